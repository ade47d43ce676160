"""Edges beside fused attention: pruned as they come, for several objectives, under hooks.

``test_edges.py`` holds them against independent truth. Here they are compared with the edges that
are read from computed scores and patterns, where that truth does not reach.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.small_tiles import small_query_tiles
from support.squares import Squares
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.families import boot, random_tokens
from truth.float64 import true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.rules.query_tiles import Attention

RULES = tuple(clrp.RULE_SETS)
PRUNED: tuple[dict[str, Any], ...] = ({"mass": 0.85}, {"threshold": 1e-3}, {"top_k": 40})


def both(model: Any, ids: Tensor, objective: Any, **how: Any) -> list[Any]:
    """The graph with eager and with fused attention."""
    graphs = []
    for kind in ("eager", "fused"):
        with small_query_tiles():
            graphs.append(
                clrp.attribution_graph(
                    model, ids, objective, memory="plain", attention=kind, progress=False, **how
                )  # type: ignore[arg-type]
            )
    return graphs


def edges_of(graph: Any) -> dict[tuple[int, ...], float]:
    names = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")
    columns = [getattr(graph, n) for n in names if getattr(graph, n) is not None]
    keys = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(keys, graph.weight.tolist(), strict=True))


def assert_same(fused: Any, eager: Any, bound: float) -> None:
    """The same edges, but for those below rounding, with the same weights."""
    ours, theirs = edges_of(fused), edges_of(eager)
    slack = bound * max(map(abs, theirs.values()))
    for key in ours.keys() | theirs.keys():
        assert abs(ours.get(key, 0.0) - theirs.get(key, 0.0)) <= slack, key


def assert_pruned_the_same(fused: Any, eager: Any) -> None:
    """The same edges in the same order; ties and roundings are far apart on these models."""
    for name in ("target_site", "source_site", "target_pos", "source_pos"):
        assert torch.equal(getattr(fused, name), getattr(eager, name)), name
    assert torch.allclose(fused.weight, eager.weight, rtol=1e-8, atol=0)
    for step, expected in zip(fused.history, eager.history, strict=True):
        for row, other in zip(step.transitions, expected.transitions, strict=True):
            assert row.edges_kept == other.edges_kept
            assert row.mass_before == pytest.approx(other.mass_before, rel=1e-9)
            assert row.mass_kept == pytest.approx(other.mass_kept, rel=1e-9)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("how", "rules"), diagonal(PRUNED, RULES))
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_pruned_sets(name: str, how: dict[str, Any], rules: str, heads: bool) -> None:
    model, ids = boot(name), random_tokens(1, 33)
    objective = clrp.logit_diff(model, 7, 11, pos=30)
    with true_float64(model):
        whole, _ = both(model, ids, objective, rules=rules, heads=heads)
        eager, fused = both(model, ids, objective, rules=rules, heads=heads, **how)
    assert fused.attention == "fused"
    assert_pruned_the_same(fused, eager)
    assert_pruned_the_same(fused, whole.prune(**how))


@pytest.mark.parametrize(("name", "rules"), diagonal(COVERED, RULES))
def test_every_family(name: str, rules: str) -> None:
    """Whatever each does to its scores: fused where it is known, computed where it is not."""
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens(17)
    objective = clrp.logit_diff(model, 7, 12)
    try:
        eager, fused = both(model, ids, objective, rules=rules)
    except UncoveredComponentError:
        pytest.skip("no graph of this family")
    assert_same(fused, eager, 1e-5)
    scale = float(eager.relevance.abs().max())
    assert float((fused.relevance - eager.relevance).abs().max()) <= 1e-5 * scale


def test_several_objectives_and_details() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 30)
    objectives = [clrp.logit_diff(model, 7, 11), clrp.target_logit(model, 5, pos=12)]
    with true_float64(model), small_query_tiles():
        eager, fused = (
            clrp.attribution_graphs(
                model, ids, objectives, attention=kind, details=True, granularity="sublayer"
            )  # type: ignore[arg-type]
            for kind in ("eager", "fused")
        )
    for one, other in zip(fused, eager, strict=True):
        assert one.attention == "fused"
        assert_same(one, other, 1e-10)
        for name in ("dimensions", "neurons", "head_relevance"):
            assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-10)


def test_node_threshold_and_columns_that_add_up() -> None:
    model, ids = boot("gemma3"), random_tokens(1, 30)
    objective = clrp.logit_diff(model, 7, 11)
    with true_float64(model):
        eager, fused = both(model, ids, objective, node_threshold=1e-3)
        _, whole = both(model, ids, objective)
    assert_same(fused, eager, 1e-10)
    for row, (source, target) in enumerate(zip(whole.sites, whole.sites[1:], strict=False)):
        sums = whole.matrix(source, target).sum(0)
        assert torch.allclose(sums, whole.relevance[row], atol=1e-10)


def test_hooks_that_look_and_hooks_on_the_pattern() -> None:
    """Under hooks, edges are checked against the run itself, which takes whole matrices."""
    model, ids = boot("qwen3"), random_tokens(1, 20)
    objective = clrp.logit_diff(model, 7, 11)
    seen = []
    looks = [("blocks.0.hook_resid_pre", lambda x, hook: seen.append(x.shape))]  # noqa: ARG005
    edits = [("blocks.0.attn.hook_pattern", lambda x, hook: x * 0.5)]  # noqa: ARG005
    with true_float64(model):
        (expected, _) = both(model, ids, objective)
        with model.hooks(fwd_hooks=looks):
            eager, fused = both(model, ids, objective)
        assert_same(fused, expected, 1e-10)
        assert_same(eager, expected, 1e-10)
        assert seen
        with model.hooks(fwd_hooks=edits):
            eager, fused = both(model, ids, objective)
    assert_same(fused, eager, 1e-10)
    assert abs(fused.delta - expected.delta) > 1e-6


def test_a_pattern_that_is_needed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A component that does something unknown to its pattern, after the edges were left to rows."""
    model, ids = boot("qwen3"), random_tokens(1, 20)
    objective = clrp.logit_diff(model, 7, 11)
    attention = model.blocks[1].attn
    original = attention.hook_pattern.forward

    def doubled(pattern: Any) -> Any:
        return original(pattern).flip(-1).flip(-1)

    with true_float64(model):
        expected, _ = both(model, ids, objective)
        monkeypatch.setattr(attention.hook_pattern, "forward", doubled)
        eager, fused = both(model, ids, objective)
    n = model.cfg.n_layers
    assert fused.attention == f"fused in {n - 1} of {n} blocks"
    assert_same(fused, eager, 1e-10)
    assert_same(eager, expected, 1e-10)


