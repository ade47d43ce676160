"""Running a study: continued, shared between processes, and never with another study's results."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import command, environment
from support.study_bench import FILE, patched, small
from support.study_failures import demo_model, same_analysis

import tl_contrastive_lrp
from tl_contrastive_lrp.errors import (
    FileFormatError,
    NonFiniteError,
    NotRunError,
    TokenizerMismatchError,
)
from tl_contrastive_lrp.study import run as run_module
from tl_contrastive_lrp.study.analyse import AnalysisSettings, analyse
from tl_contrastive_lrp.study.models import fingerprint
from tl_contrastive_lrp.study.store import Store, digest_of
from tl_contrastive_lrp.study.study import Study

QUIET = {"progress": False}


@pytest.fixture(autouse=True)
def benchmark() -> Iterator[None]:
    with patched():
        yield


def digests(folder: Path) -> dict[str, str]:
    """Each result of a store by key, without how it was made."""
    store = Store(folder)
    keys = [key for kind in ("chunk", "analysis", "model") for key in store.keys(kind)]
    entries = [store.get(key) for key in keys]
    return {entry.key: digest_of(entry.record, entry.tensors) for entry in entries}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, str]]:
    """A small study that ran undisturbed in one process."""
    folder = tmp_path_factory.mktemp("reference")
    with patched():
        study = small(folder)
        summary = study.run(**QUIET)
    assert summary.cases >= 3
    assert (summary.failed, summary.damaged, summary.found) == ((), (), 0)
    return study, digests(study.store.folder)


def test_what_is_stored_is_what_a_call_says(reference: Any) -> None:
    results = reference[0].results()
    hashed = fingerprint(demo_model())
    n_parameters = sum(p.numel() for p in demo_model().original_model.parameters())
    models = [(m.name, m.role, m.n_parameters) for m in results.models]
    assert models == [("demo", "base", n_parameters)]
    assert len(results.analyses) == 2 * len(results.cases)
    assert {a.rules for a in results.analyses} == {"attnlrp", "gradient"}
    settings = AnalysisSettings(rules=("attnlrp",), flip_limit=4)
    for case in results.cases[:2]:
        found = results.analysis(case.id, "demo", "gradient")
        with run_module.threads(1):
            direct = analyse(
                demo_model(), case, "gradient", settings, name="demo", fingerprint=hashed
            )
        assert found is not None
        assert same_analysis(found, direct)
        assert found.seconds["attribute"] > 0
    assert {d.reason for d in results.dropped} >= {"passes"}
    assert results.facts["missing_analyses"] == 0
    assert results.facts["versions"]["tl_contrastive_lrp"] == tl_contrastive_lrp.__version__


def test_running_again_computes_nothing(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    for name in ("collect", "analyse"):
        monkeypatch.setattr(run_module, name, never)
    study, before = reference
    summary = Study(study.settings, study.folder).run(**QUIET)
    assert summary.computed == 0
    assert summary.found == len(before) - 1  # all but the model's own entry
    assert digests(study.store.folder) == before


def test_one_of_two_alone_does_all(reference: Any, tmp_path: Path) -> None:
    """The other worker never comes."""
    summary = small(tmp_path).run((1, 2), **QUIET)
    assert summary.computed == len(reference[1]) - 1
    assert digests(tmp_path / "store") == reference[1]
    assert not list((tmp_path / "store" / "workers").iterdir())


def test_a_damaged_file_is_named_and_computed_again(reference: Any, tmp_path: Path) -> None:
    shutil.copytree(reference[0].store.folder, tmp_path / "store")
    study = small(tmp_path)
    paths = [study.store.path(study.store.keys(kind)[0]) for kind in ("chunk", "analysis")]
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    whole = bytearray(paths[1].read_bytes())
    whole[-3] ^= 1
    paths[1].write_bytes(bytes(whole))
    with pytest.raises(FileFormatError, match=paths[0].name):
        study.results()
    summary = small(tmp_path).run(**QUIET)
    assert summary.computed == 2
    assert sorted(path.name in message for path in paths for message in summary.damaged) == [
        False, False, True, True,
    ]  # fmt: skip
    assert digests(tmp_path / "store") == reference[1]


def test_nothing_is_served_across_studies(reference: Any, tmp_path: Path) -> None:
    """Studies that differ in one thing each share a store, in turns; each gets its own results."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "mass": {"mass": 0.5},
        "rules": {"rules": "gim, attnlrp"},
        "prompts": {"limit": 5},
        "chunks": {"batch_size": 3},
        "renamed": {"more": "# the same\n"},
    }
    shared, own = tmp_path / "shared", tmp_path / "own"
    shared.mkdir()
    found, keys = {}, {}
    for changes in variants.values():
        small(shared, **changes).run(**QUIET)
    for name, changes in variants.items():
        found[name] = small(shared, **changes).results()
        if name in ("plain", "renamed"):
            study = reference[0]
        else:
            study = small(own / name, **changes)
            study.run(**QUIET)
        keys[name] = digests(study.store.folder)
        alone = study.results()
        assert [c.id for c in alone.cases] == [c.id for c in found[name].cases]
        assert alone.cases == found[name].cases
        assert len(alone.analyses) == len(found[name].analyses)
        for one, other in zip(alone.analyses, found[name].analyses, strict=True):
            assert same_analysis(one, other), (name, one.case_id, one.rules)
    everything = digests(shared / "store")
    assert everything == {key: d for each in keys.values() for key, d in each.items()}
    for name in ("mass", "chunks"):
        assert {k for k in keys[name] if k.startswith("analysis")}.isdisjoint(keys["plain"]), name


