"""Circuits: what keeping an edge means, against slow runs of one target (and head) at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, boot, random_tokens, true_float64
from hooking import fresh
from torch import Tensor

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.circuit_edges import EdgeSpace
from tl_contrastive_lrp.circuit_results import CircuitCurve, CircuitFaithfulness
from tl_contrastive_lrp.circuit_runs import reference_states, run_circuits, visible_positions
from tl_contrastive_lrp.errors import PromptError

TOKENS = random_tokens()
CORRUPTED = TOKENS.clone()
CORRUPTED[0, 2:6] = torch.tensor([9, 20, 33, 41])
N = TOKENS.shape[1]
ASKED = {"target": 7, "contrast": 12}


def objective(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 12]).sum()


def graph_of(name: str, **how: Any) -> Any:
    model = boot(name)
    with true_float64(model):
        return model, clrp.attribution_graph(model, TOKENS, **ASKED, **how)


def states(
    model: Any, tokens: Tensor, edits: dict[str, Tensor], read: list[str], rows: int = 1
) -> list[Tensor]:
    """What is at ``read`` in ``rows`` plain runs of a prompt with ``edits`` put in place."""
    kept: dict[str, Tensor] = {}

    def put(name: str) -> Any:
        return lambda x, hook: edits[name].to(x).expand(x.shape)  # noqa: ARG005

    def keep(name: str) -> Any:
        def hook_fn(x: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept[name] = x.clone()

        return hook_fn

    points = [name for name in read if name != "logits"]
    hooks = [(name, put(name)) for name in edits] + [(name, keep(name)) for name in points]
    with torch.no_grad():
        kept["logits"] = model.run_with_hooks(tokens.expand(rows, -1), fwd_hooks=hooks)
    return [kept[name] if rows > 1 else kept[name][0] for name in read]


def output_of(model: Any, layer: int) -> str:
    last = layer == model.cfg.n_layers - 1
    return f"blocks.{layer}.hook_resid_post" if last else f"blocks.{layer + 1}.hook_resid_pre"


def drawn(space: EdgeSpace, circuits: int = 2) -> Tensor:
    """Random circuits; about two thirds of the edges each."""
    return torch.rand(circuits, space.size, generator=torch.Generator().manual_seed(3)) < 0.65


def setting(model: Any, graph: Any) -> tuple[EdgeSpace, dict[str, Tensor], dict[str, Tensor]]:
    """The space of edges, the package's reference states, and the truth about them."""
    sites = list(dict.fromkeys([*graph.sites, *(output_of(model, i) for i in range(2))]))
    truth = dict(zip(sites, states(model, CORRUPTED, {}, sites), strict=True))
    visible, _ = visible_positions(model, TOKENS)
    space = EdgeSpace.of(graph, visible, model.cfg.n_heads)
    return space, reference_states(model, CORRUPTED, 4), truth