def test_no_square_matrix_is_made() -> None:
    model, n = boot("qwen3", torch.float32), 61
    ids = random_tokens(1, n)
    objective = clrp.logit_diff(model, 7, 11)
    both(model, ids, objective, mass=0.85)  # audits the model, and checks its closed form
    with Squares(n) as squares, small_query_tiles():
        graph = clrp.attribution_graph(model, ids, objective, mass=0.85, attention="fused")
    assert graph.attention == "fused"
    assert squares.made == []


def hooks_of(model: Any) -> list[int]:
    modules = list(model.modules())
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_in_the_backward_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 20)
    objective = clrp.logit_diff(model, 7, 11)
    with true_float64(model):
        expected, _ = both(model, ids, objective)
        before = hooks_of(model)

        def fail(*_: Any) -> Any:
            raise error

        with monkeypatch.context() as broken:
            broken.setattr("tl_contrastive_lrp.graph.edges.streamed.StreamedEdges.add", fail)
            with pytest.raises(error):
                clrp.attribution_graph(model, ids, objective, attention="fused")
        assert torch._C._len_torch_function_stack() == 0
        assert hooks_of(model) == before
        eager, fused = both(model, ids, objective)
    assert_same(fused, eager, 1e-10)
    assert_same(eager, expected, 1e-10)


def test_files_say_which_attention_ran(tmp_path: Any) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 20)
    for graph in both(model, ids, clrp.logit_diff(model, 7, 11)):
        path = graph.save(tmp_path / "g.safetensors")
        assert clrp.AttributionGraph.load(path).attention == graph.attention


