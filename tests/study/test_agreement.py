"""Kappa by hand, and intervals that cover what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tl_contrastive_lrp.study.agreement import cohen_kappa, label_agreement
from tl_contrastive_lrp.study.bootstrap import bootstrap, mean, share
from tl_contrastive_lrp.study.labels import Label


def test_kappa_by_hand() -> None:
    # 50 cases; both say yes 20, no 15, yes/no 5, no/yes 10: p_o 0.7, p_e 0.5·0.6 + 0.5·0.4 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(second, first) == pytest.approx(0.4)
    assert cohen_kappa(["a", "b", "c"], ["a", "b", "c"]) == 1
    assert cohen_kappa(["a", "b"], ["b", "a"]) == -1
    assert math.isnan(cohen_kappa(["a", "a"], ["a", "a"]))
    with pytest.raises(ValueError, match="2 labels of one labeller and 1"):
        cohen_kappa(["a", "b"], ["a"])


def test_agreement_is_of_the_cases_that_both_labelled() -> None:
    labels = [
        *(Label(f"a/{i}", "Ada", "M-IA", "URT") for i in range(6)),
        *(Label(f"a/{i}", "Bo", "M-IA" if i % 2 else "NC-IA+AG") for i in range(2, 10)),
        Label("b/1", "Cy", "M-IA"),
    ]
    (outcome,) = label_agreement(labels)
    assert (outcome.first, outcome.second, outcome.same.n) == ("Ada", "Bo", 4)
    assert outcome.same.estimate == 0.5
    assert outcome.kappa.estimate == 0
    assert outcome.table == {("M-IA", "M-IA"): 2, ("M-IA", "NC-IA+AG"): 2}
    (pattern,) = label_agreement(labels, "pattern")
    assert pattern.table == {("URT", "none"): 4}
    assert pattern.same.estimate == 0


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_cover_a_planted_mean_as_often_as_they_say(method: str) -> None:
    """Exponential values of mean 1: of 400 intervals of 90 %, about 360 hold it."""
    g = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        found = bootstrap(
            g.exponential(size=60),
            method=method,
            level=0.9,
            resamples=400,
            seed=seed,  # type: ignore[arg-type]
        )
        covered += found.low <= 1 <= found.high  # type: ignore[operator]
    assert 0.84 <= covered / 400 <= 0.94


def test_bca_is_shifted_towards_the_long_tail() -> None:
    values = np.random.default_rng(1).lognormal(sigma=1.2, size=40)
    bca, plain = bootstrap(values), bootstrap(values, method="percentile")
    assert bca.estimate == plain.estimate == pytest.approx(values.mean())
    assert bca.low > plain.low  # type: ignore[operator]
    assert bca.high > plain.high  # type: ignore[operator]


def test_intervals_repeat_and_refuse() -> None:
    values = np.random.default_rng(0).exponential(size=30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)
    assert bootstrap([]).estimate is None
    assert bootstrap([5.0]).low is None
    assert bootstrap([2.0, 2.0]).low == 2
    with pytest.raises(ValueError, match="NaN"):
        bootstrap([1.0, math.nan])
    paired = bootstrap(np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]),
                       lambda x: mean(x[..., 1, :]) / mean(x[..., 0, :]))  # fmt: skip
    assert (paired.low, paired.estimate, paired.high) == (2, 2, 2)


def test_shares_cover_and_have_width_at_the_ends() -> None:
    g = np.random.default_rng(0)
    for p in (0.15, 0.6):
        counts = g.binomial(50, p, 1000)
        intervals = [share(int(c), 50) for c in counts]
        covered = np.mean([i.low <= p <= i.high for i in intervals])  # type: ignore[operator]
        assert 0.9 <= covered <= 0.98
    none, every = share(0, 37), share(37, 37)
    # Wilson: z² / (n + z²) with z = 1.959964.
    assert none.high == pytest.approx(3.841459 / (37 + 3.841459))
    assert every.low == pytest.approx(1 - none.high)  # type: ignore[operator]
    assert (none.low, every.high) == (0, 1)
    assert share(0, 0).estimate is None
    with pytest.raises(ValueError, match="3 of 2"):
        share(3, 2)


def test_agreement_of_all_has_an_interval_with_a_width() -> None:
    """No resample of equal labels differs, so it is Wilson's: n / (n + z²) to 1."""
    labels = [Label(f"a/{i}", who, "M-IA") for i in range(6) for who in ("Ada", "Bo")]
    (found,) = label_agreement(labels)
    assert (found.same.estimate, found.same.high) == (1.0, 1.0)
    assert found.same.low == pytest.approx(6 / (6 + 1.959964**2), abs=1e-6)
