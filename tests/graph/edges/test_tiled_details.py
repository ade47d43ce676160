"""In tiles, edges by head and the details of nodes equal those of the plain engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiling import LIMIT, PLAIN, TILED
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.graph.assembly.selected import _diagonal
from tl_contrastive_lrp.graph.pruning import PruneRule

COLUMNS = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")


def both(model: Any, **more: Any) -> tuple[clrp.AttributionGraph, clrp.AttributionGraph]:
    ids, objective = random_tokens(1, 30), clrp.logit_diff(model, 7, 11, pos=25)
    plain = clrp.attribution_graph(model, ids, objective, **PLAIN, **more)
    return plain, clrp.attribution_graph(model, ids, objective, **TILED, **more)


def by_key(graph: clrp.AttributionGraph) -> torch.Tensor:
    """The weight of every possible edge, 0 if there is none."""
    heads = max(int(graph.head.max()) + 2, 6)  # type: ignore[union-attr]
    n = len(graph.str_tokens)
    dense = torch.zeros(len(graph.sites), n, n, heads, 3)
    assert graph.head is not None
    assert graph.path is not None
    at = (graph.target_site, graph.target_pos, graph.source_pos, graph.head + 1, graph.path)
    dense[tuple(x.long() for x in at)] = graph.weight
    return dense


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) <= LIMIT * float(expected.abs().max())


@pytest.mark.parametrize("name", [*FAMILIES, "zoo:gpt_neo", "zoo:gpt_bigcode", "zoo:mpt"])
def test_edges_by_head_and_path(name: str) -> None:
    at_zoo = name.startswith("zoo:")
    model = zoo.boot(name[4:], torch.float32) if at_zoo else boot(name, torch.float32)
    plain, tiled = both(model, heads=True)
    assert len(set(plain.head.tolist())) > 2  # type: ignore[union-attr]
    assert_close(by_key(tiled), by_key(plain))


@pytest.mark.parametrize(
    "pruning", [{"mass": 0.8}, {"threshold": 0.01}, {"top_k": 40}, {"mass": 0.8, "rules": "cplrp"}]
)
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3"])
def test_pruned_edges_by_head_are_the_same(name: str, pruning: dict[str, Any]) -> None:
    plain, tiled = both(boot(name, torch.float32), heads=True, granularity="sublayer", **pruning)
    assert len(plain.weight) > 0
    for column in COLUMNS:
        assert torch.equal(getattr(plain, column), getattr(tiled, column)), column
    assert_close(tiled.weight, plain.weight)
    (expected,), (got,) = plain.history, tiled.history
    for one, other in zip(expected.transitions, got.transitions, strict=True):
        assert (one.edges_before, one.edges_kept) == (other.edges_before, other.edges_kept)


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, [0, 2, 3]), (0.5, [3])])
def test_what_arrives_in_parts_that_cancel_is_passed_on(threshold: float, kept: list[int]) -> None:
    """Between attention and MLP a state's relevance may sum to 0 and still be passed on."""
    source, target = torch.tensor([1.0, 0.0, -2.0, 3.0]), torch.tensor([0.0, 1.0, 0.0, 3.0])
    rows, columns, weights = _diagonal(PruneRule(), source, target, threshold).kept()
    assert rows.tolist() == columns.tolist() == kept
    assert weights.tolist() == source[kept].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, "zoo:youtu", "zoo:mixtral"])
def test_details(name: str) -> None:
    at_zoo = name.startswith("zoo:")
    model = zoo.boot(name[4:], torch.float32) if at_zoo else boot(name, torch.float32)
    plain, tiled = both(model, details=True)
    for part in ("dimensions", "head_relevance", "neurons"):
        expected = getattr(plain, part)
        if expected.numel():
            assert float(expected.abs().max()) > 0
            assert_close(getattr(tiled, part), expected)
        else:
            assert getattr(tiled, part).shape == expected.shape
    site = plain.sites[1]
    expected, got = (graph.explain_node(site, 20) for graph in (plain, tiled))
    assert list(expected.columns) == list(got.columns)
    assert expected.iloc[:5, 0].tolist() == got.iloc[:5, 0].tolist()
