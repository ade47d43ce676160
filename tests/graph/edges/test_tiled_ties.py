"""Edges of exactly one weight: a run in tiles keeps those that pruning the whole graph keeps.

A model without positions whose queries are 0 attends to every token alike, and its values each come
from one number of a residual stream, so that nothing is rounded in a different order: a repeated
token's edges into one target weigh the same, bit for bit. Prunings are drawn so that they end
among equal edges.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from truth.families import make_hf, make_tokenizer

import tl_contrastive_lrp as clrp

COLUMNS = ("source_site", "target_site", "source_pos", "target_pos")
SIZES = (4, 11, 40)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    hf = make_hf("gpt2", torch.float64)
    heads = hf.config.n_head
    width = hf.config.n_embd // heads
    with torch.no_grad():
        hf.transformer.wpe.weight.zero_()
        for block in hf.transformer.h:
            weight = block.attn.c_attn.weight  # [d_model, q k v]
            weight.zero_()
            block.attn.c_attn.bias.zero_()
            for head in range(heads):  # one number of each head's values is not 0
                weight[3 * head + 1, 2 * heads * width + head * width] = 1.0
    folder = tmp_path_factory.mktemp("alike")
    hf.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Six tokens in a random order, 40 in all."""
    drawn = torch.randint(4, 10, (1, 40), generator=torch.Generator().manual_seed(5))
    drawn[:, 0] = 1
    return drawn


@pytest.fixture(scope="module")
def whole(model: Any, ids: Tensor) -> clrp.AttributionGraph:
    return graph(model, ids, memory="plain")


def graph(model: Any, ids: Tensor, **how: Any) -> clrp.AttributionGraph:
    actual: clrp.AttributionGraph = clrp.attribution_graph(
        model, ids, target=7, contrast=11, rules="attnlrp", progress=False, **how
    )
    return actual


def sizes(actual: clrp.AttributionGraph, step: tuple[int, int]) -> Tensor:
    """|weight| of a transition's edges, the largest first."""
    mine = (actual.source_site == step[0]) & (actual.target_site == step[1])
    return actual.weight[mine].abs().sort(descending=True).values


def ends_among_equals(whole: clrp.AttributionGraph, pruned: clrp.AttributionGraph) -> bool:
    """Whether, in some transition, the last edge kept weighs as much as the first one dropped."""
    for step in whole.transitions:
        every, kept = sizes(whole, step), len(sizes(pruned, step))
        if 0 < kept < len(every) and every[kept - 1] == every[kept]:
            return True
    return False


def prunings(whole: clrp.AttributionGraph) -> list[dict[str, Any]]:
    """The prunings that end among equal edges, in the transition that has most of them."""
    counts: list[dict[str, Any]] = [{"top_k": k} for k in range(1, 400, 13)]
    shares: list[dict[str, Any]] = [{"mass": p / 200} for p in range(4, 200, 7)]
    actual = [p for p in (*counts, *shares) if ends_among_equals(whole, whole.prune(**p))]
    return actual[:: max(1, len(actual) // 8)]


def test_equal_edges_are_equal_bit_for_bit(model: Any, ids: Tensor) -> None:
    """Else the rest shows nothing; in tiles too."""
    for how in ({"memory": "plain"}, {"memory": "tiled", "tile": 7}):
        actual = graph(model, ids, **how)
        matrix = actual.matrix(actual.sites[0], actual.sites[1])
        target = 39
        tokens, weights = ids[0, :target].tolist(), matrix[target, :target].tolist()
        assert len(set(zip(tokens, weights, strict=True))) == len(set(tokens)) == len(set(weights))


@pytest.mark.slow
@pytest.mark.parametrize("tile", SIZES)
def test_among_equal_edges_the_same_are_kept(
    tile: int, model: Any, ids: Tensor, whole: clrp.AttributionGraph
) -> None:
    chosen = prunings(whole)
    assert {key for pruning in chosen for key in pruning} == {"top_k", "mass"}
    for pruning in chosen:
        expected = whole.prune(**pruning)
        actual = graph(model, ids, memory="tiled", tile=tile, **pruning)
        for column in COLUMNS:
            assert getattr(actual, column).tolist() == getattr(expected, column).tolist(), pruning
        assert float((actual.weight - expected.weight).abs().max()) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("tile", SIZES)
def test_a_threshold_never_parts_equal_edges(
    tile: int, model: Any, ids: Tensor, whole: clrp.AttributionGraph
) -> None:
    """Thresholds just below and just above a weight that many edges share."""
    counts = Counter(sizes(whole, whole.transitions[0]).tolist())
    equal = [value for value, count in counts.items() if count > 2]
    assert len(equal) > 3
    for value in equal[:: len(equal) // 3]:
        for threshold in (value * (1 - 1e-9), value * (1 + 1e-9)):
            expected = whole.prune(threshold=threshold)
            actual = graph(model, ids, memory="tiled", tile=tile, threshold=threshold)
            for column in COLUMNS:
                assert getattr(actual, column).tolist() == getattr(expected, column).tolist()
