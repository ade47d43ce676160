"""attribution_graph of answer_diff(): the sum of two graphs, one for each answer.

The truth is two graphs of hand-written objectives, their dense matrices subtracted, edge by edge.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.graphs import same
from support.grids import diagonal
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens
from truth.float64 import true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.result import report_of
from tl_contrastive_lrp.errors import ModelStateError

RULES = ("attnlrp", "cplrp", "gim")
TARGET, CONTRAST = [7, 12, 30], [9, 5]
N_TARGET, N_CONTRAST = 2, 1  # what the model reads of them


def summed(ids: list[int], start: int) -> Callable[[Tensor], Tensor]:
    def objective(logits: Tensor) -> Tensor:
        return torch.stack([logits[0, start + j, i] for j, i in enumerate(ids)]).sum()

    return objective


def followed(prompt: Tensor, ids: list[int]) -> Tensor:
    return torch.cat([prompt, torch.tensor([ids], dtype=prompt.dtype)], dim=1)


def two_graphs(model: Any, prompt: Tensor, **how: Any) -> list[clrp.AttributionGraph]:
    start = prompt.shape[1] - 1
    return [
        clrp.attribution_graph(model, followed(prompt, ids[:-1]), summed(ids, start), **how)
        for ids in (TARGET, CONTRAST)
    ]


def placed(one: Tensor, other: Tensor, n: int) -> Tensor:
    """Two graphs' matrices [target, source], or rows [..., pos], on the positions of their sum."""
    axes = 2 if one.shape[-1] == one.shape[-2] else 1
    size = n + N_TARGET + N_CONTRAST
    at = (
        torch.arange(n + N_TARGET),
        torch.cat([torch.arange(n), n + N_TARGET + torch.arange(N_CONTRAST)]),
    )
    total = one.new_zeros(size, size) if axes == 2 else one.new_zeros(*one.shape[:-1], size)
    for part, pos, sign in ((one, at[0], 1), (other, at[1], -1)):
        if axes == 2:
            total[pos[:, None], pos] += sign * part
        else:
            total[..., pos] += sign * part
    return total


def assert_sum(
    found: clrp.AttributionGraph, graphs: list[clrp.AttributionGraph], n: int, bound: float,
    **part: Any,
) -> None:  # fmt: skip
    one, other = graphs
    scale = max(float(graph.relevance.abs().max()) for graph in graphs)
    wanted = placed(one.relevance, other.relevance, n)
    assert (found.relevance - wanted).abs().max() <= bound * scale
    for ends in one.transitions:
        matrices = [graph.matrix(*ends, **part) for graph in graphs]
        largest = max(scale, *(float(m.abs().max()) for m in matrices))
        wanted = placed(*matrices, n)
        assert (found.matrix(*ends, **part) - wanted).abs().max() <= bound * largest


def assert_columns_sum(graph: clrp.AttributionGraph, bound: float) -> None:
    scale = float(graph.relevance.abs().max())
    for source, target in graph.transitions:
        sums = graph.matrix(source, target).double().sum(0)
        assert (sums - graph.relevance[source]).abs().max() <= bound * scale


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULES))
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_the_graph_is_the_difference(name: str, rules: str, granularity: str) -> None:
    model, ids = boot(name), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    how: dict[str, Any] = {"rules": rules, "granularity": granularity}
    with true_float64(model):
        found = clrp.attribution_graph(model, ids, answers, **how)
        graphs = two_graphs(model, ids, **how)
    assert_sum(found, graphs, 9, PROMISED[torch.float64])
    assert_columns_sum(found, PROMISED[torch.float64])
    assert found.final_positions == (8, 9, 10, 11)
    assert found.token_ids.tolist() == [*ids[0].tolist(), 7, 12, 9]
    texts = found.str_tokens[9:]
    assert [text.partition("]")[0] for text in texts] == ["[target", "[target", "[contrast"]
    # no edge joins the answers
    ends = found.source_pos.long(), found.target_pos.long()
    assert not bool(((ends[0] >= 9) & (ends[0] < 11) & (ends[1] == 11)).any())
    assert bool((found.weight != 0).all())