# what an edge is


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_target_sees_only_its_kept_sources(name: str, granularity: str) -> None:
    """A plain run of the whole block for every target, on that target's own mixture of states."""
    model, graph = graph_of(name, granularity=granularity)
    with true_float64(model):
        space, references, truth = setting(model, graph)
        keep = drawn(space)
        found = run_circuits(model, TOKENS, references, space.masks(keep))
        for circuit, logits in zip(keep, found, strict=True):
            (h,) = states(model, TOKENS, {}, [graph.sites[0]])
            for layer, block in enumerate(space.masks(circuit[None])):
                before, after = f"blocks.{layer}.hook_resid_pre", output_of(model, layer)
                mixtures = torch.where(block.value[0, 0, :, :, None], h, truth[before])
                (runs,) = states(model, TOKENS, {before: mixtures}, [after], N)
                h = runs[range(N), range(N)]  # of each target's run only that target
                if block.after is not None:
                    h = torch.where(block.after[0, :, None], h, truth[after])
            (wanted,) = states(model, TOKENS, {after: h}, ["logits"])
            assert (logits[-1] - wanted[-1]).abs().max() <= 1e-9 * wanted[-1].abs().max()


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_each_head_sees_only_the_keys_and_values_it_keeps(name: str) -> None:
    """A plain run for every target and head, on that head's own mixture of keys and of values."""
    model, graph = graph_of(name, heads=True)
    heads = model.cfg.n_heads
    with true_float64(model):
        space, references, truth = setting(model, graph)
        keep = drawn(space, 1)
        found = run_circuits(model, TOKENS, references, space.masks(keep))[0]
        (h,) = states(model, TOKENS, {}, [graph.sites[0]])
        for layer, block in enumerate(space.masks(keep)):
            at, after = f"blocks.{layer}.", output_of(model, layer)
            before, k, v = f"{at}hook_resid_pre", f"{at}attn.k.hook_out", f"{at}attn.v.hook_out"
            k_h, v_h = states(model, TOKENS, {before: h}, [k, v])
            k_r, v_r = states(model, TOKENS, {before: truth[before]}, [k, v])
            own = torch.where(block.position[0, :, None], h, truth[before])
            edits = {before: own}
            for name, mask, clean, other in ((k, block.key, k_h, k_r), (v, block.value, v_h, v_r)):
                edits[name] = torch.where(mask[0].flatten(0, 1)[..., None, None], clean, other)
            (runs,) = states(model, TOKENS, edits, [f"{at}attn.hook_z"], heads * N)
            runs = runs.view(heads, N, N, heads, -1)
            each = [[runs[head, j, j, head] for head in range(heads)] for j in range(N)]
            z = torch.stack([torch.stack(row) for row in each])
            (h,) = states(model, TOKENS, {before: own, f"{at}attn.hook_z": z}, [after])
        (wanted,) = states(model, TOKENS, {after: h}, ["logits"])
    assert (found[-1] - wanted[-1]).abs().max() <= 1e-9 * wanted[-1].abs().max()


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("granularity", ["block", "sublayer"])
def test_masks_hold_the_edges_of_the_table(granularity: str, heads: bool) -> None:
    """Edge by edge: a graph's rows by name, head and path, and nothing else."""
    model, graph = graph_of("qwen3", granularity=granularity, heads=heads)
    some = torch.rand(len(graph.weight), generator=torch.Generator().manual_seed(5)) < 0.4
    graph = graph.where(some)
    visible, _ = visible_positions(model, TOKENS)
    space = EdgeSpace.of(graph, visible, model.cfg.n_heads)
    masks = space.masks(space.held(graph)[None])
    wanted = [{name: torch.zeros_like(m) for name, m in vars(block).items() if m is not None}
              for block in masks]  # fmt: skip
    for edge in graph.edges.itertuples():
        block, j, i = wanted[int(edge.source_site.split(".")[1])], edge.target_pos, edge.source_pos
        if edge.source_site.endswith("mid"):
            block["after"][0, j] = True
        elif not heads:
            block["value"][0, 0, j, i] = block["key"][0, 0, j, i] = True
            block["position"][0, j] |= i == j
        elif edge.path == "position":
            block["position"][0, j] = True
        else:
            block[edge.path][0, edge.head, j, i] = True
    for block, truth in zip(masks, wanted, strict=True):
        for name, mask in truth.items():
            assert torch.equal(getattr(block, name), mask), name


@pytest.mark.parametrize("how", [{}, {"heads": True, "granularity": "sublayer"}])
@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_are_the_model_and_none_the_reference(name: str, how: dict[str, Any]) -> None:
    model, graph = graph_of(name, **how)
    with true_float64(model), torch.no_grad():
        curve = clrp.circuit_curve(model, graph, **ASKED, corrupted=CORRUPTED, progress=False)
        clean, corrupted = (float(objective(model(tokens))) for tokens in (TOKENS, CORRUPTED))
    none, full = curve.points[0], curve.points[-1]
    assert (none.edges_kept, full.edges_kept) == (0, full.edges_all)
    assert none.delta == pytest.approx(corrupted, abs=1e-10)
    assert full.delta == pytest.approx(clean, abs=1e-10)
    assert (none.recovered, full.recovered) == pytest.approx((0.0, 1.0), abs=1e-9)


@pytest.mark.parametrize("how", ["block", "sublayer", "heads"])
def test_possible_edges_are_those_that_masks_allow_and_the_end_can_see(how: str) -> None:
    """Counted by hand: window 4 in block 0, none in block 1, prompt of 9, end at the last."""
    settings = {"block": {}, "sublayer": {"granularity": "sublayer"}, "heads": {"heads": True}}
    model, graph = graph_of("gemma2", **settings[how])
    with true_float64(model):
        point = clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED)
    first, second = 1 + 2 + 3 + 4 * 6, 9
    counts = {
        "block": first + second,
        "sublayer": first + 9 + second + 1,
        "heads": 2 * 4 * (first + second) + 9 + 1,
    }
    assert point.edges_all == counts[how]
    assert point.edges_kept == len(graph.weight)


