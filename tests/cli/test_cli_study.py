"""The commands of ``study``: messages, exit codes, help and JSON."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import Run, words
from support.study_bench import FILE, patched

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study import run as run_module

COMMANDS = ("init", "plan", "run", "label", "report")


@pytest.fixture(autouse=True)
def benchmark() -> Iterator[None]:
    with patched():
        yield


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(FILE.format(store="s", limit=5, batch_size=3, rules="gradient", mass=0.9))
    return path


def test_help_of_every_command(run: Run) -> None:
    text = words(run("study", "--help").out)
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", text)
        done = run("study", name, "--help")
        assert done.code == 0
        assert "130 interrupted" in words(done.out)
    assert "study" in run("--help").out
    assert run("study").out.strip()


def test_a_study_from_beginning_to_end(run: Run, file: Path) -> None:
    done = run("study", "report", file)
    assert done.code == 5
    assert "clrp study run" in done.err
    plan = run("study", "plan", file, "--json", "--items", 2).json
    text = words(run("study", "plan", "--help").out)
    keys = {*plan, *plan["models"][0]}
    assert [key for key in keys if not re.search(rf"\b{key}\b", text)] == []
    assert (plan["items"], plan["collected"], plan["rate_from"]) == (5, 0, "the sample")
    ran = run("study", "run", file, "--json").json
    text = words(run("study", "run", "--help").out)
    assert [key for key in ran if not re.search(rf"\b{key}\b", text)] == []
    assert ran["cases"] + ran["dropped"] == 5
    again = run("study", "run", file)
    assert "0 units computed" in again.out
    assert f"study report {file}" in again.out
    after = run("study", "plan", file, "--json").json
    assert (after["collected"], after["cases"], after["rate_from"]) == (
        5,
        ran["cases"],
        "the store",
    )
    assert [m["analyses"] for m in after["models"]] == [0]
    assert run("study", "label", file, "--out", "l.html").out == "Wrote l.html.\n"
    Path("a.jsonl").write_text("")
    assert "Added 0 labels" in run("study", "label", file, "--add", "a.jsonl").out
    assert run("study", "label", file, "--add", "none.jsonl").code == 5
    assert run("study", "report", file, "--out", "r.html").code == 0
    assert Path("r.html").stat().st_size > 1000


def test_cases_alone(run: Run, file: Path) -> None:
    """Collecting only computes the chunks of items; a run after it explains the same cases."""
    done = run("study", "run", file, "--collect-only")
    assert f"study run {file}" in done.out
    study = clrp.study.Study.load(file)
    cases = study.results().cases
    assert cases
    assert not study.results().analyses
    collected = run("study", "run", file, "--collect-only", "--json").json
    assert (collected["computed"], collected["cases"]) == (0, len(cases))
    ran = run("study", "run", file, "--json").json
    assert ran["computed"] == ran["cases"] == len(cases)
    assert study.results().cases == cases


def test_init_writes_a_file_that_is_a_study(run: Run) -> None:
    done = run("study", "init", "my study.yaml")
    assert done.code == 0
    assert "study plan 'my study.yaml'" in done.out
    again = run("study", "init", "my study.yaml")
    assert (again.code, "exists already" in again.err) == (5, True)
    assert run("study", "init", "none/s.yaml").code == 5


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("max_new_tokens: 12", "max_new_token: 12"), "collect.max_new_token: 'max_new_token'"),
        (("limit: 5", "limit: 0"), "benchmarks[0].limit: it is 0"),
        (("[divergence]", "[divergance]"), "collect: "),
        (("model: demo", "model: demo, device_map: auto"), "the model 'demo'"),
        (("version: 1", "version: 3"), "this package reads 1"),
    ],
)
def test_a_wrong_file_is_named(run: Run, file: Path, changed: Any, says: str) -> None:
    file.write_text(file.read_text().replace(*changed))
    done = run("study", "run", file)
    assert done.code == 5
    assert done.err.startswith("Error: ")
    assert says in words(done.err)
    assert "--debug" not in done.err


def test_other_mistakes(run: Run, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = run("study", "plan", "none.yaml")
    assert missing.code == 5
    assert "clrp study init none.yaml" in missing.err
    for shard in ("2/2", "x"):
        done = run("study", "run", file, "--shard", shard)
        assert done.code == 2
        assert "shard" in done.err
    assert run("study", "plan", file, "--items", 0).code == 2

    def unknown(name: str, *_: Any, **__: Any) -> Any:
        raise ValueError(f"unknown benchmark: {name!r}")

    monkeypatch.setattr(run_module, "open_benchmark", unknown)
    done = run("study", "run", file)
    assert done.code == 5
    assert "benchmarks[0]: unknown benchmark: 'recorded'" in done.err


def test_failed_cases_are_listed_and_the_exit_code_says_so(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_contrastive_lrp.errors import NonFiniteError

    def fails(*_: Any, **__: Any) -> Any:
        raise NonFiniteError("it overflowed [red]")

    monkeypatch.setattr(run_module, "analyse", fails)
    done = run("study", "run", file)
    assert done.code == 1
    assert "could not be explained or checked" in done.out
    assert "it overflowed [red]" in words(done.out)


def test_an_interrupted_run_says_how_to_continue(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "collect", interrupted)
    done = run("study", "run", file, "--shard", "0/3")
    assert done.code == 130
    assert f"study run {file} --shard 0/3" in done.err
    assert done.err.rstrip().endswith("Interrupted.")
