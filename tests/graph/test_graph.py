"""AttributionGraph: how it is made, what it refuses and how it describes itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from support.graphs import SPLIT, edge_lists, facts, given, listed, made, same

from tl_contrastive_lrp.graph.assembly.selected import selection_of
from tl_contrastive_lrp.graph.columns import EdgeColumns, _sorted, slots
from tl_contrastive_lrp.graph.graph import AttributionGraph
from tl_contrastive_lrp.graph.pruning import PruneRule
from tl_contrastive_lrp.graph.streaming_prune import StreamingSelection


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
    expected = []
    for t, s, j, i, head, path, weight in sorted(edges):
        expected.append((names[s], i, names[t], j, weight, *([head, kinds[path]] if split else [])))
    assert [tuple(row) for row in rows.itertuples(index=False)] == expected
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
            expected = torch.zeros(pos, pos)
            for t_, s_, j, i, h, p, weight in edges:
                code = {"key": 2}.get(path, path) if isinstance(path, str) else path
                if (s_, t_) == (s, t) and head in (None, h) and code in (None, p):
                    expected[j, i] += weight
            actual = graph.matrix(graph.sites[s], t, head=head, path=path)
            assert torch.equal(actual, expected)


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
    diagonal = StreamingSelection(PruneRule())
    diagonal.add_diagonal(position, slots=True)
    split = selection_of(PruneRule(), slots(value, key, position), live)
    for ends, selection in (((1, 2), diagonal), ((0, 1), split)):
        rows, sources, slot, weights = selection.kept()
        columns.add_edges(*ends, rows, sources, weights, slot)
    graph = AttributionGraph.from_columns(**columns.columns(), **facts(3, 4))
    expected = [(2, 1, j, j, -1, 0, float(position[j])) for j in range(4)]
    for j in (0, 2, 3):
        expected.append((1, 0, j, j, -1, 0, float(position[j])))
        for i in range(j + 1):
            for h in range(3):
                expected.append((1, 0, j, i, h, 1, float(value[h, j, i])))
                expected.append((1, 0, j, i, h, 2, float(key[h, j, i])))
    expected = [edge for edge in expected if edge[-1] != 0.0]
    assert listed(graph) == sorted(expected)
    total = (value + key).sum(0) + torch.diag(position)
    total[1] = 0.0
    assert torch.allclose(graph.matrix(0, 1), total, atol=1e-6)
    assert torch.allclose(graph.merge_heads().matrix(0, 1), total, atol=1e-6)
    assert graph.merge_heads().head is None


def test_columns_refuse_what_does_not_fit() -> None:
    split, plain = EdgeColumns(with_heads=True), EdgeColumns()
    with pytest.raises(ValueError, match="add_edges"):
        split.add_dense(0, 1, torch.ones(2, 2))
    at, weights = torch.arange(2), torch.ones(2)
    with pytest.raises(ValueError, match="only there"):
        plain.add_edges(0, 1, at, at, weights, slot=at)
    with pytest.raises(ValueError, match="only there"):
        split.add_edges(0, 1, at, at, weights)
    plain.add_edges(0, 1, at, at, weights)
    with pytest.raises(ValueError, match="twice"):
        plain.add_dense(0, 1, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"shape \(3,\) is no matrix"):
        plain.add_dense(1, 2, torch.ones(3))
    with pytest.raises(TypeError, match="needs relevance and special"):
        AttributionGraph.from_columns(**plain.columns(), token_ids=torch.arange(2))
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


def test_many_edges_sort_without_overflow() -> None:
    """Spans whose product exceeds 64 bits are sorted with ``lexsort``."""
    rng = np.random.default_rng(0)
    keys = [torch.from_numpy(rng.integers(0, 2**20, 500)) for _ in range(4)]
    order = _sorted(keys)
    rows = list(zip(*(key.tolist() for key in keys), strict=True))
    assert [rows[i] for i in order] == sorted(rows)
