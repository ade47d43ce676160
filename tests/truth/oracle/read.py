"""From a Hugging Face model's configuration and state dict to one uniform description."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ops import Linear, Norm

ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROTARY_TYPES = ("qwen3", "qwen2", "llama", "mistral", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Block:
    """One layer. ``gate`` is None where the MLP is down(f(up(x))); ``window`` None is global."""

    ln1: Norm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    ln2: Norm
    gate: Linear | None
    up: Linear
    down: Linear
    scale: float
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    ln1_post: Norm | None = None
    ln2_post: Norm | None = None
    window: int | None = None
    theta: float | None = None
    cap: float | None = None


@dataclass(frozen=True)
class Model:
    """A decoder. ``pos_table`` [context, d_model] is None for rotary models."""

    embed: Tensor
    embed_scale: float
    pos_table: Tensor | None
    blocks: tuple[Block, ...]
    ln_final: Norm
    unembed: Linear
    final_cap: float | None
    heads: int
    kv_heads: int
    d_head: int
    activation: str


class _Weights:
    """The state dict in one dtype, with constructors for the two kinds of layer."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.of = {key: value.detach().to(dtype) for key, value in model.state_dict().items()}

    def linear(self, key: str, bias_name: str) -> Linear:
        return Linear(self.of[key + ".weight"], self.of.get(key + ".bias"), bias_name)

    def norm(self, key: str, bias_name: str, eps: float, offset: float, centred: bool) -> Norm:
        weight, bias = self.of[key + ".weight"] + offset, self.of.get(key + ".bias")
        return Norm(weight, bias, bias_name, eps, centred)


def read_model(model: Any, dtype: torch.dtype = torch.float64) -> Model:
    """Describe a Hugging Face causal LM. ValueError for one that this oracle does not know."""
    kind = model.config.model_type
    if kind == "gpt2":
        return _read_gpt2(model, dtype)
    if kind in ROTARY_TYPES:
        return _read_rotary(model, dtype)
    raise ValueError(f"no oracle for model type {kind!r}; known: gpt2, {', '.join(ROTARY_TYPES)}")


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise ValueError(f"no oracle for activation {name!r}; known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _read_gpt2(model: Any, dtype: torch.dtype) -> Model:
    config, w = model.config, _Weights(model, dtype)
    d_head = config.n_embd // config.n_head
    eps = config.layer_norm_epsilon

    def conv(key: str, bias_name: str, part: int | None = None) -> Linear:
        """GPT-2 stores [in, out]; c_attn holds query, key and value side by side."""
        weight, bias = w.of[key + ".weight"].T, w.of[key + ".bias"]
        if part is not None:
            weight, bias = weight.chunk(3)[part], bias.chunk(3)[part]
        return Linear(weight, bias, bias_name)

    blocks = []
    for i in range(config.n_layer):
        at, name = f"transformer.h.{i}.", f"blocks.{i}."
        scale = d_head**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            scale /= i + 1
        blocks.append(
            Block(
                ln1=w.norm(at + "ln_1", name + "ln1.b", eps, 0.0, True),
                query=conv(at + "attn.c_attn", name + "attn.b_Q", 0),
                key=conv(at + "attn.c_attn", name + "attn.b_K", 1),
                value=conv(at + "attn.c_attn", name + "attn.b_V", 2),
                out=conv(at + "attn.c_proj", name + "attn.b_O"),
                ln2=w.norm(at + "ln_2", name + "ln2.b", eps, 0.0, True),
                gate=None,
                up=conv(at + "mlp.c_fc", name + "mlp.b_in"),
                down=conv(at + "mlp.c_proj", name + "mlp.b_out"),
                scale=scale,
            )
        )
    return Model(
        embed=w.of["transformer.wte.weight"],
        embed_scale=1.0,
        pos_table=w.of["transformer.wpe.weight"],
        blocks=tuple(blocks),
        ln_final=w.norm("transformer.ln_f", "ln_final.b", eps, 0.0, True),
        unembed=w.linear("lm_head", "unembed.b"),
        final_cap=None,
        heads=config.n_head,
        kv_heads=config.n_head,
        d_head=d_head,
        activation=_activation(config.activation_function),
    )


def _read_rotary(model: Any, dtype: torch.dtype) -> Model:
    config, w = model.config, _Weights(model, dtype)
    kind = config.model_type
    gemma = kind.startswith("gemma")
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "gemma3_text" and config.attn_logit_softcapping is not None:
        raise ValueError("gemma3 with attn_logit_softcapping: Hugging Face itself ignores it")

    def norm(key: str, bias_name: str) -> Norm:
        return w.norm(key, bias_name, config.rms_norm_eps, 1.0 if gemma else 0.0, False)

    blocks = []
    for i in range(config.num_hidden_layers):
        at, name = f"model.layers.{i}.", f"blocks.{i}."
        qk_norm = at + "self_attn.q_norm.weight" in w.of
        second = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        scalar = config.query_pre_attn_scalar if gemma else d_head
        blocks.append(
            Block(
                ln1=norm(at + "input_layernorm", name + "ln1.b"),
                query=w.linear(at + "self_attn.q_proj", name + "attn.b_Q"),
                key=w.linear(at + "self_attn.k_proj", name + "attn.b_K"),
                value=w.linear(at + "self_attn.v_proj", name + "attn.b_V"),
                out=w.linear(at + "self_attn.o_proj", name + "attn.b_O"),
                ln2=norm(at + second, name + "ln2.b"),
                gate=w.linear(at + "mlp.gate_proj", name + "mlp.b_gate"),
                up=w.linear(at + "mlp.up_proj", name + "mlp.b_in"),
                down=w.linear(at + "mlp.down_proj", name + "mlp.b_out"),
                scale=scalar**-0.5,
                query_norm=norm(at + "self_attn.q_norm", "") if qk_norm else None,
                key_norm=norm(at + "self_attn.k_norm", "") if qk_norm else None,
                ln1_post=norm(at + "post_attention_layernorm", "") if gemma else None,
                ln2_post=norm(at + "post_feedforward_layernorm", "") if gemma else None,
                window=_window(config, i),
                theta=_theta(config, i),
                cap=config.attn_logit_softcapping if kind == "gemma2" else None,
            )
        )
    return Model(
        embed=w.of["model.embed_tokens.weight"],
        embed_scale=config.hidden_size**0.5 if gemma else 1.0,
        pos_table=None,
        blocks=tuple(blocks),
        ln_final=norm("model.norm", "ln_final.b"),
        unembed=w.linear("lm_head", "unembed.b"),
        final_cap=config.final_logit_softcapping if gemma else None,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        d_head=d_head,
        activation=_activation(config.hidden_activation if gemma else config.hidden_act),
    )


def _window(config: Any, layer: int) -> int | None:
    """Mistral's window holds for every layer; elsewhere the layer's type decides."""
    if config.model_type == "mistral":
        return config.sliding_window
    kinds = getattr(config, "layer_types", None)
    local = kinds is not None and kinds[layer] == "sliding_attention"
    return config.sliding_window if local else None


def _theta(config: Any, layer: int) -> float:
    """The rotary base; Gemma 3 has one for each type of layer."""
    settings = config.rope_parameters
    if config.model_type == "gemma3_text":
        settings = settings[config.layer_types[layer]]
    if settings["rope_type"] != "default":
        raise ValueError(f"no oracle for rotary type {settings['rope_type']!r}")
    return settings["rope_theta"]
