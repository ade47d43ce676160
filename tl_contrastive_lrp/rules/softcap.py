"""Rules for soft-caps y = cap·tanh(x/cap): tanh(v)/v at v = x/cap, in place of 1 − tanh².

Functions with the identity as forward, as in ``rules``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelStateError
from .functions import identity
from .handed_on import handed_on


def softcap_ratio(v: Tensor) -> Tensor:
    """tanh(v)/v, 1 at v = 0; below 1e-3 the series 1 − v²/3 is exact to float64 rounding."""
    small = v.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(v), v)
    return torch.where(small, 1.0 - v * v / 3.0 + 2.0 * v.pow(4) / 15.0, torch.tanh(safe) / safe)


def softcap(
    y: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"], cap: float
) -> Float[Tensor, "*shape"]:
    """Identity rule for y = cap·tanh(x/cap): gradient tanh(v)/v at v = x/cap, saturated or not."""
    return identity(y, x, lambda u: softcap_ratio(u / cap))


# In float32, 1 − tanh² keeps four digits up to here. Beyond, correcting autograd's own derivative
# would lose them.
SATURATED = 0.999


class _CorrectSoftcap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, tanh: Tensor, where: str, before: bool) -> Tensor:
        ctx.save_for_backward(v, tanh)
        ctx.where = where
        ctx.before = before
        return handed_on(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        v, tanh = ctx.saved_tensors
        wanted = g != 0
        if ctx.before:  # autograd has multiplied by 1 − tanh², which may have rounded to 0
            wanted = wanted | (tanh.to(g.dtype).abs() == 1)
        if bool((((tanh.abs() > SATURATED) | (tanh.to(g.dtype).abs() == 1)) & wanted).any()):
            raise ModelStateError(
                f"The soft-cap at {ctx.where} is saturated, where a HookPoint cannot carry its "
                "rule with full precision. Use `with clrp.lrp(model):`, which is exact there."
            )
        factor = softcap_ratio(v) / (1.0 - tanh * tanh)
        return (
            torch.where(g != 0, g * factor, torch.zeros_like(factor)).to(g.dtype),
            None,
            None,
            None,
            None,
        )


def correct_softcap(
    x: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    tanh: Float[Tensor, "*shape"],
    where: str,
    *,
    before: bool,
) -> Float[Tensor, "*shape"]:
    """Identity rule for a soft-cap by correcting autograd's derivative 1 − tanh² to tanh(v)/v.

    For hook lists only, which cannot reach the soft-cap itself. ``before``: x goes into the cap
    (else it comes out of it).

    Raises:
        ModelStateError: in the backward, where a gradient arrives in saturation.
    """
    out: Tensor = _CorrectSoftcap.apply(x, v, tanh, where, before)
    return out
