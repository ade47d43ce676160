"""Each operation and its backward rule, one formula each.

``f`` computes the forward value. ``f_back`` takes the gradient g of the output and returns the
gradient of each input under a rule. Every backward function works from the operation's inputs
and keeps nothing between calls.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)
CUBIC = 0.044715


def _one_of(rule: str, *known: str) -> None:
    if rule not in known:
        raise ValueError(f"rule {rule!r} is none of {known}")


# linear: y = x W^T + b


@dataclass(frozen=True)
class Linear:
    """weight [out, in]; bias [out] or None, known in the ledger as ``bias_name``."""

    weight: Tensor
    bias: Tensor | None
    bias_name: str


def linear(x: Tensor, layer: Linear) -> Tensor:
    y = x @ layer.weight.T
    return y if layer.bias is None else y + layer.bias


def linear_back(g: Tensor, layer: Linear) -> Tensor:
    """g_x = g W."""
    return g @ layer.weight


# norms: y = (x - m) / s * w + b, with s = sqrt(mean((x - m)^2) + eps); m = 0 for RMSNorm


@dataclass(frozen=True)
class Norm:
    """weight as it multiplies (Gemma's 1 is already added); ``centred`` for LayerNorm."""

    weight: Tensor
    bias: Tensor | None
    bias_name: str
    eps: float
    centred: bool


def _centre(x: Tensor, layer: Norm) -> Tensor:
    return x - x.mean(-1, keepdim=True) if layer.centred else x


def norm_scale(x: Tensor, layer: Norm) -> Tensor:
    return (_centre(x, layer).pow(2).mean(-1, keepdim=True) + layer.eps).sqrt()


def norm(x: Tensor, layer: Norm) -> Tensor:
    y = _centre(x, layer) / norm_scale(x, layer) * layer.weight
    return y if layer.bias is None else y + layer.bias


def norm_back(g: Tensor, x: Tensor, layer: Norm, rule: str) -> Tensor:
    """constant: C(g w) / s.  gradient: C(u - n mean(u n)) / s with u = g w, n = (x - m) / s."""
    _one_of(rule, "constant", "gradient")
    s = norm_scale(x, layer)
    u = g * layer.weight
    if rule == "gradient":
        n = _centre(x, layer) / s
        u = u - n * (u * n).mean(-1, keepdim=True)
    return _centre(u, layer) / s


# activations: value, value / x in closed form, derivative


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def _tanh_part(x: Tensor) -> Tensor:
    return torch.tanh(ROOT_2_OVER_PI * (x + CUBIC * x**3))


def activation_ratio(x: Tensor, name: str) -> Tensor:
    """f(x) / x, also at 0."""
    if name == "silu":
        return torch.sigmoid(x)
    if name == "gelu":
        return normal_cdf(x)
    if name == "gelu_tanh":
        return 0.5 * (1.0 + _tanh_part(x))
    if name == "relu":
        return (x > 0).to(x.dtype)
    raise ValueError(f"unknown activation {name!r}")


def activation(x: Tensor, name: str) -> Tensor:
    return x * activation_ratio(x, name)


def activation_derivative(x: Tensor, name: str) -> Tensor:
    """f'(x) = r(x) + x r'(x), where r = f(x) / x."""
    r = activation_ratio(x, name)
    if name == "silu":
        return r + x * r * (1.0 - r)
    if name == "gelu":
        return r + x * torch.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
    if name == "gelu_tanh":
        inner = ROOT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x**2)
        return r + x * 0.5 * (1.0 - _tanh_part(x) ** 2) * inner
    return r


def activation_back(g: Tensor, x: Tensor, name: str, rule: str) -> Tensor:
    """identity: g f(x) / x.  gradient: g f'(x)."""
    _one_of(rule, "identity", "gradient")
    return g * (activation_ratio if rule == "identity" else activation_derivative)(x, name)


# soft-cap: y = c tanh(u / c); no cap when c is None


def softcap(u: Tensor, cap: float | None) -> Tensor:
    return u if cap is None else cap * torch.tanh(u / cap)


