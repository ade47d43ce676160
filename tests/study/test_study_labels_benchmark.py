"""The benchmark of the automatic label runs and prints what the report's tables hold."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import study_labels  # noqa: E402


def test_it_prints_the_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = study_labels.main(["--limit", "2", "--out", str(tmp_path / "out.html")])
    said = capsys.readouterr().out
    assert results.rules == study_labels.RULES
    assert len(results.cases) == 2
    for title in ("Rule sets side by side", "Against the planted truth", "Outcomes and patterns"):
        assert title in said
    first = results.analyses[0]
    assert first.graph is not None
    assert abs(first.delta - results.cases[0].delta) < 1e-3
    assert (tmp_path / "out.html").is_file()