@pytest.mark.parametrize(("name", "rules"), diagonal(COVERED, RULES))
def test_one_token_each_is_the_graph_of_logit_diff(name: str, rules: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens()
    answers = clrp.answer_diff(model, ids, target=[7], contrast=[12])
    how: dict[str, Any] = {"rules": rules, "mass": 0.9}
    found = clrp.attribution_graph(model, ids, answers, **how)
    same(found, clrp.attribution_graph(model, ids, clrp.logit_diff(model, 7, 12), **how))


@pytest.mark.parametrize("name", FAMILIES)
def test_heads_and_details(name: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    how: dict[str, Any] = {"heads": True, "details": True}
    found = clrp.attribution_graph(model, ids, answers, **how)
    graphs = two_graphs(model, ids, **how)
    bound = PROMISED[torch.float32]
    assert_sum(found, graphs, 9, bound)
    assert_columns_sum(found, bound)
    for part in ({"head": 1, "path": "value"}, {"head": 2, "path": "key"}, {"path": "position"}):
        assert_sum(found, graphs, 9, bound, **part)
    assert found.head_relevance is not None
    heads = [graph.head_relevance for graph in graphs]
    wanted = placed(heads[0], heads[1], 9)  # type: ignore[arg-type]
    assert (found.head_relevance - wanted).abs().max() <= bound * wanted.abs().max()
    assert found.dimensions is not None
    largest = found.dimensions.abs().max()
    assert (found.dimensions.sum(-1) - found.relevance).abs().max() <= bound * 24 * largest
    assert found.neurons is not None
    assert found.neurons.shape == (model.cfg.n_layers, 12, 40)


@pytest.mark.parametrize("how", [
    {"memory": "tiled", "tile": 4, "progress": False, "attention": "eager"},
    {"memory": "plain", "attention": "fused"},
    {"memory": "tiled", "tile": 5, "progress": False, "attention": "fused"},
])  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_tiled_and_fused_are_plain_and_eager(name: str, how: dict[str, Any]) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    plain = clrp.attribution_graph(model, ids, answers, memory="plain", attention="eager")
    other = clrp.attribution_graph(model, ids, answers, **how)
    scale = float(plain.relevance.abs().max())
    for ends in plain.transitions:
        wanted = plain.matrix(*ends)
        bound = 4 * PROMISED[torch.float32] * max(scale, float(wanted.abs().max()))
        assert (other.matrix(*ends) - wanted).abs().max() <= bound


def test_edges_are_chosen_after_the_sum() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    graph = clrp.attribution_graph(model, ids, answers)
    for criterion in ({"mass": 0.8}, {"top_k": 7}, {"threshold": 0.05}):
        found = clrp.attribution_graph(model, ids, answers, **criterion)
        wanted = graph.prune(**criterion)
        assert torch.equal(found.weight, wanted.weight)
        assert torch.equal(found.source_pos, wanted.source_pos)
        assert found.history == wanted.history
    threshold = float(graph.relevance.abs().median())
    found = clrp.attribution_graph(model, ids, answers, node_threshold=threshold)
    assert found.node_threshold == threshold
    targets = found.relevance[found.target_site.long(), found.target_pos.long()]
    assert bool((targets.abs() > threshold).all())
    wanted = graph.prune(node_threshold=threshold)
    assert torch.equal(found.weight, wanted.weight)
    assert 0 < len(found.weight) < len(graph.weight)


@pytest.mark.parametrize("swapped", [False, True])
def test_where_one_answer_begins_the_other(swapped: bool) -> None:
    model, ids = boot("llama", torch.float32), random_tokens()
    sides = ([8, 9, 10, 11], [8, 9])
    target, contrast = sides[::-1] if swapped else sides
    answers = clrp.answer_diff(model, ids, target=target, contrast=contrast)
    found = clrp.attribution_graph(model, ids, answers)
    rest = clrp.attribution_graph(model, followed(ids, [8, 9, 10]), summed([10, 11], 10))
    sign = -1 if swapped else 1
    assert torch.equal(found.relevance, sign * rest.relevance)
    assert torch.equal(found.weight, sign * rest.weight)
    assert found.final_positions == (10, 11)


def test_it_is_an_ordinary_graph(tmp_path: Path) -> None:
    model = clrp.load_demo_model()
    case = clrp.load_demo_cases("code")[0]
    answers = clrp.answer_diff(
        model, case.prompt, target=f"{case.target} = first", contrast=f"{case.contrast} first"
    )
    graph = clrp.attribution_graph(model, case.prompt, answers)
    result = clrp.attribute(model, case.prompt, answers)
    circuit = graph.prune(mass=0.5).connected()
    same(clrp.AttributionGraph.load(circuit.save(tmp_path / "g.safetensors")), circuit)
    assert "[contrast]" in str(circuit.show())
    assert "[target]" in report_of(result, graph=circuit)  # its tokens are those of the result
    assert (graph.target, graph.contrast) == (result.target, result.contrast)
    assert graph.delta == pytest.approx(result.delta, rel=1e-5)


def test_both_graphs_have_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 20)
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    room = importlib.import_module("tl_contrastive_lrp.graph.assembly.attribution_graph")
    original = room._memory_plan

    def little(*args: Any) -> Any:
        import dataclasses

        plan = original(*args)
        return dataclasses.replace(plan, tile=8, free_bytes=100)

    monkeypatch.setattr(room, "_memory_plan", little)
    with pytest.raises(ModelStateError, match="only when they are added up"):
        clrp.attribution_graph(model, ids, answers, mass=0.8)


@pytest.mark.parametrize("split", [False, True])
def test_edges_with_the_same_ends_are_added_up(split: bool) -> None:
    """Beside a dictionary of edges; what cancels is no edge."""
    room = importlib.import_module("tl_contrastive_lrp.graph.assembly.answers")
    generator = torch.Generator().manual_seed(3)
    names = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")
    parts, wanted = [], dict[tuple[int, ...], float]()
    for sign in (1, -1):
        columns: dict[str, Any] = {
            name: torch.randint(0, high, (60,), generator=generator)
            for name, high in zip(names, (3, 3, 2, 2, 2, 3), strict=True)
        }
        columns["head"] = torch.where(columns["path"] == 0, -1, columns["head"])
        if not split:
            del columns["head"], columns["path"]
        weight = sign * torch.randint(1, 3, (60,), generator=generator).double()
        keys = torch.stack([columns[name] for name in names if name in columns], 1)
        for key, w in zip(map(tuple, keys.tolist()), weight.tolist(), strict=True):
            wanted[key] = wanted.get(key, 0.0) + w
        parts.append({**columns, "weight": weight})
    found = room._summed(parts)
    given = torch.stack([found[name] for name in names if name in found], 1).tolist()
    edges = dict(zip(map(tuple, given), found["weight"].tolist(), strict=True))
    assert any(w == 0 for w in wanted.values())
    assert edges == {key: w for key, w in wanted.items() if w != 0}


@pytest.mark.parametrize("chat", [False, True])
def test_marks_of_answers_are_no_text(chat: bool) -> None:
    """Words and lines are of the answers' own text, and none goes over from one to another."""
    model = clrp.load_demo_model()
    user = "def f(target):\n    return "
    prompt: Any = clrp.chat(model, [{"role": "user", "content": user}]) if chat else user
    answers = clrp.answer_diff(model, prompt, target="limit\nx y", contrast="depth = limit\nz")
    graph = clrp.attribution_graph(model, prompt, answers, mass=0.9)
    first = graph.final_positions[0]
    marked = graph.str_tokens[first + 1 :]
    assert all(text.startswith(("[target]", "[contrast]")) for text in marked)
    own = {
        side: "".join(
            text.removeprefix(f"[{side}]") for text in marked if text.startswith(f"[{side}]")
        )
        for side in ("target", "contrast")
    }
    for how in ("word", "line", "sentence"):
        found = graph.by(how)
        after = [s for s in found.segments if s.start > first]
        assert after[0].start == first + 1
        for side, text in own.items():
            parts = [s for s in after if s.name.startswith(f"[{side}]")]
            assert "".join(s.text for s in parts) == text
            assert not any("[" in s.text for s in parts)
        assert float(found.weight.double().sum()) == pytest.approx(
            float(graph.weight.double().sum()), rel=1e-6
        )
    assert len([s for s in graph.by("line").segments if s.start > first]) == sum(
        len(text.splitlines()) for text in own.values()
    )
    (there,) = (s for s in graph.by(["limit\nx"]).segments if s.name == "[target]limit\nx")
    assert there.start == first + 1


def test_marks_in_a_prompts_own_text_stay() -> None:
    model = clrp.load_demo_model()
    text = "a [target] b [contrast] c"
    graph = clrp.attribution_graph(model, text, target=5, contrast=6)
    assert "".join(s.text for s in graph.by("word").segments) == "".join(graph.str_tokens)
