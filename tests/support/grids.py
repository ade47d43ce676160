"""Parameters of tests that go through many models and several settings of each.

A fault lies in one model or in one setting far more often than in a pair of them, so each value of
each axis must occur, but not each pair. ``TEST_GRIDS=full`` runs every pair all the same.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

_FULL = os.environ.get("TEST_GRIDS") == "full"


def grid(*axes: Sequence[Any], turns: Sequence[Any] = ()) -> list[Any]:
    """All combinations; those off the diagonal are marked slow.

    Args:
        *axes: The values of each axis.
        turns: Values of one more axis, which take turns along the grid instead of doubling it.
    """
    params = []
    for indices, on_diagonal in _places(axes):
        values = [axis[i] for axis, i in zip(axes, indices, strict=True)]
        marks = () if on_diagonal else pytest.mark.slow
        if not turns:
            params.append(pytest.param(*values, marks=marks))
        elif _FULL:
            params += [pytest.param(*values, turn, marks=marks) for turn in turns]
        else:
            params.append(pytest.param(*values, turns[sum(indices) % len(turns)], marks=marks))
    return params


def diagonal(*axes: Sequence[Any]) -> list[Any]:
    """Each value of the longest axis once, with the values of the others in turns."""
    if _FULL:
        return list(itertools.product(*axes))
    return [
        tuple(axis[i] for axis, i in zip(axes, indices, strict=True))
        for indices, on_diagonal in _places(axes)
        if on_diagonal
    ]


def _places(axes: Sequence[Sequence[Any]]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Indices of every combination, and whether it lies on the diagonal."""
    lengths = [len(axis) for axis in axes]
    longest = lengths.index(max(lengths))
    for indices in itertools.product(*map(range, lengths)):
        lead = indices[longest]
        yield indices, all(i == lead % n for i, n in zip(indices, lengths, strict=True))
