"""Models in a state, or with a component, that the rules do not cover are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hooking import Snapshot, delta, fresh, off
from torch import Tensor, nn
from truth.families import boot, make_hf, random_tokens, true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError, UncoveredComponentError

# ---------------------------------------------------------------- states


def _calls(model: Any) -> list[Callable[[], object]]:
    def context() -> None:
        with clrp.lrp(model):
            pass

    return [
        context,
        lambda: clrp.lrp_hooks(model),
        lambda: clrp.run_with_relevance(model, random_tokens(), delta),
        lambda: clrp.attribute(model, random_tokens(), delta),
    ]


@pytest.mark.parametrize("part", ["whole", "one dropout", "wrapped model only"])
def test_training_mode_is_refused(part: str) -> None:
    model = fresh("gpt2")
    if part == "whole":
        model.train()
    elif part == "one dropout":
        next(m for m in model.original_model.modules() if isinstance(m, nn.Dropout)).train()
    else:
        model.original_model.train()
    for call in _calls(model):
        with pytest.raises(ModelStateError, match=r"model\.eval\(\)"):
            call()
    assert model.list_hooks() == {}
    model.eval()
    with clrp.lrp(model):
        pass


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference"]
)
def test_no_gradients_are_refused(mode: Callable[[], Any]) -> None:
    model = boot("qwen3", torch.float32)
    for call in _calls(model):
        with mode(), pytest.raises(ModelStateError, match="gradients"):
            call()
    assert model.list_hooks() == {}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_a_quantised_weight_is_refused(dtype: torch.dtype) -> None:
    model = fresh("qwen3")
    linear = model.blocks[1].mlp.out.original_component
    linear.weight = nn.Parameter(torch.zeros(linear.weight.shape).to(dtype), requires_grad=False)
    for call in (*_calls(model), lambda: clrp.coverage(model)):
        with pytest.raises(
            UncoveredComponentError, match=r"(?s)layers\.1.*boot_transformers"
        ) as info:
            call()
    assert str(dtype) in str(info.value)


class Swish2(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(2 * x)


class SneakyLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def _unknown_activation(model: Any) -> str:
    model.blocks[1].mlp.original_component.act_fn = Exponential().eval()
    return "Exponential"


def _unknown_linear(model: Any) -> str:
    old = model.blocks[0].attn.o.original_component
    new = SneakyLinear(old.in_features, old.out_features, bias=False).eval()
    model.blocks[0].attn.o.set_original_component(new)
    return "SneakyLinear"


def _variant_component(model: Any) -> str:
    class OddMLPBridge(type(model.blocks[0].mlp)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(*args, **kwargs).exp()

    OddMLPBridge.__module__ = type(model.blocks[0].mlp).__module__
    model.blocks[0].mlp.__class__ = OddMLPBridge
    return "Exp"


@pytest.mark.parametrize("change", [_unknown_activation, _unknown_linear, _variant_component])
def test_an_unknown_component_is_refused_by_name(
    change: Callable[[Any], str], snapshot: Snapshot
) -> None:
    model = fresh("qwen3")
    class_name = change(model)
    model(random_tokens())  # TransformerLens adds hooks of its own at a first forward
    before = snapshot(model)
    for call in (*_calls(model), lambda: clrp.coverage(model)):
        with pytest.raises(UncoveredComponentError) as info:
            call()
        message = str(info.value)
        assert class_name in message
        assert ".0." in message or ".1." in message
    assert snapshot(model) == before


def test_a_module_that_takes_no_part_is_no_obstacle() -> None:
    model = fresh("qwen3")
    before = clrp.coverage(model)
    model.blocks[0].original_component.adapter = Swish2().eval()
    assert clrp.coverage(model) == before


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
def test_per_head_inputs_are_refused_where_no_hook_reaches(flag: str) -> None:
    model = fresh("gpt2")
    hooks = clrp.lrp_hooks(model)
    getattr(model, f"set_{flag}")(True)
    with pytest.raises(ModelStateError, match=flag):
        model.run_with_hooks(random_tokens(), fwd_hooks=hooks)


@pytest.mark.parametrize("flag", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_per_head_inputs_change_no_relevance(name: str, flag: str) -> None:
    model, ids = fresh(name, torch.float64), random_tokens()
    objective = clrp.logit_diff(model, 7, 12)
    with true_float64(model):
        _, wanted = clrp.run_with_relevance(model, ids, objective, "hook_embed")
        getattr(model, f"set_{flag}")(True)
        _, got = clrp.run_with_relevance(model, ids, objective, "hook_embed")
    assert off(got["hook_embed"], wanted["hook_embed"]) <= PROMISED[torch.float64]


@pytest.mark.parametrize("thing", [None, 3, nn.Linear(2, 2), "gpt2"], ids=repr)
def test_something_that_is_no_bridge_is_refused(thing: object) -> None:
    for call in (*_calls(thing), lambda: clrp.coverage(thing)):
        with pytest.raises(TypeError, match="TransformerBridge"):
            call()


def test_a_hugging_face_model_is_refused() -> None:
    for call in _calls(make_hf("qwen3", torch.float32)):
        with pytest.raises(TypeError, match="boot_transformers"):
            call()


def test_unknown_rules_are_refused() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(ValueError, match="'attnlrp'"), clrp.lrp(model, "lrp-epsilon"):
        pass
    with pytest.raises(TypeError, match="RuleSet"), clrp.lrp(model, 3):  # type: ignore[arg-type]
        pass


def test_rules_of_transformer_lens_own_are_not_doubled() -> None:
    model = fresh("qwen3")
    model.blocks[1].mlp._relevance_rule_refcounts = {"half": 1}
    for call in _calls(model):
        with pytest.raises(ModelStateError, match=r"blocks\.1\.mlp"):
            call()
    model.blocks[1].mlp._relevance_rule_refcounts = {}
    with clrp.lrp(model):
        pass
