"""Readings that reduce relevance inside the backward and keep only the sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .backward import Reading, relevance_of


class Sums:
    """Readings that keep sums of relevance, by name."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.kept: dict[str, Tensor] = {}

    def add(self, name: str, reduce: Callable[[Tensor], Tensor], *, stream: bool = False) -> None:
        """Keep ``reduce(relevance)`` of a HookPoint; ``stream``: of the whole stream there."""

        def sink(x: Tensor, g: Tensor) -> None:
            self.kept[name] = reduce(relevance_of(x, g)).cpu()

        def fired(x: Tensor) -> None:
            zero = torch.zeros((), dtype=torch.float32).expand(x.shape)
            self.kept[name] = reduce(zero)

        self.readings.append(Reading(name, sink, "tensor" if stream else "branch", fired))

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Relevance a bias takes: bias ⊙ gradient where it was added, summed."""

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            total = g.to(torch.promote_types(g.dtype, torch.float32)).flatten(0, 1).sum(0)
            self.kept[name] = (total.flatten() * bias.detach().to(total)).sum().cpu()

        self.readings.append(Reading(name, sink))