def softcap_back(g: Tensor, u: Tensor, cap: float | None, rule: str) -> Tensor:
    """With v = u / c.  identity: g tanh(v) / v, and g at v = 0.  gradient: g (1 - tanh(v)^2)."""
    _one_of(rule, "identity", "gradient")
    if cap is None:
        return g
    v = u / cap
    if rule == "gradient":
        return g * (1.0 - torch.tanh(v) ** 2)
    at_zero = v == 0
    ratio = torch.tanh(v) / torch.where(at_zero, torch.ones_like(v), v)
    return g * torch.where(at_zero, torch.ones_like(v), ratio)


# gate product: y = a * b


def gate_product(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def gate_product_back(g: Tensor, a: Tensor, b: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """gradient: (g b, g a).  half: half of each."""
    _one_of(rule, "half", "gradient")
    share = 0.5 if rule == "half" else 1.0
    return share * g * b, share * g * a


# query-key product: u[q, k] = c sum_d query[q, d] key[k, d]; [batch, pos, head, d_head] inputs


def query_key(query: Tensor, key: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bqhd,bkhd->bhqk", query, key)


def query_key_back(
    g: Tensor, query: Tensor, key: Tensor, scale: float, rule: str
) -> tuple[Tensor, Tensor]:
    """gradient: (c g key, c g^T query).  half: half of each."""
    _one_of(rule, "half", "gradient")
    share = scale * (0.5 if rule == "half" else 1.0)
    return (
        share * torch.einsum("bhqk,bkhd->bqhd", g, key),
        share * torch.einsum("bhqk,bqhd->bkhd", g, query),
    )


# softmax over the last dimension; masked scores hold the dtype's smallest number


def softmax(s: Tensor) -> Tensor:
    e = torch.exp(s - s.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def softmax_back(g: Tensor, s: Tensor, rule: str) -> Tensor:
    """gradient: p (g - sum p g).  hot: the same with p = softmax(s / 2).  constant: 0."""
    _one_of(rule, "gradient", "hot", "constant")
    if rule == "constant":
        return torch.zeros_like(g)
    p = softmax(s / 2.0 if rule == "hot" else s)
    return p * (g - (p * g).sum(-1, keepdim=True))


# pattern-value product: z[q, d] = sum_k pattern[q, k] value[k, d]


def pattern_value(pattern: Tensor, value: Tensor) -> Tensor:
    return torch.einsum("bhqk,bkhd->bqhd", pattern, value)


def pattern_value_back(
    g: Tensor, pattern: Tensor, value: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """gradient: (g value^T, pattern^T g).  half: half of each.  value: (0, pattern^T g)."""
    _one_of(rule, "half", "gradient", "value")
    to_pattern = {"half": 0.5, "gradient": 1.0, "value": 0.0}[rule]
    to_value = 0.5 if rule == "half" else 1.0
    return (
        to_pattern * torch.einsum("bqhd,bkhd->bhqk", g, value),
        to_value * torch.einsum("bhqk,bqhd->bkhd", pattern, g),
    )


# rotary embedding: the pair (x_i, x_{i + d/2}) is turned by position * theta^(-2i/d)


@dataclass(frozen=True)
class Turn:
    """cos and sin, both [batch, pos, 1, d_head / 2]."""

    cos: Tensor
    sin: Tensor


def turn_of(positions: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> Turn:
    """positions: [batch, pos]."""
    pair = torch.arange(0, d_head, 2, dtype=dtype)
    angle = positions.to(dtype)[:, :, None, None] * theta ** (-pair / d_head)
    return Turn(torch.cos(angle), torch.sin(angle))


def rotary(x: Tensor, turn: Turn) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * turn.cos - second * turn.sin, second * turn.cos + first * turn.sin), dim=-1
    )


def rotary_back(g: Tensor, turn: Turn) -> Tensor:
    """The inverse rotation, which is the transpose."""
    return rotary(g, Turn(turn.cos, -turn.sin))


# grouped query attention: query head h reads key and value head h // group


def repeat_heads(x: Tensor, group: int) -> Tensor:
    return x.repeat_interleave(group, dim=2)


def repeat_heads_back(g: Tensor, group: int) -> Tensor:
    """Sum over the query heads that read one key or value head."""
    batch, pos, heads, d_head = g.shape
    return g.reshape(batch, pos, heads // group, group, d_head).sum(3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[batch, pos, head * d_head] -> [batch, pos, head, d_head]."""
    return x.reshape(*x.shape[:2], heads, -1)


def join_heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1)
