"""The largest of many values: which they are, and how few of them hold a share of the sum."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


def largest(size: Float[Tensor, " item"], count: int) -> Bool[Tensor, " item"]:
    """Which are the ``count`` largest values; among equal ones the first.

    Linear in time but for one partition, so millions of entries take a fraction of a second.
    """
    if count >= len(size):
        return torch.ones(len(size), dtype=torch.bool)
    if count <= 0:
        return torch.zeros(len(size), dtype=torch.bool)
    at = len(size) - count
    smallest = float(np.partition(size.numpy(), at)[at])
    mask = size > smallest
    equal = torch.nonzero(size == smallest)[:, 0]
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def fewest(size: Float[Tensor, " item"], share: float, total: float | None = None) -> int:
    """How few of the largest values, none negative, hold ``share`` (0 to 1) of their sum.

    The smallest m with Σ_{i ≤ m} x_(i) ≥ share · Σ x, sorted downwards, added up in float64.

    Args:
        size: The values.
        share: Of the sum.
        total: The sum, where ``size`` holds only the largest of all values.
    """
    falling = np.sort(size.numpy())[::-1].cumsum(dtype=np.float64)
    if not len(falling) or share == 0:
        return 0
    total = falling[-1] if total is None else total
    return min(int(np.searchsorted(falling, share * total)) + 1, len(falling))
