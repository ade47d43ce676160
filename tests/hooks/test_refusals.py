"""What cannot be explained is refused in a sentence that says what, why and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from truth import zoo

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.hooks.user_hooks import as_own

TOKENS = zoo.random_tokens()
LONGEST = 700  # characters

# A row of the zoo -> the component that is named, and what its refusal says of it.
REFUSED: dict[str, tuple[str, str]] = {
    "mamba": ("blocks.0.mixer", "state-space"),
    "mamba2": ("blocks.0.mixer", "state-space"),
    "falcon_h1": ("blocks.0.mamba", "state-space"),
    "rwkv": ("blocks.0.time_mix", "recurrent"),
    "recurrent_gemma": ("RecurrentGemmaDecoderLayer", "recurrent"),
    "qwen3_next": ("blocks.0.linear_attn", "linear-attention"),
    "olmo_hybrid": ("blocks.0.linear_attn", "linear-attention"),
    "lfm2": ("blocks.0.conv", "convolution"),
    "deepseek_v4": ("blocks.0.attn_hc", "residual streams"),
    "hrm_text": ("HrmTextForCausalLM", "L_blocks and H_blocks"),
    "gemma4_text": ("embed_tokens_per_layer", "two places"),
    "t5": ("T5ForConditionalGeneration", "cross-attention"),
    "bart": ("BartForConditionalGeneration", "encoder-decoder"),
}


def _state(model: Any) -> object:
    """Everything that a refusal could leave behind."""
    modules = list(model.original_model.modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
    overrides = [sorted(k for k in vars(m) if k == "forward") for m in modules]
    grads = [(p.requires_grad, p.grad is None) for p in model.original_model.parameters()]
    return hooks, overrides, grads, model.list_hooks(), torch.is_grad_enabled()


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_what_and_why_and_leaves_nothing_behind(name: str) -> None:
    model = zoo.boot(name)
    before, (component, reason) = _state(model), REFUSED[name]
    objective = clrp.logit_diff(model, 7, 12)
    with pytest.raises(UncoveredComponentError) as caught:
        clrp.run_with_relevance(model, TOKENS, objective)
    text = str(caught.value)
    assert component in text
    assert reason in text
    assert "activation patching" in text, "what to do instead"
    assert len(text) <= LONGEST
    for call in (clrp.coverage, clrp.lrp_hooks):
        with pytest.raises(UncoveredComponentError):
            call(model)
    with pytest.raises(UncoveredComponentError):
        clrp.attribution_graph(model, TOKENS, objective)
    assert _state(model) == before


def test_a_model_that_does_not_run_on_tokens_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _fresh("llama")

    def needs_more(*_: Any, **__: Any) -> None:
        raise ValueError("You must specify pixel_values")

    monkeypatch.setattr(model.original_model, "forward", needs_more)
    before = _state(model)
    with pytest.raises(UncoveredComponentError, match="pixel_values") as caught:
        clrp.coverage(model)
    assert "token ids alone" in str(caught.value)
    assert _state(model) == before
    monkeypatch.undo()
    assert clrp.coverage(model).rows, "it was the forward alone"


def _fresh(name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(zoo.saved(name)), device="cpu")


# ---------------------------------------------------------------- graphs


@contextmanager
def _shifted(module: Any) -> Iterator[None]:
    """A token shift in a module's output: linear, so that relevance has nothing to refuse."""

    def shift(_module: Any, _args: Any, output: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
        return output + 0.2 * before

    handle = module.register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["mlp.out", "attn.k", "attn.v"])
@pytest.mark.parametrize("rules", ["attnlrp", "relp"])
def test_tokens_that_mix_outside_attention_have_relevance_and_no_graph(
    where: str, rules: str
) -> None:
    model = _fresh("llama")
    objective = clrp.logit_diff(model, 7, 12)
    module = model.blocks[1]
    for part in where.split("."):
        module = getattr(module, part)
    with _shifted(module.original_component):
        result = clrp.attribute(model, TOKENS, objective, rules=rules)
        assert result.resid.abs().sum() > 0
        with pytest.raises(UncoveredComponentError, match=r"blocks\.1") as caught:
            clrp.attribution_graph(model, TOKENS, objective, rules=rules)
        text = str(caught.value)
        assert "blocks.0" not in text
        assert "clrp.attribute" in text
        assert len(text) <= LONGEST
        far = clrp.attribution_graph(
            model, TOKENS, objective, rules=rules, layers=[0], progress=False
        )
        column = far.matrix(far.sites[0], far.sites[1]).sum(0)
        assert torch.allclose(column, result.resid[0], atol=1e-4 * float(column.abs().max()))


def test_the_check_is_made_once_and_sees_no_hook_of_the_user() -> None:
    model = _fresh("llama")
    objective = clrp.logit_diff(model, 7, 12)
    runs: list[int] = []

    def count(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        runs.append(tensor.shape[1])

    with model.hooks(fwd_hooks=[("embed.hook_out", count)]):
        clrp.attribution_graph(model, TOKENS, objective)
        clrp.attribution_graph(model, TOKENS, objective)
    assert runs == [8, 8], "the user's hook saw the prompt alone"
    counted: list[int] = []
    handle = model.original_model.register_forward_pre_hook(as_own(lambda *_: counted.append(1)))
    clrp.attribution_graph(model, TOKENS, objective)
    assert len(counted) == 1
    clrp.attribution_graph(model, TOKENS, objective, rules="relp")
    assert len(counted) == 1 + 2, "another rule set: checked with one run, then used"
    handle.remove()
