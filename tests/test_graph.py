"""AttributionGraph: what it refuses, what it shows, and that files give it back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from graphs import edge_lists, facts, given, listed, made, same
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from tl_contrastive_lrp import Attribution
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.graph import AttributionGraph
from tl_contrastive_lrp.graph_columns import EdgeColumns

SPLIT = [
    (1, 0, 0, 0, -1, 0, 1.0),
    (1, 0, 1, 0, 0, 1, 0.5),
    (1, 0, 1, 0, 0, 2, -0.25),
    (1, 0, 1, 0, 3, 1, 2.0),
    (2, 1, 1, 1, -1, 0, 4.0),
    (2, 1, 1, 0, 1, 2, -3.0),
]


@given(edge_lists(), st.randoms())
def test_order_of_construction_is_of_no_importance(case: Any, random: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    assert listed(graph) == sorted(edges)
    random.shuffle(edges)
    same(graph, made(edges, sites, pos, split=split))


@given(edge_lists())
def test_edges_and_nodes_equal_a_slow_loop(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    rows = graph.edges
    names = graph.sites
    assert list(rows.columns) == [
        "source_site", "source_pos", "target_site", "target_pos", "weight",
        *(["head", "path"] if split else []),
    ]  # fmt: skip
    kinds = ("position", "value", "key")
    wanted = []
    for t, s, j, i, head, path, weight in sorted(edges):
        wanted.append((names[s], i, names[t], j, weight, *([head, kinds[path]] if split else [])))
    assert [tuple(row) for row in rows.itertuples(index=False)] == wanted
    nodes = {(sites - 1, pos - 1)}
    for t, s, j, i, *_ in edges:
        nodes |= {(t, j), (s, i)}
    table = graph.nodes
    assert list(zip(table["site"], table["pos"], strict=True)) == [
        (names[s], p) for s, p in sorted(nodes)
    ]
    assert table["token"].tolist() == [f" t{p}" for _, p in sorted(nodes)]


def test_the_table_of_edges_is_a_copy() -> None:
    graph = made(SPLIT, 3, 2, split=True)
    table = graph.edges
    table["weight"] *= 99.0
    table.loc[0, "source_pos"] = 1
    assert float(graph.weight[0]) == 1.0
    assert int(graph.source_pos[0]) == 0


@given(edge_lists())
def test_matrices_equal_a_slow_loop(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    for s, t in graph.transitions:
        for head, path in [(None, None)] + ([(0, None), (None, "key"), (-1, 0)] if split else []):
            wanted = torch.zeros(pos, pos)
            for t_, s_, j, i, h, p, weight in edges:
                code = {"key": 2}.get(path, path) if isinstance(path, str) else path
                if (s_, t_) == (s, t) and head in (None, h) and code in (None, p):
                    wanted[j, i] += weight
            found = graph.matrix(graph.sites[s], t, head=head, path=path)
            assert torch.equal(found, wanted)


def test_dense_matrices_come_back() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(5, 5).tril(), torch.randn(5, 5)
    graph = AttributionGraph.from_matrices({(1, 2): b, (0, 1): a}, **facts(3, 5))
    assert graph.transitions == ((0, 1), (1, 2))
    assert len(graph.weight) == 15 + 25
    assert torch.equal(graph.matrix(0, 1), a)
    assert torch.equal(graph.matrix(-2, -1), b)


def test_split_columns_equal_a_slow_loop() -> None:
    torch.manual_seed(0)
    value, key = torch.randn(3, 4, 4).tril(), torch.randn(3, 4, 4).tril()
    position, live = torch.randn(4), torch.tensor([True, False, True, True])
    key[1, 2, 0] = 0.0
    columns = EdgeColumns(with_heads=True)
    columns.add_diagonal(1, 2, position)
    columns.add_split(0, 1, value, key, position, live)
    graph = AttributionGraph.from_columns(**columns.columns(), **facts(3, 4))
    wanted = [(2, 1, j, j, -1, 0, float(position[j])) for j in range(4)]
    for j in (0, 2, 3):
        wanted.append((1, 0, j, j, -1, 0, float(position[j])))
        for i in range(j + 1):
            for h in range(3):
                wanted.append((1, 0, j, i, h, 1, float(value[h, j, i])))
                wanted.append((1, 0, j, i, h, 2, float(key[h, j, i])))
    wanted = [edge for edge in wanted if edge[-1] != 0.0]
    assert listed(graph) == sorted(wanted)
    total = (value + key).sum(0) + torch.diag(position)
    total[1] = 0.0
    assert torch.allclose(graph.matrix(0, 1), total, atol=1e-6)
    assert torch.allclose(graph.merge_heads().matrix(0, 1), total, atol=1e-6)
    assert graph.merge_heads().head is None


def test_columns_refuse_what_does_not_fit() -> None:
    split, plain = EdgeColumns(with_heads=True), EdgeColumns()
    with pytest.raises(ValueError, match="add_split"):
        split.add_dense(0, 1, torch.ones(2, 2))
    with pytest.raises(ValueError, match="add_dense"):
        plain.add_split(0, 1, torch.ones(1, 2, 2), torch.ones(1, 2, 2), torch.ones(2))
    plain.add_diagonal(0, 1, torch.ones(2))
    with pytest.raises(ValueError, match="twice"):
        plain.add_dense(0, 1, torch.ones(2, 2))
    with pytest.raises(ValueError, match="at least one"):
        EdgeColumns().columns()
    with pytest.raises(ValueError, match="nan"):
        AttributionGraph.from_matrices({(0, 1): torch.full((2, 2), torch.nan)}, **facts(2, 2))


@given(edge_lists())
def test_merged_heads_equal_a_slow_loop(case: Any) -> None:
    edges, sites, pos, split = case
    total: dict[tuple[int, ...], float] = {}
    for *edge, weight in edges:
        total[tuple(edge[:4])] = total.get(tuple(edge[:4]), 0.0) + weight
    graph = made(edges, sites, pos, split=split).merge_heads()
    assert listed(graph) == [(*edge, -1, 0, total[edge]) for edge in sorted(total)]


def test_final_position_is_inferred_or_asked_for() -> None:
    relevance = torch.zeros(2, 3)
    relevance[-1, 1] = 2.0
    given = {**facts(2, 3, relevance), "final_pos": None}
    assert AttributionGraph.from_matrices({(0, 1): torch.eye(3)}, **given).final_pos == 1
    given["relevance"] = torch.ones(2, 3)
    with pytest.raises(ValueError, match="final_pos="):
        AttributionGraph.from_matrices({(0, 1): torch.eye(3)}, **given)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unsorted": ({"path": torch.tensor([0, 2, 1, 1, 2, 0], dtype=torch.int8)}, "sort"),
    "twice the same": ({"head": torch.tensor([-1, 0, 0, 0, 1, -1], dtype=torch.int16),
                        "path": torch.tensor([0, 1, 2, 2, 2, 0], dtype=torch.int8)}, "equals"),
    "wide integers": ({"source_pos": torch.zeros(6, dtype=torch.int64)}, "int64"),
    "a position too far": ({"source_pos": torch.full((6,), 2, dtype=torch.int32)}, "0 to 1"),
    "a negative position": ({"source_pos": torch.full((6,), -1, dtype=torch.int32)}, "0 to 1"),
    "a site too far": ({"target_site": torch.full((6,), 3, dtype=torch.int16)}, "0 to 2"),
    "backwards": ({"source_site": torch.full((6,), 2, dtype=torch.int16)}, "before"),
    "an unknown path": ({"path": torch.full((6,), 3, dtype=torch.int8)}, "path"),
    "a path without head": ({"head": None}, "both"),
    "head and path disagree": ({"head": torch.zeros(6, dtype=torch.int16)}, "-1"),
    "a short column": ({"weight": torch.ones(5)}, "shape"),
    "nan": ({"weight": torch.full((6,), torch.nan)}, "nan"),
    "half precision": ({"weight": torch.ones(6).half()}, "float16"),
    "relevance of another shape": ({"relevance": torch.ones(2, 2)}, "relevance"),
    "infinite relevance": ({"relevance": torch.full((3, 2), torch.inf)}, "infinite"),
    "final position outside": ({"final_pos": 2}, "final_pos"),
    "unknown granularity": ({"granularity": "layer"}, "granularity"),
    "a negative threshold": ({"node_threshold": -1.0}, "node_threshold"),
    "a transition missing": ({"transitions": ((0, 1),)}, "transition"),
    "transitions unsorted": ({"transitions": ((1, 2), (0, 1))}, "sorted"),
    "sites of one name": ({"sites": ("a", "a", "b")}, "different"),
    "special as numbers": ({"special": torch.zeros(2)}, "bool"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_a_broken_graph_is_refused(kind: str) -> None:
    change, said = BAD[kind]
    graph = made(SPLIT, 3, 2, split=True)
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(graph, **change)


def test_a_position_wise_edge_stays_at_its_position() -> None:
    with pytest.raises(ValueError, match="stay"):
        made([(1, 0, 1, 0, -1, 0, 1.0)], 2, 2, split=True)


def test_integers_are_not_wrapped_around() -> None:
    with pytest.raises(ValueError, match="65537"):
        made([(1, 0, 0, 0, 65537, 1, 1.0)], 2, 2, split=True)
    with pytest.raises(ValueError, match="equals"):
        made([(1, 0, 0, 0, -1, 0, 1.0), (1, 0, 0, 0, -1, 0, 2.0)], 2, 2)


def test_names_that_are_not_there() -> None:
    graph = made(SPLIT, 3, 2, split=True)
    with pytest.raises(ValueError, match=r"blocks\.1\.hook_resid_pre"):
        graph.matrix("blocks.1.resid_pre", 2)
    with pytest.raises(ValueError, match="no transition"):
        graph.matrix(0, 2)
    with pytest.raises(ValueError, match="outside"):
        graph.matrix(0, 3)
    with pytest.raises(ValueError, match="path='val'"):
        graph.matrix(0, 1, path="val")
    with pytest.raises(ValueError, match="heads=True"):
        graph.merge_heads().matrix(0, 1, head=0)


def test_a_transition_that_lost_its_edges_is_zero_not_unknown() -> None:
    graph = made(SPLIT, 3, 2, split=True).prune(threshold=2.5)
    assert graph.transitions == ((0, 1), (1, 2))
    assert torch.equal(graph.matrix(0, 1), torch.zeros(2, 2))


def test_texts_say_what_was_dropped() -> None:
    graph = made(SPLIT, 3, 2, split=True, node_threshold=0.01)
    assert "0.50% of |Δℓ|" in str(graph)
    pruned = graph.prune(relative=0.5)
    text = str(pruned.connected())
    assert "threshold (threshold 1, relative 0.5): kept 3 of 6 edges, 83.7% of their mass" in text
    assert "connected (final_pos 1): kept 3 of 3 edges, 100.0% of their mass" in text
    text = str(dataclasses.replace(pruned, final_pos=0).connected())
    assert "connected (final_pos 0): kept 0 of 3 edges, 0.0% of their mass" in text
    assert "\n" not in repr(graph)


# ---------------------------------------------------------------- files


@given(edge_lists(), st.sampled_from([torch.float32, torch.float64]))
def test_saved_and_loaded_is_the_same(tmp_path_factory: Any, case: Any, dtype: Any) -> None:
    edges, sites, pos, split = case
    graph = made(
        edges, sites, pos, split=split, dtype=dtype, contrast_logit=None, node_threshold=0.1
    )
    path = tmp_path_factory.getbasetemp() / "graph.safetensors"
    for wanted in (graph, graph.prune(mass=0.5, node_threshold=0.2).connected()):
        assert wanted.save(path) == path
        loaded = AttributionGraph.load(path)
        same(wanted, loaded)
        assert str(loaded) == str(wanted)


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
    wanted = sorted(((names[s], i), (names[t], j), weight) for t, s, j, i, _, _, weight in edges)
    assert sorted(other.edges(data="weight")) == wanted
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


def test_many_edges_sort_without_overflow() -> None:
    """Spans whose product exceeds 64 bits take the other way of sorting."""
    from tl_contrastive_lrp.graph_columns import _sorted

    rng = np.random.default_rng(0)
    keys = [torch.from_numpy(rng.integers(0, 2**20, 500)) for _ in range(4)]
    order = _sorted(keys)
    rows = list(zip(*(key.tolist() for key in keys), strict=True))
    assert [rows[i] for i in order] == sorted(rows)
