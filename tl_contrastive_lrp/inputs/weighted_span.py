"""A span whose tokens count with weights: what ``trace_back`` hands relevance on to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .spans import SpanLogit


@dataclass(frozen=True)
class WeightedSpan(SpanLogit):
    """Σ_t w_t [ logit(token written at t) − what it is held against at t ].

    Attributes:
        weights: w_t, one for each token of the span; () for 1 each.
    """

    weights: tuple[float, ...] = ()

    def terms(
        self, logits: Float[Tensor, "*batch pos vocab"]
    ) -> tuple[Float[Tensor, "batch span"], Float[Tensor, "batch span"] | None]:
        """Both terms of each of the span's tokens, weighted."""
        target, held = super().terms(logits)
        if not self.weights:
            return target, held
        w = torch.tensor(self.weights, dtype=target.dtype, device=target.device)
        return w * target, None if held is None else w * held

    def spread(self, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, " span"]:
        """The standard deviation of all logits at each of the positions that are read."""
        return self.rows(logits)[0].std(-1)

    def __str__(self) -> str:
        return f"weighted {super().__str__()}" if self.weights else super().__str__()
