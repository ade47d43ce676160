"""Low precision without silent underflow: the backward is linear, the forward's loss is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.grids import grid
from support.hooking import off
from support.low_precision import LOW, LRP, TOKENS, extremes, shrunk
from torch.nn import functional as F
from truth import zoo
from truth.drawn import draw
from truth.families import FAMILIES, boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.rules.precision import WideGradient, plain
from tl_contrastive_lrp.rules.softmax import softmax_temperature


@pytest.mark.parametrize(("name", "rules", "dtype"), grid(FAMILIES, LRP, turns=LOW))
def test_the_backward_is_linear(dtype: torch.dtype, name: str, rules: str) -> None:
    """A billionth of an objective has a billionth of its relevance: no rounding, no underflow."""
    model = boot(name, dtype)
    whole = clrp.logit_diff(model, *extremes(name, dtype))
    sites = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
    _, wanted = clrp.run_with_relevance(model, TOKENS, whole, sites, rules=rules)
    _, found = clrp.run_with_relevance(
        model, TOKENS, lambda logits: 1e-9 * whole(logits), sites, rules=rules
    )
    for site in sites:
        assert off(found[site] * 1e9, wanted[site]) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "bloom", "bert"])
def test_the_backward_is_linear_elsewhere(name: str) -> None:
    """Experts, sinks, complex RoPE, ALiBi, an encoder."""
    model, tokens = zoo.boot(name, torch.bfloat16), zoo.random_tokens()
    objective = clrp.logit_diff(model, 7, 12)
    wanted = clrp.attribute(model, tokens, objective)
    found = clrp.attribute(model, tokens, lambda logits: 1e-9 * objective(logits))
    assert off(found.resid * 1e9, wanted.resid) < 1e-5
    assert off(found.heads * 1e9, wanted.heads) < 1e-5


@pytest.mark.parametrize("keys", [64, 1000])
def test_temperature_in_float16_counts_weights_that_the_pattern_lost(keys: int) -> None:
    """A fifth of these weights is 0 in the float16 pattern, but not their square roots."""
    scores = (4 * draw(20, keys, dtype=torch.float32)).half().requires_grad_(True)
    pattern = F.softmax(scores, -1, dtype=torch.float32).half()
    signal = draw(20, keys, dtype=torch.float32, seed=1)
    y = softmax_temperature(pattern, 2.0)
    assert torch.equal(y, pattern)
    (found,) = torch.autograd.grad(y, scores, WideGradient(signal, y.dtype))
    hot = torch.softmax(scores.detach().double() / 2, -1)
    wanted = hot * (signal.double() - (hot * signal.double()).sum(-1, keepdim=True))
    assert off(plain(found), wanted) < 1e-5


@pytest.mark.parametrize("explain", ["attribute", "attribution_graph"])
def test_underflow_in_the_forward_is_said(explain: str) -> None:
    model = shrunk("llama", 1e-6, torch.float16)
    with pytest.warns(UserWarning, match="too small for float16.*in_float32"):
        getattr(clrp, explain)(model, TOKENS, target=7, contrast=12)


def test_that_warning_is_deserved() -> None:
    model, high = (shrunk("llama", 1e-6, dtype) for dtype in (torch.float16, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = clrp.attribute(model, TOKENS, target=7, contrast=12)
    wanted = clrp.attribute(high, TOKENS, target=7, contrast=12)
    assert off(found.resid[:-1], wanted.resid[:-1]) > 0.01


@pytest.mark.parametrize("rules", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_warning_on_ordinary_models(name: str, rules: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clrp.attribute(
            boot(name, torch.float16), TOKENS, target=7, contrast=12, rules=rules, neurons=True
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_taken_inside_lrp_are_watched(name: str) -> None:
    """There they are torch's own, in the model's type."""
    model = boot(name, torch.float16)
    objective = clrp.logit_diff(model, *extremes(name, torch.float16))
    with warnings.catch_warnings(), clrp.lrp(model):
        warnings.simplefilter("error")
        value = objective(model(TOKENS))
        torch.autograd.grad(value, [model.embed.weight])
    with clrp.lrp(model):
        value = 1e-7 * objective(model(TOKENS))
        with pytest.warns(UserWarning, match="underflow in this float16 model.*multiply"):
            torch.autograd.grad(value, [model.embed.weight])
        value = 1e-12 * objective(model(TOKENS))  # every gradient is 0
        with pytest.warns(UserWarning, match="underflow in this float16 model"):
            torch.autograd.grad(value, [model.embed.weight])
