"""Pruning: exact, monotone, connected as networkx defines it, and accounted for completely."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import strategies as st
from support.graphs import edge_lists, given, listed, made

from tl_contrastive_lrp.cli.errors import message_of
from tl_contrastive_lrp.graph import pruning
from tl_contrastive_lrp.graph.graph import AttributionGraph
from tl_contrastive_lrp.graph.prune_history import TransitionKept
from tl_contrastive_lrp.graph.pruning import Pruned, PruneRule


def by(graph: AttributionGraph, **criterion: float) -> Pruned:
    """What one criterion keeps."""
    (pruned,) = pruning.by_size(graph, PruneRule(**criterion))
    return pruned


SHARES = st.floats(0, 1)
LIMITS = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0])
RULES: dict[str, tuple[Any, Callable[..., Pruned], int]] = {
    # What its setting may be, the rule, and whether a larger setting keeps more or fewer edges.
    "mass": (SHARES, lambda graph, share: by(graph, mass=share), +1),
    "threshold": (LIMITS, lambda graph, limit: by(graph, threshold=limit), -1),
    "node threshold": (LIMITS, pruning.by_node_threshold, -1),
    "top_k": (st.integers(0, 30), lambda graph, k: by(graph, top_k=k), +1),
}
FOUR = [(1, 0, 0, i, -1, 0, w) for i, w in enumerate([1.0, -4.0, 2.0, 2.0])]


def random_relevance(graph: AttributionGraph) -> AttributionGraph:
    generator = torch.Generator().manual_seed(len(graph.weight))
    values = torch.randint(-6, 7, graph.relevance.shape, generator=generator) / 2
    return dataclasses.replace(graph, relevance=values)


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data(), case=edge_lists())
def test_monotone(rule: str, data: Any, case: Any) -> None:
    settings, function, sign = RULES[rule]
    edges, sites, pos, split = case
    graph = random_relevance(made(edges, sites, pos, split=split))
    low, high = sorted([data.draw(settings), data.draw(settings)])
    fewer, more = (low, high) if sign > 0 else (high, low)
    assert bool((function(graph, fewer)[0] <= function(graph, more)[0]).all())


def by_transition(graph: AttributionGraph) -> dict[tuple[int, int], list[tuple[int, float]]]:
    actual: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for index, (t, s, *_, weight) in enumerate(listed(graph)):
        actual.setdefault((s, t), []).append((index, abs(weight)))
    return actual


@given(edge_lists(), SHARES)
def test_mass_keeps_the_fewest_largest_edges(case: Any, share: float) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    mask, _ = by(graph, mass=share)
    for rows in by_transition(graph).values():
        # Python's sort is stable: among equals the first in the graph's order.
        falling = sorted(rows, key=lambda row: -row[1])
        asked = Fraction(share) * sum(Fraction(w) for _, w in rows)
        count, mass = 0, Fraction(0)
        while count < len(rows) and (mass < asked or share == 1):
            mass += Fraction(falling[count][1])
            count += 1
        assert {i for i, _ in rows if mask[i]} == {i for i, _ in falling[:count]}


@given(
    edge_lists(weights=st.floats(-1e3, 1e3, width=32).filter(bool)),
    st.floats(0, 1),
)
def test_mass_kept_is_at_least_the_share_asked(case: Any, share: float) -> None:
    edges, sites, pos, split = case
    _, step = by(made(edges, sites, pos, split=split), mass=share)
    for row in step.transitions:
        assert row.mass_kept >= share * row.mass_before * (1 - 1e-14)
    assert step.mass_kept >= share * step.mass_before * (1 - 1e-14)


@given(edge_lists(), LIMITS, st.integers(0, 6))
def test_masks_equal_slow_loops(case: Any, limit: float, k: int) -> None:
    edges, sites, pos, split = case
    graph = random_relevance(made(edges, sites, pos, split=split))
    rows = listed(graph)
    mask, step = by(graph, threshold=limit)
    assert mask.tolist() == [abs(row[-1]) > limit for row in rows]
    assert dict(step.parameters) == {"threshold": limit, "relative": limit / 2}
    mask, _ = by(graph, relative=limit / 2)
    assert mask.tolist() == [abs(row[-1]) > limit for row in rows]
    mask, _ = pruning.by_node_threshold(graph, limit)
    assert mask.tolist() == [abs(float(graph.relevance[r[0], r[2]])) > limit for r in rows]
    mask, _ = by(graph, top_k=k)
    for part in by_transition(graph).values():
        falling = sorted(part, key=lambda row: -row[1])
        assert {i for i, _ in part if mask[i]} == {i for i, _ in falling[:k]}


def test_ties_go_to_the_first_edge() -> None:
    graph = made(FOUR, 2, 4)
    assert by(graph, top_k=2)[0].tolist() == [False, True, True, False]
    # 4 + 2 of 9 is 67 %.
    assert by(graph, mass=0.6)[0].tolist() == [False, True, True, False]
    assert by(graph, mass=0.67)[0].tolist() == [False, True, True, True]
    assert by(graph, mass=1.0)[0].tolist() == [True] * 4
    assert by(graph, mass=0.0)[0].tolist() == [False] * 4


def test_a_share_of_one_keeps_what_rounding_hides() -> None:
    graph = made([(1, 0, 0, 0, -1, 0, 1.0), (1, 0, 0, 1, -1, 0, 1e-30)], 2, 2)
    assert by(graph, mass=1.0)[0].tolist() == [True, True]


def test_a_threshold_between_two_floats() -> None:
    """0.1 in float32 is above 0.1 in float64, and the numbers are compared exactly."""
    graph = made([(1, 0, 0, 0, -1, 0, 0.1)], 2, 1)
    assert by(graph, threshold=0.1)[0].tolist() == [True]
    assert by(graph, threshold=0.100000001)[0].tolist() == [True]
    assert by(graph, threshold=0.1000001)[0].tolist() == [False]


@given(edge_lists(), SHARES)
def test_connected_equals_reachability_in_networkx(case: Any, share: float) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split).prune(mass=share)
    mask, step = pruning.connected(graph)
    other = nx.MultiDiGraph()
    other.add_node((sites - 1, pos - 1))
    for t, s, j, i, *_ in listed(graph):
        other.add_edge((t, j), (s, i))
    reached = nx.descendants(other, (sites - 1, pos - 1)) | {(sites - 1, pos - 1)}
    assert mask.tolist() == [(t, j) in reached for t, _, j, *_ in listed(graph)]
    part = graph.connected()
    assert set(listed(part)) <= set(listed(graph))
    assert listed(part.connected()) == listed(part)
    assert part.history == (*graph.history, step)


@given(edge_lists(), SHARES, LIMITS, st.integers(0, 6))
def test_rules_together_keep_what_each_keeps(case: Any, share: float, limit: float, k: int) -> None:
    edges, sites, pos, split = case
    graph = random_relevance(made(edges, sites, pos, split=split))
    before = listed(graph)
    pruned = graph.prune(mass=share, threshold=limit, top_k=k, node_threshold=limit / 2)
    alone = [
        graph.prune(mass=share), graph.prune(threshold=limit), graph.prune(top_k=k),
        graph.prune(node_threshold=limit / 2),
    ]  # fmt: skip
    assert set(listed(pruned)) == set.intersection(*(set(listed(g)) for g in alone))
    assert listed(graph) == before
    assert graph.history == ()
    # The account is without a gap: each step starts with what the one before it kept.
    counts = [len(before)]
    for step in pruned.history:
        assert step.edges_before == counts[-1]
        counts.append(step.edges_kept)
    assert counts[-1] == len(pruned.weight)
    assert pruned.history[-1].mass_kept == pytest.approx(pruned.mass, rel=1e-12)
    assert pruned.history[0].mass_before == pytest.approx(graph.mass, rel=1e-12)


def test_the_account_by_hand() -> None:
    edges = [*FOUR, (2, 1, 3, 0, -1, 0, 5.0), (2, 1, 3, 1, -1, 0, -0.5)]
    pruned = made(edges, 3, 4).prune()
    (step,) = pruned.history
    assert step.name == "mass"
    assert step.parameters == (("share", 0.85),)
    assert step.transitions == (
        TransitionKept(0, 1, 4, 3, 9.0, 8.0),
        TransitionKept(1, 2, 2, 1, 5.5, 5.0),
    )
    assert (step.edges_before, step.edges_kept) == (6, 4)
    assert step.share_kept == pytest.approx(13 / 14.5)
    assert str(step) == "mass (share 0.85): kept 4 of 6 edges, 89.7% of their mass"
    frame = step.to_frame()
    assert frame["share_kept"].tolist() == pytest.approx([8 / 9, 5 / 5.5])


def test_of_nothing_all_is_kept() -> None:
    """A transition without edges, in the table and in the sum."""
    (empty,) = made([], 2, 2, transitions=[(0, 1)]).prune().history
    assert empty.transitions == (TransitionKept(0, 1, 0, 0, 0.0, 0.0),)
    assert empty.share_kept == 1.0
    assert empty.to_frame()["share_kept"].tolist() == [1.0]


def test_subgraphs() -> None:
    edges = [*FOUR, (2, 1, 3, 0, -1, 0, 5.0), (2, 1, 3, 1, -1, 0, -0.5)]
    graph = made(edges, 3, 4, str_tokens=(" a", " b", " a", " c"))
    assert listed(graph.subgraph(positions=[0, -1])) == [edges[0], edges[3], edges[4]]
    assert listed(graph.subgraph(tokens=[" a", " c"])) == [edges[0], edges[2], edges[3], edges[4]]
    assert listed(graph.subgraph(tokens=" a", positions=range(2))) == [edges[0]]
    top = graph.subgraph(sites=["blocks.1.hook_resid_pre", -1])
    assert listed(top) == edges[4:]
    assert "sites 1, 2" in str(top)
    assert listed(graph.subgraph(positions=[])) == []
    assert listed(graph.subgraph(positions=0, sites=[0, 1])) == [edges[0]]
    assert listed(graph.subgraph(sites=1)) == []
    with pytest.raises(TypeError, match="integer"):
        graph.subgraph(positions=[0.7])
    mask = torch.tensor([True, False, False, False, False, True])
    chosen = graph.where(mask)
    assert listed(chosen) == [edges[0], edges[5]]
    assert "chosen edges: kept 2 of 6 edges" in str(chosen)
    for bad in (mask[:2], torch.tensor([0, 5]), [True]):
        with pytest.raises(ValueError, match=r"one bool per edge, \(6,\)"):
            graph.where(bad)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mass": 1.1}, "mass=1.1"),
        ({"mass": float("nan")}, "mass=nan"),
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"threshold": 1.0, "relative": 0.5}, "either"),
        ({"relative": float("inf")}, "relative=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_k": 2.5}, "top_k=2.5 must be a whole number"),
        ({"node_threshold": float("nan")}, "^node_threshold=nan"),
    ],
)
def test_settings_that_make_no_sense(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made(FOUR, 2, 4).prune(**asked)


def test_what_is_not_there() -> None:
    graph = made(FOUR, 2, 4, delta=0.0)
    with pytest.raises(ValueError, match="Δℓ is 0"):
        graph.prune(relative=0.1)
    assert "relative None" in str(graph.prune(threshold=0.1))
    for asked, said in (
        ({"tokens": ["t1"]}, "' t0'"),
        ({"positions": [4]}, "4 tokens"),
        ({"sites": ["x"]}, "no site"),
        ({}, "Give positions="),
    ):
        with pytest.raises(ValueError, match=said):
            graph.subgraph(**asked)


def test_subgraphs_by_id_and_by_a_part_of_a_character() -> None:
    """What tables and paths show can be passed as ``tokens``: ids and parts of a character."""
    edges = [(1, 0, i, i, -1, 0, 1.0 + i) for i in range(4)]
    graph = made(
        edges, 2, 4, str_tokens=(" a", "é", "", ""), token_ids=torch.tensor([7, 200, 201, 202])
    )
    assert listed(graph.subgraph(tokens="id:201")) == [edges[2]]
    assert listed(graph.subgraph(tokens=["id:7 a", " a", "id:202"])) == [edges[0], edges[3]]
    assert listed(graph.subgraph(tokens="é²⁄₂")) == [edges[2]]
    assert listed(graph.subgraph(tokens=["é¹⁄₂", "é"])) == [edges[1]]
    assert listed(graph.subgraph(tokens="")) == edges[2:]
    with pytest.raises(ValueError, match=r"No token of the prompt is 'id:20'.*id:123"):
        graph.subgraph(tokens="id:20")
    # A token without a name is shown as its id: the text comes first.
    shown = made(edges, 2, 4, str_tokens=("a", "id:0", "b", "c"))
    assert listed(shown.subgraph(tokens="id:0")) == [edges[1]]


def test_a_rule_is_checked_once_and_spelled_for_both_front_ends() -> None:
    """The command line names its options where Python names its arguments."""
    for settings, in_python, in_the_shell in (
        ({"top_k": -1}, "top_k=-1 must be a whole number", "--top-k=-1 must be a whole number"),
        ({"mass": 1.1}, "mass=1.1 must be a share", "--mass 1.1 must be a share"),
        (
            {"threshold": 1.0, "relative": 0.5},
            "Give either threshold (in logits) or relative (to |Δℓ|).",
            "Give either --threshold (in logits) or --relative (to |Δℓ|).",
        ),
    ):
        with pytest.raises(ValueError, match=r"must be|Give either") as caught:
            PruneRule(**settings)
        assert str(caught.value).startswith(in_python)
        assert message_of(caught.value).startswith(in_the_shell)


def test_criteria_of_a_rule() -> None:
    rule = PruneRule(mass=0.5, top_k=3, relative=0.25)
    assert rule
    assert not PruneRule()
    assert rule.criteria == {"mass": 0.5, "top_k": 3, "relative": 0.25}
    assert PruneRule(**rule.criteria) == rule
    assert list(rule.split()) == [
        PruneRule(relative=0.25), PruneRule(mass=0.5), PruneRule(top_k=3)
    ]  # fmt: skip
    assert rule.in_logits(-2.0) == PruneRule(mass=0.5, top_k=3, threshold=0.5)
    assert PruneRule(mass=0.5).single() == PruneRule(mass=0.5)
    assert PruneRule().single() == PruneRule()
    with pytest.raises(ValueError, match="Give one of mass=, threshold= and top_k= here"):
        rule.single()
