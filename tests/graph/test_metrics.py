"""Metrics, computed by hand on tiny graphs and by slow loops on random ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support.graphs import edge_lists, given, listed, made

from tl_contrastive_lrp.graph.metrics import gini, input_metrics, top_count

EDGES = [
    (1, 0, 0, 0, -1, 0, 2.0),
    (1, 0, 2, 0, -1, 0, -1.0),
    (1, 0, 2, 2, -1, 0, 3.0),
    (2, 1, 2, 0, -1, 0, 1.0),
    (2, 1, 2, 2, -1, 0, 1.0),
]
RELEVANCE = torch.tensor([[1.0, 5.0, 3.0], [1.0, 0.0, -3.0], [0.0, 0.0, 2.0]])


def test_gini_by_hand() -> None:
    assert gini(torch.tensor([2.0, -2.0, 2.0])) == pytest.approx(0)
    assert gini(torch.tensor([0.0, 0.0, 0.0, -7.0])) == pytest.approx(0.75)
    assert gini(torch.tensor([1.0, 3.0])) == pytest.approx(0.25)
    assert math.isnan(gini(torch.zeros(3)))
    assert math.isnan(gini(torch.zeros(0)))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12))
def test_gini_is_half_the_relative_mean_difference(values: list[float]) -> None:
    size = [abs(v) for v in values]
    if sum(size) < 1e-6:
        return
    n = len(size)
    expected = sum(abs(a - b) for a in size for b in size) / (2 * n * sum(size))
    assert gini(torch.tensor(values)) == pytest.approx(expected, abs=1e-6)


def test_top_counts_by_hand() -> None:
    values = torch.tensor([5.0, -1.0, 4.0, 0.5, -9.0, 0.5])
    assert top_count(values) == 2  # 9 of 10
    assert top_count(values, 0.91) == 3
    assert top_count(values, 0.0) == 0
    assert top_count(-values) == 1  # 9 of 10
    assert top_count(torch.tensor([-1.0])) == 0
    assert top_count(torch.tensor([])) == 0


def test_a_site_table_by_hand() -> None:
    table = made(EDGES, 3, 3, relevance=RELEVANCE).metrics().set_index("site")
    first, middle, last = (table.iloc[i].to_dict() for i in range(3))
    assert list(table.index) == [
        "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post",
    ]  # fmt: skip
    assert (first["nodes"], first["edges"], first["fan_in_max"], first["mass"]) == (2, 0, 0, 0.0)
    assert math.isnan(first["verticality"])
    assert math.isnan(first["sparsity"])
    assert (first["fan_out_mean"], first["fan_out_max"]) == (1.5, 2)
    assert first["centre"] == pytest.approx(1.5)  # (1·0 + 3·2) / 4: position 1 is not in the graph
    assert (first["hub"], first["hub_mass"]) == (0, 1.0)
    assert middle["nodes"] == 2
    assert middle["edges"] == 3
    assert (middle["fan_in_mean"], middle["fan_in_max"]) == (1.5, 2)
    assert (middle["fan_out_mean"], middle["fan_out_max"]) == (1.0, 1)
    assert middle["sparsity"] == pytest.approx(1 - 3 / 9)
    assert middle["node_mean_abs"] == pytest.approx(2.0)
    assert middle["node_gini"] == pytest.approx(0.25)
    assert middle["edge_mean_abs"] == pytest.approx(2.0)
    assert middle["edge_gini"] == pytest.approx(2 / 9)  # (−2·1 + 0·2 + 2·3) / (3·6)
    assert middle["mass"] == 6.0
    assert middle["verticality"] == pytest.approx(5 / 6)
    assert (middle["node_top90_pos"], middle["node_top90_neg"]) == (1, 1)
    assert (middle["edge_top90_pos"], middle["edge_top90_neg"]) == (2, 1)
    assert middle["centre"] == pytest.approx(1.5)
    assert middle["lookback"] == pytest.approx(2 / 6)
    # From others into (1, 2): 1; from (1, 0) to (2, 2): 1. The earlier of equals.
    assert (middle["hub"], middle["hub_mass"]) == (0, 1.0)
    assert last["lookback"] == pytest.approx(1.0)
    assert last["fan_in_max"] == 2


def test_hubs_by_hand() -> None:
    hubs = made(EDGES, 3, 3, relevance=RELEVANCE).hubs()
    assert hubs["pos"].tolist() == [0, 2]
    assert hubs["in_mass"].tolist() == [0.0, 2.0]
    assert hubs["out_mass"].tolist() == [2.0, 0.0]
    assert hubs["share"].tolist() == [0.5, 0.5]
    assert hubs["token"].tolist() == [" t0", " t2"]
    assert made(EDGES, 3, 3).hubs(1)["pos"].tolist() == [0]
    assert made(EDGES[:1], 3, 3).hubs().empty
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"k={k}"):
            made(EDGES, 3, 3).hubs(k)


@given(edge_lists())
def test_sites_equal_slow_loops(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    table = graph.metrics()
    rows = listed(graph)
    moves = [edge for edge in rows if edge[2] != edge[3]]
    present = {(t, j) for t, _, j, *_ in rows} | {(s, i) for _, s, _, i, *_ in rows}
    present |= {(sites - 1, pos - 1)}
    for site in range(sites):
        row = table.iloc[site]
        here = [node for node in present if node[0] == site]
        into = [edge for edge in rows if edge[0] == site]
        assert (row["nodes"], row["edges"]) == (len(here), len(into))
        fan_in = [sum((e[0], e[2]) == node for e in rows) for node in here]
        fan_out = [sum((e[1], e[3]) == node for e in rows) for node in here]
        assert row["fan_in_max"] == max(fan_in, default=0)
        assert row["fan_out_max"] == max(fan_out, default=0)
        if here:
            assert row["fan_in_mean"] == pytest.approx(sum(fan_in) / len(here))
            assert row["fan_out_mean"] == pytest.approx(sum(fan_out) / len(here))
        mass = sum(abs(e[-1]) for e in into)
        assert row["mass"] == pytest.approx(mass)
        exchanged = [
            sum(abs(e[-1]) for e in moves if (site, p) in ((e[0], e[2]), (e[1], e[3])))
            for p in range(pos)
        ]
        assert row["hub_mass"] == pytest.approx(max(exchanged))
        assert row["hub"] == (exchanged.index(max(exchanged)) if max(exchanged) else -1)
        if not into:
            continue
        assert row["verticality"] == pytest.approx(
            sum(abs(e[-1]) for e in into if e[2] == e[3]) / mass
        )
        assert row["lookback"] == pytest.approx(
            sum(abs(e[-1]) * (e[2] - e[3]) for e in into) / mass
        )
        pairs, transitions = {e[:4] for e in into}, {e[:2] for e in into}
        assert row["sparsity"] == pytest.approx(1 - len(pairs) / (pos**2 * len(transitions)))
        assert row["edge_gini"] == pytest.approx(gini(torch.tensor([e[-1] for e in into])))
        assert row["edge_top90_neg"] == top_count(-torch.tensor([e[-1] for e in into]))


@given(edge_lists())
def test_a_summary_equals_slow_loops(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    row = graph.summary().iloc[0]
    mass = sum(abs(e[-1]) for e in edges)
    assert (row["edges"], row["nodes"]) == (len(edges), len(graph.nodes))
    assert row["transitions"] == len({e[:2] for e in edges})
    assert row["mass"] == pytest.approx(mass)
    assert row["mass_kept"] == 1
    assert row["arrives"] == pytest.approx(pos / 2)
    if edges:
        assert row["positive_mass"] == pytest.approx(sum(max(e[-1], 0) for e in edges) / mass)
        assert row["verticality"] == pytest.approx(
            sum(abs(e[-1]) for e in edges if e[2] == e[3]) / mass
        )
        assert row["lookback"] == pytest.approx(
            sum(abs(e[-1]) * (e[2] - e[3]) for e in edges) / mass
        )
        pairs = len({e[:4] for e in edges})
        assert row["sparsity"] == pytest.approx(1 - pairs / (pos**2 * row["transitions"]))


def test_the_published_numbers_by_hand() -> None:
    row = made(EDGES, 3, 3, relevance=RELEVANCE).summary().iloc[0]
    # Nodes (0, 0), (0, 2), (1, 0), (1, 2), (2, 2); no edge is between neighbours.
    assert row["neighbour_share"] == 0
    assert row["mean_lookback"] == pytest.approx(4 / 5)
    assert row["fan_in_gini"] == pytest.approx((-4 * 0 - 2 * 0 + 0 * 1 + 2 * 2 + 4 * 2) / (5 * 5))
    assert row["fan_out_gini"] == pytest.approx((-4 * 0 - 2 * 1 + 0 * 1 + 2 * 1 + 4 * 2) / (5 * 5))
    # Degrees 2, 1, 2, 3, 2: mean 2, standard deviation √0.4, so that 3 alone is above.
    assert row["degree_hubs"] == 1
    share = [0.1, 0.3, 0.1, 0.3, 0.2]
    expected = -sum(q * math.log(q) for q in share)
    assert row["entropy"] == pytest.approx(expected)
    assert row["entropy_share"] == pytest.approx(expected / math.log(5))
    assert row["early_late"] == pytest.approx(4 / 2)  # the middle site counts nowhere
    next_to = made([(1, 0, 1, 0, -1, 0, -9.0), (1, 0, 2, 2, -1, 0, 0.1)], 2, 3).summary().iloc[0]
    assert next_to["neighbour_share"] == 0.5
    assert next_to["early_late"] == pytest.approx(1)
    bare = made([], 2, 3).summary().iloc[0]
    assert bare["degree_hubs"] == 0
    for name in ("neighbour_share", "mean_lookback", "fan_in_gini", "entropy_share"):
        assert math.isnan(bare[name]), name


@given(edge_lists())
def test_the_published_numbers_equal_slow_loops(case: Any) -> None:
    edges, sites, pos, split = case
    relevance = torch.tensor([[(3 * s + p) % 7 - 2.5 for p in range(pos)] for s in range(sites)])
    graph = made(edges, sites, pos, split=split, relevance=relevance)
    row, rows = graph.summary().iloc[0], listed(graph)
    present = {(t, j) for t, _, j, *_ in rows} | {(s, i) for _, s, _, i, *_ in rows}
    present |= {(sites - 1, pos - 1)}
    fan_in = [sum((e[0], e[2]) == node for e in rows) for node in sorted(present)]
    fan_out = [sum((e[1], e[3]) == node for e in rows) for node in sorted(present)]
    degree = [a + b for a, b in zip(fan_in, fan_out, strict=True)]
    mean = sum(degree) / len(degree)
    spread = math.sqrt(sum((d - mean) ** 2 for d in degree) / len(degree))
    near = [d for d in degree if abs(d - mean - spread) < 1e-9]  # which rounding decides
    above = sum(d > mean + spread for d in degree)
    assert abs(row["degree_hubs"] - above) <= len(near)
    for name, fan in (("fan_in_gini", fan_in), ("fan_out_gini", fan_out)):
        total = sum(fan)
        if total:
            slow = sum(abs(a - b) for a in fan for b in fan) / (2 * len(fan) * total)
            assert row[name] == pytest.approx(slow, abs=1e-9)
    if rows:
        steps = [e[2] - e[3] for e in rows]
        assert row["neighbour_share"] == pytest.approx(steps.count(1) / len(steps))
        assert row["mean_lookback"] == pytest.approx(sum(steps) / len(steps))
    size = {node: abs(float(relevance[node])) for node in present}
    total = sum(size.values())
    entropy = -sum(x / total * math.log(x / total) for x in size.values() if x)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-9)
    lower = sum(x for (site, _), x in size.items() if site < sites / 2 - 0.5)
    upper = sum(x for (site, _), x in size.items() if site > sites / 2 - 0.5)
    assert row["early_late"] == pytest.approx(lower / upper)


def test_a_summary_says_how_much_pruning_kept() -> None:
    graph = made(EDGES, 3, 3, relevance=RELEVANCE)
    pruned = graph.prune(threshold=1.5).connected()
    assert pruned.summary()["mass_kept"].item() == pytest.approx(pruned.mass / graph.mass)
    assert pruned.summary()["arrives"].item() == pytest.approx(4.5)


def test_input_relevance_by_hand() -> None:
    table = input_metrics(torch.tensor([4.0, 0.0, -2.0, 4.0]), top=1).set_index("part")
    every, target, contrast = (table.loc[part] for part in ("all", "target", "contrast"))
    assert every["mass"] == 10
    assert every["tokens"] == 3
    expected = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2))
    assert every["entropy"] == pytest.approx(expected)
    assert every["effective_tokens"] == pytest.approx(math.exp(expected))
    assert every["entropy_share"] == pytest.approx(expected / math.log(4))
    assert every["gini"] == pytest.approx((-3 * 0 - 1 * 2 + 1 * 4 + 3 * 4) / (4 * 10))
    assert every["top_share"] == pytest.approx(0.4)
    assert every["centre"] == pytest.approx(0.2 * 2 + 0.4 * 3)
    assert target["effective_tokens"] == pytest.approx(2)
    assert target["centre"] == pytest.approx(1.5)
    assert (contrast["entropy"], contrast["top_share"], contrast["centre"]) == (0.0, 1.0, 2.0)


def test_a_graph_s_input_is_its_first_site() -> None:
    table = made(EDGES, 3, 3, relevance=RELEVANCE).input_metrics(top=2).set_index("part")
    assert table.loc["all", "mass"] == 9
    assert table.loc["all", "top_share"] == pytest.approx(8 / 9)
    assert table.loc["contrast", "tokens"] == 0


def test_input_relevance_at_the_edges() -> None:
    nothing = input_metrics(torch.zeros(3))
    assert nothing["mass"].tolist() == [0, 0, 0]
    assert nothing["entropy"].isna().all()
    one = input_metrics(torch.tensor([2.0]))
    assert one["entropy"].tolist()[0] == 0
    assert math.isnan(one["entropy_share"].tolist()[0])
    for bad in (torch.zeros(0), torch.zeros(1, 3)):
        with pytest.raises(ValueError, match="shape"):
            input_metrics(bad)
    with pytest.raises(ValueError, match="top=0"):
        input_metrics(torch.ones(2), top=0)
