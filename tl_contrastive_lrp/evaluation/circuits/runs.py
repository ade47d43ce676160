"""Run a model in which every state depends on others only through a circuit's edges.

The model itself recomputes each node (site t, position j) from the states of its sources. A source
(s, i) contributes its state in this very run if the edge is kept, and its reference state (of a
corrupted prompt, or the mean over prompts) if it is not:

    h_t[j] = block(x)[j],    x[i] = h_s[i] if (s, i) → (t, j) is kept, else r_s[i].

This is path patching with one path per edge, for all edges at once. Positions mix only in
attention, so each block needs about three rows of a batch per circuit, not one per target: the
target's own state x[j] (for the residual stream, query and MLP), and the keys and values of both h
and r, from which scores are chosen by (j, i), and likewise the terms of pattern · value. Heads,
grouped queries, norms, RoPE and soft-caps remain the model's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...hooks.attach import HookFn
from ...hooks.placement import own_hooks
from ...inputs.bridge import hook_points, public_name
from .edge_space import BlockMasks

References = dict[str, Float[Tensor, "pos d_model"]]


def _reference_sites(model: Any) -> list[str]:
    """Return the residual-stream sites whose reference states a run may need."""
    hook_dict, n_layers = hook_points(model), int(model.cfg.n_layers)
    names = [f"blocks.{i}.hook_resid_{place}" for i in range(n_layers) for place in ("pre", "mid")]
    return [name for name in names if name in hook_dict]


def reference_states(model: Any, prompts: Int[Tensor, "prompt pos"], batch_size: int) -> References:
    """Return the residual stream at every site and position, averaged over prompts."""
    sums: References = {}
    names = _reference_sites(model)
    hooks = [(public_name(hook_points(model), name), _sum_into(sums, name)) for name in names]
    with torch.no_grad(), own_hooks(model, hooks):
        for chunk in chunks(len(prompts), batch_size):
            model(prompts[chunk.start : chunk.stop])
    return {name: total / len(prompts) for name, total in sums.items()}


def _sum_into(sums: References, name: str) -> HookFn:
    def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        total = reduce(tensor.detach(), "prompt pos d_model -> pos d_model", "sum")
        sums[name] = sums[name] + total if name in sums else total

    return hook_fn


def visible_positions(
    model: Any, tokens: Int[Tensor, "1 pos"]
) -> tuple[list[Bool[Tensor, "target source"]], Float[Tensor, "1 pos vocab"]]:
    """Return which positions each target may attend to in each block, and the logits.

    Visibility is read from the scores, after the model's own masks.
    """
    visible: dict[int, Tensor] = {}

    def reader(layer: int) -> HookFn:
        def hook_fn(scores: Tensor, hook: Any) -> None:  # noqa: ARG001
            # Masks add -inf or the dtype's lowest number.
            visible[layer] = (scores[0] > torch.finfo(scores.dtype).min / 2).any(0).cpu()

        return hook_fn

    layers = range(int(model.cfg.n_layers))
    names = [(f"blocks.{i}.attn.hook_attn_scores", reader(i)) for i in layers]
    hooks = [(public_name(hook_points(model), name), fn) for name, fn in names]
    with torch.no_grad(), own_hooks(model, hooks):
        logits = model(tokens)
    return [visible[i] for i in layers], logits


class _BlockHooks:
    """The hooks of one block, for c circuits at once.

    The batch has 3c + 1 rows: the targets with keys and values of this run (c rows), the targets
    with those of the reference (c rows), the states of this run (c rows), the reference (one row).

    Args:
        masks: The parts of the block that the circuits keep.
        before: Reference states at the block's input, [pos, d_model].
        between: Reference states between attention and MLP, where the graph has a site there.
    """

    def __init__(self, masks: BlockMasks, before: Tensor, between: Tensor | None) -> None:
        self.masks, self.before, self.between = masks, before, between
        self.c = len(masks.position)
        self.own: Tensor

    def at_input(self, h: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        h, r = h[: self.c], self.before.to(h)
        self.own = torch.where(self.masks.position[..., None], h, r)
        return torch.cat([self.own, self.own, h, r[None]])

    def at_keys_or_values(self, x: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        h, r = x[2 * self.c : -1], x[-1:]
        return torch.cat([h, r.expand_as(h), h, r])

    def at_scores(self, scores: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        clean, reference = scores[: self.c], scores[self.c : 2 * self.c]
        mixed = torch.where(self.masks.key, clean, reference)
        return torch.cat([mixed, scores[self.c :]])

    def at_pattern(self, pattern: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        mixed = pattern[: self.c]
        parts = [mixed * self.masks.value, mixed * ~self.masks.value]
        return torch.cat([*parts, pattern[2 * self.c :]])

    def at_z(self, z: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        return torch.cat([z[: self.c] + z[self.c : 2 * self.c], z[self.c :]])

    def at_attention_output(self, out: Tensor, hook: Any) -> Tensor:  # noqa: ARG002
        assert self.masks.after is not None
        assert self.between is not None
        to_reference = self.between.to(out) - self.own
        mixed = torch.where(self.masks.after[..., None], out[: self.c], to_reference)
        return torch.cat([mixed, out[self.c :]])


def run_circuits(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    references: References,
    masks: Sequence[BlockMasks],
) -> Float[Tensor, "circuit pos vocab"]:
    """Run several circuits in one batch.

    Args:
        model: The bridge.
        tokens: The clean prompt. Its embeddings are the sources' states at the first site.
        references: The result of ``reference_states``.
        masks: The parts that the circuits keep, for each block.

    Returns:
        The logits of each circuit. Those at positions that the graph does not explain are
        meaningless.
    """
    c = len(masks[0].position)
    hook_dict = hook_points(model)
    hooks: list[tuple[str, HookFn]] = []
    for layer, block_masks in enumerate(masks):
        block = f"blocks.{layer}."
        block_masks = block_masks.to(tokens.device)
        edit = _BlockHooks(
            block_masks,
            references[f"{block}hook_resid_pre"],
            references.get(f"{block}hook_resid_mid"),
        )
        hooks += [
            (f"{block}hook_resid_pre", edit.at_input),
            (f"{block}attn.k.hook_out", edit.at_keys_or_values),
            (f"{block}attn.v.hook_out", edit.at_keys_or_values),
            (f"{block}attn.hook_attn_scores", edit.at_scores),
            (f"{block}attn.hook_pattern", edit.at_pattern),
            (f"{block}attn.hook_z", edit.at_z),
        ]
        if block_masks.after is not None:
            hooks.append((f"{block}hook_attn_out", edit.at_attention_output))

    def only_circuits(h: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return h[:c]

    hooks.append((f"blocks.{len(masks) - 1}.hook_resid_post", only_circuits))
    named = [(public_name(hook_dict, name), fn) for name, fn in hooks]
    with torch.no_grad(), own_hooks(model, named):
        logits: Tensor = model(tokens.expand(3 * c + 1, -1))
    return logits


def chunks(count: int, size: int) -> Iterable[range]:
    """Split the numbers from 0 to ``count`` into ranges of at most ``size``."""
    return (range(start, min(start + size, count)) for start in range(0, count, size))
