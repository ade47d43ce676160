"""Parameters of tests that go through many models and several settings of each.

A fault lies in one model or in one setting far more often than in a pair of them, so each value of
each axis must occur, but not each pair. ``TEST_GRIDS=full`` runs every pair all the same.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

IS_FULL = os.environ.get("TEST_GRIDS") == "full"


def grid(*axes: Iterable[Any], turns: Sequence[Any] = ()) -> list[Any]:
    """All combinations; those off the diagonal are marked slow.

    Args:
        *axes: The values of each axis.
        turns: Values of one more axis, which take turns along the grid instead of doubling it.
    """
    params = []
    for indices, values, on_diagonal in _combinations(axes):
        marks = () if on_diagonal else pytest.mark.slow
        if not turns:
            params.append(pytest.param(*values, marks=marks))
        elif IS_FULL:
            params += [pytest.param(*values, turn, marks=marks) for turn in turns]
        else:
            params.append(pytest.param(*values, turns[sum(indices) % len(turns)], marks=marks))
    return params


def diagonal(*axes: Iterable[Any]) -> list[Any]:
    """Each value of the longest axis once, with the values of the others in turns."""
    return [tuple(values) for _, values, is_on in _combinations(axes) if is_on or IS_FULL]


def _combinations(
    axes: Iterable[Iterable[Any]],
) -> Iterator[tuple[tuple[int, ...], list[Any], bool]]:
    """Of every combination its indices, its values, and whether it lies on the diagonal."""
    lists = [list(axis) for axis in axes]
    lengths = [len(axis) for axis in lists]
    longest = lengths.index(max(lengths))
    for indices in itertools.product(*map(range, lengths)):
        values = [axis[i] for axis, i in zip(lists, indices, strict=True)]
        lead = indices[longest]
        yield indices, values, all(i == lead % n for i, n in zip(indices, lengths, strict=True))
