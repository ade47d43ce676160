"""Measures of faithfulness and their plots: known curves, definitions, the normal distribution."""

from __future__ import annotations

import math
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tl_contrastive_lrp.evaluation.faithfulness import (
    FaithfulnessCurves,
    auroc,
    average_precision,
    bootstrap_interval,
)

# of curves


def made(morf: list[float], lerf: list[float]) -> FaithfulnessCurves:
    n = len(morf) - 1
    return FaithfulnessCurves(
        ("x",), torch.arange(n + 1), n, torch.tensor([morf]).double(),
        torch.tensor([lerf]).double(), morf[0], "zero embeddings",
    )  # fmt: skip


def test_measures_of_known_curves() -> None:
    """Two tokens; one carries everything. Top 1, 5, 10, 20, 50 % are all one token."""
    perfect = made([4.0, 0.0, 0.0], [4.0, 4.0, 0.0])
    assert perfect.scale == 4.0
    assert perfect.area["x"] == pytest.approx(0.5)  # the most that two tokens allow
    assert perfect.comprehensiveness["x"] == pytest.approx(1.0)
    assert perfect.sufficiency["x"] == pytest.approx(0.0)
    wrong = made([4.0, 4.0, 0.0], [4.0, 0.0, 0.0])
    assert wrong.area["x"] == pytest.approx(-0.5)
    assert wrong.comprehensiveness["x"] == pytest.approx(0.0)
    assert wrong.sufficiency["x"] == pytest.approx(1.0)
    below = made([1.0, -3.0, -3.0], [1.0, 1.0, -3.0])
    assert below.scale == 4.0
    ten = made([10.0, *[8.0 - i for i in range(10)]], [10.0, *[9.0] * 9, -1.0])
    # Top 1 (of 1, 5 and 10 %), 2 and 5 tokens of ten: Δℓ falls by 2, 3 and 6 without them; with
    # them alone, so after the other 9, 8 and 5 are gone, by 1 each.
    assert ten.comprehensiveness["x"] == pytest.approx((2 + 3 + 6) / 3 / 11)
    assert ten.sufficiency["x"] == pytest.approx(1 / 11)
    assert made([10.0, *[8.0 - i for i in range(10)]], [10.0, *[9.0] * 9, -1.0]).area[
        "x"
    ] == pytest.approx(float(np.trapezoid([0, *[1 + i for i in range(9)], 0], dx=0.1)) / 11)


# plots


def test_without_plotly_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_contrastive_lrp.render import plotly_figures as lines

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(lines, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install plotly.*to_frame"):
        made([4.0, 0.0, 0.0], [4.0, 4.0, 0.0]).plot()


def test_plots_hold_the_curves() -> None:
    pytest.importorskip("plotly")
    curves = made([4.0, 0.0, 0.0], [4.0, 4.0, 0.0])
    figure = curves.plot()
    assert [line.name for line in figure.data] == ["x MoRF", "x LeRF"]
    assert list(figure.data[0].y) == [4.0, 0.0, 0.0]
    assert list(figure.data[1].x) == [0.0, 0.5, 1.0]
    assert figure.data[1].line.dash == "dash"
    assert figure.data[0].line.color == figure.data[1].line.color


# of rankings

SOME = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 0.5, 2.0]), st.booleans()), min_size=2)


def _counts(pairs: list[tuple[float, bool]]) -> tuple[list[float], list[float]]:
    return [s for s, t in pairs if t], [s for s, t in pairs if not t]


@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(SOME)
def test_auroc_and_average_precision_by_definition(pairs: list[tuple[float, bool]]) -> None:
    true, false = _counts(pairs)
    hypothesis.assume(true and false)
    scores = torch.tensor([s for s, _ in pairs])
    truth = torch.tensor([t for _, t in pairs])
    wins = sum((a > b) + 0.5 * (a == b) for a in true for b in false)
    assert auroc(scores, truth) == pytest.approx(wins / (len(true) * len(false)))
    area, found = 0.0, 0
    for level in sorted(set(scores.tolist()), reverse=True):
        above = [t for s, t in pairs if s >= level]
        area += sum(above) / len(above) * (sum(above) - found)
        found = sum(above)
    assert average_precision(scores, truth) == pytest.approx(area / len(true))


def test_measures_refuse_what_has_no_answer() -> None:
    for measure in (auroc, average_precision):
        with pytest.raises(ValueError, match="both True and False"):
            measure(torch.ones(3), torch.ones(3).bool())
        with pytest.raises(ValueError, match="booleans"):
            measure(torch.ones(3), torch.ones(3))
        with pytest.raises(ValueError, match="3 scores"):
            measure(torch.ones(3), torch.ones(2).bool())
        with pytest.raises(ValueError, match="NaN"):
            measure(torch.tensor([math.nan, 1.0]), torch.tensor([True, False]))


def test_bootstrap_interval() -> None:
    """As wide as the normal distribution says, where that is right."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double() + 3.0
    low, high = bootstrap_interval(values.numpy(), draws=4000)
    error = float(values.std()) / 20
    assert (low, high) == pytest.approx(
        (float(values.mean()) - 1.96 * error, float(values.mean()) + 1.96 * error), abs=0.1 * error
    )
    assert bootstrap_interval([2.0] * 5) == (2.0, 2.0)
    assert bootstrap_interval([0.0, 1.0, 5.0], seed=1) == bootstrap_interval(
        [0.0, 1.0, 5.0], seed=1
    )
    for bad, what in (([], "at least one"), ([math.nan], "finite")):
        with pytest.raises(ValueError, match=what):
            bootstrap_interval(bad)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval([1.0], level=1.0)
