"""Functions that a user passes are causes of results: each has data of its own, in any process."""

from __future__ import annotations

import functools
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from support.children import environment
from support.study_bench import patched, small

from tl_contrastive_lrp.study import benchmarks, register_locator
from tl_contrastive_lrp.study.collect import LOCATORS
from tl_contrastive_lrp.study.keys import content_hash, function_data
from tl_contrastive_lrp.study.settings import read_settings
from tl_contrastive_lrp.study.study import Study

SOURCE = """
import functools

class Judge:
    def __init__(self, at): self.at = at
    def __call__(self, item, pieces): return self.at
    def ask(self, item, pieces): return self.at

class Client:
    pass

def make(k):
    return lambda item, pieces: k

def default(item, pieces, at=0, *, by=None): return at
def nested(item, pieces): return [x + 1 for x in pieces]
"""


def made(source: str = SOURCE) -> dict[str, Any]:
    module: dict[str, Any] = {"__name__": "judges"}
    exec(source, module)
    return module


def functions(source: str = SOURCE) -> list[Any]:
    m = made(source)
    return [
        m["make"](0), m["make"](1), m["Judge"](0), m["Judge"](1), m["Judge"](0).ask,
        m["Judge"](1).ask, m["default"], m["nested"], functools.partial(m["default"], at=1),
        functools.partial(m["default"], at=2), functools.partial(m["default"], by=m["Client"]()),
        functools.partial(m["default"], by=m["make"](0)),
        functools.partial(m["default"], by=m["make"](1)),
    ]  # fmt: skip


def hashes(source: str = SOURCE) -> list[str]:
    return [content_hash(function_data(function)) for function in functions(source)]


def test_functions_of_one_name_differ_by_what_they_do() -> None:
    own = hashes()
    assert len(set(own)) == len(own)
    assert hashes() == own
    moved = "\n\n# other lines\n" + SOURCE
    assert hashes(moved) == own
    changed = SOURCE.replace("x + 1", "x + 2").replace("at=0", "at=3")
    differing = [a != b for a, b in zip(own, hashes(changed), strict=True)]
    assert differing == [i in (6, 7, 8, 9, 10, 11, 12) for i in range(len(own))]


def test_another_process_finds_the_same() -> None:
    code = "from study.test_keys import hashes; print(*hashes())"
    here = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(here)!r}); {code}"],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == hashes()


def test_another_judge_and_another_locator_are_asked_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_locators(names: str, judges: tuple[Any, ...] = ()) -> Study:
        study = small(tmp_path, limit=6, rules="gradient")
        collect = study.settings.collect
        object.__setattr__(collect, "locators", tuple(names.split()))
        return Study(study.settings, tmp_path, judges=judges)

    monkeypatch.setitem(LOCATORS, "mine", lambda *_: None)
    with patched():
        found = []
        for k in (0, 1, 0):
            study = with_locators("judge", (lambda *_, k=k: k,))
            found.append((study.run(progress=False).computed > 0, _where(study)))
        assert [computed for computed, _ in found] == [True, True, False]
        assert "token 0" in found[0][1]
        assert "token 1" in found[1][1]
        assert found[2][1] == found[0][1]
        with_locators("mine").run(progress=False)
        monkeypatch.delitem(LOCATORS, "mine")
        register_locator("mine", lambda *_: 0)
        study = with_locators("mine")
        assert study.run(progress=False).found == 0
        assert "token 0" in _where(study)


def test_what_no_library_could_check_is_checked_once_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.jsonl").write_text(
        '{"key": 1, "prompt": "Name a lamp.", "instruction_id_list": ["keywords:existence"],'
        ' "kwargs": [{"keywords": ["zebra"]}]}\n'
    )
    file = "{version: 1, base: {model: demo}, benchmarks: [{name: ifeval, path: rows.jsonl}]}"
    study = Study(read_settings(file), tmp_path)
    real = benchmarks.version

    def without(library: str) -> str:
        if library == "if-verifiable":
            raise PackageNotFoundError
        return real(library)

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "if_verifiable.common", None)
        patch.setattr(benchmarks, "version", without)
        study.run(progress=False)
        assert [gone.reason for gone in study.results().dropped] == ["unchecked"]
    assert study.run(progress=False).found == 0
    assert [gone.reason for gone in study.results().dropped] != ["unchecked"]
    monkeypatch.setattr(benchmarks, "version", lambda library: real(library) + ".1")
    assert study.run(progress=False).found == 0


def _where(study: Study) -> str:
    """What the cases and drops say of the place of the error."""
    results = study.results()
    places = [f"token {case.target_position}" for case in results.cases]
    return "; ".join([*places, *(gone.detail for gone in results.dropped)])


def test_another_number_of_threads_is_another_cause(tmp_path: Path) -> None:
    """Sums are rounded otherwise then."""
    with patched():
        one = small(tmp_path, limit=2).run(progress=False)
        two = small(tmp_path, limit=2, more="threads: 2\n").run(progress=False)
        again = small(tmp_path, limit=2).run(progress=False)
    assert one.computed == two.computed > 0
    assert (one.found, two.found, again.computed) == (0, 0, 0)
