"""Readings that reduce relevance inside the backward and keep only the sums.

They also see when float16 is too coarse for a model's activations: see ``warn_of_underflow``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs.bridge import hook_points, is_kind
from ..rules.precision import NOTABLE, underflow
from .reading import Reading, relevance_of


class RelevanceSums:
    """Readings that keep sums of relevance, by name, of one backward after the other."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self._kept: dict[str, Tensor] = {}
        self._zeros: dict[str, Tensor] = {}
        self._lost: dict[str, Tensor] = {}
        self._mass: dict[str, Tensor] = {}

    def add(self, name: str, reduce: Callable[[Tensor], Tensor], *, stream: bool = False) -> None:
        """Keep ``reduce(relevance)`` of a HookPoint; ``stream``: of the whole stream there."""

        def sink(x: Tensor, g: Tensor) -> None:
            relevance = relevance_of(x, g)
            self._kept[name] = reduce(relevance).cpu()
            if x.dtype == torch.float16:
                lost, mass = underflow(x, g), relevance.abs().sum().cpu()
                self._lost[name] = self._lost.get(name, torch.zeros(())) + lost
                self._mass[name] = self._mass.get(name, torch.zeros(())) + mass

        def fired(x: Tensor) -> None:
            zero = torch.zeros((), dtype=torch.float32).expand(x.shape)
            self._zeros[name] = reduce(zero)

        self.readings.append(Reading(name, sink, "tensor" if stream else "branch", fired))

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Relevance a bias takes: bias ⊙ gradient where it was added, summed."""

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            total = g.to(torch.promote_types(g.dtype, torch.float32)).flatten(0, 1).sum(0)
            self._kept[name] = (total.flatten() * bias.detach().to(total)).sum().cpu()

        self.readings.append(Reading(name, sink))

    def take(self) -> dict[str, Tensor]:
        """What the last backward brought, by name; 0 where the rules let nothing through."""
        taken = {**self._zeros, **self._kept}
        self._kept.clear()
        return taken

    def clear(self) -> None:
        """Forget the last forward and backward."""
        self._kept.clear()
        self._zeros.clear()

    def warn_of_underflow(self) -> None:
        """Warn once where float16 activations are so small that relevance may have been lost.

        The gradient is float32, so only the activation can have underflowed. What that may have
        cost at a HookPoint is compared with the relevance at the one that holds most.
        """
        if not self._lost:
            return
        worst = max(self._lost, key=lambda name: float(self._lost[name]))
        lost, mass = float(self._lost[worst]), max(map(float, self._mass.values()))
        if lost > NOTABLE * mass:
            share = f"up to {lost / mass:.0%} of the relevance" if mass else "all relevance"
            warnings.warn(
                f"Activations at {worst} are too small for float16: {share} may have been lost to "
                "underflow there. Load the model in bfloat16 or float32, or explain it inside "
                "`with clrp.in_float32(model):`.",
                stacklevel=4,
            )


def add_heads(sums: RelevanceSums, model: Any, layer: int) -> str:
    """Sum a block's relevance by head, [head, pos]; returns the name it is kept under.

    Heads are read at ``hook_z``; where TransformerLens has none or splits it into other heads than
    attention has (MLA), at pattern·v itself.
    """
    path = f"blocks.{layer}.attn"
    odd = is_kind(model.blocks[layer].attn, "MLAAttentionBridge")
    if odd or f"{path}.hook_z" not in hook_points(model):
        sums.add(f"{path}.z", lambda r: r.sum(-1)[0])
        return f"{path}.z"
    sums.add(f"{path}.hook_z", lambda r: r.sum(-1)[0].T)
    return f"{path}.hook_z"
