"""Activation functions as data: f(x)/x in closed form, for the identity rule.

A ratio never divides by an activation: it is finite everywhere and correct at 0. It exists only if
f(0) = 0; a function without a row here (a bare sigmoid, softplus) has no identity rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .functions import Ratio
from .softcap import softcap_ratio


def silu_ratio(x: Tensor) -> Tensor:
    """SiLU(x)/x = σ(x)."""
    return torch.sigmoid(x)


def gelu_ratio(x: Tensor) -> Tensor:
    """GELU(x)/x = Φ(x), the normal distribution function (erfc keeps the left tail exact)."""
    tail: Tensor = torch.special.erfc(x * -math.sqrt(0.5))
    return 0.5 * tail


def gelu_tanh_ratio(x: Tensor) -> Tensor:
    """GELU's tanh approximation over x, written as a logistic: ½(1 + tanh a) = σ(2a)."""
    return torch.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3)))


def relu_ratio(x: Tensor) -> Tensor:
    """ReLU(x)/x = 1[x > 0]."""
    return (x > 0).to(x.dtype)


def relu_squared_ratio(x: Tensor) -> Tensor:
    """ReLU(x)²/x = ReLU(x)."""
    return torch.relu(x)


def quick_gelu_ratio(x: Tensor) -> Tensor:
    """x·σ(1.702 x) over x."""
    return torch.sigmoid(1.702 * x)


def mish_ratio(x: Tensor) -> Tensor:
    """x·tanh(softplus(x)) over x."""
    return torch.tanh(torch.nn.functional.softplus(x))


def expm1_ratio(x: Tensor) -> Tensor:
    """(eˣ − 1)/x, 1 at 0 (expm1 keeps every digit of the numerator)."""
    zero = x == 0
    safe = torch.where(zero, torch.ones_like(x), x)
    return torch.where(zero, torch.ones_like(x), torch.expm1(safe) / safe)


def xielu_ratio(module: Any) -> Ratio:
    """f(x)/x of xIELU (arXiv:2411.13010): αₚ·x + β for x > 0, αₙ·((eˣ − 1)/x − 1) + β below."""

    def ratio(x: Tensor) -> Tensor:
        positive = torch.nn.functional.softplus(module.alpha_p.detach()).to(x)
        beta = module.beta.detach().to(x)
        negative = beta + torch.nn.functional.softplus(module.alpha_n.detach()).to(x)
        left = negative * (expm1_ratio(x.clamp(max=0.0)) - 1.0)
        both: Tensor = beta + torch.where(x > 0, positive * x, left)
        return both

    return ratio


# Activation module class, or name of the function that TransformerLens calls when it computes a
# gated MLP itself (processed weights) -> f(x)/x.
ACTIVATIONS: dict[str, Ratio] = {
    "SiLUActivation": silu_ratio,
    "SiLU": silu_ratio,
    "silu": silu_ratio,
    "GELUActivation": gelu_ratio,
    "GELU": gelu_ratio,
    "gelu": gelu_ratio,
    "NewGELUActivation": gelu_tanh_ratio,
    "GELUTanh": gelu_tanh_ratio,
    "PytorchGELUTanh": gelu_tanh_ratio,
    "FastGELUActivation": gelu_tanh_ratio,
    "AccurateGELUActivation": gelu_tanh_ratio,
    "BloomGelu": gelu_tanh_ratio,
    "gelu_tanh": gelu_tanh_ratio,
    "QuickGELUActivation": quick_gelu_ratio,
    "ReLU": relu_ratio,
    "relu": relu_ratio,
    "ReLUSquaredActivation": relu_squared_ratio,
    "relu_squared": relu_squared_ratio,
    "MishActivation": mish_ratio,
    "Mish": mish_ratio,
    "Tanh": softcap_ratio,
}

# Activations with parameters of their own: class -> function from the module to f(x)/x.
PARAMETRIC: dict[str, Callable[[Any], Ratio]] = {"XIELUActivation": xielu_ratio}


def ratio_of(module: Any) -> Ratio | None:
    """f(x)/x of an activation module, or None for a module without an identity rule."""
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return gelu_tanh_ratio
    return PARAMETRIC[name](module) if name in PARAMETRIC else ACTIVATIONS.get(name)