def test_an_explained_position_in_the_middle() -> None:
    model = boot("qwen3")
    asked = clrp.logit_diff(model, 7, 12, pos=5)
    with true_float64(model):
        graph = clrp.attribution_graph(model, TOKENS, asked)
        curve = clrp.circuit_curve(model, graph, asked, corrupted=CORRUPTED, progress=False)
        logits = model(CORRUPTED)[0, 5].detach()
    assert curve.points[-1].edges_all == 6 * 7 // 2 + 6
    assert curve.points[0].delta == pytest.approx(float(logits[7] - logits[12]), abs=1e-10)


# references


def test_mean_states_are_means_over_prompts() -> None:
    model, graph = graph_of("qwen3", granularity="sublayer")
    prompts = random_tokens(5, N, seed=8)
    with true_float64(model):
        found = reference_states(model, prompts, 2)
        each = [states(model, row[None], {}, list(found)) for row in prompts]
    for number, name in enumerate(found):
        wanted = torch.stack([run[number] for run in each]).mean(0)
        assert (found[name] - wanted).abs().max() <= 1e-12, name
    with true_float64(model):
        one = clrp.circuit_faithfulness(model, graph, **ASKED, mean_over=CORRUPTED)
        same = clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED[0])
        many = clrp.circuit_faithfulness(model, graph, **ASKED, mean_over=prompts)
    assert replace(one, ablation="corrupted") == same
    assert many.delta_full == pytest.approx(same.delta_full, abs=1e-12)
    assert many.delta_empty != pytest.approx(same.delta_empty, abs=1e-3)


# the curve


def test_cpr_and_cmd_of_known_curves() -> None:
    def point(kept: int, delta: float) -> CircuitFaithfulness:
        return CircuitFaithfulness(
            kept, 10, delta, delta_full=4.0, delta_empty=2.0, ablation="mean"
        )

    straight = CircuitCurve("x", (point(0, 2.0), point(10, 4.0)))
    assert (straight.cpr, straight.cmd) == pytest.approx((0.5, 0.5))
    over = CircuitCurve("x", (point(0, 2.0), point(5, 6.0), point(10, 4.0)))  # f: 0, 2, 1
    assert over.cpr == pytest.approx(0.5 * 1.0 + 0.5 * 1.5)
    assert over.cmd == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    frame = over.to_frame()
    assert frame["recovered"].tolist() == [0.0, 2.0, 1.0]
    assert frame["share"].tolist() == [0.0, 0.5, 1.0]


def test_circuits_grow_by_weight_or_by_given_scores() -> None:
    model, graph = graph_of("qwen3")
    how = {**ASKED, "corrupted": CORRUPTED, "progress": False}
    with true_float64(model):
        curve = clrp.circuit_curve(model, graph, fractions=[0.25], **how)
        size = curve.points[-1].edges_all
        strongest = graph.where(
            graph.weight.abs() >= graph.weight.abs().sort().values[-round(size / 4)]
        )
        alone = clrp.circuit_faithfulness(model, strongest, **ASKED, corrupted=CORRUPTED)
        same = clrp.circuit_curve(model, graph, fractions=[0.25], by=graph.weight.abs(), **how)
        other = clrp.circuit_curve(model, graph, fractions=[0.25], by=-graph.weight.abs(), **how)
        drawn = [
            clrp.circuit_curve(model, graph, by="random", seed=seed, **how) for seed in (0, 0, 1)
        ]
    assert alone.edges_kept == curve.points[1].edges_kept == round(size / 4)
    assert alone.delta == pytest.approx(curve.points[1].delta, abs=1e-10)
    assert same.points[1].delta == pytest.approx(curve.points[1].delta, abs=1e-10)
    assert other.points[1].delta != pytest.approx(curve.points[1].delta, abs=1e-3)
    assert drawn[0].cpr == pytest.approx(drawn[1].cpr, abs=1e-12)
    assert drawn[0].cpr != pytest.approx(drawn[2].cpr, abs=1e-6)
    assert (curve.name, same.name, drawn[0].name) == ("attnlrp", "scores", "random")


