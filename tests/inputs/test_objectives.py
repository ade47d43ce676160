"""Several objectives at once are what each is alone, and share the forward and every block's run.

That a single one is right is tested against oracles elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiling import FIELDS, LIMIT, PLAIN, TILED
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.errors import ModelStateError

WAYS = {"plain": PLAIN, "tiled": TILED}


def model_of(name: str) -> Any:
    return zoo.boot(name[4:], torch.float32) if name.startswith("zoo:") else boot(name)


def three(model: Any) -> list[Any]:
    """Of other tokens, at another position, and one that contrasts the other way round."""
    return [
        clrp.logit_diff(model, 7, 11),
        clrp.logit_diff(model, 3, 5, pos=9),
        clrp.logit_diff(model, 11, 7),
    ]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= LIMIT * float(wanted.abs().max())


# With biases and with tangents, soft-caps, windows; attention by operation; experts; ALiBi.
NAMES = [*FAMILIES, "zoo:gpt_neo", "zoo:gpt_bigcode", "zoo:mpt", "zoo:mixtral", "zoo:gpt_oss"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_nodes_and_edges_are_those_of_each_alone(name: str, way: str) -> None:
    model, ids = model_of(name), random_tokens(1, 20)
    asked = three(model)
    results = clrp.attribute_each(model, ids, asked, **WAYS[way])
    graphs = clrp.attribution_graphs(model, ids, asked, **WAYS[way])
    assert len(results) == len(graphs) == 3
    for objective, result, graph in zip(asked, results, graphs, strict=True):
        alone = clrp.attribute(model, ids, objective, **PLAIN)
        for field in FIELDS[:3]:
            assert_close(getattr(result, field), getattr(alone, field))
        assert result.objective == str(objective) == graph.objective
        assert result.pos == objective.pos % 20
        assert result.delta == pytest.approx(alone.delta, abs=1e-4)
        single = clrp.attribution_graph(model, ids, objective, **PLAIN)
        assert_close(graph.relevance, single.relevance)
        for source, target in single.transitions:
            ends = single.sites[source], single.sites[target]
            assert_close(graph.matrix(*ends), single.matrix(*ends))
    assert_close(results[2].resid, -results[0].resid)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "more", [{"heads": True}, {"details": True}, {"mass": 0.7}, {"rules": "cplrp"}], ids=str
)
def test_whatever_else_a_graph_holds(way: str, more: dict[str, Any]) -> None:
    model, ids = boot("gpt2"), random_tokens(1, 20)
    asked = three(model)
    graphs = clrp.attribution_graphs(model, ids, asked, **WAYS[way], **more)
    for objective, graph in zip(asked, graphs, strict=True):
        single = clrp.attribution_graph(model, ids, objective, **PLAIN, **more)
        assert len(graph.weight) == len(single.weight)
        assert torch.equal(graph.source_pos, single.source_pos)
        assert_close(graph.weight, single.weight)
        for part in ("dimensions", "head_relevance", "neurons"):
            if getattr(single, part) is not None:
                assert_close(getattr(graph, part), getattr(single, part))


def test_layers_that_skip_blocks() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 12)
    asked = [clrp.logit_diff(model, 7, 11), clrp.logit_diff(model, 3, 5, pos=9)]
    graphs = clrp.attribution_graphs(model, ids, asked, layers=[0, 2], progress=False)
    for objective, graph in zip(asked, graphs, strict=True):
        single = clrp.attribution_graph(model, ids, objective, layers=[0, 2], progress=False)
        assert_close(graph.weight, single.weight)


@pytest.mark.parametrize("way", WAYS)
def test_the_forward_and_block_runs_are_shared(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 40)
    forwards, replays = [], []
    handle = model.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    real = tiled_backward.Backward._replayed
    monkeypatch.setattr(
        tiled_backward.Backward, "_replayed", lambda *args: (replays.append(1), real(*args))[1]
    )
    counts = []
    one = clrp.logit_diff(model, 7, 11)
    for asked in ([one], [one, clrp.logit_diff(model, 7, 12), clrp.logit_diff(model, 7, 13)]):
        clrp.attribute_each(model, ids, asked, **WAYS[way])
        counts.append((len(forwards), len(replays)))
        forwards.clear()
        replays.clear()
    handle.remove()
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_any_functions_of_the_logits() -> None:
    model, ids = boot("gemma3"), random_tokens(1, 15)

    def squares(logits: Tensor) -> Tensor:
        return logits[0, 4].square().mean()

    asked = [squares, clrp.logit_diff(model, 7, 11, pos=9)]
    for way in WAYS.values():
        for objective, result in zip(
            asked, clrp.attribute_each(model, ids, asked, **way), strict=True
        ):
            alone = clrp.attribute(model, ids, objective, **PLAIN)
            assert_close(result.resid, alone.resid)
            assert result.objective == alone.objective


def test_checkpoints_hold_all_objectives(tmp_path: Any) -> None:
    model, ids = boot("gpt2"), random_tokens(1, 20)
    asked, ways = three(model), {**TILED, "checkpoint_dir": tmp_path}
    first = clrp.attribution_graphs(model, ids, asked, top_k=30, **ways)
    (tmp_path / "block_0.safetensors").unlink()
    again = clrp.attribution_graphs(model, ids, asked, top_k=30, **ways)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.relevance, other.relevance)
        assert torch.equal(one.weight, other.weight)
    with pytest.raises(clrp.errors.FileFormatError, match="another run"):
        clrp.attribution_graphs(model, ids, asked[:2], top_k=30, **ways)


@pytest.mark.parametrize("call", [clrp.attribute_each, clrp.attribution_graphs])
def test_bad_lists_are_refused(call: Any) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 8)
    one = clrp.logit_diff(model, 7, 11)
    with pytest.raises(ValueError, match="is empty"):
        call(model, ids, [])
    with pytest.raises(TypeError, match="must be a list"):
        call(model, ids, one)
    with pytest.raises(TypeError, match="'x' among objectives"):
        call(model, ids, [one, "x"])


@pytest.mark.parametrize("way", list(WAYS))
def test_a_prompt_for_each_objective(way: str) -> None:
    """Prompts of different lengths, each explained as if it had come alone."""
    model = boot("gemma3")
    prompts = [random_tokens(1, 15), random_tokens(1, 9)[0], random_tokens(1, 15)]
    each = [clrp.logit_diff(model, 7, 11), clrp.logit_diff(model, 5, 6, pos=4), *three(model)[:1]]
    results = clrp.attribute_each(model, prompts, each, **WAYS[way])
    for prompt, objective, result in zip(prompts, each, results, strict=True):
        alone = clrp.attribute(model, prompt, objective, **WAYS[way])
        assert torch.equal(result.token_ids, prompt.reshape(-1))
        assert_close(result.resid, alone.resid)
        assert result.objective == alone.objective


def test_prompts_that_do_not_match_the_objectives_are_refused(tmp_path: Any) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 8)
    one = clrp.logit_diff(model, 7, 11)
    with pytest.raises(ValueError, match="2 prompts and 1 objectives"):
        clrp.attribute_each(model, [ids, ids], [one])
    with pytest.raises(ValueError, match="belong to one prompt"):
        clrp.attribute_each(model, [ids, ids], [one, one], checkpoint_dir=tmp_path)
    with pytest.raises(clrp.errors.PromptError, match="batch of 2"):
        clrp.attribute_each(model, random_tokens(2, 8), [one, one])


@pytest.mark.parametrize("memory", ["plain", "tiled"])
def test_functions_that_look_past_the_logits_are_refused(memory: Any) -> None:
    """An activation that a hook kept: in tiles it is no part of the run, in a graph of no edge."""
    model, ids, kept = boot("qwen3", torch.float32), random_tokens(1), {}
    way = {"memory": memory, "progress": False, "tile": 4 if memory == "tiled" else None}

    def keep(tensor: Any, hook: Any) -> None:  # noqa: ARG001
        kept["x"] = tensor

    def both(logits: Any) -> Any:
        return logits[0, -1, 7] + kept["x"].sum()

    def with_a_probe(logits: Any) -> Any:
        return (logits[0, -1] * probe).sum() + kept["x"].detach().sum()

    probe = torch.nn.Parameter(torch.ones(model.cfg.d_vocab))
    with model.hooks(fwd_hooks=[("blocks.0.hook_out", keep)]):
        for call in (clrp.attribute, clrp.attribution_graph):
            with pytest.raises(ModelStateError, match=r"besides the logits.*\.detach\(\)"):
                call(model, ids, both, **way)
            assert call(model, ids, with_a_probe, **way).delta
