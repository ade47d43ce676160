"""Bootstrap intervals: how much a number over cases would vary with other cases.

Cases are drawn with replacement. Means have bias-corrected and accelerated (BCa)
intervals (Efron 1987), whose coverage is closer to what they say than that of percentiles where a
distribution is skewed, as Δℓ and token counts are. All resamples are one array operation, and the
seed makes every interval repeatable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 2000
_NORMAL = NormalDist()
_MAX_NUMBERS = 2**22  # of resamples held in memory at a time

# A function of [..., case] that takes the last axis away.
Statistic = Callable[["NDArray[Any]"], "NDArray[np.float64]"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: The statistic of the cases; None where it is undefined.
        low: Lower end; None with fewer than two cases, or where it is undefined.
        high: Upper end.
        n: Number of cases.

    Example:
        >>> clrp.study.Interval(0.5, 0.2, 0.8, 10).high
        0.8
    """

    estimate: float | None
    low: float | None
    high: float | None
    n: int


def mean(values: NDArray[Any]) -> NDArray[np.float64]:
    """The mean over the last axis."""
    result: NDArray[np.float64] = np.asarray(values, dtype=np.float64).mean(axis=-1)
    return result


def bootstrap(
    values: Sequence[Any] | NDArray[Any],
    statistic: Statistic = mean,
    *,
    method: Literal["bca", "percentile"] = "bca",
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A bootstrap interval of a statistic of cases.

    Args:
        values: One value a case, or [part, case] for statistics of several values a case.
        statistic: A function of values [..., case], or [..., part, case], that takes cases away.
        method: "bca", or "percentile" for statistics without a useful jackknife.
        level: The share of resamples inside.
        resamples: How many.
        seed: Seed of the resampling.

    Returns:
        The estimate and its interval. Resamples in which the statistic is undefined (NaN) do not
        count; if more than half are, there is no interval.

    Raises:
        ValueError: A value is not finite, or ``level``, ``method`` or ``resamples`` is out of
            range.

    Example:
        >>> from tl_contrastive_lrp.study.bootstrap import bootstrap
        >>> found = bootstrap([1.0, 2.0, 3.0, 6.0])
        >>> found.estimate, found.low < 3.0 < found.high
        (3.0, True)
    """
    data = np.asarray(values, dtype=np.float64)
    if not np.isfinite(data).all():
        raise ValueError("values hold NaN or infinite numbers; there is no interval for them")
    if not 0 < level < 1 or resamples < 1 or method not in ("bca", "percentile"):
        raise ValueError(
            f"level {level} must lie in (0, 1), resamples {resamples} be 1 or more, and method "
            f"{method!r} be 'bca' or 'percentile'"
        )
    n = data.shape[-1]
    if n == 0:
        return Interval(None, None, None, 0)
    estimate = float(statistic(data))
    if n < 2 or not math.isfinite(estimate):
        return Interval(estimate if math.isfinite(estimate) else None, None, None, n)
    drawn = _resampled(data, statistic, resamples, seed)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) * 2 < resamples:
        return Interval(estimate, None, None, n)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca(data, statistic, estimate, drawn, tails)
    low, high = np.quantile(drawn, tails)
    return Interval(estimate, float(low), float(high), n)


def _resampled(
    data: NDArray[np.float64], statistic: Statistic, resamples: int, seed: int
) -> NDArray[np.float64]:
    generator = np.random.default_rng(seed)
    n = data.shape[-1]
    at_once = max(1, _MAX_NUMBERS // data.size)
    parts = []
    for start in range(0, resamples, at_once):
        index = generator.integers(0, n, (min(at_once, resamples - start), n))
        # [part, resample, case] to [resample, part, case]; one value a case stays [resample, case].
        parts.append(statistic(np.moveaxis(data[..., index], -2, 0)))
    return np.concatenate(parts)


def _bca(
    data: NDArray[np.float64],
    statistic: Statistic,
    estimate: float,
    drawn: NDArray[np.float64],
    tails: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The quantiles to take instead of ``tails``: shifted by bias and by acceleration."""
    below = (np.sum(drawn < estimate) + 0.5 * np.sum(drawn == estimate)) / len(drawn)
    if not 0 < below < 1:
        return tails  # all resamples on one side: nothing to correct with
    bias = _NORMAL.inv_cdf(float(below))
    n = data.shape[-1]
    left_out = np.array([float(statistic(np.delete(data, i, axis=-1))) for i in range(n)])
    deviation = left_out[np.isfinite(left_out)]
    deviation = deviation.mean() - deviation if len(deviation) else np.zeros(1)
    spread = float((deviation**2).sum())
    acceleration = float((deviation**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    z = np.array([_NORMAL.inv_cdf(float(tail)) for tail in tails]) + bias
    shifted = bias + z / (1 - acceleration * z)
    return np.array([_NORMAL.cdf(float(value)) for value in shifted])


def share(count: int, of: int, *, level: float = 0.95, seed: int = 0) -> Interval:
    """The interval of a share of cases.

    It is the percentile bootstrap's, whose resamples are binomial. Where none or all of the cases
    count, every resample is the same and the bootstrap has no width; there it is Wilson's (1927).

    Args:
        count: How many cases count.
        of: Among how many.
        level: The share of resamples inside.
        seed: Seed of the resampling.

    Returns:
        The share and its interval.

    Raises:
        ValueError: ``count`` does not lie in 0 to ``of``.
    """
    if not 0 <= count <= of:
        raise ValueError(f"{count} of {of} is no share")
    if of == 0:
        return Interval(None, None, None, 0)
    p = count / of
    if 0 < count < of:
        drawn = np.random.default_rng(seed).binomial(of, p, RESAMPLES) / of
        low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        return Interval(p, float(low), float(high), of)
    z2 = _NORMAL.inv_cdf((1 + level) / 2) ** 2
    edge = z2 / (of + z2)
    return Interval(p, 0.0, edge, of) if count == 0 else Interval(p, 1 - edge, 1.0, of)
