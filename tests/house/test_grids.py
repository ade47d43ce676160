"""Grids of parameters that are not run whole leave out no value of any axis."""

from __future__ import annotations

import itertools

import pytest
from support import grids

NAMES, RULES, SIZES = tuple("abcdefg"), (1, 2, 3, 4, 5), ("block", "sublayer")


@pytest.mark.parametrize("axes", [(NAMES, RULES), (RULES, NAMES), (SIZES, NAMES, RULES)])
def test_every_value_is_on_the_diagonal(axes: tuple[tuple[object, ...], ...]) -> None:
    found = grids.diagonal(*axes)
    assert len(found) == len(NAMES)
    for axis, values in zip(axes, zip(*found, strict=True), strict=True):
        assert set(values) == set(axis)


def test_a_grid_is_whole_and_its_diagonal_is_fast() -> None:
    found = grids.grid(NAMES, RULES)
    assert [p.values for p in found] == list(itertools.product(NAMES, RULES))
    assert [p.values for p in found if not p.marks] == grids.diagonal(NAMES, RULES)


def test_turns_meet_every_value_of_both_axes() -> None:
    found = [p.values for p in grids.grid(NAMES, RULES, turns=SIZES)]
    assert [(name, rule) for name, rule, _ in found] == list(itertools.product(NAMES, RULES))
    for axis, others in ((0, NAMES), (1, RULES)):
        assert {(p[axis], p[2]) for p in found} == set(itertools.product(others, SIZES))


def test_full_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "IS_FULL", True)
    assert grids.diagonal(RULES, SIZES) == list(itertools.product(RULES, SIZES))
    assert len(grids.grid(NAMES, RULES, turns=SIZES)) == len(NAMES) * len(RULES) * len(SIZES)
