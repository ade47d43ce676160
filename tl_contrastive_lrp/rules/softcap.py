"""Rules for soft-caps y = cap·tanh(x/cap): tanh(v)/v at v = x/cap, in place of 1 − tanh².

Functions with the identity as forward, as in ``rules``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelStateError
from .functions import handed_on, identity
from .threads import caller


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
        needed = g != 0
        if ctx.before:  # autograd has multiplied by 1 − tanh², which may have rounded to 0
            needed = needed | (tanh.to(g.dtype).abs() == 1)
        if bool((((tanh.abs() > SATURATED) | (tanh.to(g.dtype).abs() == 1)) & needed).any()):
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

    This is for lists of hooks, which cannot reach the soft-cap itself. If ``before``, x is the
    cap's input, otherwise its output.

    Raises:
        ModelStateError: In the backward, where a gradient arrives in saturation.
    """
    out: Tensor = _CorrectSoftcap.apply(x, v, tanh, where, before)
    return out


def identity_softcap(y: Tensor, x: Tensor, cap: float) -> Tensor:
    """``softcap``, where there is a gradient at all."""
    return softcap(y, x, cap) if x.requires_grad else y


class CapOperand:
    """Stands in for the number c in ``c * tanh(x / c)`` and applies a rule to the result.

    In all threads except the one that created it, it acts as the number.
    """

    def __init__(self, cap: float, rule: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        self.cap = cap
        self.rule = rule
        self.owner = caller()
        self.x: Tensor | None = None

    def __rtruediv__(self, x: Tensor) -> Tensor:
        if caller() is self.owner:
            self.x = x
        return x / self.cap

    def __rmul__(self, tanh: Tensor) -> Tensor:
        y = tanh * self.cap
        if caller() is not self.owner:
            return y
        x, self.x = self.x, None
        return y if x is None else self.rule(y, x, self.cap)


@contextmanager
def softcap_replaced(
    holder: Any, attribute: str, rule: Callable[[Tensor, Tensor, float], Tensor]
) -> Iterator[None]:
    """Apply ``rule`` where a module computes its soft-cap, for the block and in this thread.

    Args:
        holder: The config or module that has the cap.
        attribute: The cap's name there. The module only divides by it and multiplies by it.
        rule: Takes y = cap·tanh(x/cap), x and the cap, and returns y with another derivative.
    """
    values = vars(holder)  # a config's own __setattr__ would refuse anything but a number
    cap = values[attribute]
    values[attribute] = CapOperand(cap, rule)
    try:
        yield
    finally:
        values[attribute] = cap
