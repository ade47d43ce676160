"""What the oracle is checked with: automatic differentiation of rules written as stop-gradients.

``stop_gradients(rules)`` replaces the oracle's forward operations by forms whose ordinary
gradient is the rule, so that differentiating the oracle's forward derives a rule set anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from truth.oracle import ops


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def off(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def gradients(scalar: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(scalar, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def stop_norm(x: Tensor, layer: ops.Norm) -> Tensor:
    mean = x.mean(-1, keepdim=True) if layer.centred else 0.0
    std = ((x - mean).pow(2).mean(-1, keepdim=True) + layer.eps).sqrt().detach()
    y = (x - mean) / std * layer.weight
    return y if layer.bias is None else y + layer.bias


def plain_activation(x: Tensor, name: str) -> Tensor:
    f = torch.nn.functional
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": f.silu, "gelu": f.gelu, "relu": f.relu,
        "gelu_tanh": lambda t: f.gelu(t, approximate="tanh"),
    }  # fmt: skip
    return known[name](x)


def stop_activation(x: Tensor, name: str) -> Tensor:
    return x * (plain_activation(x, name) / x).detach()


def stop_softcap(u: Tensor, cap: float | None) -> Tensor:
    return u if cap is None else u * (cap * torch.tanh(u / cap) / u).detach()


def halved(y: Tensor) -> Tensor:
    return 0.5 * y + 0.5 * y.detach()


class HotSoftmax(torch.autograd.Function):
    """softmax forward; backward through the explicit Jacobian at temperature 2."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        ctx.save_for_backward(s)
        return torch.softmax(s, -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (s,) = ctx.saved_tensors
        p = torch.softmax(s / 2.0, -1)
        jacobian = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
        return (jacobian @ g[..., None])[..., 0]


@contextmanager
def stop_gradients(rules: str) -> Iterator[None]:
    """The forward's operations, replaced by the stop-gradient form that spells out each rule."""
    query_key, pattern_value = ops.query_key, ops.pattern_value
    forms: dict[str, Any] = {"norm": stop_norm, "gate_product": lambda a, b: halved(a * b)}
    if rules != "gim":
        forms |= {"activation": stop_activation, "softcap": stop_softcap}
    if rules in ("attnlrp", "gim"):
        forms["query_key"] = lambda q, k, c: halved(query_key(q, k, c))
        forms["pattern_value"] = lambda p, v: halved(pattern_value(p, v))
    if rules == "cplrp":
        forms["pattern_value"] = lambda p, v: pattern_value(p.detach(), v)
    forms["softmax"] = HotSoftmax.apply if rules == "gim" else lambda s: torch.softmax(s, -1)
    with mock.patch.multiple(ops, **forms):
        yield
