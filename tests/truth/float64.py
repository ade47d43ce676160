"""Make a test model compute in float64 from end to end.

A model booted in float64 does not: Hugging Face and TransformerLens cast down to float32 at

- attention softmax: ``torch.nn.functional.softmax(scores, dtype=torch.float32)`` (all families
  but GPT-2), in Hugging Face's eager attention and in TransformerLens' own attention alike;
- RMSNorm: ``hidden_states.to(torch.float32)`` or ``x.float()``; Gemma casts the weight too;
- rotary embeddings: inverse frequencies, angles, cos and sin are computed in float32;
- Gemma's embedding scale, when the model was made in float32: a float32 buffer.

Those casts alone cost 1e-8 to 1e-6 relative, which would hide an error that a float64 test is
there to find.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


def _softmax_keeping_float64(original: Any) -> Any:
    """softmax that ignores a request for float32 when its input is float64."""

    def softmax(
        input: torch.Tensor, dim: Any = None, _stacklevel: int = 3, dtype: Any = None
    ) -> torch.Tensor:
        if input.dtype == torch.float64:
            dtype = None
        return original(input, dim=dim, _stacklevel=_stacklevel, dtype=dtype)

    return softmax


def _rms_forward(norm: Any) -> Any:
    """The norm's formula in its input's dtype: w * x / sqrt(mean(x^2) + eps), or (1 + w) * ..."""
    one_plus_weight = type(norm).__name__.startswith("Gemma")
    eps = norm.eps if one_plus_weight else norm.variance_epsilon

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        weight = 1.0 + norm.weight if one_plus_weight else norm.weight
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + eps)
        return hidden_states * scale * weight

    return forward


def _rotary_forward(rotary: Any) -> Any:
    """cos and sin of position * theta^(-2i/d), in float64."""
    config = rotary.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        settings = config.rope_parameters
        settings = settings[layer_type] if layer_type is not None else settings
        assert settings["rope_type"] == "default", "only default rotary embeddings are known here"
        pair = torch.arange(0, width, 2, dtype=torch.float64)
        frequency = settings["rope_theta"] ** (-pair / width)
        angle = position_ids[..., None].to(torch.float64) * frequency
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)

    return forward


@contextmanager
def true_float64(model: Any) -> Iterator[Any]:
    """Within the context, ``model`` computes in float64 throughout; everything is undone after.

    Args:
        model: a Hugging Face causal LM or a TransformerBridge around one, in float64.

    Yields the model. The forward is the family's own but for the casts listed above. Raises
    ValueError for a model in another dtype.
    """
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float64}:
        raise ValueError(f"true_float64 needs a float64 model, this one has {kinds}")
    wrapped = getattr(model, "original_model", model)
    with ExitStack() as stack:
        functional = torch.nn.functional
        replacement = _softmax_keeping_float64(functional.softmax)
        stack.enter_context(mock.patch.object(functional, "softmax", replacement))
        for module in _unique_modules(wrapped):
            kind = type(module).__name__
            if kind.endswith("RMSNorm"):
                stack.enter_context(_instance_forward(module, _rms_forward(module)))
            elif kind.endswith("RotaryEmbedding"):
                stack.enter_context(_instance_forward(module, _rotary_forward(module)))
            elif "embed_scale" in module._buffers:
                exact = torch.tensor(module.scalar_embed_scale, dtype=torch.float64)
                stack.enter_context(_buffer(module, "embed_scale", exact))
        yield model


def _unique_modules(model: torch.nn.Module) -> list[Any]:
    """Every Hugging Face module, also those that TransformerLens' bridges wrap."""
    return list(dict.fromkeys(model.modules()))


@contextmanager
def _instance_forward(module: torch.nn.Module, forward: Any) -> Iterator[None]:
    """Give one module another forward for the context's duration."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def _buffer(module: torch.nn.Module, name: str, value: torch.Tensor) -> Iterator[None]:
    """Exchange one buffer for the context's duration."""
    before = module._buffers[name]
    module._buffers[name] = value
    try:
        yield
    finally:
        module._buffers[name] = before
