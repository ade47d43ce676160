"""The command ``demo``: recorded failures, explained and held against what decides them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.cli_runs import TEXT, Run

from tl_contrastive_lrp.cli import demo as cli_demo
from tl_contrastive_lrp.demo import KINDS, load_demo_cases


def test_demo_explains_a_recorded_failure(run: Run) -> None:
    done = run("demo", "--out", "r.html")
    assert (done.code, done.err.count("\n")) == (0, 1)
    reply = run("demo", "--json").json
    case = next(c for c in load_demo_cases() if c.id == reply["case"]["id"])
    assert case.id in done.out
    assert reply["delta"] == pytest.approx(case.delta, abs=1e-3)
    assert reply["target"]["is_top"] is True
    relevance = [abs(row["relevance"]) for row in reply["tokens"]]
    assert [row["pos"] for row in reply["case"]["decisive"]] == list(case.decisive_positions)
    for row in reply["case"]["decisive"]:
        stronger = sum(value > relevance[row["pos"]] for value in relevance)
        assert row["rank"] == stronger + 1
        assert row["in_top_5"] == (stronger < 5)
        assert f"(rank {row['rank']})" in done.out
    hits = sum(row["in_top_5"] for row in reply["case"]["decisive"])
    assert hits, "the default case is meant to show well"
    html = Path("r.html").read_text(encoding="utf-8")
    assert "demo model" in html
    assert "The model wrote" in html


def test_demo_lists_and_chooses(run: Run) -> None:
    failures = load_demo_cases("code")
    done = run("demo", "--list", "--kind", "code")
    assert done.code == 0
    assert re.findall(r"code-\S+", done.out) == [c.id for c in failures]
    rows = run("demo", "--list", "--json").json["cases"]
    assert [row["id"] for row in rows] == [c.id for c in load_demo_cases()]
    reply = run("demo", "--kind", "code", "--case", 2, "--rules", "gradient", "--json").json
    assert reply["case"]["id"] == failures[1].id
    assert reply["rules"] == "gradient"
    solved = load_demo_cases(failed=False)[0]
    assert run("demo", "--case", solved.id, "--json").json["case"]["id"] == solved.id
    for wrong in ("0", "999", "no-such"):
        done = run("demo", "--case", wrong)
        assert done.code == TEXT
        assert "--list" in done.err
    for kind in KINDS:
        assert cli_demo.choose(None, kind).kind == kind


def test_demo_refuses_cases_of_another_model(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    case = load_demo_cases()[0]
    monkeypatch.setattr(cli_demo, "choose", lambda *_: replace(case, n_tokens=case.n_tokens + 1))
    done = run("demo")
    assert done.code == 1
    assert "do not belong together" in done.err
