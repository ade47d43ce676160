"""How well estimated effects agree with measured ones: pure functions on two rows of numbers.

Every measure takes resamples [sample, cell] at once, so a bootstrap is a few tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

MEASURES = ("pearson", "spearman", "slope", "overlap", "same_sign")
_AT_ONCE = 2**22  # numbers of a resample held in memory at a time


@dataclass(frozen=True)
class Agreement:
    """Agreement of one group of cells, each measure with its bootstrap interval (low, high).

    A measure is nan where it is not defined (a side that does not vary, no two effects to compare).

    Attributes:
        group: "all", or the layer.
        n: Cells.
        k: How many largest |effects| of each side ``overlap`` compares.
        pearson: Linear correlation of measured and estimated effects, −1 to 1.
        spearman: The same of their ranks.
        slope: Estimate per measured effect, least squares through 0: ½ where estimates are half of
            what is measured, whatever their correlation.
        overlap: Share of the ``k`` largest measured |effects| among the ``k`` largest estimated.
        same_sign: Share of equal signs where both effects are larger than rounding.
    """

    group: str
    n: int
    k: int
    pearson: float
    spearman: float
    slope: float
    overlap: float
    same_sign: float
    pearson_interval: tuple[float, float]
    spearman_interval: tuple[float, float]
    slope_interval: tuple[float, float]
    overlap_interval: tuple[float, float]
    same_sign_interval: tuple[float, float]

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n:
            raise ValueError(f"Agreement of {self.group}: k={self.k} of {self.n} cells.")
        bounds = {"pearson": (-1, 1), "spearman": (-1, 1), "overlap": (0, 1), "same_sign": (0, 1)}
        for name in MEASURES:
            low, high = getattr(self, f"{name}_interval")
            least, most = bounds.get(name, (-math.inf, math.inf))
            for value in (getattr(self, name), low, high):
                if value < least - 1e-9 or value > most + 1e-9:
                    raise ValueError(f"Agreement of {self.group}: {name} is {value}.")
            if low > high:
                raise ValueError(f"Agreement of {self.group}: {name}_interval is {low, high}.")


def agreement(
    group: str,
    measured: Float[Tensor, " cell"],
    estimated: Float[Tensor, " cell"],
    *,
    k: int,
    draw: Callable[[int, int], tuple[Tensor, Tensor]],
    n_resamples: int,
    confidence: float,
) -> Agreement:
    """Measures of two rows of effects, and their percentile bootstrap intervals.

    Args:
        group: Its name.
        measured, estimated: Effects in float64; those within rounding of 0 set to 0.
        k: For ``overlap``.
        draw: (start, count) → that many resamples of both rows, [sample, cell].
        n_resamples: How many in all.
        confidence: Of the intervals.
    """
    values = _measures(measured[None], estimated[None], k)
    at_once = max(1, _AT_ONCE // max(1, measured.numel()))
    parts = [
        _measures(*draw(start, min(at_once, n_resamples - start)), k)
        for start in range(0, n_resamples, at_once)
    ]
    tail = (1.0 - confidence) / 2.0
    quantiles = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    found: dict[str, Any] = {}
    for name in MEASURES:
        found[name] = float(values[name])
        drawn = torch.cat([part[name] for part in parts])
        low, high = torch.nanquantile(drawn, quantiles).tolist()
        found[f"{name}_interval"] = (low, high)
    return Agreement(group, measured.numel(), k, **found)


def _measures(
    x: Float[Tensor, "sample cell"], y: Float[Tensor, "sample cell"], k: int
) -> dict[str, Float[Tensor, " sample"]]:
    both = (x != 0) & (y != 0)
    shared = (_largest(x, k) & _largest(y, k)).sum(-1).double() / k
    none = (x == 0).all(-1) | (y == 0).all(-1)  # then nothing is the largest
    return {
        "pearson": pearson(x, y),
        "spearman": pearson(ranks(x), ranks(y)),
        "slope": (x * y).sum(-1) / x.square().sum(-1),
        "overlap": torch.where(none, torch.nan, shared),
        "same_sign": (both & (x.sign() == y.sign())).sum(-1).double() / both.sum(-1),
    }


def pearson(
    x: Float[Tensor, "sample cell"], y: Float[Tensor, "sample cell"]
) -> Float[Tensor, " sample"]:
    """Linear correlation of each pair of rows; nan where a row does not vary."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    spread = x.norm(dim=-1) * y.norm(dim=-1)
    r = (x * y).sum(-1) / spread
    flat = spread <= torch.finfo(x.dtype).tiny
    return torch.where(flat, torch.nan, r).clamp(-1.0, 1.0)


def ranks(x: Float[Tensor, "sample cell"]) -> Float[Tensor, "sample cell"]:
    """Rank of every entry in its row, from 1; equal entries share the mean of their ranks."""
    x = x.contiguous()
    ordered = x.sort(-1).values
    below = torch.searchsorted(ordered, x)
    up_to = torch.searchsorted(ordered, x, right=True)
    return (below + up_to + 1).to(x.dtype) / 2.0


def _largest(x: Float[Tensor, "sample cell"], k: int) -> Tensor:
    """Which entries are the k largest in size of their row (the earlier ones among equals)."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)
