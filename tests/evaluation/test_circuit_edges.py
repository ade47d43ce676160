"""What keeping an edge means, against slow runs of one target (and head) at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.computed_graphs import circuit_graph
from torch import Tensor
from truth.circuit_truth import ASKED, CORRUPTED, TOKENS, N, objective, states
from truth.families import FAMILIES, boot, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.evaluation.circuits.edge_space import EdgeSpace
from tl_contrastive_lrp.evaluation.circuits.runs import (
    reference_states,
    run_circuits,
    visible_positions,
)

# Of random models, all edges and none may give nearly the same Δℓ; a warning says so.
pytestmark = pytest.mark.filterwarnings("ignore:.*mean little here")


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


@pytest.mark.parametrize("granularity", ["block", "sublayer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_target_sees_only_its_kept_sources(name: str, granularity: str) -> None:
    """A plain run of the whole block for every target, on that target's own mixture of states."""
    model, graph = circuit_graph(name, granularity=granularity)
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
    model, graph = circuit_graph(name, heads=True)
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
    model, graph = circuit_graph("qwen3", granularity=granularity, heads=heads)
    some = torch.rand(len(graph.weight), generator=torch.Generator().manual_seed(5)) < 0.4
    graph = graph.where(some)
    visible, _ = visible_positions(model, TOKENS)
    space = EdgeSpace.of(graph, visible, model.cfg.n_heads)
    masks = space.masks(space.mask_of_graph(graph)[None])
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
    model, graph = circuit_graph(name, **how)
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
    model, graph = circuit_graph("gemma2", **settings[how])
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
