"""Sizes and checkpoints, re-derived one number at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.studies import made_up_analysis, made_up_case, made_up_study

from tl_contrastive_lrp.study.results import ModelEntry, StudyResults
from tl_contrastive_lrp.study.sizes import (
    checkpoints,
    correction,
    segment_means,
    segment_values,
    size_points,
)


@pytest.mark.parametrize(
    ("base", "other", "kind"),
    [
        (2.0, -2.0, "corrected"),
        (2.0, 2.0, "not corrected"),
        (2.0, -1.0, None),  # clear means beyond 1
        (2.0, 1.0, None),
        (1.0, -2.0, None),
        (-2.0, -2.0, None),
    ],
)
def test_what_counts_as_corrected(base: float, other: float, kind: str | None) -> None:
    assert correction(base, other) == kind


def test_points_are_of_cases_that_both_models_analysed() -> None:
    study = made_up_study(6)
    gone = study.cases[2].id
    kept = [a for a in study.analyses if not (a.model == "large" and a.case_id == gone)]
    points = size_points(replace(study, analyses=tuple(kept)), "large")
    expected = []
    for case in study.cases:
        deltas = {a.model: a.delta for a in kept if a.case_id == case.id and a.rules == "attnlrp"}
        if "large" in deltas:
            expected.append((case.id, deltas["small"], deltas["large"]))
    assert [(p.case_id, p.base, p.other) for p in points] == expected
    assert gone not in {p.case_id for p in points}


def test_segment_sums_by_hand() -> None:
    values = [9.0, 0.5, 0.0, 1.0, -2.0, *[0.0] * 21, 0.25, 0.25, 0.0, -0.5]
    analysis = made_up_analysis(made_up_case(), values)  # the first token is special
    assert segment_values(analysis) == pytest.approx(
        {"all": -0.5 / 2, "instruction": -1.0 / 2, "answer": 0.0, "query": 0.5 / 2}
    )
    zero = made_up_analysis(made_up_case(), [9.0, *[0.0] * 29])
    assert segment_values(zero)["all"] == 0
    means = segment_means([analysis, zero])
    assert list(means) == ["all", "instruction", "query", "answer"]
    assert means["all"].estimate == pytest.approx(-0.125)
    assert means["all"].n == 2


def test_trajectories_are_of_cases_that_all_checkpoints_share() -> None:
    study = made_up_study(6)
    gone = study.cases[4].id
    kept = [a for a in study.analyses if not (a.model == "step 200" and a.case_id == gone)]
    shuffled = (*study.models[3:][::-1], *study.models[:3])
    found = checkpoints(replace(study, analyses=tuple(kept), models=shuffled))
    assert found is not None
    assert [m.name for m in found.models] == ["step 100", "step 200", "step 400", "small"]
    assert found.cases == tuple(c.id for c in study.cases if c.id != gone)
    for case in found.cases:
        for i, model in enumerate(found.models):
            (delta,) = [
                a.delta
                for a in kept
                if (a.case_id, a.model, a.rules) == (case, model.name, "attnlrp")
            ]
            assert found.delta[case][i] == delta
    column = [found.delta[case][1] for case in found.cases]
    assert found.mean[1].estimate == pytest.approx(sum(column) / len(column))


def test_without_checkpoints_there_is_nothing() -> None:
    case = made_up_case()
    study = StudyResults(
        "x", (case,), (), (made_up_analysis(case),), (), (ModelEntry("small", "base"),)
    )
    assert checkpoints(study) is None
