"""The largest of many values, with ties decided by position: numbers only, no markup.

Pictures, pruning and metrics all select "the k largest" with these functions, so that they agree on
ties: among equal values the first is selected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def largest_mask(values: NDArray[Any], count: int) -> NDArray[np.bool_]:
    """Mark the ``count`` largest values; among equal ones the first.

    Takes linear time (one partition), so millions of values take a fraction of a second.

    Args:
        values: One-dimensional, without NaN.
        count: How many to mark; 0 or less marks none.
    """
    if count >= len(values):
        return np.ones(len(values), dtype=bool)
    if count <= 0:
        return np.zeros(len(values), dtype=bool)
    cut = len(values) - count
    smallest = np.partition(values, cut)[cut]
    mask: NDArray[np.bool_] = values > smallest
    ties = np.flatnonzero(values == smallest)
    mask[ties[: count - np.count_nonzero(mask)]] = True
    return mask


def largest_ascending(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, smallest first; equal ones in their order."""
    indices = np.flatnonzero(largest_mask(values, count))
    return indices[np.argsort(values[indices], kind="stable")]


def largest_first(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, largest first; equal ones in their order."""
    return np.argsort(-values, kind="stable")[:count]


def extremes(values: NDArray[np.float64], count: int) -> tuple[list[int], list[int]]:
    """Indices of the most positive and of the most negative values, at most ``count`` each.

    Args:
        values: One-dimensional; zeros are in neither list, so set what is not eligible to 0.
        count: Length of each list at most.
    """
    order = np.argsort(-values, kind="stable")
    return (
        [i for i in order[:count].tolist() if values[i] > 0],
        [i for i in order[::-1][:count].tolist() if values[i] < 0],
    )
