"""``graph.by``: the graph between segments, against sums over dense matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from truth import chat_tokenizers as forms
from truth.chat_templates import TEMPLATES
from truth.families import boot

import tl_contrastive_lrp as clrp

TEXT = "a b c d e f a c"
SPANS = {"one": (1, 3), "two": (3, 7)}
NAMES = ("rest", "one", "two", "rest")
CUTS = [(0, 1), (1, 3), (3, 7)]


def graphs(name: str, **options: Any) -> tuple[Any, Any, clrp.AttributionGraph, Any]:
    model = boot(name, torch.float64)
    objective = clrp.logit_diff(model, "a", " b")
    graph = clrp.attribution_graph(model, TEXT, objective, **options)
    return model, objective, graph, graph.by(SPANS)


def spans_of(graph: clrp.AttributionGraph) -> list[slice]:
    return [slice(a, b) for a, b in [*CUTS, (7, len(graph.str_tokens))]]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("heads", [False, True])
def test_sums_of_the_matrices(name: str, heads: bool) -> None:
    _, _, graph, merged = graphs(name, heads=heads, granularity="sublayer", details=True)
    spans = spans_of(graph)
    assert merged.str_tokens == NAMES
    assert type(merged) is type(graph)
    for source, target in graph.transitions:
        kinds: list[dict[str, Any]] = [{}]
        if heads:
            pairs = {*zip(graph.head.tolist(), graph.path.tolist(), strict=True)}
            kinds += [{"head": head, "path": path} for head, path in sorted(pairs)]
        for kind in kinds:
            fine = graph.matrix(source, target, **kind)
            coarse = merged.matrix(source, target, **kind)
            truth = torch.tensor([[fine[t, s].sum() for s in spans] for t in spans])
            assert (coarse - truth).abs().max() <= 1e-12 * max(1, fine.abs().sum())
    for site in range(len(graph.sites)):
        truth = torch.stack([graph.relevance[site, span].sum() for span in spans])
        assert torch.allclose(merged.relevance[site], truth, rtol=0, atol=1e-12)
    # Every node's incoming edges sum to it, as in the graph between tokens.
    for source, target in merged.transitions:
        off = (graph.matrix(source, target).sum(0) - graph.relevance[source]).abs().sum()
        total = merged.matrix(source, target).sum(0)
        assert (total - merged.relevance[source]).abs().max() <= off + 1e-12
        assert off < 1e-6 * graph.relevance[source].abs().sum()
    for detail, axis in (("dimensions", 1), ("neurons", 1), ("head_relevance", 2)):
        fine, coarse = getattr(graph, detail), getattr(merged, detail)
        truth = torch.stack(
            [fine.narrow(axis, s.start, s.stop - s.start).sum(axis) for s in spans], axis
        )
        assert torch.allclose(coarse, truth, rtol=0, atol=1e-12)


def test_float32_graphs_are_added_in_float64() -> None:
    model = boot("qwen3", torch.float32)
    graph = clrp.attribution_graph(model, TEXT, clrp.logit_diff(model, "a", " b"))
    merged = graph.by("word")
    assert merged.weight.dtype == merged.relevance.dtype == torch.float64
    assert float(merged.weight.sum()) == pytest.approx(
        float(graph.weight.double().sum()), abs=1e-12
    )


def test_its_methods_work(tmp_path: Path) -> None:
    _, _, graph, merged = graphs("qwen3")
    circuit = merged.prune(mass=0.9).connected()
    assert 0 < len(circuit.weight) <= len(merged.weight)
    assert len(merged.paths(3).to_frame()) > 0
    assert set(merged.nodes["token"]) == set(NAMES)
    assert merged.metrics()["edges"].sum() == len(merged.weight)
    assert merged.save_html(tmp_path / "graph.html").stat().st_size > 0
    assert merged.to_networkx().number_of_edges() == len(merged.weight)
    assert merged.subgraph(tokens=["one"]).weight.numel() > 0
    loaded = clrp.AttributionGraph.load(merged.save(tmp_path / "graph"))
    assert (loaded.segments, loaded.of_segments) == (merged.segments, True)
    assert torch.equal(loaded.weight, merged.weight)
    assert (merged.token_ids == -1).all()
    assert merged.final_pos == len(NAMES) - 1
    assert merged.str_tokens[merged.final_pos] == "rest"
    assert graph.of_segments is False


def test_what_runs_the_model_refuses_segments() -> None:
    model, objective, _, merged = graphs("qwen3")
    with pytest.raises(ValueError, match="between segments already"):
        merged.by("word")
    ends = (merged.sites[-2], 3), (merged.sites[-1], 3)
    with pytest.raises(ValueError, match="graph between tokens"):
        merged.explain_edge(*ends, model=model, objective=objective)
    with pytest.raises(ValueError, match="graph between tokens"):
        clrp.circuit_faithfulness(model, merged, objective, corrupted=TEXT)
    with pytest.raises(ValueError, match="segments"):
        dataclasses.replace(merged, segments=merged.segments[1:])


def test_the_graph_of_a_chat(tmp_path: Path) -> None:
    template, form = TEMPLATES["qwen3"]
    model = forms.booted(form)
    model.tokenizer.chat_template = template
    prompt = clrp.chat(model, [{"role": "user", "content": "The capital"}], answer="is")
    graph = clrp.attribution_graph(model, prompt, clrp.logit_diff(model, 200, 210))
    assert graph.segments == prompt.segments
    loaded = clrp.AttributionGraph.load(graph.save(tmp_path / "graph"))
    assert loaded.segments == prompt.segments
    by_message = loaded.by("message")
    assert by_message.str_tokens == ("template 1", "user 1", "template 2", "answer")
    result = clrp.attribute(model, prompt, clrp.logit_diff(model, 200, 210))
    frame = result.by("message")
    assert torch.allclose(
        by_message.relevance[0], torch.tensor(frame["relevance"].to_numpy()), atol=1e-9
    )


def test_several_explained_positions() -> None:
    model = boot("qwen3", torch.float64)

    def objective(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, [2, 4, 5], 3].sum()

    graph = clrp.attribution_graph(model, TEXT, objective)
    assert graph.final_positions == (2, 4, 5)
    merged = graph.by(SPANS)
    assert merged.final_positions == (1, 2)
    assert len(merged.connected().weight) > 0
