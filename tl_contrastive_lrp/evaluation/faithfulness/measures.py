"""Scores against a known truth, and how sure a mean is. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from torch import Tensor


def _checked(scores: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    scores, truth = scores.detach().cpu().double().flatten(), truth.detach().cpu().flatten()
    if truth.dtype != torch.bool:
        raise ValueError(f"truth is {truth.dtype}; give booleans, True for what should rank first.")
    if scores.shape != truth.shape:
        raise ValueError(f"{len(scores)} scores were given for {len(truth)} truths.")
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("A score is NaN or infinite.")
    if not bool(truth.any()) or bool(truth.all()):
        raise ValueError("truth must hold both True and False: otherwise nothing can be ranked.")
    return scores, truth


def auroc(scores: Float[Tensor, " item"], truth: Bool[Tensor, " item"]) -> float:
    """Chance that a true item scores higher than a false one; a tie counts half.

    The area under the receiver operating characteristic, by its rank-sum form (Hanley and McNeil
    1982). ½ is chance, 1 a perfect ranking. Highest scores rank first: give |relevance|.

    Raises:
        ValueError: shapes differ, truth is not boolean or all the same, a score is not finite.
    """
    scores, truth = _checked(scores, truth)
    _, inverse, count = torch.unique(scores, return_inverse=True, return_counts=True)
    below = count.cumsum(0) - count
    rank = (below + (count + 1) / 2)[inverse]  # mean rank among equals, from 1
    true, false = int(truth.sum()), int((~truth).sum())
    return float((rank[truth].sum() - true * (true + 1) / 2) / (true * false))


def average_precision(scores: Float[Tensor, " item"], truth: Bool[Tensor, " item"]) -> float:
    """Σ over thresholds of precision × the recall it adds; 1 is a perfect ranking.

    Chance is about the share of true items. Items that tie enter together.

    Raises:
        ValueError: as ``auroc``.
    """
    scores, truth = _checked(scores, truth)
    _, inverse = torch.unique(scores, return_inverse=True)
    levels = int(inverse.max()) + 1
    added = torch.zeros(levels, dtype=torch.float64).index_add_(0, inverse, truth.double()).flip(0)
    size = torch.bincount(inverse, minlength=levels).double().flip(0)
    precision = added.cumsum(0) / size.cumsum(0)
    return float((precision * added).sum() / truth.sum())


def bootstrap_interval(
    values: ArrayLike | Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over resampled cases (Efron 1979).

    Args:
        values: One number a case.
        level: Coverage aimed at.
        draws: Resamples.
        seed: Of the resampling.

    Raises:
        ValueError: no values, or some that are not finite; a level outside 0 to 1; no draws.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"An interval needs finite values, got {len(array)} with some that are not"
                         if len(array) else "An interval needs at least one value.")  # fmt: skip
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level={level} must be between 0 and 1, draws={draws} 1 or more.")
    chosen = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(array[chosen].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
