"""``relevance_patch``, and ``attribution_patch`` inside the rules: nodes and edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hooking import input_gradient
from torch import Tensor
from transformer_lens.tools.analysis import attribution_patching as ap
from truth import zoo
from truth.families import (
    FAMILIES,
    boot,
    hf_model,
    make_hf,
    make_tokenizer,
    random_tokens,
    true_float64,
)
from truth.linear_model import frozen, linear_model
from truth.oracle import contrast_seed, propagate

import tl_contrastive_lrp as clrp

A, B = 7, 12
EDGES = ap.EdgeAttributionConfig(granularity="edge")
RULES = ("attnlrp", "relp", "gim", "gradient")
relevance_patch = clrp.patching.relevance_patch


def pair(pos: int = 5, batch: int = 1) -> tuple[Tensor, Tensor]:
    return random_tokens(batch, pos, seed=1), random_tokens(batch, pos, seed=2)


def off(got: dict[Any, float], wanted: dict[Any, float]) -> float:
    """Largest difference relative to the largest wanted score; keys and order must be the same."""
    assert list(got) == list(wanted)
    largest = max(map(abs, wanted.values()))
    assert largest > 1e-3
    return max(abs(got[key] - wanted[key]) for key in wanted) / largest


# ---------------------------------------------------------------- nodes


@pytest.mark.parametrize("rules", ["attnlrp", "relp"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nodes_of_every_family_against_the_oracle(name: str, rules: str) -> None:
    model, hf = boot(name), hf_model(name)
    clean, corrupt = pair()
    truth = propagate(hf, corrupt, contrast_seed(corrupt, A, B, 48), rules)
    other = propagate(hf, clean, contrast_seed(clean, A, B, 48), rules)
    with true_float64(model):
        result = relevance_patch(model, clean, corrupt, clrp.logit_diff(model, A, B), rules=rules)
    assert isinstance(result, ap.AttributionResult)
    assert not result.edge_scores
    wanted = {}
    for node in result.node_scores:
        at = node.hook_name
        change = (other.activation[at] - truth.activation[at]) * truth.gradient[at]
        at_pos = change[0, node.position]
        wanted[node] = float((at_pos if node.head is None else at_pos[node.head]).sum())
    assert off(result.node_scores, wanted) < 1e-9
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    assert len(wanted) == 5 * (1 + n_layers * (n_heads + 1))


@pytest.mark.parametrize("name", FAMILIES)
def test_nodes_are_those_of_attribution_patch_inside_the_rules(name: str) -> None:
    """Batches too: scores are averages over pairs, in the same order of keys."""
    model = boot(name)
    clean, corrupt = pair(4, batch=2)
    objective = clrp.logit_diff(model, A, B)
    with clrp.lrp(model, "relp"):
        wanted = ap.attribution_patch(model, clean, corrupt, objective)
    got = relevance_patch(model, clean, corrupt, objective, rules="relp")
    assert off(got.node_scores, wanted.node_scores) < 1e-5
    assert [n for n, _ in got.top_nodes(3)] == [n for n, _ in wanted.top_nodes(3)]


def test_a_metric_of_a_single_example_as_attribution_patch_wants_it() -> None:
    model = boot("llama")
    clean, corrupt = pair(4, batch=2)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, A] - logits[0, -1, B]

    wanted = ap.attribution_patch(model, clean, corrupt, metric)
    got = relevance_patch(model, clean, corrupt, metric, rules="gradient")
    assert off(got.node_scores, wanted.node_scores) < 1e-5


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama-mha"])
def test_attribution_patch_works_unchanged_inside_the_rules(name: str, rules: str) -> None:
    """Its edges add up to its nodes only if every rule also holds where it forks the stream."""
    model = boot(name)
    clean, corrupt = pair()
    objective = clrp.logit_diff(model, A, B)
    with true_float64(model):
        with clrp.lrp(model, rules):
            nodes = ap.attribution_patch(model, clean, corrupt, objective)
            edges = ap.attribution_patch(model, clean, corrupt, objective, EDGES)
        ours = relevance_patch(model, clean, corrupt, objective, EDGES, rules=rules)
    by_node = {node: edges.node_scores[node] for node in nodes.node_scores}
    assert off(by_node, nodes.node_scores) < 1e-9
    assert off(ours.edge_scores, edges.edge_scores) < 1e-9
    assert off(ours.node_scores, edges.node_scores) < 1e-9
    assert not model.cfg.use_split_qkv_input
    assert not model.cfg.use_attn_result


def test_edges_in_compatibility_mode_and_over_pairs() -> None:
    from support.hooking import fresh

    model = fresh("gpt2", torch.float64)
    model.enable_compatibility_mode()
    clean, corrupt = pair(3, batch=2)
    objective = clrp.logit_diff(model, A, B)
    with clrp.lrp(model, "relp"):
        wanted = ap.attribution_patch(model, clean, corrupt, objective, EDGES)
    got = relevance_patch(model, clean, corrupt, objective, EDGES, rules="relp")
    assert off(got.edge_scores, wanted.edge_scores) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_rules_hold_on_streams_forked_per_head(name: str) -> None:
    """The flag that edges turn on changes no relevance, also with grouped queries."""
    model, ids = boot(name), random_tokens()
    with true_float64(model), clrp.lrp(model, "attnlrp"):
        wanted = input_gradient(model, ids, [])
        for switch in (model.set_use_split_qkv_input, model.set_use_attn_in):
            if switch == model.set_use_attn_in and model.cfg.n_heads != 3:
                continue  # TransformerLens shares out one copy a query head: another model then
            switch(True)
            try:
                got = input_gradient(model, ids, [])
            finally:
                switch(False)
            assert (got - wanted).abs().max() < 1e-9 * wanted.abs().max()


def test_hook_lists_refuse_streams_forked_per_head() -> None:
    model = boot("gpt2")
    hooks = clrp.lrp_hooks(model)
    clean, corrupt = pair()
    with (
        model.hooks(fwd_hooks=hooks),
        pytest.raises(clrp.errors.ModelStateError, match=r"use_split_qkv_input.*clrp\.lrp\(model"),
    ):
        ap.attribution_patch(model, clean, corrupt, clrp.logit_diff(model, A, B), EDGES)
    assert model.list_hooks() == {}


def ungrouped(directory: Any) -> Any:
    """The llama family's model with each key and value head repeated for its query heads."""
    from transformer_lens.model_bridge import TransformerBridge

    grouped, plain = make_hf("llama", torch.float32), make_hf("llama-mha", torch.float32)
    weights = dict(grouped.state_dict())
    for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
        by_head = weights[name].unflatten(0, (2, 8))
        weights[name] = by_head.repeat_interleave(2, 0).flatten(0, 1)
    plain.load_state_dict(weights)
    plain.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("rules", ["attnlrp", "gradient"])
