"""The rules as a list of hooks: what the context manager gives, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.grids import grid
from support.hooking import UserError, delta, fail, fresh, input_gradient, leaf, off
from support.written import Written, patch
from torch import Tensor
from truth.families import ALL, boot, make_hf, random_tokens, true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

RULES = tuple(clrp.RULE_SETS)


@pytest.mark.parametrize(
    ("name", "rules"), grid([n for n in ALL if not n.startswith("gemma2")], RULES)
)
def test_hook_list_equals_context(name: str, rules: str) -> None:
    model, ids = boot(name, torch.float64), random_tokens(2)
    with true_float64(model):
        with clrp.lrp(model, rules):
            wanted = input_gradient(model, ids, [])
        got = input_gradient(model, ids, clrp.lrp_hooks(model, rules))
    assert off(got, wanted) <= PROMISED[torch.float64]
    assert model.list_hooks() == {}


@pytest.mark.parametrize("rules", RULES)
def test_hook_list_equals_context_below_saturated_softcaps(rules: str) -> None:
    """Caps wide enough for what a HookPoint can carry; still far from linear."""
    model, ids = fresh("gemma2", torch.float64), random_tokens(2)
    model.original_model.config.final_logit_softcapping = 12.0
    for block in model.blocks:
        block.attn.original_component.attn_logit_softcapping = 12.0
    with true_float64(model):
        with clrp.lrp(model, rules):
            wanted = input_gradient(model, ids, [])
        got = input_gradient(model, ids, clrp.lrp_hooks(model, rules))
    assert off(got, wanted) <= PROMISED[torch.float64]


def test_hook_list_refuses_a_saturated_softcap() -> None:
    model = fresh("gemma2")
    model.original_model.config.final_logit_softcapping = 0.05
    with pytest.raises(ModelStateError, match="saturated"):
        input_gradient(model, random_tokens(), clrp.lrp_hooks(model, "attnlrp"))
    with clrp.lrp(model, "attnlrp"):
        assert input_gradient(model, random_tokens(), []).isfinite().all()


@pytest.mark.parametrize("edit", [lambda t: t + 1.0, torch.zeros_like], ids=["shift", "zero"])
@pytest.mark.parametrize(
    ("name", "point"),
    [("qwen3", "blocks.0.mlp.gate.hook_out"), ("qwen3", "blocks.0.mlp.in.hook_out"),
     ("gpt2", "blocks.0.mlp.in.hook_out"), ("gemma2-uncapped", "blocks.1.mlp.gate.hook_out")],
)  # fmt: skip
def test_hook_list_refuses_an_edit_after_its_reading(
    name: str, point: str, edit: Callable[[Tensor], Tensor]
) -> None:
    model = boot(name, torch.float32)
    user = (point, lambda tensor, hook: edit(tensor))  # noqa: ARG005
    hooks = clrp.lrp_hooks(model, "attnlrp")
    with pytest.raises(ModelStateError, match="changed the value"):
        input_gradient(model, random_tokens(), [*hooks, user])
    assert input_gradient(model, random_tokens(), [user, *hooks]).isfinite().all()
    assert model.list_hooks() == {}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("point", ["mlp.gate.hook_out", "mlp.in.hook_out", "attn.hook_pattern"])
def test_hook_list_of_gim_follows_edits(point: str, order: str) -> None:
    """No rule of GIM's reads an activation's input, so there is nothing to refuse."""
    model, ids, at = boot("qwen3", torch.float64), random_tokens(), f"blocks.0.{point}"
    written = Written(make_hf("qwen3"), {at: lambda t: 1.7 * t + 0.2}, "gim")
    user = (at, lambda tensor, hook: 1.7 * tensor + 0.2)  # noqa: ARG005
    hooks = clrp.lrp_hooks(model, "gim")
    with true_float64(model):
        got = input_gradient(model, ids, [user, *hooks] if order == "before" else [*hooks, user])
    delta(written.run(ids)).backward()
    assert off(got, written.nodes["embed.hook_out"].grad) < 1e-9


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("point", ["hook_scale", "hook_normalized", "hook_out"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
def test_hook_list_follows_or_refuses_edits_of_a_norm(
    name: str, point: str, order: str, rules: str
) -> None:
    model, ids = boot(name, torch.float64), random_tokens()
    at = f"blocks.0.ln2.{point}"
    written = Written(make_hf("qwen3"), {at: patch}, rules) if name == "qwen3" else None
    user, hooks = (at, lambda tensor, hook: patch(tensor)), clrp.lrp_hooks(model, rules)  # noqa: ARG005
    listed = [user, *hooks] if order == "before" else [*hooks, user]
    if (point, order) in (("hook_out", "after"), ("hook_scale", "before")):
        with true_float64(model):
            got = input_gradient(model, ids, listed)
        if written is not None:
            delta(written.run(ids)).backward()
            assert off(got, written.nodes["embed.hook_out"].grad) < 1e-9
        return
    with pytest.raises(ModelStateError, match="changed the value"):
        input_gradient(model, ids, listed)
    assert model.list_hooks() == {}


@pytest.mark.parametrize("form", ["lrp", "lrp_hooks"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_backward_hooks_fire_behind_every_rule(name: str, form: str) -> None:
    """Rules replace gradients, not the graph that a user's backward hooks hang on."""
    model = boot(name, torch.float32)
    points = ["blocks.0.ln1.hook_out", "blocks.1.mlp.out.hook_in", "blocks.0.attn.o.hook_in",
              "ln_final.hook_out", "blocks.0.attn.hook_pattern"]  # fmt: skip
    seen: dict[str, float] = {}

    def note(grad: Tensor, hook: Any) -> None:
        seen[hook.name] = float(grad.abs().max())

    kept: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[leaf(kept)], bwd_hooks=[(p, note) for p in points]):
        if form == "lrp":
            with clrp.lrp(model):
                value = delta(model(random_tokens()))
        else:
            with model.hooks(fwd_hooks=clrp.lrp_hooks(model)):
                value = delta(model(random_tokens()))
        torch.autograd.grad(value, kept["leaf"])
    assert set(seen) == set(points)
    assert all(v > 0 for v in seen.values())


def test_hook_list_can_be_used_again() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    hooks = clrp.lrp_hooks(model)
    first = input_gradient(model, ids, hooks)
    with pytest.raises(UserError):
        input_gradient(model, ids, [*hooks, ("blocks.1.ln2.hook_normalized", fail)])
    assert torch.equal(input_gradient(model, ids, hooks), first)
    other = random_tokens(1, 5)
    assert input_gradient(model, other, hooks).shape[1] == 5
