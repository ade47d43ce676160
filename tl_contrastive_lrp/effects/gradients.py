"""The plain gradient of Δℓ at every head's z, from one forward and a backward for each objective.

It is no rule set: nothing is halved or held constant. Attention is fused where that is faster and
nobody needs the pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..engine.fused import AttentionKind, without_rules
from ..engine.plain import check_value
from ..hooks.placement import embedding_leaves, reading_hooks
from ..rules.query_tiles import Attend, Attention, attend
from ..rules.threads import frozen_parameters
from .passes import logits_at
from .streams import AttentionWatch, Operands, by_head, refused, watched


class _ZWatch(AttentionWatch):
    """Hands on the z that a component computes from its pattern, and lets everything else pass."""

    def __init__(self, path: str, sink: Callable[[str, Tensor], None]) -> None:
        super().__init__(path, 1)
        self.sink = sink

    def times_values(self, operands: Operands) -> Tensor:
        """Pattern times values, handed on."""
        z = super().times_values(operands)
        self.sink(self.path, z)
        return z


def gradients_at_z(
    model: Any,
    parts: dict[str, Any],
    tokens: Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    read: tuple[int, ...],
    attention: AttentionKind,
) -> dict[str, Float[Tensor, "objective head pos d_v"]]:
    """The gradient of each objective at z, by path of the attention component.

    Args:
        model: The bridge.
        parts: Its attention components by path.
        tokens: The prompt, [1, pos].
        objectives: Functions of the logits of the positions that are read, [1, read, vocab].
        read: Those positions, rising.
        attention: Whether attention is fused.

    Raises:
        UncoveredComponentError: a component that computes z in an unknown way.
        ModelStateError: an objective that gives no differentiable number.
    """
    found: dict[str, list[Tensor]] = {path: [] for path in parts}

    def keep(path: str, z: Tensor) -> None:
        found[path].append(z)

    def kept(path: str) -> Attend:
        def attended(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
            z = attend(q, k, v, attention)
            keep(path, z)
            return z

        return attended

    fused = without_rules(model, attention, tokens.shape[1])
    starts = embedding_leaves(model, {})
    with (
        frozen_parameters(model),
        reading_hooks(model, starts),
        watched(parts, {path: _ZWatch(path, keep) for path in parts}),
        nullcontext() if fused is None else fused.active(attend=kept),
    ):
        logits = logits_at(model, tokens, read)
    for path, zs in found.items():
        if len(zs) != 1:
            raise refused(path, f"it computes pattern·v {len(zs)} times, not once.")
    zs = [found[path][0] for path in parts]
    of_objectives: list[tuple[Tensor | None, ...]] = []
    for which, objective in enumerate(objectives):
        value = objective(logits)
        check_value(value, [logits])
        more = which + 1 < len(objectives)
        of_objectives.append(torch.autograd.grad(value, zs, retain_graph=more, allow_unused=True))
    return {
        path: torch.stack([_filled(found[path][0], g[n]) for g in of_objectives])
        for n, path in enumerate(parts)
    }


def _filled(z: Tensor, g: Tensor | None) -> Float[Tensor, "head pos d_v"]:
    g = torch.zeros_like(z) if g is None else g.detach()
    return by_head(g, 1)[0]
