"""Models in bfloat16 and float16, and the truth about them in float64 on the same weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from truth.families import VOCAB, make_hf, random_tokens, saved
from truth.oracle import contrast_seed, propagate

LOW = (torch.bfloat16, torch.float16)
TOKENS = random_tokens()
LRP = ("attnlrp", "cplrp", "relp", "gim")


@functools.cache
def rounded(name: str, dtype: torch.dtype) -> Any:
    """The family in float64, with the weights its low model has."""
    model = make_hf(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).double())
    return model


@functools.cache
def extremes(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The likeliest and the unlikeliest next token: a Δℓ that rounding does not drown."""
    with torch.no_grad():
        logits = rounded(name, dtype)(TOKENS).logits[0, -1]
    return int(logits.argmax()), int(logits.argmin())


@functools.cache
def truth(name: str, dtype: torch.dtype, rules: str) -> Any:
    seed = contrast_seed(TOKENS, *extremes(name, dtype), VOCAB)
    return propagate(rounded(name, dtype), TOKENS, seed, rules)


def shrunk(name: str, factor: float, dtype: torch.dtype) -> Any:
    """A model whose embeddings are so small that its residual stream is subnormal in float16."""
    from transformer_lens.model_bridge import TransformerBridge

    model: Any = TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=dtype)
    with torch.no_grad():
        model.embed.weight.mul_(factor)
        for key, parameter in model.original_model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight")) or ".o." in key:
                parameter.mul_(factor)
            if "mlp" in key and ".out." in key:
                parameter.mul_(factor)
    return model
