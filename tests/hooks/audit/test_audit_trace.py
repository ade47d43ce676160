"""The audit runs once, in any mode, beside anybody's hooks, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hooking import Snapshot, UserError, delta, fail, fresh
from torch import Tensor
from truth.families import random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError
from tl_contrastive_lrp.hooks.audit.audit import audit
from tl_contrastive_lrp.hooks.placement import attached, place


def test_it_runs_once_until_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh("qwen3")
    runs: list[int] = []
    honest = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, *a, **k: (runs.append(1), honest(self, *a, **k))[1]
    )
    first = audit(model)
    assert len(runs) == 1
    for _ in range(3):
        assert audit(model) is first
        with clrp.lrp(model):
            pass
    assert len(runs) == 1
    model.cfg.use_attn_result = True
    assert audit(model).clean
    assert len(runs) == 2
    model.cfg.use_attn_result = False
    model.enable_compatibility_mode(disable_warnings=True)
    assert audit(model).clean
    assert len(runs) == 3


def test_nothing_is_left_behind(snapshot: Snapshot) -> None:
    model = fresh("gemma2")
    model(random_tokens())  # transformers hooks itself in at the first forward
    for p in model.original_model.parameters():
        p.grad = torch.ones_like(p)
    before, numbers = snapshot(model), torch.get_rng_state()
    assert audit(model).clean
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_works_in_any_gradient_mode(mode: Callable[[], Any]) -> None:
    model = fresh("gpt2")
    with mode():
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        report = audit(model)
        assert (grad, inference) == (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    assert report.clean


def test_users_hooks_neither_run_nor_count_and_are_back_in_order() -> None:
    model, ids = fresh("llama"), random_tokens()
    called: list[str] = []

    def user(name: str) -> Callable[..., Tensor]:
        def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            called.append(name)
            return tensor + tensor.tanh()

        return hook_fn

    def backward(gradient: Tensor, hook: Any) -> None:  # noqa: ARG001
        called.append("backward")

    model.add_perma_hook("blocks.0.hook_out", user("permanent"))
    with model.hooks(
        fwd_hooks=[("blocks.0.hook_out", user("first")), ("blocks.0.mlp.hook_out", user("mlp"))],
        bwd_hooks=[("blocks.0.hook_out", backward)],
    ):
        before = delta(model(ids))
        order, called[:] = list(called), []
        assert audit(model).clean
        assert called == []
        after = delta(model(ids))
        assert torch.equal(before, after)
        assert called == order == ["mlp", "permanent", "first"]
        after.backward()
        assert called[-1] == "backward"
    called.clear()
    model(ids)
    assert called == ["permanent"]
    model.reset_hooks(including_permanent=True)
    model(ids)
    assert called == ["permanent"]


def test_an_exception_leaves_nothing_behind(snapshot: Snapshot) -> None:
    model = fresh("qwen3")
    model(random_tokens())
    model.add_hook("blocks.0.hook_out", fail)
    wrapped = model.blocks[1].mlp.original_component
    before = snapshot(model)
    wrapped.forward = lambda *_: fail(None, wrapped)
    wrapped.name = "deep inside"
    with pytest.raises(UserError, match="deep inside"):
        audit(model)
    del wrapped.forward
    assert snapshot(model) == before
    model.reset_hooks()
    assert audit(model).clean


def test_it_refuses_what_would_mislead_it() -> None:
    model = fresh("llama")
    with (
        attached(model, place(model, "attnlrp")[0]),
        pytest.raises(ModelStateError, match="already on"),
    ):
        audit(model)
    known = audit(model)
    with clrp.lrp(model):
        assert audit(model) is known
    model = fresh("llama")
    model.train()
    with pytest.raises(ModelStateError, match="training mode"):
        audit(model)
    with pytest.raises(TypeError, match="TransformerBridge"):
        audit(model.original_model)
