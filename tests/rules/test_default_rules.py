"""The rule that chooses the default rule set, on made-up measurements, and what it chose."""

from __future__ import annotations

import re
import sys
from itertools import product
from pathlib import Path

import pandas as pd
import pytest

import tl_contrastive_lrp as clrp

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from _faithfulness_rule import (  # noqa: E402
    Measure,
    candidates,
    chosen,
    counts,
    holm,
    sign_test,
    verdicts,
)

SETS = ("attnlrp", "a", "b")
FINE = dict.fromkeys(SETS, 1.0)


def measure(
    group: str = "x", *, tokens: bool = True, higher: bool = True, prompts: int = 16, **gaps: float
) -> Measure:
    """Prompts on which each method is so much better than AttnLRP, a little more or less."""
    noise = [0.1, -0.1, 0.2, -0.2, 0.05, -0.05, 0.15, -0.15] * (prompts // 8)
    sign = 1.0 if higher else -1.0
    rows = [
        {"prompt": i, "method": m, "value": i + sign * (gaps.get(m, 0.0) + part)}
        for m in SETS
        for i, part in enumerate(noise if m != "attnlrp" else [0.0] * prompts)
    ]
    frame = pd.DataFrame(rows)
    return Measure.of("x", group, frame, "value", higher=higher, tokens=tokens)


@pytest.mark.parametrize("higher", [True, False])
def test_better_is_what_an_interval_says(higher: bool) -> None:
    one = measure(higher=higher, a=1.0, b=-1.0)
    assert (one.sign("a", "attnlrp"), one.sign("attnlrp", "a")) == (1, -1)
    assert one.sign("b", "attnlrp") == -1
    assert measure(higher=higher, a=0.01).sign("a", "attnlrp") == 0, "within the noise"
    assert counts([one, measure(a=1.0), measure()], "a", "attnlrp") == (2, 0)


@pytest.mark.parametrize("higher", [True, False])
def test_better_on_real_weights_is_what_a_sign_test_says(higher: bool) -> None:
    one = measure(higher=higher, a=1.0, b=-1.0)
    assert (one.wins("a", "attnlrp"), one.wins("b", "attnlrp")) == ((16, 0), (0, 16))
    assert (verdicts([one], "a"), verdicts([one], "b")) == ([1], [-1])
    assert verdicts([measure(higher=higher)], "a") == [0]


def test_undefined_prompts_and_equal_ones_say_nothing() -> None:
    one = measure(a=1.0)
    one.values.loc[0, "a"] = float("nan")
    one.values.loc[1, "a"] = one.values.loc[1, "attnlrp"]
    assert one.wins("a", "attnlrp") == (14, 0)
    assert len(one.gap("a", "attnlrp")) == 15


def test_a_sign_test_counts_coins() -> None:
    """Every outcome of n coins written out: those at least as uneven, of 2ⁿ."""
    for n in range(1, 9):
        heads = [sum(coins) for coins in product((0, 1), repeat=n)]
        for better in range(n + 1):
            uneven = abs(better - (n - better))
            as_uneven = sum(abs(h - (n - h)) >= uneven for h in heads)
            assert sign_test(better, n - better) == pytest.approx(as_uneven / 2**n)
    assert sign_test(0, 0) == 1.0


def test_holm_by_hand() -> None:
    """0.01·4, then 0.02·3 = 0.06, then 0.022·2 = 0.044 but not below 0.06, then 0.9."""
    assert holm([0.02, 0.9, 0.01, 0.022]) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_many_measures_make_each_less_certain() -> None:
    """16 of 16 prompts stay certain; 8 of 8 (p = 0.008) do not among ten measures."""
    few, none = measure(prompts=8, a=1.0), measure(prompts=8)
    assert verdicts([few], "a") == [1]
    assert verdicts([few, *[none] * 9], "a")[0] == 0
    assert verdicts([measure(a=1.0), *[none] * 9], "a")[0] == 1


def test_who_is_a_candidate() -> None:
    x, y, nothing = measure("x", a=1.0), measure("y", a=1.0), measure("y")
    assert candidates([x, y], [nothing], SETS, FINE) == ["a"]
    assert candidates([x, nothing], [nothing], SETS, FINE) == [], "one is too few"
    assert candidates([x, x, nothing], [nothing], SETS, FINE) == [], "one group"
    assert candidates([x, y, measure("z", a=-1.0)], [nothing], SETS, FINE) == [], "worse on one"
    assert candidates([x, y], [measure(a=-1.0)], SETS, FINE) == [], "worse where trained"
    assert candidates([x, y], [measure(a=1.0)], SETS, FINE) == ["a"], "better there is no matter"
    for low in (5.1, float("nan"), float("inf")):
        assert candidates([x, y], [nothing], SETS, {**FINE, "a": low}) == []


def test_what_is_not_about_tokens_does_not_count() -> None:
    x, y = measure("x", a=1.0), measure("y", a=1.0, tokens=False)
    assert candidates([x, y], [], SETS, FINE) == []
    y = measure("y", a=1.0)
    worse = measure("z", a=-1.0, tokens=False)
    assert candidates([x, y, worse], [worse], SETS, FINE) == ["a"]


def test_who_is_chosen() -> None:
    both, other, only_b = measure("x", a=1.0, b=1.0), measure("y", a=1.0, b=1.0), measure(b=1.0)
    assert chosen([both, other, only_b], [], SETS, FINE) == "b", "better on more"
    assert chosen([both, other], [], SETS, FINE) == "a", "equals: the first"
    assert chosen([both], [], SETS, FINE) == "attnlrp"
    assert chosen([], [], SETS, FINE) == "attnlrp"
    assert chosen([measure("x", a=-1.0), measure("y", b=-1.0)], [], SETS, FINE) == "attnlrp"


def test_the_default_is_what_the_page_says() -> None:
    page = (ROOT / "docs" / "faithfulness.md").read_text("utf-8")
    said = re.findall(r"the rule says \*\*`(\w+)`\*\*", page)
    assert said == [clrp.DEFAULT_RULES]