def test_edges_without_weight_come_last() -> None:
    """A pruned graph as ranking: its edges first, whatever it lost after them."""
    model, graph = graph_of("qwen3")
    half = graph.prune(top_k=12)
    how = {**ASKED, "corrupted": CORRUPTED, "progress": False}
    with true_float64(model):
        size = clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED).edges_all
        alone = clrp.circuit_faithfulness(model, half, **ASKED, corrupted=CORRUPTED)
        curve = clrp.circuit_curve(model, half, fractions=[len(half.weight) / size], **how)
    assert curve.points[1].edges_kept == len(half.weight) == alone.edges_kept
    assert curve.points[1].delta == pytest.approx(alone.delta, abs=1e-10)


def test_compatibility_mode() -> None:
    model, graph = graph_of("qwen3", heads=True)
    with true_float64(model):
        wanted = clrp.circuit_faithfulness(model, graph.prune(), **ASKED, corrupted=CORRUPTED)
    other = fresh("qwen3", torch.float64)
    other.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    with true_float64(other):
        pruned = clrp.attribution_graph(other, TOKENS, **ASKED, heads=True).prune()
        found = clrp.circuit_faithfulness(other, pruned, **ASKED, corrupted=CORRUPTED)
    assert found.delta == pytest.approx(wanted.delta, abs=1e-9)


# refusals


def test_what_cannot_be_right_is_refused(snapshot: Any) -> None:
    model, graph = graph_of("qwen3")
    clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED)
    before = snapshot(model)
    good = {**ASKED, "corrupted": CORRUPTED}

    def refused(what: str, error: type = ValueError, g: Any = graph, **changes: Any) -> None:
        with pytest.raises(error, match=what), true_float64(model):
            clrp.circuit_curve(model, g, **{**good, "progress": False, **changes})

    refused("corrupted=", corrupted=None)
    refused("corrupted=", mean_over=CORRUPTED)
    refused("same number of tokens", PromptError, corrupted=CORRUPTED[:, :-1])
    refused("one prompt", PromptError, corrupted=random_tokens(2))
    refused("Token ids must lie", PromptError, corrupted=CORRUPTED + 60)
    refused("changes nothing", corrupted=TOKENS)
    refused("made with", contrast=13)
    refused("shares of edges", fractions=[1.5])
    refused("unknown", by="size")
    refused("one finite score", by=torch.ones(3))
    refused("batch_size", batch_size=0)
    refused("both", TypeError, target=None)
    with true_float64(model):
        far = clrp.attribution_graph(model, TOKENS, **ASKED, layers=[0], progress=False)
    refused("block by block", g=far)
    assert snapshot(model) == before


def test_the_model_is_left_as_found(snapshot: Any) -> None:
    model, graph = graph_of("gemma2", heads=True)
    before = snapshot(model)
    with true_float64(model):
        clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED)

    def breaks(logits: Tensor) -> Tensor:
        if len(logits) == 1 and not torch.allclose(logits, clean):
            raise RuntimeError("mine")
        return objective(logits)

    with true_float64(model):
        clean = model(TOKENS).detach()
        with pytest.raises(RuntimeError, match="mine"):
            clrp.circuit_faithfulness(model, graph, breaks, corrupted=CORRUPTED)
    assert snapshot(model) == before


def test_what_is_said() -> None:
    point = CircuitFaithfulness(25, 100, 3.0, delta_full=4.0, delta_empty=2.0, ablation="mean")
    assert str(point) == (
        "25 of 100 edges (25.00%) recover 50.0% of Δℓ: +3.000 logits, from +2.000 (none, mean "
        "states) to +4.000 (all)"
    )
    assert str(CircuitCurve("gim", (replace(point, edges_kept=0, delta=2.0), point))) == (
        "gim: CPR 0.062, CMD 0.188 (2 circuits)"
    )


def test_plot_holds_the_curve() -> None:
    pytest.importorskip("plotly")
    point = CircuitFaithfulness(0, 100, 2.0, delta_full=4.0, delta_empty=2.0, ablation="mean")
    points = (point, replace(point, edges_kept=25, delta=3.0), replace(point, edges_kept=100))
    (line,) = CircuitCurve("gim", points).plot().data
    assert (line.name, list(line.x), list(line.y)) == ("gim", [0.25, 1.0], [0.5, 0.0])
