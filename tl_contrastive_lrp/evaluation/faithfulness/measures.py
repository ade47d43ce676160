"""Comparison of scores with a known truth, and intervals for a mean. Pure functions of numbers."""

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


def auroc(scores: Float[Tensor, "*item"], truth: Bool[Tensor, "*item"]) -> float:
    """Return the probability that a true item scores higher than a false one.

    This is the area under the receiver operating characteristic, computed in its rank-sum form
    (Hanley and McNeil 1982), where a tie counts half. ½ is chance level, 1 a perfect ranking. The
    highest scores rank first, so give |relevance|.

    Args:
        scores: One score per item, in any unit.
        truth: Which items should rank first.

    Raises:
        ValueError: The shapes differ, the truth is not boolean or is the same for all items, or a
            score is not finite.

    Example:
        >>> scores, truth = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([True, False, False])
        >>> clrp.faithfulness.auroc(scores, truth)
        1.0
    """
    scores, truth = _checked(scores, truth)
    _, inverse, count = torch.unique(scores, return_inverse=True, return_counts=True)
    n_below = count.cumsum(0) - count
    rank = (n_below + (count + 1) / 2)[inverse]  # from 1; the mean rank among equals
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    return float((rank[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def average_precision(scores: Float[Tensor, "*item"], truth: Bool[Tensor, "*item"]) -> float:
    """Return the sum over thresholds of precision times the gain in recall.

    1 is a perfect ranking, and chance level is about the share of true items. Tied items share a
    threshold.

    Args:
        scores: One score per item, in any unit. The highest rank first.
        truth: Which items should rank first.

    Raises:
        ValueError: As for ``auroc``.

    Example:
        >>> scores, truth = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([False, True, False])
        >>> clrp.faithfulness.average_precision(scores, truth)
        0.5
    """
    scores, truth = _checked(scores, truth)
    _, inverse = torch.unique(scores, return_inverse=True)
    levels = int(inverse.max()) + 1
    n_true = torch.zeros(levels, dtype=torch.float64).index_add_(0, inverse, truth.double()).flip(0)
    n_items = torch.bincount(inverse, minlength=levels).double().flip(0)
    precision = n_true.cumsum(0) / n_items.cumsum(0)
    return float((precision * n_true).sum() / truth.sum())


def bootstrap_interval(
    values: ArrayLike | Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over cases (Efron 1979).

    Args:
        values: One number per case.
        level: The coverage to aim for, between 0 and 1.
        draws: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The lower and the upper bound, in the unit of the values.

    Raises:
        ValueError: There are no values, some are not finite, the level is not between 0 and 1, or
            ``draws`` is below 1.

    Example:
        >>> low, high = clrp.faithfulness.bootstrap_interval([0.0, 1.0, 2.0, 3.0])
        >>> low < 1.5 < high
        True
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or not np.isfinite(array).all():
        raise ValueError(f"An interval needs finite values, got {len(array)} with some that are not"
                         if len(array) else "An interval needs at least one value.")  # fmt: skip
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"level={level} must be between 0 and 1, draws={draws} 1 or more.")
    indices = np.random.default_rng(seed).integers(0, len(array), (draws, len(array)))
    low, high = np.quantile(array[indices].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