def test_attention_without_rows_is_torchs_own() -> None:
    """What decides which backward runs; relevance alone takes torch's where it can."""
    from tl_contrastive_lrp.rules.visible import MaskMemory, VisibleKeys

    keys = VisibleKeys(4, 4, MaskMemory())
    assert Attention(keys).is_torchs
    assert not Attention(keys, rows=lambda _: None).is_torchs
    assert not Attention(keys, temperature=2.0).is_torchs


# ---------------------------------------------------------------- in tiles, and from one forward


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("how", "rules"), diagonal(({}, *PRUNED), RULES))
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma3"])
def test_in_tiles(name: str, how: dict[str, Any], rules: str, heads: bool) -> None:
    """GPT-2 has biases, so that its edges need derivatives; Gemma 3 has windows."""
    model, ids = boot(name), random_tokens(1, 33)
    objective = clrp.logit_diff(model, 7, 11, pos=30)
    with true_float64(model):
        whole, _ = both(model, ids, objective, rules=rules, heads=heads)
        with small_query_tiles():
            tiled = clrp.attribution_graph(
                model, ids, objective, rules=rules, heads=heads, memory="tiled", tile=7,
                attention="fused", progress=False, **how,
            )  # fmt: skip
    assert (tiled.memory, tiled.attention) == ("tiled (tile 7)", "fused")
    if how:
        assert_pruned_the_same(tiled, whole.prune(**how))
    else:
        assert_same(tiled, whole, 1e-10)


def test_in_tiles_for_several_objectives() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 30)
    objectives = [clrp.logit_diff(model, 7, 11), clrp.target_logit(model, 5, pos=12)]
    with true_float64(model), small_query_tiles():
        plain, tiled = (
            clrp.attribution_graphs(
                model, ids, objectives, details=True, granularity="sublayer", progress=False, **how
            )
            for how in (
                {"memory": "plain", "attention": "eager"},
                {"memory": "tiled", "tile": 7, "attention": "fused"},
            )
        )  # type: ignore[arg-type]
    for one, other in zip(tiled, plain, strict=True):
        assert one.attention == "fused"
        assert_same(one, other, 1e-10)


@pytest.mark.parametrize("tile", [None, 7])
def test_from_a_forward_that_has_been_run(tile: int | None) -> None:
    """One forward for relevance and graph: both are what they are by themselves."""
    from tl_contrastive_lrp.attribution.attribute import relevance_readings
    from tl_contrastive_lrp.engine.memory import plan_memory
    from tl_contrastive_lrp.engine.prefilled import prefill_prompt
    from tl_contrastive_lrp.engine.reading import BlockCall
    from tl_contrastive_lrp.graph.assembly.plain import graph_readings
    from tl_contrastive_lrp.graph.assembly.plan import GraphPlan

    model, ids = boot("qwen3"), random_tokens(1, 30)
    objective = clrp.logit_diff(model, 7, 11)
    memory: Any = "plain" if tile is None else "tiled"
    with true_float64(model), small_query_tiles():
        calls: dict[int, BlockCall] = {}
        readings = [*relevance_readings(model), *graph_readings(GraphPlan.of(model, "gim"), calls)]
        prefilled = prefill_prompt(
            model, ids, "gim", readings, plan_memory(model, 30, memory, tile),
            calls=calls, uses=2, attention="fused",
        )  # fmt: skip
        relevance = clrp.attribute(model, ids, objective, rules="gim", prefilled=prefilled)
        graph = clrp.attribution_graph(
            model, ids, objective, rules="gim", prefilled=prefilled, mass=0.9, progress=False
        )
        own = clrp.attribute(model, ids, objective, rules="gim", attention="eager")
        eager, _ = both(model, ids, objective, rules="gim", mass=0.9)
    assert relevance.attention == graph.attention == "fused"
    assert float((relevance.resid - own.resid).abs().max()) <= 1e-10 * float(own.resid.abs().max())
    assert_pruned_the_same(graph, eager)
