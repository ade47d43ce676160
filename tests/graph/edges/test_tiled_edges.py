"""Edges computed in tiles are those of the plain engine, and streaming keeps the same ones."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from support.graphs import facts
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.graph.columns import EdgeColumns
from tl_contrastive_lrp.graph.pruning import PruneRule
from tl_contrastive_lrp.graph.streaming_prune import StreamingSelection

TILED: dict[str, Any] = {"memory": "tiled", "tile": 7, "progress": False}
COLUMNS = ("source_site", "target_site", "source_pos", "target_pos")
PRUNINGS: list[dict[str, Any]] = [
    {"mass": 0.85}, {"mass": 0.3}, {"mass": 1.0}, {"mass": 0.0}, {"top_k": 30}, {"top_k": 0},
    {"threshold": 0.02},
]  # fmt: skip


def assert_same_matrices(plain: clrp.AttributionGraph, tiled: clrp.AttributionGraph) -> None:
    assert plain.transitions == tiled.transitions
    assert float((plain.relevance - tiled.relevance).abs().max()) <= 1e-5 * float(
        plain.relevance.abs().max()
    )
    for source, target in plain.transitions:
        expected, got = (g.matrix(g.sites[source], g.sites[target]) for g in (plain, tiled))
        assert float(expected.abs().max()) > 0
        assert float((expected - got).abs().max()) <= 1e-5 * float(expected.abs().max())


def both(model: Any, ids: Tensor, **more: Any) -> tuple[Any, Any]:
    objective = clrp.logit_diff(model, 7, 11, pos=more.pop("pos", -1))
    return tuple(
        clrp.attribution_graph(model, ids, objective, **way, **more)
        for way in ({"memory": "plain"}, TILED)
    )  # type: ignore[return-value]


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3-bias"])
def test_edges_are_those_of_the_plain_way(name: str) -> None:
    plain, tiled = both(boot(name, torch.float32), random_tokens(1, 40))
    assert_same_matrices(plain, tiled)
    assert tiled.memory == "tiled (tile 7)"


# Constant patterns; norms that are not linear, so that keys and values need their derivatives.
@pytest.mark.parametrize("rules", ["cplrp", "gradient"])
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_other_rules_sublayers_and_a_position_in_the_middle(name: str, rules: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens(1, 30)
    assert_same_matrices(*both(model, ids, rules=rules, granularity="sublayer", pos=17))


# Attention by operation (its keys and values are read at their use), ALiBi, experts with sinks.
@pytest.mark.parametrize("name", ["gpt_neo", "mpt", "bloom", "youtu", "gpt_oss"])
def test_families_of_the_zoo(name: str) -> None:
    model = zoo.boot(name, torch.float32)
    ids = torch.randint(4, 48, (1, 23), generator=torch.Generator().manual_seed(1))
    assert_same_matrices(*both(model, ids))


def test_half_precision() -> None:
    assert_same_matrices(*both(boot("qwen2", torch.bfloat16), random_tokens(1, 24)))


@pytest.mark.parametrize("pruning", PRUNINGS, ids=str)
@pytest.mark.parametrize("name", ["gemma3", "gpt2"])
def test_pruned_edges_are_the_same(name: str, pruning: dict[str, Any]) -> None:
    """In float64, where no rounding puts two edges in another order."""
    plain, tiled = both(boot(name, torch.float64), random_tokens(1, 26), **pruning)
    for column in COLUMNS:
        assert getattr(plain, column).tolist() == getattr(tiled, column).tolist()
    assert str(plain.history[0]) == str(tiled.history[0])
    for expected, got in zip(
        plain.history[0].transitions, tiled.history[0].transitions, strict=True
    ):
        assert (expected.source, expected.target) == (got.source, got.target)
        assert (expected.edges_before, expected.edges_kept) == (got.edges_before, got.edges_kept)
        assert abs(expected.mass_before - got.mass_before) <= 1e-5 * expected.mass_before
        assert abs(expected.mass_kept - got.mass_kept) <= 1e-5 * expected.mass_before
    assert plain.prune(top_k=9).connected().sites == tiled.prune(top_k=9).connected().sites


def test_targets_below_the_node_threshold_are_not_expanded() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    whole, _ = both(model, ids)
    threshold = float(whole.relevance.abs().median())
    plain, tiled = both(model, ids, node_threshold=threshold)
    assert 0 < len(plain.weight) < len(whole.weight)
    assert_same_matrices(plain, tiled)
    assert tiled.node_threshold == threshold


def test_what_tiles_cannot_do_is_refused() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    with pytest.raises(ValueError, match="cannot run in tiles"):
        clrp.attribution_graph(model, ids, objective, **TILED, layers=[0])
    with pytest.raises(ValueError, match="Give one of"):
        clrp.attribution_graph(model, ids, objective, mass=0.5, top_k=3)
    with pytest.raises(ValueError, match="share from 0 to 1"):
        clrp.attribution_graph(model, ids, objective, mass=1.5)
    with pytest.raises(ValueError, match=r"top_k=2\.5 must be a whole number"):
        clrp.attribution_graph(model, ids, objective, top_k=2.5)


# ---------------------------------------------------------------- streaming alone


def streamed(matrix: Tensor, rule: PruneRule, bounds: list[int]) -> StreamingSelection:
    """Rows in tiles, the last ones first, each as wide as causality allows."""
    actual = StreamingSelection(rule)
    for start, stop in reversed(list(pairwise(bounds))):
        actual.add(matrix[start:stop, :stop], start, 0, start * (start + 1) // 2)
    return actual


def dense(matrix: Tensor, rule: PruneRule) -> clrp.AttributionGraph:
    """The same with the pruning of whole graphs."""
    n = len(matrix)
    columns = EdgeColumns()
    columns.add_dense(0, 1, matrix)
    graph = clrp.AttributionGraph.from_columns(**columns.columns(), **facts(2, n))
    return graph.prune(mass=rule.mass, threshold=rule.threshold, top_k=rule.top_k)


def draw(kind: str, n: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if kind == "ties":  # few different values, exact in every sum
        noise = (3 * noise).round()
    if kind == "heavy":
        noise = noise.sign() * (4 * noise).exp()
    if kind == "late":  # all mass in the rows that come last
        noise[n // 4 :] *= 1e-3
    return noise.to(dtype).tril()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["ties", "heavy", "even", "late"])
@pytest.mark.parametrize(
    "rule",
    [PruneRule(mass=p) for p in (0.0, 0.05, 0.5, 0.85, 0.999, 1.0)]
    + [PruneRule(top_k=k) for k in (0, 1, 40, 10**6)]
    + [PruneRule(threshold=t) for t in (0.0, 1.0, 3.0)],
    ids=str,
)
def test_streaming_chooses_what_the_whole_matrix_would(
    rule: PruneRule, kind: str, dtype: torch.dtype
) -> None:
    for seed, bounds in enumerate(([0, 60], [0, 1, 9, 10, 33, 60], list(range(61)))):
        matrix = draw(kind, 60, seed, dtype)
        actual = streamed(matrix, rule, bounds)
        rows, columns, weights = actual.kept()
        expected = dense(matrix, rule)
        assert rows.tolist() == expected.target_pos.tolist()
        assert columns.tolist() == expected.source_pos.tolist()
        assert torch.equal(weights, expected.weight)
        account, step = actual.account(0, 1, weights), expected.history[0].transitions[0]
        assert (account.edges_before, account.edges_kept) == (step.edges_before, step.edges_kept)
        assert account.mass_before == pytest.approx(step.mass_before, rel=1e-12)
        assert account.mass_kept == pytest.approx(step.mass_kept, rel=1e-12)


@pytest.mark.parametrize("rule", [PruneRule(mass=0.85), PruneRule(top_k=50)], ids=str)
def test_what_cannot_be_kept_is_dropped_on_the_way(rule: PruneRule) -> None:
    matrix = draw("heavy", 400, 0, torch.float32)
    actual, most = StreamingSelection(rule), 0
    for start in range(380, -1, -20):
        actual.add(matrix[start : start + 20, : start + 20], start, 0, start * (start + 1) // 2)
        most = max(most, sum(len(part[2]) for part in actual._parts))
    assert most < 0.1 * actual.edges


def test_a_weight_that_is_no_number_is_refused() -> None:
    matrix = torch.ones(3, 3)
    matrix[2, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        StreamingSelection(PruneRule()).add(matrix, 0, 0, 0)
