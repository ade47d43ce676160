"""The command ``graph``: against the library, on tiny local models."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli_runs import (
    FILE,
    MODEL,
    PROMPT,
    TEXT,
    USAGE,
    Run,
    asked,
    built,
    keys,
    same,
    typed_next,
    words,
)

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import AttributionGraph

# ---- what is printed and written ---------------------------------------------------------


def test_files_load_back_and_the_page_shows_the_pruned_graph(
    run: Run, folder: Path, bridge: Any
) -> None:
    done = run(*asked(folder, "--mass", 0.6, "--out", "g.html", "--save", "g.safetensors"))
    assert (done.code, done.err) == (0, "")
    full = built(bridge)
    saved = AttributionGraph.load("g.safetensors")
    assert same(saved, full)
    assert saved.history == ()
    kept = full.prune(mass=0.6).connected()
    assert 0 < len(kept.weight) < len(full.weight)
    html = words(Path("g.html").read_text(encoding="utf-8"))
    assert f"{len(kept.weight)} edges between {int(kept.node_mask.sum())} hidden states" in html
    assert f"kept {kept.history[0].edges_kept} of {len(full.weight)} edges" in html
    assert str(folder) in html
    for path in ("Page: g.html", "Full graph: g.safetensors"):
        assert path in done.out.splitlines()
    assert run(*asked(folder, "--mass", 0.6, "--save", "p.safetensors", "--save-pruned")).code == 0
    pruned = AttributionGraph.load("p.safetensors")
    assert same(pruned, kept)
    assert pruned.history == kept.history


def test_json_agrees_with_the_library(run: Run, folder: Path, bridge: Any) -> None:
    done = run(*asked(folder, "--rules", "cplrp", "--pos", -3, "--top", 4, "--json"))
    assert (done.code, done.err) == (0, "")
    reply = done.json
    full = built(bridge, rules="cplrp", pos=-3)
    kept = full.prune(mass=0.85).connected()
    assert (reply["status"], reply["rules"], reply["pos"]) == ("graph", "cplrp", full.final_pos)
    assert reply["delta"] == full.delta
    assert reply["target"]["logit"] - reply["contrast"]["logit"] == pytest.approx(full.delta)
    assert reply["objective"] == full.objective
    assert reply["sites"] == list(full.sites)
    assert reply["node_threshold"] == {"logits": 0.0, "relative": 0.0}
    for name, graph in (("full", full), ("kept", kept)):
        weights = list(keys(graph).values())
        assert reply[name]["edges"] == len(weights)
        assert reply[name]["mass"] == pytest.approx(sum(map(abs, weights)))
        assert reply[name]["nodes"] == len(graph.nodes)
    left = keys(kept)
    out = max(abs(w) for ends, w in keys(full).items() if ends not in left)
    weakest = min(map(abs, left.values()))
    for name, size in (("weakest_kept", weakest), ("strongest_left_out", out)):
        assert reply["kept"][name]["logits"] == pytest.approx(size)
        assert reply["kept"][name]["relative"] == pytest.approx(size / abs(full.delta))
    assert reply["kept"]["mass_share"] == pytest.approx(kept.mass / full.mass)
    assert reply["kept"]["edge_share"] == pytest.approx(len(left) / len(full.weight))
    assert [step["name"] for step in reply["pruning"]] == ["mass", "connected"]
    assert reply["pruning"][0]["parameters"] == {"share": 0.85}
    for step, expected in zip(reply["pruning"], kept.history, strict=True):
        assert step["edges_kept"] == expected.edges_kept
        assert step["mass_before"] == expected.mass_before
    paths = full.paths(4)
    assert [p["strength"] for p in reply["paths"]] == [p.strength for p in paths]
    assert [p["positions"] for p in reply["paths"]] == [list(p.positions) for p in paths]
    assert [p["share"] * full.delta for p in reply["paths"]] == pytest.approx(
        [p.strength for p in paths]
    )
    assert reply["paths"][0]["heads"] is None
    assert reply["closed"] == paths.closed
    table = kept.metrics()
    assert [row["site"] for row in reply["metrics"]] == list(full.sites)
    assert [row["hub"] for row in reply["metrics"]] == table["hub"].tolist()
    assert reply["metrics"][0]["lookback"] is None  # NaN: the input is no target
    assert reply["metrics"][-1]["lookback"] == table["lookback"].iloc[-1]
    assert (reply["page"], reply["saved"]) == (None, None)


def test_the_account_and_the_paths_in_words(run: Run, folder: Path, bridge: Any) -> None:
    done = run(*asked(folder, "--relative", 0.02, "--heads", "--top", 3))
    full = built(bridge, heads=True)
    tau = 0.02 * abs(full.delta)
    stay = [w for w in keys(full).values() if abs(w) > tau]
    assert 0 < len(stay) < len(full.weight)
    share = sum(map(abs, stay)) / sum(map(abs, keys(full).values()))
    assert (
        f"Pruned by threshold {tau:.3g} logits (2 % of |Δℓ|): kept {len(stay)} of "
        f"{len(full.weight)} edges, {share:.1%} of their mass"
    ) in done.out
    lines = done.out.splitlines()
    for i, path in enumerate(full.paths(3), 1):
        assert f"{i}. {path}" in lines
    assert f"Δℓ = logit of « a» − logit of « b» = ({full.target_logit:.4f})" in done.out
    kept = full.prune(relative=0.02).connected()
    rows = {line.split("  ")[0].strip(): line.split() for line in lines}
    last = kept.metrics().iloc[-1]
    cells = rows["output"]
    assert (int(cells[1]), int(cells[2])) == (last["nodes"], last["edges"])
    assert float(cells[3]) == pytest.approx(last["mass"], rel=1e-3)
    assert rows["input"][2:5] == ["0", "0", "-"]
    assert "Add --out graph.html" in lines[-1]


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        (("--granularity", "sublayer"), {"granularity": "sublayer"}),
        (("--layers", "0, 2"), {"layers": [0, 2]}),
        (("--layers", "1", "--heads"), {"layers": [1], "heads": True}),
        (("--node-threshold", 0.2), {"node_threshold": 0.2}),
    ],
)
def test_how_the_graph_is_built(
    run: Run, folder: Path, bridge: Any, typed: tuple[object, ...], options: dict[str, Any]
) -> None:
    reply = run(*asked(folder, *typed, "--save", "g.safetensors", "--json")).json
    full, plain = built(bridge, **options), built(bridge)
    assert same(AttributionGraph.load("g.safetensors"), full)
    assert (full.sites, len(full.weight)) != (plain.sites, len(plain.weight))
    assert reply["granularity"] == full.granularity
    assert reply["node_threshold"]["logits"] == full.node_threshold
    assert (reply["paths"][0]["heads"] is None) == (full.head is None)
    if full.node_threshold:
        relative = f"({100 * 0.2 / abs(full.delta):.2g} % of |Δℓ|)"
        line = f"Hidden states of |relevance| up to 0.2 logits {relative} were not expanded."
        assert line in run(*asked(folder, *typed)).out.splitlines()


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        ((), {"mass": 0.85}),
        (("--mass", 0.5), {"mass": 0.5}),
        (("--threshold", 0.05), {"threshold": 0.05}),
        (("--relative", 0.1, "--mass", 0.9), {"relative": 0.1, "mass": 0.9}),
        (("--top-k", 3), {"top_k": 3}),
    ],
)
def test_pruning_options_act(
    run: Run, folder: Path, bridge: Any, typed: tuple[object, ...], options: dict[str, Any]
) -> None:
    full = built(bridge)
    pruned = full.prune(**options)
    assert 0 < len(pruned.weight) < len(full.weight)
    save = ("--save", "p.safetensors", "--save-pruned")
    assert run(*asked(folder, *typed, *save)).code == 0
    assert same(AttributionGraph.load("p.safetensors"), pruned.connected())
    reply = run(*asked(folder, *typed, "--no-connected", *save, "--json")).json
    assert same(AttributionGraph.load("p.safetensors"), pruned)
    assert reply["kept"]["edges"] == len(pruned.weight)
    left = keys(pruned)
    out = max(abs(w) for ends, w in keys(full).items() if ends not in left)
    assert reply["kept"]["strongest_left_out"]["logits"] == pytest.approx(out)
    if "top_k" in options:
        assert out > min(map(abs, left.values())), "a strong edge of a transition with many"


def test_nothing_left_is_said(run: Run, folder: Path) -> None:
    done = run(*asked(folder, "--threshold", 1e9, "--out", "g.html"))
    assert done.code == 0
    assert "Left: 1 nodes, 0 edges (0.0 %) with 0.0 % of Σ|weight|" in done.out
    assert "Weakest edge kept: none" in done.out
    assert "No edges" in Path("g.html").read_text(encoding="utf-8")
    reply = run(*asked(folder, "--threshold", 1e9, "--json")).json
    assert reply["kept"]["weakest_kept"] is None
    reply = run(*asked(folder, "--mass", 1, "--no-connected", "--json")).json
    assert reply["kept"]["strongest_left_out"] is None
    assert reply["kept"]["mass_share"] == 1


# ---- what is refused ---------------------------------------------------------------------


def test_without_contrast_a_graph_command_that_runs(run: Run, folder: Path) -> None:
    typed = ("--pos", 0, "--heads", "--threshold", 0.0, "--layers", "0,1", "--no-connected")
    done = run("graph", "--model", folder, "--prompt", PROMPT, *typed, "--out", "g.html")
    assert not os.path.exists("g.html")
    command = shlex.split(typed_next(done))
    assert command[1] == "graph"
    reply = run(*command[1:], "--json").json
    assert reply["pos"] == 0
    assert reply["contrast"]["ids"] == [reply["candidates"][1]["id"]]
    assert reply["paths"][0]["heads"] is not None
    assert [step["name"] for step in reply["pruning"]] == ["threshold"]
    assert os.path.exists("g.html")
    asked_json = run("graph", "--model", folder, "--prompt", PROMPT, "--json")
    assert asked_json.code == TEXT
    assert asked_json.json["status"] == "needs_contrast"
    assert run(*shlex.split(asked_json.json["command"])[1:]).json["status"] == "graph"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--threshold", "1", "--relative", "1"), USAGE, "either --threshold"),
        (("--relative", "inf"), USAGE, "must be a finite number, 0 or more"),
        (("--mass", "nan"), USAGE, "--mass"),
        (("--node-threshold", "inf"), USAGE, "--node-threshold must be a finite"),
        (("--mass", "1.5"), USAGE, "--mass"),
        (("--top-k", "0"), USAGE, "--top-k"),
        (("--threshold", "-1"), USAGE, "--threshold"),
        (("--granularity", "head"), USAGE, "sublayer"),
        (("--layers", "0;1"), USAGE, "such as 0,4,8"),
        (("--layers", "3"), USAGE, "blocks 0 to 1"),
        (("--layers", "2"), USAGE, "blocks 0 to 1"),
        (("--layers", "0", "--heads"), USAGE, "no single head"),
        (("--layers", "0", "--granularity", "sublayer"), USAGE, "--granularity block"),
        (("--save-pruned",), USAGE, "goes with --save"),
        (("--out", "x", "--save", "x"), USAGE, "the same file"),
        (("--system", "x"), USAGE, "go with --chat"),
        (("--contrast", "ab"), TEXT, "written id:123"),
        (("--pos", "40"), TEXT, "Position 40 does not exist"),
        (("--model", "/nowhere/model"), MODEL, "There is no folder"),
        (("--out", "no/g.html"), FILE, "mkdir -p no"),
    ],
)
def test_errors_have_a_code_and_a_message(
    run: Run, folder: Path, more: tuple[str, ...], code: int, message: str
) -> None:
    done = run(*asked(folder, *more, "--json"))
    assert done.code == code, done
    assert message in words(done.err.replace("│", " "))
    assert done.out == ""
    assert "Traceback" not in done.err
    assert os.listdir() == []


def test_overflow_is_said(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = clrp.attribution_graph  # before the patch: the package keeps what it first finds

    def overflowed(*arguments: Any, **options: Any) -> Any:
        graph = real(*arguments, **options)
        return replace(graph, relevance=graph.relevance * float("inf"))

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", overflowed
    )
    done = run(*asked(folder, "--out", "g.html"))
    assert (done.code, done.out) == (1, "")
    assert "Use --dtype float32" in done.err
    assert os.listdir() == []


def test_a_full_disk_names_the_file(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device", ".hidden.tmp")

    monkeypatch.setattr("tl_contrastive_lrp.graph.export.save", full)
    done = run(*asked(folder, "--save", "g.safetensors"))
    assert (done.code, done.out) == (FILE, "")
    assert done.err == "Error: g.safetensors cannot be written: No space left on device.\n"
