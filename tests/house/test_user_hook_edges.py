"""Edges with a user's hooks on the model are autograd's, or are refused.

Truth: the model's forward with its hooks under the rules, the gradient at a target site kept at one
position, sent back alone by autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.hooking import delta, fresh, objective_of
from torch import Tensor
from truth.edge_truth import error as edge_error
from truth.families import boot, random_tokens, true_float64
from truth.sparse_autoencoder import SparseAutoencoder

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.graph.edges.batched import batched_edges
from tl_contrastive_lrp.rules.rule_sets import get_rule_set

Hook = tuple[str, Callable[..., Any]]
F64 = torch.float64
IDS = random_tokens(1)
N = IDS.shape[1]


def sites_of(model: Any) -> list[str]:
    n = model.cfg.n_layers
    return [*(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post"]


def true_edges(
    model: Any,
    rules: str,
    hooks: Sequence[Hook],
    ids: Tensor,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """A[target, source] of every transition between neighbouring sites, one backward a target."""
    kept: dict[str, Tensor] = {}

    def start(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return tensor.detach().requires_grad_(True)

    def keep(name: str) -> Callable[..., Any]:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept[name] = tensor

        return hook_fn

    names = names or sites_of(model)
    with (
        model.hooks(fwd_hooks=list(hooks)),
        clrp.lrp(model, rules),
        model.hooks(fwd_hooks=[("embed.hook_out", start), *((n, keep(n)) for n in names)]),
    ):
        value = delta(model(ids))
    gradients = torch.autograd.grad(value, [kept[n] for n in names], retain_graph=True)
    found = []
    for (source, target), g in zip(pairwise(names), gradients[1:], strict=True):
        rows = []
        for j in range(ids.shape[1]):
            alone = torch.zeros_like(g)
            alone[:, j] = g[:, j]
            (back,) = torch.autograd.grad(kept[target], kept[source], alone, retain_graph=True)
            rows.append((back * kept[source].detach())[0].sum(-1))
        found.append(torch.stack(rows))
    return found


def graph_with(model: Any, rules: str, hooks: Sequence[Hook], ids: Tensor, **how: Any) -> Any:
    with model.hooks(fwd_hooks=list(hooks)):
        return clrp.attribution_graph(
            model, ids, objective_of(model), rules=rules, progress=False, **how
        )


def largest_error(graph: Any, wanted: list[Tensor], names: list[str]) -> float:
    pairs = zip(pairwise(names), wanted, strict=True)
    return max(edge_error(graph.matrix(*ends), a.double()) for ends, a in pairs)


def hook_of(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda tensor, hook: edit(tensor)  # noqa: ARG005


def _head(x: Tensor, scale: float) -> Tensor:
    """[batch, pos, head, d_head]: one head scaled."""
    factor = torch.ones(x.shape[2], 1, dtype=x.dtype)
    factor[1] = scale
    return x * factor


def _zeroed(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, N - 4 : N - 1] = 0.0
    return x


def _fewer(pattern: Tensor) -> Tensor:
    """[batch, head, query, key]"""
    pattern = pattern.clone()
    pattern[:, 0, 3:, 1] = 0.0
    return pattern


BY_POSITION: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a head of z scaled": ("attn.o.hook_in", lambda x: _head(x, 1.7)),
    "attention zeroed at positions": ("attn.hook_out", _zeroed),
    "steering": ("hook_in", lambda x: x + 0.3),
    "steering inside": ("ln1.hook_out", lambda x: x + 0.3),
    "steered values": ("attn.v.hook_out", lambda x: x + 0.4),
    "steered keys": ("attn.k.hook_out", lambda x: 1.5 * x + 0.4),
    "steered queries": ("attn.q.hook_out", lambda x: 0.5 * x - 0.4),
    "values at positions": ("attn.v.hook_out", _zeroed),
    "fewer keys": ("attn.hook_pattern", _fewer),
    "steered scores": ("attn.hook_attn_scores", lambda x: 0.5 * x + 0.2),
    "neurons": ("mlp.out.hook_in", lambda x: torch.relu(x) + 0.1),
}


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("case", BY_POSITION)
def test_edits_by_position_keep_exact_edges(case: str, name: str) -> None:
    point, edit = BY_POSITION[case]
    hooks = [(f"blocks.1.{point}", hook_of(edit))]
    for dtype, limit in ((torch.float32, 1e-5), (F64, 1e-10)):
        model = boot(name, dtype)
        with true_float64(model) if dtype == F64 else nullcontext():
            wanted = true_edges(model, "attnlrp", hooks, IDS)
            graph = graph_with(model, "attnlrp", hooks, IDS)
        assert largest_error(graph, wanted, sites_of(model)) < limit


@pytest.mark.parametrize("rules", ["gim", "cplrp"])
@pytest.mark.parametrize("case", ["a head of z scaled", "steered values", "fewer keys"])
def test_other_rule_sets(case: str, rules: str) -> None:
    point, edit = BY_POSITION[case]
    hooks = [(f"blocks.0.{point}", hook_of(edit))]
    model = boot("qwen3", F64)
    with true_float64(model):
        wanted = true_edges(model, rules, hooks, IDS)
        graph = graph_with(model, rules, hooks, IDS, heads=True)
    assert largest_error(graph, wanted, sites_of(model)) < 1e-10


@pytest.mark.parametrize("point", ["blocks.0.mlp.hook_out", "blocks.1.hook_in"])
def test_spliced_sparse_autoencoders(point: str) -> None:
    model = boot("qwen3", F64)
    hooks = [(point, hook_of(SparseAutoencoder(24, "jumprelu", "constant").to(F64)))]
    with true_float64(model):
        wanted = true_edges(model, "attnlrp", hooks, IDS)
        graph = graph_with(model, "attnlrp", hooks, IDS)
    assert largest_error(graph, wanted, sites_of(model)) < 1e-10


@pytest.mark.parametrize("case", ["attention zeroed at positions", "steered values", "neurons"])
def test_sublayers(case: str) -> None:
    point, edit = BY_POSITION[case]
    hooks = [(f"blocks.0.{point}", hook_of(edit))]
    model = boot("qwen3", F64)
    pre, post = sites_of(model)[:-1], sites_of(model)[-1]
    names = [name for p in pre for name in (p, p.replace("resid_pre", "resid_mid"))] + [post]
    with true_float64(model):
        wanted = true_edges(model, "attnlrp", hooks, IDS, names)
        graph = graph_with(model, "attnlrp", hooks, IDS, granularity="sublayer")
    assert largest_error(graph, wanted, names) < 1e-10


def _mean_of_a_head(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 1] = x[:, :, 1].mean(1, keepdim=True)
    return x


def _copied(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 5] = x[:, 2]
    return x


def _shifted(x: Tensor) -> Tensor:
    return x.roll(1, 1)


BETWEEN_POSITIONS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "mean over positions of a head": ("blocks.1.attn.o.hook_in", _mean_of_a_head),
    "shifted z": ("blocks.0.attn.o.hook_in", _shifted),
    "one position copied": ("blocks.0.ln2.hook_in", _copied),
    "residual copied": ("blocks.1.hook_in", _copied),
    "shifted output": ("blocks.1.attn.hook_out", _shifted),
    "shifted neurons": ("blocks.0.mlp.hook_out", _shifted),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", BETWEEN_POSITIONS)
def test_edits_between_positions_are_refused(case: str, dtype: torch.dtype) -> None:
    point, edit = BETWEEN_POSITIONS[case]
    hooks = [(point, hook_of(edit))]
    with pytest.raises(UncoveredComponentError, match=rf"<lambda> at {point}.*layers="):
        graph_with(boot("qwen3", dtype), "attnlrp", hooks, IDS)


def test_batched_signals_hold_with_any_hook() -> None:
    model = boot("qwen3", F64)
    hooks = [("blocks.1.attn.o.hook_in", hook_of(_mean_of_a_head))]
    with true_float64(model):
        graph = graph_with(model, "attnlrp", hooks, IDS, layers=[0])
        with model.hooks(fwd_hooks=hooks):
            nodes = clrp.attribute(model, IDS, objective_of(model), rules="attnlrp", memory="plain")
    source, target = sites_of(model)[0], sites_of(model)[-1]
    torch.testing.assert_close(graph.matrix(source, target).sum(0), nodes.resid[0])


def test_keys_and_values_that_move_are_refused_or_right() -> None:
    """A shift of v, k or q is a path between positions that attention itself accounts for only
    where tangents follow it."""
    model = boot("qwen3", F64)
    for part in "qkv":
        hooks = [(f"blocks.1.attn.{part}.hook_out", hook_of(_shifted))]
        with true_float64(model):
            wanted = true_edges(model, "attnlrp", hooks, IDS)
            try:
                graph = graph_with(model, "attnlrp", hooks, IDS)
            except UncoveredComponentError:
                continue
        assert largest_error(graph, wanted, sites_of(model)) < 1e-10, part


POINTS = ("hook_in", "ln1.hook_in", "ln1.hook_out", "attn.q.hook_out", "attn.k.hook_out",
          "attn.v.hook_out", "attn.hook_attn_scores", "attn.hook_pattern", "attn.o.hook_in",
          "attn.hook_out", "ln2.hook_in", "ln2.hook_out", "mlp.in.hook_out", "mlp.out.hook_in",
          "mlp.hook_out", "hook_out")  # fmt: skip
EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "observe": lambda x: x,
    "scale": lambda x: 1.3 * x,
    "zero": lambda x: torch.cat((x[:, :2] * 0.0, x[:, 2:]), 1),
    "replace": lambda x: torch.cat((torch.full_like(x[:, :1], 0.2), x[:, 1:]), 1),
    "add": lambda x: x + 0.2,
    "mean over positions": lambda x: 0.5 * x + 0.5 * x.mean(1, keepdim=True),
    "shift": lambda x: x.roll(1, 1),
    "relu": torch.relu,
    "sin": torch.sin,
}


@pytest.mark.parametrize("seed", range(12))
def test_random_hooks_give_right_edges_or_a_refusal(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)

    def one(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    model, rules = boot(one(["qwen3", "gpt2"]), F64), one(["attnlrp", "gim"])
    hooks = [
        (f"blocks.{one([0, 1])}.{one(POINTS)}", hook_of(EDITS[one(list(EDITS))])) for _ in range(2)
    ]
    with true_float64(model):
        try:
            graph = graph_with(model, rules, hooks, IDS)
        except UncoveredComponentError:
            return
        wanted = true_edges(model, rules, hooks, IDS)
    assert largest_error(graph, wanted, sites_of(model)) < 1e-9


def _rolled(out: Any) -> Any:
    return (out[0].roll(1, 1), *out[1:]) if isinstance(out, tuple) else out.roll(1, 1)


@pytest.mark.parametrize("at", ["block", "mlp", "before a HookPoint"])
def test_torch_hooks_hold_edges_to_autograd(at: str) -> None:
    model = fresh("qwen3")
    module = model.blocks[0] if at == "block" else model.blocks[0].mlp
    graph_with(model, "attnlrp", [], IDS)
    if at == "before a HookPoint":
        point = model.hook_dict["blocks.0.mlp.hook_out"]
        point.register_forward_pre_hook(lambda _, args: (args[0].roll(1, 1),))
    else:
        module.register_forward_hook(lambda _, args, out: _rolled(out))  # noqa: ARG005
    with pytest.raises(UncoveredComponentError, match=r"<lambda> at blocks\.0.*layers="):
        graph_with(model, "attnlrp", [], IDS)


def _tripled_from_inside(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    out = tensor * 1.0
    if out.requires_grad:
        out.register_hook(lambda g: 3.0 * g)
    return out


@pytest.mark.parametrize("how", ["backward hook", "hook on a tensor"])
@pytest.mark.parametrize("point", ["attn.v.hook_out", "attn.k.hook_out", "mlp.hook_out"])
def test_hooks_that_change_gradients_have_right_edges_or_none(point: str, how: str) -> None:
    model, name = boot("qwen3", F64), f"blocks.1.{point}"
    source, target = sites_of(model)[1:]
    settings: dict[str, Any] = {"rules": "attnlrp", "progress": False}
    forward = how == "hook on a tensor"
    triple = _tripled_from_inside if forward else hook_of(lambda g: 3.0 * g)
    with (
        true_float64(model),
        model.hooks(**{"fwd_hooks" if forward else "bwd_hooks": [(name, triple)]}),
    ):
        wanted = batched_edges(
            model, IDS, objective_of(model), get_rule_set("attnlrp"), [(source, target)],
            progress=False,
        )[source, target]  # fmt: skip
        if point != "mlp.hook_out":
            with pytest.raises(UncoveredComponentError, match=name):
                clrp.attribution_graph(model, IDS, objective_of(model), **settings)
            return
        graph = clrp.attribution_graph(model, IDS, objective_of(model), **settings)
    assert edge_error(graph.matrix(source, target), wanted.double()) < 1e-10
    assert any(row.attached == "changed in the backward" for row in graph.coverage.rows)


def test_hooks_of_the_backward_that_look_are_shown_the_models_own_alone() -> None:
    model, seen = boot("gpt2", F64), list[Tensor]()
    point = "blocks.1.mlp.hook_out"

    def look(gradient: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(gradient.clone())

    with true_float64(model), model.hooks(bwd_hooks=[(point, look)]):
        hooks = [("blocks.0.attn.o.hook_in", hook_of(lambda z: 1.3 * z))]
        graph_with(model, "attnlrp", hooks, IDS)
    assert len(seen) == 1


def test_a_rule_in_a_hook_before_scores_is_right_or_refused() -> None:
    """Keys' and values' derivatives are taken forward, where autograd Functions have none."""
    model = boot("gpt2", F64)
    for rule in (
        lambda x: x + 0.2 * clrp.rules.ordinary(torch.sin(3.0 * x)),
        lambda x: clrp.rules.uniform(x * x),
    ):
        hooks = [("blocks.1.ln1.hook_out", hook_of(rule))]
        with true_float64(model):
            try:
                graph = graph_with(model, "attnlrp", hooks, IDS)
            except UncoveredComponentError:
                continue
            wanted = true_edges(model, "attnlrp", hooks, IDS)
        assert largest_error(graph, wanted, sites_of(model)) < 1e-10