def test_edges_with_grouped_queries(rules: str, tmp_path: Any) -> None:
    """Equal to TransformerLens' edges of the same model without grouping, where a group's query
    heads each have a copy of their key and value head, added up over the group."""
    model, plain = boot("llama"), ungrouped(tmp_path)
    clean, corrupt = pair()
    objective = clrp.logit_diff(model, A, B)
    with pytest.raises(ValueError, match="GQA"):
        ap.attribution_patch(model, clean, corrupt, objective, EDGES)
    with true_float64(model), true_float64(plain):
        assert torch.allclose(model(corrupt), plain(corrupt), atol=1e-9)
        with clrp.lrp(plain, rules):
            copies = ap.attribution_patch(plain, clean, corrupt, objective, EDGES)
        result = relevance_patch(model, clean, corrupt, objective, EDGES, rules=rules)
        nodes = relevance_patch(model, clean, corrupt, objective, rules=rules)
    wanted: dict[Any, float] = dict.fromkeys(result.edge_scores, 0.0)
    for (writer, reader), score in copies.edge_scores.items():
        if reader.kind in ("k_input", "v_input"):
            reader = ap.Node(reader.kind, reader.position, reader.layer, reader.head // 2)
        wanted[writer, reader] += score
    assert off(result.edge_scores, wanted) < 1e-9
    assert result.node_scores.keys() == nodes.node_scores.keys()
    by_node = {node: result.node_scores[node] for node in nodes.node_scores}
    assert off(by_node, nodes.node_scores) < 1e-9


def test_an_edge_is_what_ablating_it_measures_where_the_model_is_linear() -> None:
    """TransformerLens' ``faithfulness`` replaces writers at single readers: each edge's effect."""
    model = linear_model()
    clean, corrupt = pair(3)
    objective = clrp.logit_diff(model, A, B)
    with frozen(model):
        result = relevance_patch(model, clean, corrupt, objective, EDGES)
        edges = list(result.edge_scores)
        chosen = edges[:: max(1, len(edges) // 12)]
        for edge in chosen:
            all_but = [e for e in edges if e != edge]
            measured = ap.faithfulness(model, clean, corrupt, objective, all_but)
            gap = measured.full_metric - measured.corrupt_metric
            lost = (1.0 - measured.recovered) * gap
            assert abs(lost - result.edge_scores[edge]) < 1e-9 * max(1.0, abs(gap)), edge
    assert len(chosen) > 10


def test_results_feed_faithfulness() -> None:
    model = boot("llama-mha")
    clean, corrupt = pair()
    objective = clrp.logit_diff(model, A, B)
    result = relevance_patch(model, clean, corrupt, objective, EDGES)
    everything = ap.faithfulness(model, clean, corrupt, objective, result.top_edges(10**6))
    assert everything.total_edges == len(result.edge_scores) == everything.circuit_size
    assert abs(everything.recovered - 1.0) < 1e-4
    some = ap.faithfulness(model, clean, corrupt, objective, result.top_edges(300))
    none = ap.faithfulness(model, clean, corrupt, objective, [])
    assert abs(none.recovered) < 1e-4 < abs(some.recovered)


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "olmo2", "roberta", "laguna"])
def test_edges_are_refused_where_blocks_are_built_otherwise(name: str, snapshot: Any) -> None:
    """By structure, or (roberta, laguna) because they do not add up to their writers' scores."""
    model = zoo.boot(name)
    clean, corrupt = pair(3)
    model(clean)  # TransformerLens wires hooks of its own in a model's first forward
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.0.*granularity=\"node\""):
        relevance_patch(model, clean, corrupt, clrp.logit_diff(model, A, B), EDGES)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "bloom"])
def test_nodes_of_other_families(name: str) -> None:
    model = zoo.boot(name)
    clean, corrupt = pair(4)
    objective = clrp.logit_diff(model, A, B)
    with clrp.lrp(model, "relp"):
        wanted = ap.attribution_patch(model, clean, corrupt, objective)
    got = relevance_patch(model, clean, corrupt, objective, rules="relp")
    assert off(got.node_scores, wanted.node_scores) < 1e-5


def test_heads_that_transformer_lens_splits_wrongly_are_no_nodes() -> None:
    model = zoo.boot("deepseek_v2")
    clean, corrupt = pair(3)
    with pytest.raises(ValueError, match=r"hook_z' into 10 heads, but this model has 4"):
        relevance_patch(model, clean, corrupt, clrp.logit_diff(model, A, B))


def test_activations_that_do_not_exist_are_named() -> None:
    model = zoo.boot("gpt_neox")
    clean, corrupt = pair(3)
    cache = model.run_with_cache(clean)[1]
    with pytest.raises(ValueError, match=r"no HookPoint 'blocks\.0\.hook_resid_mid'"):
        clrp.patching.get_relevance_patch_resid_mid(
            model, corrupt, cache, clrp.logit_diff(model, A, B)
        )
