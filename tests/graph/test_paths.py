"""Paths: the k best of all paths, with the strength that the module defines."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from support.graphs import edge_lists, facts, given, listed, made

from tl_contrastive_lrp.graph.graph import AttributionGraph
from tl_contrastive_lrp.graph.paths import CANCELLED, _between

# Three tokens, three sites: 0.6 and 0.4 of the final node, whose sources pass on all they have.
RELEVANCE = torch.tensor([[1.2, 0.5, 0.3], [1.5, 0.0, 0.5], [0.0, 0.0, 2.0]])
EDGES = [
    (2, 1, 2, 0, 1, 1, 1.5),
    (2, 1, 2, 2, -1, 0, 0.5),
    (1, 0, 0, 0, -1, 0, 1.0),
    (1, 0, 0, 1, 0, 2, 0.5),
    (1, 0, 2, 0, 0, 1, 0.2),
    (1, 0, 2, 2, -1, 0, 0.3),
]


def brute_force(graph: AttributionGraph) -> list[tuple[float, tuple[int, ...]]]:
    """Every path's (strength, edges from the input up), straight from the definition."""
    edges = listed(graph)
    rows: dict[tuple[int, int, int], float] = {}
    for t, s, j, *_, weight in edges:
        rows[t, s, j] = rows.get((t, s, j), 0.0) + abs(weight)

    def descend(site: int, pos: int) -> list[tuple[float, tuple[int, ...]]]:
        if site == 0:
            return [(1.0, ())]
        actual = []
        for index, (t, s, j, i, _, _, weight) in enumerate(edges):
            if (t, j) != (site, pos):
                continue
            net, gross = float(graph.relevance[t, j]), rows[t, s, j]
            if net == 0 or abs(net) < CANCELLED * gross:
                continue
            share = weight * math.copysign(1, net) / max(abs(net), gross)
            actual += [(share * rest, (*path, index)) for rest, path in descend(s, i)]
        return actual

    last = len(graph.sites) - 1
    start = float(graph.relevance[last, graph.final_pos])
    return [(start * share, path) for share, path in descend(last, graph.final_pos)]


def edges_of(graph: AttributionGraph, path: Any) -> tuple[int, ...]:
    index = {edge[:6]: n for n, edge in enumerate(listed(graph))}
    actual = []
    for step in range(len(path.weights)):
        head = -1 if path.heads is None else path.heads[step]
        kind = "position" if path.kinds is None else path.kinds[step]
        source, target = (graph.site_index(path.sites[step + up]) for up in (0, 1))
        key = (target, source, path.positions[step + 1], path.positions[step], head)
        actual.append(index[(*key, ("position", "value", "key").index(kind))])
    return tuple(actual)


@given(
    edge_lists(weights=st.floats(-4, 4, width=32).filter(lambda w: abs(w) > 1e-3)),
    st.integers(1, 12),
    st.integers(0, 10**6),
    examples=200,
)
def test_the_k_best_of_all_paths(case: Any, k: int, seed: int) -> None:
    edges, sites, pos, split = case
    relevance = torch.randn(sites, pos, generator=torch.Generator().manual_seed(seed))
    relevance[1, 0] = 0.0
    relevance[-1, -1] = 2.0
    graph = made(edges, sites, pos, split=split, relevance=relevance)
    every = {path: strength for strength, path in brute_force(graph)}
    actual = graph.paths(k)
    assert len(actual) == min(k, len(every))
    strongest = sorted((abs(v) for v in every.values()), reverse=True)[:k]
    assert [abs(path.strength) for path in actual] == pytest.approx(strongest, rel=1e-9)
    names = [edges_of(graph, path) for path in actual]
    assert len(set(names)) == len(names)
    for name, path in zip(names, actual, strict=True):
        assert path.strength == pytest.approx(every[name], rel=1e-9)
        assert path.share == path.strength / 2.0


