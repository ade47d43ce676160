"""The rule that chooses the default rule set, on made-up measurements, and what it chose."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
import pytest

import tl_contrastive_lrp as clrp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _faithfulness_rule import Measure, candidates, chosen, counts  # noqa: E402

SETS = ("attnlrp", "a", "b")
FINE = dict.fromkeys(SETS, 1.0)


def measure(*, deepest: bool = False, higher: bool = True, **gaps: float) -> Measure:
    """Eight prompts on which each method is so much better than AttnLRP, a little more or less."""
    noise = [0.1, -0.1, 0.2, -0.2, 0.05, -0.05, 0.0, 0.0]
    sign = 1.0 if higher else -1.0
    rows = [
        {"prompt": i, "method": m, "value": i + sign * (gaps.get(m, 0.0) + part)}
        for m in SETS
        for i, part in enumerate(noise if m != "attnlrp" else [0.0] * 8)
    ]
    return Measure.of("x", pd.DataFrame(rows), "value", higher=higher, deepest=deepest)


@pytest.mark.parametrize("higher", [True, False])
def test_better_is_what_an_interval_says(higher: bool) -> None:
    one = measure(higher=higher, a=1.0, b=-1.0)
    assert (one.sign("a", "attnlrp"), one.sign("attnlrp", "a")) == (1, -1)
    assert one.sign("b", "attnlrp") == -1
    assert measure(higher=higher, a=0.01).sign("a", "attnlrp") == 0, "within the noise"
    assert counts([one, measure(a=1.0), measure()], "a", "attnlrp") == (2, 0)


def test_who_is_a_candidate() -> None:
    good, deep, nothing, bad = (
        measure(a=1.0),
        measure(a=1.0, deepest=True),
        measure(),
        measure(a=-1.0),
    )
    assert candidates([good, good, deep], SETS, FINE) == ["a"]
    assert candidates([good, deep, nothing], SETS, FINE) == [], "two are too few"
    assert candidates([good, good, good, measure(deepest=True)], SETS, FINE) == [], "not deep"
    assert candidates([good, good, good, deep, bad], SETS, FINE) == [], "worse on one"
    for low in (5.1, float("nan"), float("inf")):
        assert candidates([good, good, deep], SETS, {**FINE, "a": low}) == []


def test_who_is_chosen() -> None:
    both, only_a = measure(a=1.0, b=1.0), measure(a=1.0)
    deep = measure(a=1.0, b=1.0, deepest=True)
    lost = {"attnlrp": 0.0, "a": 0.5, "b": 0.1}
    assert chosen([both, both, deep, only_a], SETS, FINE, lost) == "a", "better on more"
    assert chosen([both, both, deep], SETS, FINE, lost) == "b", "equals: it conserves more"
    assert chosen([both, deep], SETS, FINE, lost) == "attnlrp"
    assert chosen([measure(a=-1.0, b=-1.0)] * 4, SETS, FINE, lost) == "attnlrp"


def test_the_default_is_what_the_page_says() -> None:
    page = (ROOT / "docs" / "faithfulness.md").read_text("utf-8")
    said = re.findall(r"the rule says \*\*`(\w+)`\*\*", page)
    assert said == [clrp.DEFAULT_RULES]
