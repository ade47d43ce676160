"""Where tiles begin and end, and which positions' logits objectives read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ...inputs.objective import Objective

Range = tuple[int, int]


def position_of(objective: Callable[[Tensor], Tensor], length: int) -> int | None:
    """The one position whose logits an objective reads, from 0; None if it does not say."""
    if not isinstance(objective, Objective) or not isinstance(objective.pos, int):
        return None
    if not -length <= objective.pos < length:
        return None  # it will say so itself
    return objective.pos % length


def wanted_positions(
    objectives: Sequence[Callable[[Tensor], Tensor]], length: int
) -> tuple[Range, ...]:
    """(start, stop) of the positions whose logits objectives read, rising.

    One position each, or all of them where an objective does not say what it reads.
    """
    found = [position_of(objective, length) for objective in objectives]
    if any(at is None for at in found):
        return ((0, length),)
    return tuple((at, at + 1) for at in sorted({at for at in found if at is not None}))


def tiles_of(length: int, tile: int, wanted: Sequence[Range]) -> tuple[Range, ...]:
    """Bounds of tiles of at most ``tile`` positions, none of which is wanted in part only."""
    ends = sorted({0, length, *(end for range_ in wanted for end in range_)})
    return tuple(
        (at, min(at + tile, stop)) for start, stop in pairwise(ends)
        for at in range(start, stop, tile)
    )  # fmt: skip


def is_wanted(start: int, wanted: Sequence[Range]) -> bool:
    """Whether a tile that starts there is a wanted one."""
    return any(first <= start < stop for first, stop in wanted)
