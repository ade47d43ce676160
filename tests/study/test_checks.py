"""Verdicts on maps in a study: as ``result.check`` gives them, and never another study's."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import command, environment
from support.study_bench import FILE, patched, small
from support.study_failures import demo_model

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import (
    FileFormatError,
    NonFiniteError,
    SettingsError,
    UncoveredComponentError,
)
from tl_contrastive_lrp.study import run as run_module
from tl_contrastive_lrp.study.checks import CheckSettings, check_case
from tl_contrastive_lrp.study.records import check_cost, check_data, check_from
from tl_contrastive_lrp.study.report import report
from tl_contrastive_lrp.study.store import Store, digest_of
from tl_contrastive_lrp.study.study import Study

QUIET = {"progress": False}
TENSORS = (
    "relevance", "predicted", "measured", "measured_at", "strongest", "drawn", "ordinary",
)  # fmt: skip


@pytest.fixture(autouse=True)
def benchmark() -> Iterator[None]:
    with patched():
        yield


def checking(folder: Path, check: Any = True, k: int = 4, seed: int = 0, **changes: Any) -> Study:
    """A small study whose maps are checked."""
    study = small(folder, **changes)
    section = dataclasses.replace(study.settings.analyse, check=check, check_tokens=k)
    study.settings = dataclasses.replace(study.settings, analyse=section, seed=seed)
    return study


def digests(folder: Path) -> dict[str, str]:
    """Each result of a store by key, without how it was made."""
    store = Store(folder)
    kinds = ("chunk", "analysis", "check", "model")
    entries = [store.get(key) for kind in kinds for key in store.keys(kind)]
    return {entry.key: digest_of(entry.record, entry.tensors) for entry in entries}


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study that ran without checks."""
    with patched():
        study = small(tmp_path_factory.mktemp("without"))
        study.run(**QUIET)
    assert study.store.keys("check") == []
    return study


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, str]]:
    """A study that ran with checks, at once and in one process."""
    with patched():
        study = checking(tmp_path_factory.mktemp("undisturbed"))
        summary = study.run(**QUIET)
    assert (summary.failed, summary.found) == ((), 0)
    return study, digests(study.store.folder)


def same(one: clrp.MapCheck, other: clrp.MapCheck) -> bool:
    """Whether two checks are equal, bit for bit, what they cost aside."""
    return digest_of(*check_data(one)) == digest_of(*check_data(other))


def test_a_stored_check_is_the_one_that_a_call_gives(undisturbed: Any) -> None:
    results = undisturbed[0].results()
    assert set(results.checks) == {
        (case.id, rules) for case in results.cases for rules in ("attnlrp", "gradient")
    }
    assert results.checked_rules == ("attnlrp", "gradient")
    model = demo_model()
    for case in results.cases[:3]:
        for rules in results.rules:
            found = results.checks[case.id, rules]
            asked = clrp.logit_diff(model, case.target_id, case.contrast_id)
            with run_module.threads(1):
                result = clrp.attribute(model, torch.tensor(case.ids), asked, rules=rules, **QUIET)
                by_hand = result.check(model, k=4, n_random=4, seed=0, **QUIET)
            for name in TENSORS:
                assert torch.equal(getattr(found, name), getattr(by_hand, name)), name
            assert (found.verdict, found.sentence) == (by_hand.verdict, by_hand.sentence)
            assert found.statistics == by_hand.statistics
            assert (found.forwards, found.rules) == (by_hand.forwards, rules)
            assert found.seconds > 0
            # It is of the map that the report shows, which a graph's backward gave.
            shown = results.analysis(case.id, "demo", rules)
            assert shown is not None
            assert found.delta == pytest.approx(shown.delta, abs=1e-4)
            scale = float(shown.tokens.abs().max())
            torch.testing.assert_close(
                found.relevance.float(), shown.tokens, rtol=0, atol=1e-4 * scale
            )


