"""The command ``graph`` where edges are pruned while they come: as if the whole had been made."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.cli_runs import PROMPT, Run, asked, built, keys, same, words

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import AttributionGraph
from tl_contrastive_lrp.cli import make_graph
from tl_contrastive_lrp.cli.errors import CliError
from tl_contrastive_lrp.cli.pruning import Pruning
from tl_contrastive_lrp.graph.pruning import PruneRule

MEMORY_OPTIONS = [("--memory", "plain"), ("--memory", "tiled", "--tile", 3)]


@pytest.fixture(autouse=True)
def long_from_here(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt of these tests counts as long."""
    monkeypatch.setattr(make_graph, "LONG", bridge.to_tokens(PROMPT).shape[1] - 1)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[AttributionGraph]:
    """The graphs that the library was asked for."""
    found: list[AttributionGraph] = []
    real = clrp.attribution_graph  # before the patch: the package keeps what it first finds

    def watched(*arguments: Any, **options: Any) -> Any:
        found.append(real(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(
        "tl_contrastive_lrp.graph.assembly.attribution_graph.attribution_graph", watched
    )
    return found


def close(found: AttributionGraph, expected: AttributionGraph) -> None:
    """The same edges; weights up to what tiles round otherwise."""
    one, other = keys(found), keys(expected)
    assert one.keys() == other.keys()
    assert all(one[ends] == pytest.approx(other[ends], abs=1e-5) for ends in one)


@pytest.mark.parametrize("memory", MEMORY_OPTIONS)
@pytest.mark.parametrize(
    ("typed", "options"),
    [
        ((), {"mass": 0.85}),
        (("--mass", 0.5), {"mass": 0.5}),
        (("--threshold", 0.05), {"threshold": 0.05}),
        (("--top-k", 3), {"top_k": 3}),
        (("--relative", 0.05), {"relative": 0.05}),
        (("--relative", 0.1, "--mass", 0.9), {"relative": 0.1, "mass": 0.9}),
        (("--top-k", 4, "--mass", 0.6), {"top_k": 4, "mass": 0.6}),
        (("--top-k", 5, "--threshold", 0.3), {"top_k": 5, "threshold": 0.3}),
        (("--top-k", 9, "--threshold", 0.1, "--mass", 0.8),
         {"top_k": 9, "threshold": 0.1, "mass": 0.8}),
    ],
)  # fmt: skip
def test_pruned_on_the_way_is_pruned_afterwards(
    run: Run,
    folder: Path,
    bridge: Any,
    taken: list[AttributionGraph],
    memory: tuple[object, ...],
    typed: tuple[object, ...],
    options: dict[str, Any],
) -> None:
    full = built(bridge)
    expected = full.prune(**options).connected()
    assert 0 < len(expected.weight) < len(full.weight)
    save = ("--save", "p.safetensors", "--save-pruned", "--json")
    reply = run(*asked(folder, *memory, *typed, *save)).json
    found = AttributionGraph.load("p.safetensors")
    close(found, expected)
    assert len(taken[0].weight) < len(full.weight), "the whole graph was made"
    # The account is that of the whole graph.
    weights = list(keys(full).values())
    assert reply["full"]["edges"] == len(weights)
    assert reply["full"]["mass"] == pytest.approx(sum(map(abs, weights)), rel=1e-5)
    assert reply["full"]["nodes"] is None
    assert reply["kept"]["edges"] == len(expected.weight)
    assert reply["kept"]["mass_share"] == pytest.approx(expected.mass / full.mass, rel=1e-5)
    left = keys(expected)
    out = max(abs(w) for ends, w in keys(full).items() if ends not in left)
    left_out = reply["kept"]["strongest_left_out"]
    if left_out["at_most"]:
        assert left_out["logits"] >= out - 1e-5
    else:
        assert left_out["logits"] == pytest.approx(out, abs=1e-5)
    assert left_out["relative"] == pytest.approx(left_out["logits"] / abs(full.delta), rel=1e-5)


@pytest.mark.parametrize("mass", [0.5, 0.9])
def test_a_bound_on_what_is_left_out(run: Run, folder: Path, bridge: Any, mass: float) -> None:
    """In a transition none is larger than the weakest that stayed, nor than all left out weigh."""
    full = built(bridge)
    pruned, bounds = full.prune(mass=mass), []
    for pair, part in full.slices.items():
        kept = pruned.weight[pruned.slices[pair]].abs()
        rest = float(full.weight[part].abs().sum()) - float(kept.sum())
        bounds.append((float(kept.min()), rest))
    decided = {weakest < rest for weakest, rest in bounds}
    assert decided == ({True, False} if mass == 0.5 else {True}), "both bounds decide somewhere"
    done = run(*asked(folder, "--mass", mass, "--no-connected", "--json"))
    left_out = done.json["kept"]["strongest_left_out"]
    assert left_out["logits"] == pytest.approx(max(map(min, bounds)), rel=1e-4)
    assert left_out["at_most"] is True
    done = run(*asked(folder, "--mass", mass, "--no-connected"))
    assert "strongest left out: at most " in done.out


def test_bounds_of_a_threshold_and_of_nothing_left_out(run: Run, folder: Path) -> None:
    reply = run(*asked(folder, "--threshold", 0.05, "--no-connected", "--json")).json
    assert reply["kept"]["strongest_left_out"]["logits"] <= 0.05
    reply = run(*asked(folder, "--mass", 1, "--no-connected", "--json")).json
    assert reply["kept"]["strongest_left_out"] is None


def test_what_is_saved_and_said(run: Run, folder: Path, bridge: Any) -> None:
    n, full = bridge.to_tokens(PROMPT).shape[1], built(bridge)
    done = run(*asked(folder, "--mass", 0.6, "--save", "g.safetensors", "--top", 3))
    saved = AttributionGraph.load("g.safetensors")
    assert same(saved, full.prune(mass=0.6))
    assert [step.name for step in saved.history] == ["mass"]
    assert f"more than {n - 1} tokens ({n}), so its edges were pruned" in words(done.err)
    assert "--save writes that graph; --mass 1 would keep every edge." in done.err
    lines = done.out.splitlines()
    assert "Graph as it was made: g.safetensors" in lines
    assert any(line.startswith("Strongest paths of the graph as it was made") for line in lines)
    for i, path in enumerate(saved.paths(3), 1):
        assert f"{i}. {path}" in lines
    strengths = [abs(path.strength) for path in full.paths(3)]
    assert all(
        abs(path.strength) >= least - 1e-6
        for path, least in zip(saved.paths(3), strengths, strict=True)
    )
    assert f"Full graph: 3 sites, {len(full.weight)} edges, Σ|weight|" in done.out
    assert f"kept {len(saved.weight)} of {len(full.weight)} edges" in done.out
    assert run(*asked(folder, "--quiet")).err == ""
    reply = run(*asked(folder, "--save", "a.safetensors", "--mass", 1, "--json")).json
    assert same(AttributionGraph.load("a.safetensors"), full)
    assert any("pruned while they were computed" in note for note in reply["notes"])
    assert "--save" not in run(*asked(folder)).err


@pytest.mark.parametrize("memory", MEMORY_OPTIONS)
def test_split_by_heads(run: Run, folder: Path, bridge: Any, memory: tuple[object, ...]) -> None:
    expected = built(bridge, heads=True).prune(mass=0.85).connected()
    save = ("--save", "p.safetensors", "--save-pruned")
    assert run(*asked(folder, "--heads", *memory, *save)).code == 0
    found = AttributionGraph.load("p.safetensors")
    close(found, expected)
    assert found.head is not None
    assert expected.head is not None
    assert torch.equal(found.head, expected.head)


def test_a_page_of_a_long_prompt(run: Run, folder: Path, bridge: Any) -> None:
    assert run(*asked(folder, "--out", "g.html", *MEMORY_OPTIONS[1])).code == 0
    kept = built(bridge).prune(mass=0.85).connected()
    html = words(Path("g.html").read_text(encoding="utf-8"))
    assert f"{len(kept.weight)} edges between {int(kept.node_mask.sum())} hidden states" in html


def test_relative_to_nothing_is_refused(bridge: Any) -> None:
    relative, full = Pruning(PruneRule(relative=0.1)), built(bridge)
    for delta in (0.0, -0.0):
        with pytest.raises(typer.BadParameter, match="use --threshold"):
            relative.while_computed(delta)
    # Δℓ was another in the forward that the threshold was taken from.
    made = full.prune(threshold=0.2 * abs(full.delta))
    with pytest.raises(CliError, match="Use --threshold instead of --relative"):
        relative.apply(made)
    assert same(Pruning(PruneRule(relative=0.3)).apply(made), full.prune(relative=0.3).connected())
    with pytest.raises(typer.BadParameter, match="use --threshold"):
        relative.apply(replace(full, delta=0.0))


def test_nothing_is_left_behind_by_a_stop(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_contrastive_lrp.engine.tiled.backward.Backward.layer", stop)
    done = run(*asked(folder, *MEMORY_OPTIONS[1], "--save", "g.safetensors", "--out", "g.html"))
    assert (done.code, done.out) == (130, "")
    assert os.listdir() == []
