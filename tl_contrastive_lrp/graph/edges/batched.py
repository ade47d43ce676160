"""Edges between any two sites of the residual stream: one shared forward, many backward signals.

Across several blocks there is no closed form. As in arXiv:2604.17761, Appendix A, the gradient at
the target site is split by position and each piece is sent back alone:

    A[j, i] = Σ_d h_s[i, d] · ∂⟨g_t[j], h_t[j]⟩ / ∂h_s[i, d]

Here all pieces go back over one recorded forward, many of them in one vectorised backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...engine.memory import free_bytes
from ...errors import is_out_of_memory
from ...hooks.attach import HookFn
from ...hooks.context import plan
from ...hooks.hook_rules import rules_in_hooks
from ...hooks.placement import attached, check_ready, check_single, embedding_leaves, reading_hooks
from ...hooks.user_hooks import restarted, user_hooks
from ...rules.functions import at_least_float32, started, writable
from ...rules.precision import first_gradient, is_low, plain
from ...rules.rule_sets import RuleSet
from ...rules.threads import frozen_parameters

_SHARE_OF_FREE_MEMORY = 0.5
# On a CPU more signals at once are no faster (measured: 1 to 64), and cost memory.
_MOST_SIGNALS = 16


def chunk_size(model: Any, pos: int, device: torch.device) -> int:
    """How many backward signals fit into memory at once.

    Each needs about as much as one backward allocates.
    """
    if is_low(model):
        return 1  # a vectorised backward rounds where it slices (RoPE)
    cfg = model.cfg
    width = max(int(cfg.d_mlp or 4 * cfg.d_model), int(cfg.d_model)) * 4
    bytes_per_signal = 4 * pos * (width + 3 * int(cfg.n_heads) * pos)
    return max(
        1, min(_MOST_SIGNALS, int(_SHARE_OF_FREE_MEMORY * free_bytes(device)) // bytes_per_signal)
    )


@contextmanager
def _recorded(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: RuleSet,
    names: Sequence[str],
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """One forward under the rules whose autograd graph is kept.

    Yields the tensors at the named sites, and their gradients, both [1, pos, d_model].
    """
    check_ready(model, "attribution_graph")
    check_single(model)
    attachments, _ = plan(model, rule_set)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            seen[name] = tensor
            return None if (ahead := started(tensor)) is tensor else ahead

        return hook_fn

    starts = embedding_leaves(model, {})
    keeps = [(name, keep(name)) for name in names]
    hooks = user_hooks(model)
    with frozen_parameters(model):
        with (
            rules_in_hooks(model, rule_set, hooks=hooks),
            writable(any(hook.is_forward for hook in hooks)),
            restarted(hooks),
            reading_hooks(model, [*starts, *keeps]),
            attached(model, attachments),
        ):
            value = objective(model(tokens))
        first, ends = first_gradient(model, value), [seen[n] for n in names]
        gradients = torch.autograd.grad(
            value, ends, first, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        yield seen, dict(zip(names, gradients, strict=True))


def edge_by_dimension(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    objective: Callable[[Tensor], Tensor],
    rule_set: RuleSet,
    source: tuple[str, int],
    target: tuple[str, int],
) -> Float[Tensor, " d_model"]:
    """One edge as a sum over the hidden dimensions of its source, from one backward signal.

    Args:
        model: The bridge.
        tokens: The prompt's token ids.
        objective: The objective, a function of the logits.
        rule_set: The rules.
        source: The source node: (residual-stream HookPoint, position).
        target: The target node.

    Returns:
        What each dimension contributes to the edge's weight, in logits, on the CPU.

    Raises:
        ModelStateError: As for ``lrp``.
        UncoveredComponentError: As for ``lrp``.
    """
    names = [source[0], target[0]]
    with _recorded(model, tokens, objective, rule_set, names) as (seen, at):
        signal = torch.zeros_like(at[target[0]])
        signal[0, target[1]] = at[target[0]][0, target[1]]
        (back,) = torch.autograd.grad(
            seen[target[0]], seen[source[0]], signal, allow_unused=True, materialize_grads=True
        )
        h, g = seen[source[0]].detach()[0, source[1]], plain(back)[0, source[1]]
    return (at_least_float32(h) * at_least_float32(g)).cpu()


def batched_edges(
    model: Any,
    tokens: Int[Tensor, "1 pos"],
    objective: Callable[[Tensor], Tensor],
    rule_set: RuleSet,
    transitions: Sequence[tuple[str, str]],
    *,
    node_threshold: float = 0.0,
    progress: bool = True,
) -> dict[tuple[str, str], Float[Tensor, "target source"]]:
    """The edges of every transition, by batches of backward signals.

    Args:
        model: The bridge.
        tokens: The prompt's token ids.
        objective: The objective, a function of the logits.
        rule_set: The rules.
        transitions: Pairs (source, target) of residual-stream HookPoint names, source upstream.
        node_threshold: Targets with |relevance| at or below it (logits) are not expanded; their
            rows are 0.
        progress: Whether to show a progress bar over the signals on stderr.

    Returns:
        The weights of each transition in logits, on the CPU.

    Raises:
        ModelStateError: As for ``lrp``.
        UncoveredComponentError: As for ``lrp``.
    """
    if not transitions:
        return {}
    from tqdm.auto import tqdm  # here: in a notebook without widgets its import warns

    names = list(dict.fromkeys(name for pair in transitions for name in pair))
    with _recorded(model, tokens, objective, rule_set, names) as (seen, at):
        result = {}
        rows = {pair: _expanded(seen[pair[1]], at[pair[1]], node_threshold) for pair in transitions}
        bar = tqdm(
            total=sum(len(r) for r in rows.values()),
            desc="edges",
            disable=not progress,
            leave=False,
        )
        with bar:
            for source, target in transitions:
                result[source, target] = _transition(
                    seen[source], seen[target], at[target], rows[source, target],
                    chunk_size(model, tokens.shape[1], tokens.device), bar,
                )  # fmt: skip
    return result


def _expanded(h: Tensor, g: Tensor, threshold: float) -> Int[Tensor, " row"]:
    """The target positions whose |relevance| is above a threshold; all of them if it is 0."""
    relevance = (at_least_float32(h.detach()) * at_least_float32(plain(g))).sum(-1)[0]
    return (relevance.abs() > threshold).nonzero()[:, 0] if threshold else torch.arange(
        relevance.shape[0], device=h.device
    )  # fmt: skip


def _transition(
    source: Tensor, target: Tensor, g: Tensor, rows: Tensor, chunk: int, bar: Any
) -> Float[Tensor, "target source"]:
    """The edges of one transition, ``chunk`` target positions at a time.

    Args:
        source: The recorded source site, [1, pos, d_model].
        target: The recorded target site, [1, pos, d_model].
        g: The gradient at the target site.
        rows: The target positions to expand.
        chunk: How many signals to send back at once; halved where memory does not suffice.
        bar: A progress bar, or None.
    """
    pos = target.shape[1]
    h = at_least_float32(source.detach())[0]
    edges = h.new_zeros(pos, pos)
    done = 0
    while done < len(rows):
        part = rows[done : done + chunk]
        signals = g.new_zeros(len(part), *g.shape)
        signals[torch.arange(len(part)), 0, part] = g[0, part]
        try:
            if len(part) == 1:
                (back,) = torch.autograd.grad(
                    target, source, signals[0], retain_graph=True,
                    allow_unused=True, materialize_grads=True,
                )  # fmt: skip
                back = plain(back)[None]
            else:
                (back,) = torch.autograd.grad(
                    target,
                    source,
                    signals,
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
        except (RuntimeError, MemoryError) as error:
            if chunk == 1 or not is_out_of_memory(error):
                raise
            chunk = max(1, chunk // 2)
            continue
        edges[part.to(edges.device)] = (at_least_float32(back[:, 0]) * h).sum(-1)
        done += len(part)
        if bar is not None:
            bar.update(len(part))
    return edges.cpu()
