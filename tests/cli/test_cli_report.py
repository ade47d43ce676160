"""The graph in the reports of ``explain`` and ``demo``: shown, left out, or why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import FILE, MODEL, PROMPT, Run, asked, built, words

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import make_graph
from tl_contrastive_lrp.errors import Argument, Message

PLAIN = Argument("memory", "plain")
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

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", never
    )
    assert run(*asked(folder)).code == 1, "the graph command would notice"
    assert run("explain", *asked(folder)[1:], "--json").code == 0
    assert run(*explained(folder, "--no-graph")).code == 0


def test_a_long_prompt_has_a_graph_pruned_on_the_way(
    run: Run, folder: Path, bridge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, whole = bridge.to_tokens(PROMPT).shape[1], built(bridge)
    monkeypatch.setattr(make_graph, "LONG", n - 1)
    monkeypatch.setattr(make_graph, "REPORT_EDGES", 7)
    taken, real = [], clrp.attribution_graph  # the package keeps what it first finds

    def watched(*arguments: Any, **options: Any) -> Any:
        taken.append(real(*arguments, **options))
        return taken[-1]

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", watched
    )
    done = run(*explained(folder))
    assert done.code == 0
    assert [step.name for step in taken[0].history] == ["mass"]
    assert len(taken[0].weight) < len(whole.weight)
    kept = whole.prune(mass=0.85, top_k=7).connected()
    share = sum(map(abs, kept.weight.tolist())) / sum(map(abs, whole.weight.tolist()))
    html = words(Path("r.html").read_text(encoding="utf-8"))
    assert f"{len(kept.weight)} edges between {int(kept.node_mask.sum())} hidden states" in html
    assert f"lead to the prediction hold {share:.0%} of Σ|weight|" in html
    assert f"more than {n - 1} tokens ({n})" in done.err
    assert "comes next; --no-graph" in done.err
    assert run(*explained(folder, "--quiet")).err == ""
    monkeypatch.setattr(make_graph, "LONG", n)
    assert run(*explained(folder)).err == ""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (clrp.errors.UncoveredComponentError("no closed form"), "no closed form"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (MemoryError(), "not enough memory"),
        (clrp.errors.ModelStateError(Message("not in tiles, try ", PLAIN)), "try --memory plain"),
        (clrp.errors.FileFormatError("another run"), "another run"),
    ],
)
def test_a_graph_that_fails_costs_no_report(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", fail
    )
    reply = run(*explained(folder, "--json")).json
    assert message in reply["notes"][0]
    assert reply["report"] == "r.html"
    assert SECTION not in Path("r.html").read_text(encoding="utf-8")
    codes = {"no closed form": MODEL, "try --memory plain": MODEL, "another run": FILE}
    assert run(*asked(folder)).code == codes.get(message, 1)


def test_a_bug_in_the_graph_is_not_hidden(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", fail
    )
    done = run(*explained(folder))
    assert done.code == 1
    assert "boom" in done.err
