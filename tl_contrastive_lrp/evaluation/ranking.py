"""Which entries come first in an order: shared by circuits and by the removal of tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def first_in_order(
    order: Int[Tensor, " item"], counts: Int[Tensor, " step"], size: int
) -> Bool[Tensor, "step size"]:
    """Mark the first ``counts`` entries of an order, for each count.

    Args:
        order: Indices below ``size``, first to last. Indices that are absent are never marked.
        counts: How many entries to mark.
        size: Number of entries in all.
    """
    rank = torch.full((size,), size)
    rank[order] = torch.arange(len(order))
    return rank[None] < counts[:, None]