def test_another_model_and_another_version_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = small(tmp_path, limit=4, rules="gradient")
    study.run(**QUIET)
    before = digests(study.store.folder)
    real = run_module.open_model

    def changed(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            next(model.original_model.parameters()).view(-1)[7] += 0.25
        return model

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "open_model", changed)
        summary = small(tmp_path, limit=4, rules="gradient").run(**QUIET)
        assert summary.found == 0
    # The report is of the run before it, and running with the old weights finds all of it again.
    again = small(tmp_path, limit=4, rules="gradient")
    assert again.run(**QUIET).computed == 0
    assert {k: v for k, v in digests(study.store.folder).items() if k in before} == before
    monkeypatch.setattr(tl_contrastive_lrp, "__version__", "0.0.9")
    with pytest.raises(NotRunError, match="clrp study run"):
        small(tmp_path, limit=4, rules="gradient").results()
    assert small(tmp_path, limit=4, rules="gradient").run(**QUIET).found == 0


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    study = small(tmp_path)
    marker = study.store.folder / "store.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "version": 99}))
    for step in ("run", "plan", "results"):
        with pytest.raises(FileFormatError, match="Name another folder under store:"):
            getattr(small(tmp_path), step)()


def test_a_case_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = run_module.analyse, list[str]()

    def fails(model: Any, case: Any, rules: str, *rest: Any, **named: Any) -> Any:
        asked.append(case.id)
        if rules == "gradient" and case.id == asked[0]:
            raise NonFiniteError("overflowed")
        return real(model, case, rules, *rest, **named)

    monkeypatch.setattr(run_module, "analyse", fails)
    summary = small(tmp_path).run(**QUIET)
    assert [(f.case_id, f.rules, f.why) for f in summary.failed] == [
        (asked[0], "gradient", "overflowed")
    ]
    results = small(tmp_path).results()
    assert len(results.analyses) == 2 * len(results.cases) - 1
    assert results.facts["missing_analyses"] == 1
    monkeypatch.setattr(run_module, "analyse", real)
    again = small(tmp_path).run(**QUIET)
    assert (again.computed, again.failed) == (1, ())

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(run_module, "analyse", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        small(tmp_path, mass=0.3).run(**QUIET)


def test_siblings_and_checkpoints_are_analysed_under_the_first_rule_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = (
        'siblings: [{name: big, model: demo}]\ncheckpoints: [{name: "s 5", model: demo, step: 5}]'
    )
    opened: list[str] = []
    real = run_module.open_model

    def opening(spec: Any, device: Any) -> Any:
        opened.append(spec.name)
        return real(spec, device)

    monkeypatch.setattr(run_module, "open_model", opening)
    study = small(tmp_path, limit=5, more=more)
    study.run(**QUIET)
    assert opened == ["demo", "big", "s 5"]
    results = study.results()
    n = len(results.cases)
    counts = {(a.model, a.rules) for a in results.analyses}
    assert counts == {
        ("demo", "attnlrp"), ("demo", "gradient"), ("big", "attnlrp"), ("s 5", "attnlrp"),
    }  # fmt: skip
    assert len(results.analyses) == 4 * n
    assert [(m.role, m.step) for m in results.models] == [
        ("base", None), ("sibling", None), ("checkpoint", 5),
    ]  # fmt: skip

    def differs(*_: Any) -> None:
        raise TokenizerMismatchError("id 7 differs")

    monkeypatch.setattr(run_module, "check_same_tokens", differs)
    with pytest.raises(TokenizerMismatchError, match="id 7"):
        small(tmp_path, limit=5, more=more).run(**QUIET)


def test_completions_of_a_log_become_the_cases_that_they_were(
    reference: Any, tmp_path: Path
) -> None:
    """A log of what the model wrote gives the same target, contrast and analysis of each case."""
    before = reference[0].results()
    log, rows = tmp_path / "log.jsonl", []
    for case in before.cases:
        chat = [*case.messages, {"role": "assistant", "content": case.completion}]
        rows.append(json.dumps({"id": case.id[9:], "messages": chat, "passed": False}))
    log.write_text("\n".join(rows))
    settings = FILE.format(store="store", limit=99, batch_size=2, rules="gradient", mass=0.85)
    path = tmp_path / "study.yaml"
    path.write_text(settings.replace("limit: 99", "log: log.jsonl"))
    study = Study.load(path)
    with pytest.raises(NotRunError):
        study.results()
    assert study.plan(items=2, progress=False).items == len(before.cases)
    summary = study.run(**QUIET)
    assert (summary.cases, summary.failed) == (len(before.cases), ())
    results = study.results()
    for one, other in zip(results.cases, before.cases, strict=True):
        assert (one.ids, one.target_id, one.contrast_id) == (
            other.ids, other.target_id, other.contrast_id,
        )  # fmt: skip
        found = results.analysis(one.id, "demo", "gradient")
        expected = before.analysis(other.id, "demo", "gradient")
        assert found is not None
        assert expected is not None
        assert torch.equal(found.tokens, expected.tokens)
    assert Study.load(path).run(**QUIET).computed == 0
    log.write_text("\n".join(rows[:-1]))
    assert Study.load(path).run(**QUIET).cases == len(before.cases) - 1


def test_threads_are_the_study_s_and_come_back(tmp_path: Path) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    real = run_module.fingerprint

    def noting(model: Any) -> str:
        seen.append(torch.get_num_threads())
        return real(model)

    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run_module, "fingerprint", noting)
            small(tmp_path, limit=1).run(**QUIET)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_study_that_has_not_run_says_so(tmp_path: Path) -> None:
    for step in (Study.results, lambda s: s.label("x.html"), lambda s: s.report("x.html")):
        with pytest.raises(NotRunError, match="run the study first"):
            step(small(tmp_path))