@pytest.mark.parametrize("seed", range(12))
def test_the_k_best_of_all_paths_of_a_full_graph(seed: int) -> None:
    """Hundreds of paths or more, of very different strengths; some edges skip a site."""
    generator = torch.Generator().manual_seed(seed)
    sites, pos = 6, 4
    matrices = {
        (t - 1, t): torch.randn(pos, pos, generator=generator, dtype=torch.float64).exp()
        for t in range(1, sites)
    }
    matrices[0, 3] = torch.randn(pos, pos, generator=generator, dtype=torch.float64)
    relevance = torch.randn(sites, pos, generator=generator, dtype=torch.float64)
    graph = AttributionGraph.from_matrices(matrices, **facts(sites, pos, relevance))
    every = {path: strength for strength, path in brute_force(graph)}
    assert len(every) > 500
    actual = graph.paths(40)
    strongest = sorted(map(abs, every.values()), reverse=True)[:40]
    assert [abs(path.strength) for path in actual] == pytest.approx(strongest, rel=1e-9)
    assert [every[edges_of(graph, path)] for path in actual] == pytest.approx(
        [path.strength for path in actual], rel=1e-9
    )


@given(edge_lists(), st.randoms(), st.integers(1, 8))
def test_equally_strong_paths_come_in_one_order(case: Any, random: Any, k: int) -> None:
    edges, sites, pos, split = case
    first = made(edges, sites, pos, split=split).paths(k)
    random.shuffle(edges)
    assert made(edges, sites, pos, split=split).paths(k) == first


def test_strengths_by_hand() -> None:
    graph = made(EDGES, 3, 3, split=True, relevance=RELEVANCE)
    actual = graph.paths(10)
    assert actual.closed == 0
    assert [p.positions for p in actual] == [(0, 0, 2), (1, 0, 2), (2, 2, 2), (0, 2, 2)]
    assert [p.strength for p in actual] == pytest.approx([1.0, 0.5, 0.3, 0.2])
    assert actual[0].share == pytest.approx(0.5)
    assert actual[1].weights == pytest.approx((0.5, 1.5))
    assert actual[1].heads == (0, 1)
    assert actual[1].kinds == ("key", "value")
    assert actual[1].relevance == pytest.approx((0.5, 1.5, 2.0))
    assert actual[1].tokens == (" t1", " t0", " t2")
    assert str(actual[1]) == (
        "+0.5000 (25.0% of Δℓ): ' t1' @1 → [block 0 head 0 key] ' t0' @0 "
        "→ [block 1 head 1 value] ' t2' @2"
    )
    assert str(actual[2]) == "+0.3000 (15.0% of Δℓ): ' t2' @2 → stays there"
    assert str(actual).endswith(
        "4 paths from the first site reach the final node.\n"
        "All paths from the first token and special tokens: +1.2000 (60.0% of Δℓ)."
    )
    frame = actual.to_frame()
    assert len(frame) == 12
    second = frame[frame["path"] == 1]
    assert second["pos"].tolist() == [1, 0, 2]
    assert second["weight"].tolist()[:2] == pytest.approx([0.5, 1.5])
    assert math.isnan(second["weight"].tolist()[2])
    assert second["kind"].tolist() == ["key", "value", ""]


def test_strengths_add_up_to_the_input_s_relevance() -> None:
    """If no edges cancel, the paths that end in a token sum to exactly its relevance."""
    torch.manual_seed(0)
    n, steps = 5, 4
    relevance = torch.zeros(steps + 1, n, dtype=torch.float64)
    relevance[-1, -1] = 3.0
    matrices = {}
    for target in range(steps, 0, -1):
        shares = torch.rand(n, n, dtype=torch.float64).tril()
        shares /= shares.sum(1, keepdim=True)
        matrices[target - 1, target] = relevance[target][:, None] * shares
        relevance[target - 1] = matrices[target - 1, target].sum(0)
    graph = AttributionGraph.from_matrices(matrices, **facts(steps + 1, n, relevance))
    actual = graph.paths(10_000)
    ends = torch.zeros(n, dtype=torch.float64)
    for path in actual:
        ends[path.positions[0]] += path.strength
    assert torch.allclose(ends, relevance[0], atol=1e-12)
    # Pruning takes nothing from the paths that stay.
    kept = {path.positions: path.strength for path in actual}
    for path in graph.prune(mass=0.7).paths(100):
        assert path.strength == pytest.approx(kept[path.positions])


