"""Rules go on and off again, alone and among a user's own hooks, and change no forward."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.grids import diagonal, grid
from support.hooking import (
    Snapshot,
    UserError,
    delta,
    fail,
    forward,
    fresh,
    input_gradient,
    points_of,
)
from torch import Tensor
from truth.families import FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

RULES = tuple(clrp.RULE_SETS)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("name", "rules", "dtype"), grid(FAMILIES, RULES, turns=DTYPES))
def test_forward_is_bit_identical(name: str, dtype: torch.dtype, rules: str) -> None:
    model, ids = boot(name, dtype), random_tokens(2)
    plain = forward(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with clrp.lrp(model, rules):
            assert model.list_hooks() != {} or rules == "gradient"
            ruled = forward(model, ids)
        with model.hooks(fwd_hooks=clrp.lrp_hooks(model, rules)):
            hooked = forward(model, ids)
        objective = clrp.logit_diff(model, 7, 11)
        logits, _ = clrp.run_with_relevance(model, ids, objective, "hook_embed", rules=rules)
    for key, value in plain.items():
        assert torch.equal(ruled[key], value), key
        assert torch.equal(hooked[key], value), key
    assert torch.equal(logits, plain["logits"])


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_forward_is_bit_identical_without_gradients_in_play(name: str) -> None:
    """Frozen parameters and no leaf: every hook meets tensors without a graph."""
    model = fresh(name)
    model.original_model.requires_grad_(False)
    plain = forward(model, random_tokens())
    with clrp.lrp(model):
        ruled = forward(model, random_tokens())
    assert all(torch.equal(ruled[key], plain[key]) for key in plain)


# ---------------------------------------------------------------- on and off again


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULES))
def test_everything_is_as_before(name: str, rules: str, snapshot: Snapshot) -> None:
    model = boot(name, torch.float32)
    before = snapshot(model)
    with clrp.lrp(model, rules) as coverage:
        assert coverage.rules == rules
        assert rules == "gradient" or snapshot(model) != before
    assert snapshot(model) == before
    assert model.list_hooks() == {}
    clrp.coverage(model, rules)
    clrp.lrp_hooks(model, rules)
    assert snapshot(model) == before


def _inside_lrp(model: Any, name: str) -> None:
    with clrp.lrp(model), model.hooks(fwd_hooks=[(name, fail)]):
        delta(model(random_tokens())).backward()


def _around_lrp(model: Any, name: str) -> None:
    with model.hooks(fwd_hooks=[(name, fail)]), clrp.lrp(model):
        delta(model(random_tokens())).backward()


def _run_with_hooks(model: Any, name: str) -> None:
    model.run_with_hooks(random_tokens(), fwd_hooks=[*clrp.lrp_hooks(model), (name, fail)])


def _relevance(model: Any, name: str) -> None:
    with model.hooks(fwd_hooks=[(name, fail)]):
        clrp.run_with_relevance(model, random_tokens(), delta)


def _attribute(model: Any, name: str) -> None:
    with model.hooks(fwd_hooks=[(name, fail)]):
        clrp.attribute(model, random_tokens(), delta, neurons=True)


CALLS = {f.__name__.strip("_"): f
         for f in (_inside_lrp, _around_lrp, _run_with_hooks, _relevance, _attribute)}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_an_exception_at_any_hook_point_leaves_nothing(
    name: str, call: str, snapshot: Snapshot
) -> None:
    model = boot(name, torch.float32)
    before = snapshot(model)
    points = points_of(model)
    assert len(points) > 60 or name == "gpt2"
    for point in points:
        with pytest.raises(UserError):
            CALLS[call](model, point)
        assert snapshot(model) == before, point
    # and the model still explains as ever
    with clrp.lrp(model):
        pass


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_an_exception_in_the_backward_leaves_nothing(name: str, snapshot: Snapshot) -> None:
    model = boot(name, torch.float32)
    before = snapshot(model)

    def bad(grad: Tensor, hook: Any) -> None:  # noqa: ARG001
        raise UserError

    for point in ("blocks.1.hook_out", "blocks.0.attn.o.hook_in", "blocks.0.mlp.hook_out"):
        with pytest.raises(UserError), model.hooks(bwd_hooks=[(point, bad)]):
            clrp.run_with_relevance(model, random_tokens(), delta)
        assert snapshot(model) == before


def test_an_exception_in_the_objective_leaves_nothing(snapshot: Snapshot) -> None:
    model = boot("gemma2", torch.float32)
    before = snapshot(model)

    def objective(logits: Tensor) -> Tensor:  # noqa: ARG001
        raise UserError

    with pytest.raises(UserError):
        clrp.run_with_relevance(model, random_tokens(), objective)
    assert snapshot(model) == before


def test_the_softcap_number_is_the_configs_own_again() -> None:
    model = boot("gemma2", torch.float32)
    config = model.original_model.config
    attention = model.blocks[0].attn.original_component
    with clrp.lrp(model, "attnlrp"):
        assert type(config.final_logit_softcapping) is not float
    assert type(config.final_logit_softcapping) is float
    assert config.final_logit_softcapping == 3.0
    assert type(attention.attn_logit_softcapping) is float
    assert attention.attn_logit_softcapping == 2.5


def test_interrupt_is_an_exception_too(snapshot: Snapshot) -> None:
    model = boot("gemma2", torch.float32)
    before = snapshot(model)

    def interrupt(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    hooks = [("blocks.1.mlp.hook_in", interrupt)]
    with pytest.raises(KeyboardInterrupt), clrp.lrp(model), model.hooks(fwd_hooks=hooks):
        model(random_tokens())
    assert snapshot(model) == before


# ---------------------------------------------------------------- nesting


@pytest.mark.parametrize("order", ["user outside", "user inside"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_a_users_reading_hooks_change_nothing(name: str, order: str) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    seen: list[str] = []
    points = points_of(model)
    user = [(p, lambda tensor, hook: seen.append(hook.name)) for p in points]  # noqa: ARG005
    with clrp.lrp(model):
        wanted = input_gradient(model, ids, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if order == "user outside":
            with model.hooks(fwd_hooks=user), clrp.lrp(model):
                got = input_gradient(model, ids, [])
            assert model.list_hooks() == {}
        else:
            with clrp.lrp(model), model.hooks(fwd_hooks=user):
                got = input_gradient(model, ids, [])
    assert torch.equal(got, wanted)
    assert len(seen) == len(points)


def test_a_users_own_hook_stays() -> None:
    model = boot("qwen3", torch.float32)
    handle = model.hook_dict["blocks.0.hook_in"].add_hook(lambda t, hook: None)  # noqa: ARG005
    try:
        before = {k: list(v) for k, v in model.list_hooks().items()}
        with clrp.lrp(model):
            pass
        clrp.run_with_relevance(model, random_tokens(), delta, "hook_embed")
        assert {k: list(v) for k, v in model.list_hooks().items()} == before
        assert handle in model.hook_dict["blocks.0.hook_in"].fwd_hooks
    finally:
        model.reset_hooks()


ONLY_SCOPED = clrp.RuleSet(
    "scoped-only", "gradient", "identity", "identity", "gradient", "gradient", "gradient",
    "gradient",
)  # fmt: skip


@pytest.mark.parametrize("outer", ["attnlrp", "cplrp", "gim", ONLY_SCOPED], ids=str)
@pytest.mark.parametrize("inner", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_rules_inside_rules_are_refused(
    name: str, outer: str | clrp.RuleSet, inner: str, snapshot: Snapshot
) -> None:
    model = boot(name, torch.float32)
    before = snapshot(model)
    with clrp.lrp(model, outer):
        during = snapshot(model)
        with pytest.raises(ModelStateError, match="already on"), clrp.lrp(model, inner):
            pass
        with pytest.raises(ModelStateError, match="already on"):
            clrp.lrp_hooks(model, inner)
        with pytest.raises(ModelStateError, match="already on"):
            clrp.run_with_relevance(model, random_tokens(), delta, rules=inner)
        with pytest.raises(ModelStateError, match="already on"):
            clrp.attribute(model, random_tokens(), delta, rules=inner)
        assert snapshot(model) == during
    assert snapshot(model) == before


def test_rules_after_an_exception_are_not_refused() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(UserError):
        _inside_lrp(model, "blocks.0.hook_in")
    with clrp.lrp(model):
        pass
