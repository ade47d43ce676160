"""The graph in the reports of ``explain`` and ``demo``: there, left out, or said why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli_runs import MODEL, PROMPT, Run, asked, built, words

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import graph as cli_graph

pytest_plugins = ("cli_fixtures",)

SECTION = "Attribution graph: how relevance flows"


def explained(folder: Path, *more: object) -> tuple[object, ...]:
    return ("explain", *asked(folder, "--out", "r.html", *more)[1:])


def test_reports_have_the_pruned_connected_graph(run: Run, folder: Path, bridge: Any) -> None:
    assert run(*explained(folder)).code == 0
    html = words(Path("r.html").read_text(encoding="utf-8"))
    kept = built(bridge).prune(mass=0.85).connected()
    assert SECTION in html
    assert f"{len(kept.weight)} edges between {int(kept.node_mask.sum())} hidden states" in html
    done = run(*explained(folder, "--no-graph", "--json"))
    assert (done.code, done.json["notes"]) == (0, [])
    assert SECTION not in Path("r.html").read_text(encoding="utf-8")
    assert run("demo", "--out", "d.html").code == 0
    assert SECTION in Path("d.html").read_text(encoding="utf-8")
    assert run("demo", "--out", "d.html", "--no-graph").code == 0
    assert SECTION not in Path("d.html").read_text(encoding="utf-8")


def test_no_graph_is_made_for_no_report(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a graph was made")

    monkeypatch.setattr("tl_contrastive_lrp.graph_build.attribution_graph", never)
    assert run(*asked(folder)).code == 1, "the graph command would notice"
    assert run("explain", *asked(folder)[1:], "--json").code == 0
    assert run(*explained(folder, "--no-graph")).code == 0


def test_a_long_prompt_has_no_graph_and_says_so(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = bridge.to_tokens(PROMPT).shape[1]
    monkeypatch.setattr(cli_graph, "REPORT_TOKENS", n - 1)
    done = run(*explained(folder))
    assert done.code == 0
    assert f"Note: The report has no graph, because the prompt has more than {n - 1} " in done.err
    html = Path("r.html").read_text(encoding="utf-8")
    assert SECTION not in html
    assert "The report has no graph" in words(html)
    monkeypatch.setattr(cli_graph, "REPORT_TOKENS", n)
    assert run(*explained(folder)).err == ""
    assert SECTION in Path("r.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (clrp.errors.UncoveredComponentError("no closed form"), "no closed form"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_graph_that_fails_costs_no_report(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("tl_contrastive_lrp.graph_build.attribution_graph", fail)
    told = run(*explained(folder, "--json")).json
    assert message in told["notes"][0]
    assert told["report"] == "r.html"
    assert SECTION not in Path("r.html").read_text(encoding="utf-8")
    assert run(*asked(folder)).code == (MODEL if "closed" in message else 1)


def test_a_bug_in_the_graph_is_not_hidden(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr("tl_contrastive_lrp.graph_build.attribution_graph", fail)
    done = run(*explained(folder))
    assert done.code == 1
    assert "boom" in done.err
