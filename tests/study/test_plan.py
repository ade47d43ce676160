"""The numbers of a plan, from counts that are known and a clock that is made up."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.study_bench import patched, small

from tl_contrastive_lrp.engine.memory import plain_bytes
from tl_contrastive_lrp.study import plan as plan_module
from tl_contrastive_lrp.study import run as run_module
from tl_contrastive_lrp.study.plan import ModelPlan, StudyPlan
from tl_contrastive_lrp.study.study import Study


@pytest.fixture(autouse=True)
def benchmark() -> Iterator[None]:
    with patched():
        yield


def model_plan(**changes: Any) -> ModelPlan:
    facts = {
        "name": "m", "n_parameters": 10, "weight_bytes": 40, "plain_bytes": 100, "free_bytes": 200,
        "seconds": {"a": 1.0, "b": 3.0}, "analyses": 1800,
    }  # fmt: skip
    return ModelPlan(**{**facts, **changes})


def test_hours_by_hand() -> None:
    model = model_plan()
    assert model.hours == pytest.approx(2.0 * 1800 / 3600)  # half of them under each rule set
    assert not model.is_tiled
    assert model_plan(plain_bytes=201).is_tiled
    plan = StudyPlan(
        items=1000, collected=100, cases=300, most_cases=930, rate_from="the sample",
        tokens=(50, 90), seconds_per_item=4.0, models=(model, model_plan(analyses=0)),
    )  # fmt: skip
    assert plan.hours == pytest.approx(900 * 4 / 3600 + 1.0)
    text = str(plan)
    for words in (
        "1,000 items, 100 collected already; about 300 cases", "at most 930",
        "50 in the median, 90 at most", "a case a 1 s, b 3 s; 1,800 analyses, 60 min",
        "In all about 2.0 h", "3.4 h if every item became a case",  # 630 cases more, 2 models · 4 s
    ):  # fmt: skip
        assert words in text, words
    tiled = StudyPlan(**{**vars(plan), "models": (model_plan(free_bytes=1),)})
    assert "in tiles" in str(tiled)


class Clock:
    """A clock that goes on by one second at each look."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def test_a_sample_is_counted_and_timed_and_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "time", SimpleNamespace(perf_counter=Clock().perf_counter))
    study = small(tmp_path, limit=9, rules="attnlrp, gradient", batch_size=4)
    before = study.plan(items=3, progress=False)
    assert study.store.keys("chunk") == study.store.keys("analysis") == []
    assert (before.items, before.collected, before.rate_from) == (9, 0, "the sample")
    assert before.most_cases == 9
    assert before.seconds_per_item == pytest.approx(1 / 3)  # one look to the next, for 3 items
    (model,) = before.models
    assert model.seconds == {"attnlrp": 1.0, "gradient": 1.0}
    assert model.analyses == 2 * before.cases
    assert before.hours == pytest.approx((9 / 3 + 2 * before.cases) / 3600)
    summary = study.run(progress=False)
    after = study.plan(items=3, progress=False)
    assert (after.collected, after.cases, after.most_cases) == (9, summary.cases, summary.cases)
    assert after.rate_from == "the store"
    assert after.models[0].analyses == 0
    assert after.hours == 0
    # One more rule set, and half of the chunks gone: both are missing again.
    more = small(tmp_path, limit=9, rules="attnlrp, gradient, gim", batch_size=4)
    assert more.plan(items=3, progress=False).models[0].analyses == summary.cases
    gone = study.store.path(study.store.keys("chunk")[0])
    gone.unlink()
    partly = small(tmp_path, limit=9, batch_size=4).plan(items=3, progress=False)
    assert partly.collected in (5, 8)
    assert partly.most_cases <= 9


def test_memory_is_that_of_the_longest_prompt_of_the_sample(tmp_path: Path) -> None:
    from support.study_failures import demo_model

    plan = small(tmp_path, limit=9).plan(items=9, progress=False)
    (model,) = plan.models
    longest, bridge = plan.tokens[1], demo_model()
    assert model.plain_bytes == plain_bytes(bridge, longest, graphs=1, pruned=True)
    assert model.weight_bytes == 4 * model.n_parameters
    assert plan.tokens[0] <= longest


def test_a_sample_without_a_case_is_timed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "collect", lambda *a, **_: [None] * len(a[2]))
    plan = small(tmp_path, limit=5, rules="gradient").plan(items=2, progress=False)
    assert plan.cases == 0
    assert plan.most_cases == 5
    assert plan.models[0].seconds["gradient"] > 0
    assert plan.tokens[0] > 5
    with pytest.raises(ValueError, match="items=0"):
        small(tmp_path).plan(items=0)


def test_contrasts_of_siblings_are_part_of_the_sample(tmp_path: Path) -> None:
    """A sibling with the base's weights has the base's contrasts, so as many cases."""
    expected = []
    for contrast in ("own", "sibling"):
        more = "siblings: [{name: other, model: demo}]\n"
        study = small(tmp_path, limit=9, batch_size=9, rules="gradient", more=more)
        collect = replace(study.settings.collect, contrast=(contrast,), max_new_tokens=48)
        study = Study(replace(study.settings, collect=collect), tmp_path)
        expected.append(study.plan(items=9, progress=False).cases)
    assert expected[0] == expected[1] > 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_measured_is_shown_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "siblings: [{name: other, model: demo}]\n"
    study = small(tmp_path, limit=3, rules="attnlrp, gradient", more=more)
    steps = [
        "Opening demo", "Timing the collecting of recorded", "Timing an analysis, demo, attnlrp",
        "Timing an analysis, demo, gradient", "Opening other", "Timing an analysis, other, attnlrp",
    ]  # fmt: skip
    for stream, asked in ((Terminal(), True), (Terminal(), False), (io.StringIO(), True)):
        monkeypatch.setattr(sys, "stderr", stream)
        study.plan(items=2, progress=asked)
        shown = re.findall(r"\r([^\r]*?): +\d+%\|.*?\| (\d+)/6 ", stream.getvalue())
        if not asked or not stream.isatty():
            assert shown == []
            continue
        named = {name: int(done) for name, done in reversed(shown)}
        assert [(name, named[name]) for name in steps] == [
            (name, i) for i, name in enumerate(steps)
        ]
        assert shown[-1] == (steps[-1], "6")
