"""``in_float32``: the way out of low precision, and back."""

from __future__ import annotations

import pytest
import torch
from support.hooking import off
from support.low_precision import LOW, TOKENS, extremes, shrunk, truth
from truth.families import FAMILIES, boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.rules.precision import in_float32


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_in_float32_leaves_no_rounding(name: str, dtype: torch.dtype) -> None:
    model = boot(name, dtype)
    before = [(p, p.data_ptr(), p.dtype) for p in model.original_model.parameters()]
    target, contrast = extremes(name, dtype)
    with in_float32(model):
        result = clrp.attribute(model, TOKENS, target=target, contrast=contrast, rules="attnlrp")
        assert all(p.dtype == torch.float32 for p in model.original_model.parameters())
    true = truth(name, dtype, "attnlrp").relevance
    wanted = torch.stack([true[site].sum(-1)[0] for site in result.sites])
    # Gemma's factor on the embeddings is a buffer, and stays the rounded number it is.
    rounded_constant = torch.finfo(dtype).eps / 2 if name.startswith("gemma") else 0.0
    assert off(result.resid, wanted) < 1e-5 + rounded_constant
    after = [(p, p.data_ptr(), p.dtype) for p in model.original_model.parameters()]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, after, strict=True))


def test_in_float32_puts_the_weights_back_after_an_exception() -> None:
    model = boot("qwen3", torch.bfloat16)
    with torch.no_grad():
        before = model(TOKENS)
    with pytest.raises(clrp.errors.TokenError), in_float32(model):
        clrp.attribute(model, TOKENS, target=7, contrast=7)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)


def test_in_float32_refuses_what_it_cannot_widen() -> None:
    with pytest.raises(TypeError, match="TransformerBridge"), in_float32(object()):
        pass
    model = shrunk("llama", 1.0, torch.bfloat16)
    model.original_model.to("meta")
    with pytest.raises(clrp.errors.ModelStateError, match="offloaded"), in_float32(model):
        pass


@pytest.mark.parametrize("folded", [False, True], ids=["no processing", "folded"])
def test_in_float32_reaches_processed_weights(folded: bool) -> None:
    model = shrunk("llama", 1.0, torch.bfloat16)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    with in_float32(model):
        result = clrp.attribute(model, TOKENS, target=7, contrast=12)
    assert off(result.resid, clrp.attribute(model, TOKENS, target=7, contrast=12).resid) < 0.05
    assert result.ledger.delta != 0
