"""Run a model so that every state sees only what a circuit's edges let through.

Each node (site t, position j) is recomputed by the model itself from its sources' states, where
source (s, i) gives its state of this very run if the edge is kept, and its reference state (of a
corrupted prompt, or a mean over prompts) if not:

    h_t[j] = block(x)[j],    x[i] = h_s[i] if (s, i) → (t, j) is kept, else r_s[i].

That is path patching with one path an edge, all at once. Positions mix only in attention, so per
block it takes four rows of a batch, not one a target: target j's own state x[j] (residual, query,
MLP) and keys and values of both h and r, from which scores are chosen by (j, i), and likewise the
terms of pattern · value. Heads, grouped queries, norms, RoPE and soft-caps are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...hooks.attach import HookFn
from ...hooks.placement import own_hooks
from ...inputs.bridge import hook_points, public_name
from .edge_space import BlockMasks

References = dict[str, Float[Tensor, "pos d_model"]]


def sites_needed(model: Any) -> list[str]:
    """Sites of the residual stream whose reference states a run can need."""
    hook_dict, n = hook_points(model), int(model.cfg.n_layers)
    names = [f"blocks.{i}.hook_resid_{at}" for i in range(n) for at in ("pre", "mid")]
    return [name for name in names if name in hook_dict]


def reference_states(model: Any, prompts: Int[Tensor, "prompt pos"], batch_size: int) -> References:
    """The residual stream at every site and position, averaged over prompts."""
    sums: References = {}
    hooks = [
        (public_name(hook_points(model), name), _adder(sums, name)) for name in sites_needed(model)
    ]
    with torch.no_grad(), own_hooks(model, hooks):
        for piece in chunks(len(prompts), batch_size):
            model(prompts[piece.start : piece.stop])
    return {name: total / len(prompts) for name, total in sums.items()}


def _adder(sums: References, name: str) -> HookFn:
    def add(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        total = tensor.detach().sum(0)
        sums[name] = sums[name] + total if name in sums else total

    return add


def visible_positions(
    model: Any, tokens: Int[Tensor, "1 pos"]
) -> tuple[list[Bool[Tensor, "target source"]], Float[Tensor, "1 pos vocab"]]:
    """Per block, which positions each may attend to, as the model's own masks say; the logits."""
    found: dict[int, Tensor] = {}

    def reader(layer: int) -> HookFn:
        def read(scores: Tensor, hook: Any) -> None:  # noqa: ARG001
            # Masks add -inf or the type's lowest number.
            found[layer] = (scores[0] > torch.finfo(scores.dtype).min / 2).any(0).cpu()

        return read

    layers = range(int(model.cfg.n_layers))
    names = [(f"blocks.{i}.attn.hook_attn_scores", reader(i)) for i in layers]
    hooks = [(public_name(hook_points(model), name), fn) for name, fn in names]
    with torch.no_grad(), own_hooks(model, hooks):
        logits = model(tokens)
    return [found[i] for i in layers], logits


class _BlockHooks:
    """The hooks of one block. Rows: targets with clean keys, the same with the reference's, the
    run's own states (c each), and the reference (one)."""

    def __init__(self, masks: BlockMasks, before: Tensor, between: Tensor | None) -> None:
        self.masks, self.before, self.between = masks, before, between
        self.c = len(masks.position)
        self.own: Tensor

    def enter(self, h: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        h, r = h[: self.c], self.before.to(h)
        self.own = torch.where(self.masks.position[..., None], h, r)
        return torch.cat([self.own, self.own, h, r[None]])

    def project(self, x: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        h, r = x[2 * self.c : -1], x[-1:]
        return torch.cat([h, r.expand_as(h), h, r])

    def score(self, scores: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        clean, reference = scores[: self.c], scores[self.c : 2 * self.c]
        chosen = torch.where(self.masks.key, clean, reference)
        return torch.cat([chosen, scores[self.c :]])

    def weigh(self, pattern: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        chosen = pattern[: self.c]
        parts = [chosen * self.masks.value, chosen * ~self.masks.value]
        return torch.cat([*parts, pattern[2 * self.c :]])

    def add(self, z: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        return torch.cat([z[: self.c] + z[self.c : 2 * self.c], z[self.c :]])

    def leave_attention(self, out: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        assert self.masks.after is not None
        assert self.between is not None
        to_reference = self.between.to(out) - self.own
        mine = torch.where(self.masks.after[..., None], out[: self.c], to_reference)
        return torch.cat([mine, out[self.c :]])


def run_circuits(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    references: References,
    masks: Sequence[BlockMasks],
) -> Float[Tensor, "circuit pos vocab"]:
    """Logits of each circuit's run; positions after the one explained mean nothing.

    Args:
        model: The bridge.
        tokens: The clean prompt; its embeddings are every source's state at the first site.
        references: ``reference_states``.
        masks: Of every block, for the same circuits.
    """
    c = len(masks[0].position)
    hook_dict = hook_points(model)
    hooks: list[tuple[str, HookFn]] = []
    for layer, block in enumerate(masks):
        at = f"blocks.{layer}."
        block = block.to(tokens.device)
        edit = _BlockHooks(
            block, references[f"{at}hook_resid_pre"], references.get(f"{at}hook_resid_mid")
        )
        hooks += [
            (f"{at}hook_resid_pre", edit.enter),
            (f"{at}attn.k.hook_out", edit.project),
            (f"{at}attn.v.hook_out", edit.project),
            (f"{at}attn.hook_attn_scores", edit.score),
            (f"{at}attn.hook_pattern", edit.weigh),
            (f"{at}attn.hook_z", edit.add),
        ]
        if block.after is not None:
            hooks.append((f"{at}hook_attn_out", edit.leave_attention))

    def only_circuits(h: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return h[:c]

    hooks.append((f"blocks.{len(masks) - 1}.hook_resid_post", only_circuits))
    named = [(public_name(hook_dict, name), fn) for name, fn in hooks]
    with torch.no_grad(), own_hooks(model, named):
        logits: Tensor = model(tokens.expand(3 * c + 1, -1))
    return logits


def chunks(count: int, size: int) -> Iterable[range]:
    """0 to ``count`` in pieces of ``size``."""
    return (range(at, min(at + size, count)) for at in range(0, count, size))
