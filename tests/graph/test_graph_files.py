"""Graphs on disk and in other libraries: files restore them exactly, or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.graphs import SPLIT, edge_lists, given, made, same

from tl_contrastive_lrp import Attribution
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.graph.graph import AttributionGraph


@given(edge_lists(), st.sampled_from([torch.float32, torch.float64]))
def test_saved_and_loaded_is_the_same(tmp_path_factory: Any, case: Any, dtype: Any) -> None:
    edges, sites, pos, split = case
    graph = made(
        edges, sites, pos, split=split, dtype=dtype, contrast_logit=None, node_threshold=0.1
    )
    path = tmp_path_factory.getbasetemp() / "graph.safetensors"
    for expected in (graph, graph.prune(mass=0.5, node_threshold=0.2).connected()):
        assert expected.save(path) == path
        loaded = AttributionGraph.load(path)
        same(expected, loaded)
        assert str(loaded) == str(expected)


def test_details_of_nodes_travel_along(tmp_path: Path) -> None:
    details = {
        "dimensions": torch.randn(3, 2, 5),
        "neurons": torch.randn(2, 2, 7),
        "head_relevance": torch.randn(2, 4, 2),
    }
    graph = made(SPLIT, 3, 2, split=True, **details)
    same(graph, AttributionGraph.load(graph.save(tmp_path / "graph")))
    kept = graph.prune().connected()
    same(kept, AttributionGraph.load(kept.save(tmp_path / "graph")))
    assert torch.equal(kept.dimensions, details["dimensions"])
    for name in details:
        with pytest.raises(ValueError, match="together"):
            dataclasses.replace(graph, **{name: None})
        with pytest.raises(ValueError, match="do not fit"):
            dataclasses.replace(graph, **{name: torch.zeros(5, 5, 5)})


def _changed(source: Path, target: Path, change: Any) -> Path:
    with safe_open(source, framework="pt") as file:
        meta = dict(file.metadata())
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    data = json.loads(meta["data"])
    change(meta, tensors, data)
    if "data" in meta:
        meta["data"] = json.dumps(data)
    save_file(tensors, target, metadata=meta)
    return target


DAMAGE: dict[str, Any] = {
    "version 2": lambda m, t, d: m.update(version="2"),  # noqa: ARG005
    "holds no attribution graph": lambda m, t, d: m.update(format="other"),  # noqa: ARG005
    "damaged.*data": lambda m, t, d: m.pop("data"),  # noqa: ARG005
    "damaged.*weight": lambda m, t, d: t.pop("weight"),  # noqa: ARG005
    "damaged.*source_pos": lambda m, t, d: t.update(source_pos=t["source_pos"] + 7),  # noqa: ARG005
    "damaged.*colour": lambda m, t, d: d.update(colour="red"),  # noqa: ARG005
    "damaged.*delta": lambda m, t, d: d.pop("delta"),  # noqa: ARG005
    "damaged.*transitions": lambda m, t, d: d.update(transitions=[[0, 5]]),  # noqa: ARG005
    "damaged.*edges_kept": lambda m, t, d: d["history"][0]["transitions"][0].pop("edges_kept"),  # noqa: ARG005
}


@pytest.mark.parametrize("said", DAMAGE)
def test_damaged_and_foreign_files(said: str, tmp_path: Path) -> None:
    good = made(SPLIT, 3, 2, split=True).prune().save(tmp_path / "good")
    bad = _changed(good, tmp_path / "bad", DAMAGE[said])
    with pytest.raises(FileFormatError, match=said):
        AttributionGraph.load(bad)


def test_other_files(tmp_path: Path) -> None:
    graph = made(SPLIT, 3, 2, split=True)
    path = graph.save(tmp_path / "graph")
    with pytest.raises(FileFormatError, match="no attribution of"):
        Attribution.load(path)
    for share in (0.0, 0.3, 0.99):
        (tmp_path / "cut").write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(FileFormatError):
            AttributionGraph.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        AttributionGraph.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        graph.save(tmp_path / "nowhere" / "graph")
    with pytest.raises(IsADirectoryError):
        graph.save(tmp_path)


def test_a_failed_save_leaves_the_older_file(tmp_path: Path) -> None:
    graph = made(SPLIT, 3, 2, split=True)
    path = graph.save(tmp_path / "graph")
    with pytest.raises(TypeError, match="JSON"):
        dataclasses.replace(graph, objective=object()).save(path)
    same(graph, AttributionGraph.load(path))
    assert [p.name for p in tmp_path.iterdir()] == ["graph"]


# ---------------------------------------------------------------- other libraries


@given(edge_lists())
def test_networkx_holds_every_edge(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    other = graph.to_networkx()
    assert other.is_multigraph() == split
    names = graph.sites
    expected = sorted(((names[s], i), (names[t], j), weight) for t, s, j, i, _, _, weight in edges)
    assert sorted(other.edges(data="weight")) == expected
    assert set(other.nodes) == set(zip(graph.nodes["site"], graph.nodes["pos"], strict=True))
    final = other.nodes[names[-1], pos - 1]
    assert (final["token"], final["relevance"], final["pos"]) == (f" t{pos - 1}", 1.0, pos - 1)


@pytest.mark.parametrize("split", [False, True])
def test_json_and_graphml_come_back_through_networkx(split: bool, tmp_path: Path) -> None:
    tokens = ("\x00<&>\r", "é\n\U0001f600\"'")
    graph = made(SPLIT if split else SPLIT[:2], 3, 2, split=split, str_tokens=tokens).prune()
    data = json.loads(graph.to_json(tmp_path / "g.json").read_text(encoding="utf-8"))
    read = nx.node_link_graph(data, edges="edges")
    xml = nx.read_graphml(graph.to_graphml(tmp_path / "g.graphml"))
    other = nx.relabel_nodes(graph.to_networkx(), lambda node: f"{node[0]}@{node[1]}")
    for copy in (read, xml):
        assert sorted(copy.edges(data="weight")) == sorted(other.edges(data="weight"))
        assert set(copy.nodes) == set(other.nodes)
        assert copy.graph["objective"] == graph.objective
        assert copy.graph["delta"] == 2.0
    assert read.nodes["blocks.0.hook_resid_pre@0"]["token"] == tokens[0]
    assert xml.nodes["blocks.0.hook_resid_pre@0"]["token"] == "\\x00<&>\\r"
    if split:
        kinds = sorted((d["head"], d["path"]) for _, _, d in other.edges(data=True))
        for copy in (read, xml):
            assert sorted((d["head"], d["path"]) for _, _, d in copy.edges(data=True)) == kinds
