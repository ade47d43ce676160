"""Details sum to their node or edge, and equal the relevance that is read elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp

TOKENS = random_tokens()
FAMILIES = ("qwen3", "gpt2", "gemma2")


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    model = boot(request.param, torch.float32)
    objective = clrp.logit_diff(model, 7, 12)
    graph = clrp.attribution_graph(
        model, TOKENS, objective, granularity="sublayer", heads=True, details=True
    )
    return model, objective, graph


def test_dimensions_add_up_to_the_node(made: tuple[Any, Any, Any]) -> None:
    _, _, graph = made
    for site, name in enumerate(graph.sites):
        frame = graph.explain_node(name, 4, k=10_000)
        of_dimensions = frame[frame["part"] == "dimension"]["relevance"].sum()
        assert of_dimensions == pytest.approx(float(graph.relevance[site, 4]), rel=1e-4, abs=1e-6)


def test_heads_and_neurons_are_those_of_the_block_that_wrote(made: tuple[Any, Any, Any]) -> None:
    model, objective, graph = made
    _, relevance = clrp.run_with_relevance(model, TOKENS, objective)
    frame = graph.explain_node("blocks.1.hook_resid_pre", -1, k=10_000).set_index(["part", "name"])
    z = relevance["blocks.0.attn.hook_z"][0, -1].sum(-1)
    post = relevance["blocks.0.mlp.hook_post"][0, -1]
    for head, expected in enumerate(z.tolist()):
        assert frame.loc[("head", f"0.{head}"), "relevance"] == pytest.approx(expected, abs=1e-5)
    for neuron, expected in enumerate(post.tolist()):
        assert frame.loc[("neuron", f"0.{neuron}"), "relevance"] == pytest.approx(
            expected, abs=1e-5
        )
    middle = graph.explain_node("blocks.1.hook_resid_mid", 2)
    assert set(middle["part"]) == {"dimension", "head"}
    assert middle[middle["part"] == "head"]["name"].str.startswith("1.").all()
    assert set(graph.explain_node(0, 2)["part"]) == {"dimension"}


def test_parts_of_an_edge_add_up_to_it(made: tuple[Any, Any, Any]) -> None:
    model, objective, graph = made
    whole = clrp.attribution_graph(model, TOKENS, objective, granularity="sublayer")
    source, target = "blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid"
    for i, j in ((2, 5), (5, 5)):
        frame = graph.explain_edge((source, i), (target, j), k=10_000)
        edge = float(whole.matrix(source, target)[j, i])
        assert frame["relevance"].sum() == pytest.approx(edge, rel=1e-4, abs=1e-6)
        assert ("position-wise" in set(frame["part"])) == (i == j)
    sizes = frame["relevance"].abs().tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
def test_dimensions_of_an_edge_add_up_to_it(made: tuple[Any, Any, Any], rules: str) -> None:
    model, objective, _ = made
    graph = clrp.attribution_graph(model, TOKENS, objective, rules=rules, granularity="sublayer")
    for source, target, i, j in ((0, 1, 2, 5), (0, 1, 5, 5), (1, 2, 4, 4)):
        edge = float(graph.matrix(source, target)[j, i])
        frame = graph.explain_edge(
            (source, i), (target, j), k=10_000, model=model, objective=objective
        )
        assert set(frame["part"]) == {"dimension"}
        assert len(frame) == model.cfg.d_model
        assert frame["relevance"].sum() == pytest.approx(edge, rel=1e-4, abs=1e-6)


def test_details_survive_saving_and_pruning(made: tuple[Any, Any, Any], tmp_path: Any) -> None:
    _, _, graph = made
    pruned = graph.prune(mass=0.5).connected()
    loaded = clrp.AttributionGraph.load(pruned.save(tmp_path / "g.safetensors"))
    for name in ("dimensions", "neurons", "head_relevance"):
        assert torch.equal(getattr(loaded, name), getattr(graph, name))
    frame = loaded.explain_node(-1, -1)
    assert frame.equals(graph.explain_node(-1, -1))


def test_what_was_not_kept_is_named(made: tuple[Any, Any, Any]) -> None:
    model, objective, graph = made
    bare = clrp.attribution_graph(model, TOKENS, objective)
    with pytest.raises(ValueError, match="details=True"):
        bare.explain_node(0, 0)
    with pytest.raises(ValueError, match="heads=True"):
        bare.explain_edge((0, 0), (1, 0))
    with pytest.raises(ValueError, match="together"):
        bare.explain_edge((0, 5), (1, 5), model=model)
    with pytest.raises(ValueError, match=r"no edge from .* @5 to .* @2"):
        graph.explain_edge((0, 5), (1, 2))
    with pytest.raises(ValueError, match="Position 99"):
        graph.explain_node(0, 99)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"layers": [0.5]}, "whole numbers"),
        ({"layers": [99]}, "from 0 to 2"),
        ({"layers": [2]}, "from 0 to 2"),
        ({"layers": [0], "granularity": "sublayer"}, "granularity='block'"),
        ({"layers": [0], "heads": True}, "no single head"),
        ({"granularity": "token"}, "'block' or 'sublayer'"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], says: str) -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(ValueError, match=says):
        clrp.attribution_graph(model, TOKENS, clrp.logit_diff(model, 7, 12), **arguments)


def test_the_packed_route_equals_the_closed_form_on_adjacent_sites() -> None:
    from tl_contrastive_lrp.graph.edges.batched import batched_edges
    from tl_contrastive_lrp.rules.rule_sets import RULE_SETS

    model = boot("gpt2", torch.float32)
    objective = clrp.logit_diff(model, 7, 12)
    graph = clrp.attribution_graph(model, TOKENS, objective)
    pairs = [(graph.sites[0], graph.sites[1]), (graph.sites[1], graph.sites[2])]
    packed = batched_edges(model, TOKENS, objective, RULE_SETS[graph.rules], pairs, progress=False)
    for pair in pairs:
        expected = graph.matrix(*pair)
        assert (packed[pair] - expected).abs().max() <= 1e-5 * expected.abs().max()