def test_records_read_back_exactly_or_are_refused(undisturbed: Any) -> None:
    check = next(iter(undisturbed[0].results().checks.values()))
    record, tensors = check_data(check)
    again = check_from(record, tensors, check_cost(check))
    for one in dataclasses.fields(check):
        left, right = getattr(check, one.name), getattr(again, one.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    assert not {"seconds", "forwards"} & set(record)
    with pytest.raises(ValueError, match="MapCheck missing or unknown: k"):
        check_from({n: v for n, v in record.items() if n != "k"}, tensors, check_cost(check))


def test_switching_it_on_only_adds_checks(without: Study, tmp_path: Path) -> None:
    shutil.copytree(without.store.folder, tmp_path / "store")
    before = digests(tmp_path / "store")
    study = checking(tmp_path)
    summary = study.run(**QUIET)
    after = digests(tmp_path / "store")
    assert {key: after[key] for key in before} == before
    added = set(after) - set(before)
    assert {key.partition("/")[0] for key in added} == {"check"}
    assert len(added) == summary.computed == 2 * summary.cases
    # Off again: nothing is shown or missing, and nothing is computed.
    off = small(tmp_path)
    assert off.run(**QUIET).computed == 0
    assert (off.results().checks, off.results().facts["missing_checks"]) == ({}, 0)
    # "first" finds those of the first rule set.
    first = checking(tmp_path, "first")
    assert first.run(**QUIET).computed == 0
    assert {rules for _, rules in first.results().checks} == {"attnlrp"}


def test_an_analysis_has_the_causes_that_it_had_before_there_were_checks(without: Study) -> None:
    what = without.store.get(without.store.keys("analysis")[0]).what
    assert set(what) == {
        "case", "content", "model", "fingerprint", "rules", "rule_set", "settings", "threads",
        "versions",
    }  # fmt: skip
    assert what["settings"] == {
        "graph": True, "granularity": "block", "mass": 0.85, "node_threshold": 0.01,
        "flip_limit": 4, "memory": "auto", "attention": "auto",
    }  # fmt: skip


def test_no_check_is_served_for_another(tmp_path: Path) -> None:
    """Studies that differ in one thing share a store, in turns; each gets its own checks."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "k": {"k": 3},
        "seed": {"seed": 1},
        "rules": {"rules": "gim"},
        "graphs": {"mass": 0.5},
    }
    few: dict[str, Any] = {"limit": 3, "rules": "gradient"}
    for changes in variants.values():
        checking(tmp_path / "shared", **{**few, **changes}).run(**QUIET)
    keys, found = {}, {}
    for name, changes in variants.items():
        alone = checking(tmp_path / name, **{**few, **changes})
        alone.run(**QUIET)
        keys[name] = {key for key in digests(alone.store.folder) if key.startswith("check/")}
        own = alone.results().checks
        found[name] = checking(tmp_path / "shared", **{**few, **changes}).results().checks
        assert set(own) == set(found[name])
        assert len(own) > 0
        assert all(same(own[of], found[name][of]) for of in own), name
    # The graph's mass is no cause of a check; all else is.
    assert keys["graphs"] == keys["plain"]
    del keys["graphs"]
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))
    assert set(Store(tmp_path / "shared" / "store").keys("check")) == set().union(*keys.values())
    assert {(c.k, c.n_random) for c in found["k"].values()} == {(3, 3)}
    assert {c.seed for c in found["seed"].values()} == {1}
    drawn = [[c.drawn.tolist() for c in found[name].values()] for name in ("plain", "seed")]
    assert drawn[0] != drawn[1]


def test_another_model_and_another_case_are_checked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = checking(tmp_path, limit=4, rules="gradient")
    study.run(**QUIET)
    case = study.results().cases[0]
    keys = {
        study._run().check_key(one, name, weights, rules)
        for one in (case, dataclasses.replace(case, contrast_id=case.contrast_id + 1))
        for name in ("demo", "other")
        for weights in ("a", "b")
        for rules in ("gradient", "gim")
    }
    assert len(keys) == 16
    other = checking(tmp_path, limit=4, rules="gradient", more="threads: 2\n")
    keys |= {other._run().check_key(case, "demo", "a", "gradient")}
    assert len(keys) == 17
    real = run_module.open_model

    def changed(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            next(model.original_model.parameters()).view(-1)[7] += 0.25
        return model

    before = set(study.store.keys("check"))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_model", changed)
        checking(tmp_path, limit=4, rules="gradient").run(**QUIET)
    assert len(set(study.store.keys("check")) - before) > 0
    assert checking(tmp_path, limit=4, rules="gradient").run(**QUIET).computed == 0


def test_only_the_base_s_maps_are_checked(tmp_path: Path) -> None:
    more = "siblings: [{name: big, model: demo}]\n"
    study = checking(tmp_path, limit=4, rules="gradient, gim", more=more)
    study.run(**QUIET)
    results = study.results()
    whats = [study.store.get(key).what for key in study.store.keys("check")]
    assert {what["model"] for what in whats} == {"demo"}
    assert len(whats) == len(results.checks) == 2 * len(results.cases)


# ---------------------------------------------------------------- interrupted and shared


def test_interrupted_and_resumed_is_undisturbed(
    undisturbed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = run_module.check_case, list[str]()

    def interrupted(model: Any, case: Any, *rest: Any) -> Any:
        calls.append(case.id)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return real(model, case, *rest)

    monkeypatch.setattr(run_module, "check_case", interrupted)
    for n in (2, 4):
        with pytest.raises(KeyboardInterrupt):
            checking(tmp_path).run(**QUIET)
        assert len(Store(tmp_path / "store").keys("check")) == n
    monkeypatch.setattr(run_module, "check_case", real)
    summary = checking(tmp_path).run((1, 2), **QUIET)  # the other worker never comes
    assert summary.computed == len(undisturbed[0].store.keys("check")) - 4
    assert digests(tmp_path / "store") == undisturbed[1]


def test_a_damaged_check_is_named_and_computed_again(undisturbed: Any, tmp_path: Path) -> None:
    shutil.copytree(undisturbed[0].store.folder, tmp_path / "store")
    study = checking(tmp_path)
    path = study.store.path(study.store.keys("check")[1])
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(bytes(whole))
    with pytest.raises(FileFormatError, match=path.name):
        study.results()
    summary = checking(tmp_path).run(**QUIET)
    assert summary.computed == 1
    assert path.name in summary.damaged[0]
    assert digests(tmp_path / "store") == undisturbed[1]


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_are_one_undisturbed(
    undisturbed: Any, tmp_path: Path
) -> None:
    path = tmp_path / "study.yaml"
    text = FILE.format(store="store", limit=9, batch_size=4, rules="attnlrp, gradient", mass=0.85)
    path.write_text(text.replace("mass: 0.85", "mass: 0.85, check: true, check_tokens: 4"))

    def started(shard: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command("study_bench", "study", "run", str(path), "--shard", shard),
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    killed, other = started("0/2"), started("1/2")
    checks = tmp_path / "store" / "check"
    while killed.poll() is None and len(list(checks.glob("??/*.safetensors"))) < 2:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    out, err = other.communicate(timeout=300)
    assert other.returncode == 0, out + err
    assert digests(tmp_path / "store") == undisturbed[1]


# ---------------------------------------------------------------- failing


def test_a_check_that_fails_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = run_module.check_case, list[str]()

    def fails(model: Any, case: Any, *rest: Any) -> Any:
        asked.append(case.id)
        if case.id == asked[0]:
            raise NonFiniteError("overflowed")
        return real(model, case, *rest)

    monkeypatch.setattr(run_module, "check_case", fails)
    study = checking(tmp_path, limit=7, rules="gradient")
    summary = study.run(**QUIET)
    assert [(f.case_id, f.rules, f.kind, f.why) for f in summary.failed] == [
        (asked[0], "gradient", "check", "overflowed")
    ]
    results = study.results()
    assert len(results.checks) == len(results.cases) - 1
    assert len(results.analyses) == len(results.cases)
    assert (results.facts["missing_checks"], results.facts["missing_analyses"]) == (1, 0)
    report(results, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text("utf-8")
    assert "1 check of a map is missing" in page
    assert ">not checked</span>" in page
    monkeypatch.setattr(run_module, "check_case", real)
    assert study.run(**QUIET).computed == 1
    assert study.results().facts["missing_checks"] == 0


def test_a_model_without_predictions_is_refused_with_what_to_type(
    undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = undisturbed[0].results().cases[0]

    def refuses(*_: Any, **__: Any) -> Any:
        raise UncoveredComponentError("blocks.0.attn")

    monkeypatch.setattr("tl_contrastive_lrp.attribution.check.run.token_effects", refuses)
    with pytest.raises(SettingsError, match=r"analyse\.check: .*blocks\.0\.attn.*give false"):
        check_case(demo_model(), case, "gradient", CheckSettings(k=2, n_random=2))


# ---------------------------------------------------------------- planned


def test_checks_are_planned(tmp_path: Path, undisturbed: Any) -> None:
    assert small(tmp_path, limit=9).plan(items=3, progress=False).models[0].checks == 0
    plan = checking(tmp_path, limit=9).plan(items=3, progress=False)
    (model,) = plan.models
    assert model.checks == 2 * plan.cases == model.analyses
    assert set(model.check_seconds) == {"attnlrp", "gradient"}
    assert min(model.check_seconds.values()) > 0
    assert f"; {model.checks:,} checks, " in str(plan)
    assert Store(tmp_path / "store").keys("check") == []
    done = undisturbed[0].plan(items=3, progress=False).models[0]
    assert (done.analyses, done.checks, done.hours) == (0, 0, 0)
    more = checking(undisturbed[0].folder, k=5).plan(items=3, progress=False).models[0]
    assert (more.analyses, more.checks) == (0, 2 * len(undisturbed[0].results().cases))
    first = checking(undisturbed[0].folder, "first", k=5).plan(items=3, progress=False).models[0]
    assert first.checks == len(undisturbed[0].results().cases)
