"""The bundle refuses records that contradict each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.studies import made_up_analysis, made_up_checks, made_up_study
from support.study_bench import patched, small

from tl_contrastive_lrp.study.labels import Label
from tl_contrastive_lrp.study.results import ModelEntry


def test_a_bundle_finds_its_analyses() -> None:
    results = made_up_study(4)
    assert results.base.name == "small"
    assert results.rules == ("attnlrp", "gradient")
    assert results.benchmarks == ("ifeval", "math")
    case = results.cases[1]
    found = results.analysis(case.id, "large", "attnlrp")
    assert found is not None
    assert (found.case_id, found.model) == (case.id, "large")
    assert results.analysis(case.id, "large", "gradient") is None
    other = replace(results, main_rules="gradient")
    assert other.rules == ("gradient", "attnlrp")
    assert other.of_model("small")[case.id].rules == "gradient"
    assert other.of_model("large") == {}
    assert list(results.of_model("large")) == [case.id for case in results.cases]


def test_contradictions_are_refused() -> None:
    good = made_up_study(4)
    with pytest.raises(ValueError, match="'ifeval/0' is there twice"):
        replace(good, cases=(*good.cases, good.cases[0]))
    with pytest.raises(ValueError, match="exactly one base"):
        replace(good, models=good.models[1:])
    with pytest.raises(ValueError, match=r"analysis .*is there twice"):
        replace(good, analyses=(*good.analyses, good.analyses[3]))
    with pytest.raises(ValueError, match="which is no case"):
        replace(good, cases=good.cases[1:])
    with pytest.raises(ValueError, match="is by 'large'; the study's models"):
        replace(good, models=(good.models[0], *good.models[2:]))
    short = made_up_analysis(replace(good.cases[0], prompt_ids=good.cases[0].prompt_ids[1:]))
    with pytest.raises(ValueError, match="25 relevances and 25 texts for 26 tokens"):
        replace(good, analyses=(short, *good.analyses[1:]))
    with pytest.raises(ValueError, match="'Cy' labelled 'math/99'"):
        replace(good, labels=(Label("math/99", "Cy", "M-IA"),))
    with pytest.raises(ValueError, match=r"label .*is there twice"):
        replace(good, labels=(*good.labels, replace(good.labels[0], outcome="M-IA")))
    with pytest.raises(ValueError, match="main_rules is 'relp'"):
        replace(good, main_rules="relp")
    checks = made_up_checks(good)
    assert replace(good, checks=checks).checked_rules == ("attnlrp", "gradient")
    first = checks[good.cases[0].id, "attnlrp"]
    for key, check, words in (
        (("ifeval/99", "attnlrp"), first, "a check of 'ifeval/99', which is no case"),
        ((good.cases[0].id, "relp"), first, "under 'relp' is of a map under 'attnlrp'"),
        ((good.cases[1].id, "attnlrp"), first, "has 26 tokens for 27 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(good, checks={key: check})
    with pytest.raises(ValueError, match="has no step"):
        ModelEntry("x", "checkpoint")
    with pytest.raises(ValueError, match="role of 'x'"):
        ModelEntry("x", "parent")


def test_the_main_rule_set_is_the_file_s_also_where_its_first_analysis_is_missing(
    tmp_path: Path,
) -> None:
    with patched():
        study = small(tmp_path, limit=9, rules="attnlrp, gradient")
        study.run(progress=False)
        first = study.results().analyses[0]
        assert first.rules == "attnlrp"
        for key in study.store.keys("analysis"):
            what = study.store.get(key).what
            if (what["case"], what["rules"]) == (first.case_id, "attnlrp"):
                study.store.path(key).unlink()
        results = study.results()
    assert results.facts["missing_analyses"] == 1
    assert results.rules == ("attnlrp", "gradient")
    assert {a.rules for a in results.of_model("demo").values()} == {"attnlrp"}