def test_labels_are_checked_and_kept(reference: Any, tmp_path: Path) -> None:
    from tl_contrastive_lrp.study.labels import Label, write_labels

    shutil.copytree(reference[0].store.folder, tmp_path / "store")
    study = small(tmp_path)
    case = study.results().cases[0]
    ours = [Label(case.id, "Ada", "M-IA", "URT"), Label("other/1", "Ada", "M-IA")]
    write_labels(tmp_path / "ada.jsonl", ours)
    assert list(study.add_labels(tmp_path / "ada.jsonl")) == ours
    assert study.results().labels == (ours[0],)
    (tmp_path / "bad.jsonl").write_text("{}\n")
    with pytest.raises(FileFormatError, match="line 1"):
        study.add_labels(tmp_path / "bad.jsonl")
    assert study.results().labels == (ours[0],)
    assert study.label(tmp_path / "l.html").stat().st_size > 1000


# ---------------------------------------------------------------- processes


def started(
    folder: Path, *arguments: str, launcher: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    """``study run`` in a process of its own, or in those of a launcher."""
    path = folder / "study.yaml"
    if not path.exists():
        path.write_text(
            FILE.format(store="store", limit=9, batch_size=4, rules="attnlrp, gradient", mass=0.85)
        )
    python, *rest = command("study_bench", "study", "run", str(path), *arguments)
    return subprocess.Popen(
        [*(launcher or [python]), *rest],
        env={**environment(), **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def finished(*children: subprocess.Popen[str]) -> list[str]:
    outs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0] * len(children), outs
    return [out for out, _ in outs]


def written(folder: Path) -> list[Path]:
    return list((folder / "store").glob("*/??/*.safetensors"))


@pytest.mark.slow
def test_two_processes_are_one_bit_for_bit(reference: Any, tmp_path: Path) -> None:
    """Started by accelerate as it starts processes for several GPUs, by torchrun."""
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", "0",
    ]  # fmt: skip
    [out] = finished(started(tmp_path, launcher=launcher, OMP_NUM_THREADS="2"))
    assert digests(tmp_path / "store") == reference[1]
    computed = [int(n) for n in re.findall(r"(\d+) units computed", out)]
    assert len(computed) == 2
    assert min(computed) > 0
    assert sum(computed) <= len(reference[1]) + 1  # a unit twice at most, and none for the model


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_undisturbed(reference: Any, tmp_path: Path) -> None:
    """At random moments: after some files, and a random time into the next unit."""
    drawn = random.Random(0)
    for wanted in sorted(drawn.sample(range(1, len(reference[1]) - 3), 3)):
        child = started(tmp_path)
        while child.poll() is None and len(written(tmp_path)) < wanted:
            time.sleep(0.005)
        time.sleep(drawn.uniform(0, 0.1))
        child.send_signal(signal.SIGKILL)
        assert child.wait(60) == -signal.SIGKILL
        child.communicate()
    before = len(written(tmp_path))
    assert before < len(reference[1])
    summary = Study.load(tmp_path / "study.yaml").run(**QUIET)
    assert summary.damaged == ()
    assert digests(tmp_path / "store") == reference[1]
    assert summary.computed == len(reference[1]) - before


@pytest.mark.slow
def test_interrupted_it_says_how_to_continue(reference: Any, tmp_path: Path) -> None:
    for how in (signal.SIGINT, signal.SIGTERM):
        before = len(written(tmp_path))
        child = started(tmp_path, "--shard", "0/1")
        while child.poll() is None and len(written(tmp_path)) < before + 4:
            time.sleep(0.005)
        child.send_signal(how)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 130, err
        assert f"study run {tmp_path / 'study.yaml'} --shard 0/1" in err
        assert "Interrupted." in err
        assert "Traceback" not in err + out
        assert not list((tmp_path / "store").rglob(".*.tmp"))
        assert not list((tmp_path / "store" / "workers").iterdir())
    summary = Study.load(tmp_path / "study.yaml").run(**QUIET)
    assert summary.computed > 0
    assert digests(tmp_path / "store") == reference[1]


def test_another_dtype_writes_and_the_base_measures(
    tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote = []

    def watched(base: Any, *arguments: Any, writer: Any = None, **named: Any) -> Any:
        wrote.append((base.cfg.dtype, None if writer is None else writer.cfg.dtype))
        return collect(base, *arguments, writer=writer, **named)

    collect = run_module.collect
    monkeypatch.setattr(run_module, "collect", watched)
    shutil.copytree(reference[0].store.folder, tmp_path / "store")  # it has other results
    study = small(tmp_path)
    section = dataclasses.replace(study.settings.collect, writer_dtype="float64")
    study.settings = dataclasses.replace(study.settings, collect=section)
    assert study.run(**QUIET).found < 9  # nothing that the base itself wrote is taken for it
    assert set(wrote) == {(torch.float32, torch.float64)}
    cases = study.results().cases
    assert {case.provenance.decoding["dtype"] for case in cases} == {"float64"}
    exact = {case.id: case.delta for case in reference[0].results().cases}
    assert [case.delta for case in cases] == [exact[case.id] for case in cases]


def test_a_benchmark_has_its_own_way_of_collecting(tmp_path: Path) -> None:
    study = small(tmp_path)
    [one] = study.settings.benchmarks
    own = dataclasses.replace(one, collect={"batch_size": 9, "max_new_tokens": 11})
    study.settings = dataclasses.replace(study.settings, benchmarks=(own,))
    summary = study.run(**QUIET)
    [key] = study.store.keys("chunk")  # one chunk of nine items
    assert len(study.store.get(key).record["cases"]) == 9
    results = study.results()
    assert len(results.cases) == summary.cases > 0
    decoding = [case.provenance.decoding for case in results.cases]
    assert {(one["batch_size"], one["max_new_tokens"]) for one in decoding} == {(9, 11)}


def test_graphs_of_the_first_rule_set_alone(tmp_path: Path, reference: Any) -> None:
    shutil.copytree(reference[0].store.folder, tmp_path / "store")

    def analyses(rules: str) -> dict[tuple[str, str], bool]:
        study = small(tmp_path, rules=rules)
        section = dataclasses.replace(study.settings.analyse, graph="first")
        study.settings = dataclasses.replace(study.settings, analyse=section)
        study.run(**QUIET)
        return {(a.case_id, a.rules): a.graph is not None for a in study.results().analyses}

    for rules in ("attnlrp, gradient", "gradient, attnlrp"):  # in one store
        found = analyses(rules)
        assert {(name, graph) for (_, name), graph in found.items()} == {
            (name, name == rules.split(",")[0]) for name in ("attnlrp", "gradient")
        }
