"""Shapes are checked while tests run: a tensor of another shape than is annotated raises."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError
from support.shapes import check_package

from tl_contrastive_lrp.graph.metrics import top_count
from tl_contrastive_lrp.inputs.tokens import special_mask
from tl_contrastive_lrp.rules.functions import weighted

pytestmark = pytest.mark.skipif(
    os.environ.get("CHECK_SHAPES") == "0", reason="shapes are not checked in this run"
)

WRONG = (BeartypeCallHintViolation, TypeCheckError)


def test_a_second_length_of_one_axis_raises() -> None:
    y, n = torch.ones(2, 3), torch.ones(2, 3)
    assert weighted(y, n, torch.ones(3)).shape == (2, 3)
    with pytest.raises(WRONG):
        weighted(y, n[:1], torch.ones(3))


def test_another_number_of_axes_raises() -> None:
    assert top_count(torch.ones(3)) == 3
    with pytest.raises(WRONG):
        top_count(torch.ones(3, 1))


def test_another_type_of_number_raises() -> None:
    with pytest.raises(WRONG):
        top_count(torch.ones(3, dtype=torch.long))


def test_a_wrong_result_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    assert special_mask(torch.tensor([1, 5]), [5]).tolist() == [False, True]
    monkeypatch.setattr(torch, "isin", lambda *_: torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(WRONG):
        special_mask(torch.tensor([1, 5]), [5])


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from jaxtyping import Float
from torch import Tensor

Row = Float[Tensor, " pos"]

@dataclass
class Fields:
    one: Row
    other: Row

class Methods:
    def method(self, row: Row, matrix: Float[Tensor, "pos pos"]) -> None: ...

    @staticmethod
    def static(row: Row) -> int:
        return len(row)

    @property
    def found(self) -> Row:
        return [1.0]

def outer(row: object) -> object:
    def inner(row: Row) -> Row:
        return row
    return inner(row)
"""


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package of its own that is checked like this one."""
    (tmp_path / "shapes_example.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    check_package("shapes_example")
    yield importlib.import_module("shapes_example")
    del sys.modules["shapes_example"]


def test_dataclasses_methods_and_properties_are_checked(example: Any) -> None:
    row, longer = torch.ones(2), torch.ones(3)
    example.Fields(row, row)
    example.Methods().method(row, torch.ones(2, 2))
    assert example.Methods.static(row) == 2
    for wrong in (
        lambda: example.Fields(row, longer),
        lambda: example.Methods().method(row, torch.ones(2, 3)),
        lambda: example.Methods.static(torch.ones(2, 2)),
        lambda: example.Methods().found,
    ):
        with pytest.raises(WRONG):
            wrong()


def test_functions_inside_functions_are_left_alone(example: Any) -> None:
    assert example.outer("no tensor") == "no tensor"
