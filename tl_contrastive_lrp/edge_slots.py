"""Edges between two positions in slots: one for the position-wise part, then value and key by head.

Slots are in the order of edges, so that what is not 0 comes out sorted.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

POSITION, VALUE, KEY = 0, 1, 2
PATHS = ("position", "value", "key")


def slots(
    value: Float[Tensor, "head target_pos source_pos"] | None,
    key: Float[Tensor, "head target_pos source_pos"] | None,
    position: Float[Tensor, " target_pos"],
    offset: int = 0,
) -> Float[Tensor, "target_pos source_pos slot"]:
    """What goes by value, by key, and past attention's mixing, side by side.

    Args:
        value, key: By head; None is none.
        position: The position-wise part; the first target's own source is ``offset``.
    """
    some = value if value is not None else key
    if some is None:
        made = position.new_zeros(len(position), offset + len(position), 1)
    else:
        made = some.new_zeros(*some.shape[1:], 1 + 2 * len(some))
    made[..., 0].diagonal(offset).copy_(position)
    for start, path in ((1, value), (2, key)):
        if path is not None:
            made[..., start::2] = path.detach().permute(1, 2, 0)
    return made


def heads_and_paths(
    slot: Int[Tensor, " edge"],
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """Head (-1: none) and path of edges in slots."""
    head = torch.div(slot - 1, 2, rounding_mode="floor")
    path = torch.where(slot == 0, POSITION, torch.where(slot % 2 == 1, VALUE, KEY))
    return head, path
