"""How well estimated effects agree with measured ones: pure functions of two rows of numbers.

Every measure takes many resamples at once, [sample, cell], so a bootstrap is a few tensor
operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

MEASURES = ("pearson", "spearman", "slope", "overlap", "same_sign")
_MAX_NUMBERS = 2**22  # of resamples held in memory at a time


@dataclass(frozen=True)
class Agreement:
    """Agreement of one group of cells; each measure has a bootstrap interval (low, high).

    A measure is NaN where it is undefined: a side does not vary, or no two effects can be compared.

    Attributes:
        group: "all", or the layer.
        n: Number of cells.
        k: How many of the largest |effects| of each side ``overlap`` compares.
        pearson: Linear correlation of measured and estimated effects, from −1 to 1.
        spearman: The same correlation of their ranks.
        slope: Least-squares slope through 0 of the estimated over the measured effects. It is ½
            where estimates are half of what is measured, whatever their correlation.
        overlap: Share of the ``k`` largest measured |effects| among the ``k`` largest estimated.
        same_sign: Share of equal signs among cells where both effects exceed rounding.
        pearson_interval: Bootstrap interval of ``pearson``.
        spearman_interval: Bootstrap interval of ``spearman``.
        slope_interval: Bootstrap interval of ``slope``.
        overlap_interval: Bootstrap interval of ``overlap``.
        same_sign_interval: Bootstrap interval of ``same_sign``.

    Example:
        >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
        >>> overall = clrp.compare(measured, 0.5 * measured, baseline=0.0).overall
        >>> overall.group, overall.n, round(overall.slope, 3)
        ('all', 4, 0.5)
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
    """Return the measures of two rows of effects, with percentile bootstrap intervals.

    Args:
        group: Name of the group.
        measured: Measured effects in float64; those within rounding of 0 are set to 0.
        estimated: Estimated effects, likewise.
        k: How many of the largest |effects| ``overlap`` compares.
        draw: Maps (start, count) to ``count`` resamples of both rows, [sample, cell].
        n_resamples: Number of resamples in all.
        confidence: Confidence level of the intervals.
    """
    values = _measures(measured[None], estimated[None], k)
    batch_size = max(1, _MAX_NUMBERS // max(1, measured.numel()))
    parts = [
        _measures(*draw(start, min(batch_size, n_resamples - start)), k)
        for start in range(0, n_resamples, batch_size)
    ]
    tail = (1.0 - confidence) / 2.0
    quantiles = torch.tensor([tail, 1.0 - tail], dtype=torch.float64)
    fields: dict[str, Any] = {}
    for name in MEASURES:
        fields[name] = float(values[name])
        resampled = torch.cat([part[name] for part in parts])
        low, high = torch.nanquantile(resampled, quantiles).tolist()
        fields[f"{name}_interval"] = (low, high)
    return Agreement(group, measured.numel(), k, **fields)


def _measures(
    x: Float[Tensor, "sample cell"], y: Float[Tensor, "sample cell"], k: int
) -> dict[str, Float[Tensor, " sample"]]:
    both = (x != 0) & (y != 0)
    overlap = (_largest(x, k) & _largest(y, k)).sum(-1).double() / k
    undefined = (x == 0).all(-1) | (y == 0).all(-1)  # no effect is the largest
    return {
        "pearson": pearson(x, y),
        "spearman": pearson(ranks(x), ranks(y)),
        "slope": (x * y).sum(-1) / x.square().sum(-1),
        "overlap": torch.where(undefined, torch.nan, overlap),
        "same_sign": (both & (x.sign() == y.sign())).sum(-1).double() / both.sum(-1),
    }


def pearson(
    x: Float[Tensor, "sample cell"], y: Float[Tensor, "sample cell"]
) -> Float[Tensor, " sample"]:
    """Return the linear correlation of each pair of rows, NaN where a row does not vary."""
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    r = (x * y).sum(-1) / norms
    constant = norms <= torch.finfo(x.dtype).tiny
    return torch.where(constant, torch.nan, r).clamp(-1.0, 1.0)


def ranks(x: Float[Tensor, "sample cell"]) -> Float[Tensor, "sample cell"]:
    """Return each entry's rank in its row, from 1; equal entries share their mean rank."""
    x = x.contiguous()
    ordered = x.sort(-1).values
    n_below = torch.searchsorted(ordered, x)
    n_up_to = torch.searchsorted(ordered, x, right=True)
    return (n_below + n_up_to + 1).to(x.dtype) / 2.0


def _largest(x: Float[Tensor, "sample cell"], k: int) -> Bool[Tensor, "sample cell"]:
    """Mark the k largest |entries| of each row, the earlier ones among equals."""
    order = x.abs().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, order, True)