@given(edge_lists(adjacent=True), st.integers(0, 10**6))
def test_no_more_flows_than_the_final_node_has(case: Any, seed: int) -> None:
    edges, sites, pos, split = case
    relevance = torch.randn(sites, pos, generator=torch.Generator().manual_seed(seed)) / 10
    graph = made(edges, sites, pos, split=split, relevance=relevance)
    total = math.fsum(abs(path.strength) for path in graph.paths(10**6))
    assert total <= abs(float(relevance[-1, -1])) * (1 + 1e-12)


def test_a_node_whose_edges_cancel_is_closed_and_said_so() -> None:
    relevance = RELEVANCE.clone()
    relevance[1, 0] = 1e-4  # of Σ|w| 1.5
    graph = made(EDGES, 3, 3, split=True, relevance=relevance)
    actual = graph.paths(10)
    assert actual.closed == 1
    assert [p.positions for p in actual] == [(2, 2, 2), (0, 2, 2)]
    assert "through 1 nodes whose edges cancel" in str(actual)
    relevance[1, 0] = -2e-3
    opened = dataclasses.replace(graph, relevance=relevance).paths(1)[0]
    assert opened.strength == pytest.approx(-1.0)  # 2.0 · 1.5/2 · −1.0/1.5


@given(edge_lists(), st.integers(1, 8))
def test_sinks_can_be_left_out_and_are_added_up(case: Any, k: int) -> None:
    """The first token and special ones, against all paths gone through one by one."""
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    special = torch.zeros(pos, dtype=torch.bool)
    special[-1] = True
    graph = dataclasses.replace(graph, special=special)
    every = [(strength, graph.source_pos[path[0]].item()) for strength, path in brute_force(graph)]
    others = sorted((abs(v) for v, start in every if start not in (0, pos - 1)), reverse=True)
    kept, all_paths = graph.paths(k, special=False), graph.paths(k)
    assert [abs(path.strength) for path in kept] == pytest.approx(others[:k], rel=1e-9)
    assert all(path.positions[0] not in (0, pos - 1) for path in kept)
    sinks = math.fsum(v for v, start in every if start in (0, pos - 1))
    assert all_paths.special == kept.special == pytest.approx(sinks, rel=1e-9, abs=1e-12)


def test_no_path_at_all() -> None:
    actual = made(EDGES[:2], 3, 3, split=True, relevance=RELEVANCE).paths(3)
    assert len(actual) == 0
    assert str(actual) == "0 paths from the first site reach the final node."
    assert actual.to_frame().empty
    for k in (0, 2.5):
        with pytest.raises(ValueError, match=f"k={k}"):
            made(EDGES, 3, 3, split=True).paths(k)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("blocks.3.hook_resid_pre", "blocks.4.hook_resid_pre", "block 3"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post", "block 3"),
        ("blocks.3.hook_resid_pre", "blocks.3.hook_resid_mid", "block 3, first half"),
        ("blocks.3.hook_resid_mid", "blocks.4.hook_resid_pre", "block 3, second half"),
        ("blocks.3.hook_resid_mid", "blocks.3.hook_resid_post", "block 3, second half"),
        ("blocks.0.hook_resid_pre", "blocks.4.hook_resid_pre", "blocks 0-3"),
        ("hook_embed", "blocks.4.hook_resid_pre", "hook_embed → blocks.4.hook_resid_pre"),
    ],
)
def test_blocks_are_named(source: str, target: str, said: str) -> None:
    assert _between(source, target) == said


def test_parts_of_a_character_are_told_apart() -> None:
    """They have no text of their own in the prompt, but paths and hubs identify them."""
    graph = made(EDGES, 3, 3, split=True, relevance=RELEVANCE, str_tokens=("你", "", ""))
    paths = graph.paths(4)
    names = ("你¹⁄₃", "你²⁄₃", "你³⁄₃")
    for path in paths:
        assert path.tokens == tuple(names[pos] for pos in path.positions)
        assert f"'{names[path.positions[-1]]}' @{path.positions[-1]}" in str(path)
    for frame in (paths.to_frame(), graph.hubs()):
        assert list(frame["token"]) == [names[pos] for pos in frame["pos"]]
