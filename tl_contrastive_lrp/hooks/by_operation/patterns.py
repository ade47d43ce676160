"""Patterns of norms, clamps and sigmoid gates in a wrapped module's own code.

The rules inside a wrapped module see single calls of torch functions. The functions here recognise
the calls that have a rule: the denominator of a norm, a norm in one call, a clamp, and x ⊙ σ(c·x)
written by hand. A clamp and that product are functions of one argument with f(0) = 0, so both get
the identity rule, f(x)/x in closed form. The product looks like one of two computed tensors, but
the autograd graph shows that both factors come from the same one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rules import functions as rules

# Nodes with one computed input that act on each element by itself, linearly.
_ELEMENTWISE = frozenset({"MulBackward0", "DivBackward0", "NegBackward0", "ToCopyBackward0"})
_CASTS = frozenset({"ToCopyBackward0"})
_BOUNDS = {"clamp": ("min", "max"), "clip": ("min", "max"), "clamp_min": ("min",),
           "clamp_max": ("max",)}  # fmt: skip


def clamp_ratio(low: float | None, high: float | None) -> rules.Ratio:
    """clamp(x)/x for ``low`` <= 0 <= ``high``: 1 inside the bounds, bound/x beyond them.

    Beyond a bound x is not 0, so the quotient is finite everywhere.
    """

    def ratio(x: Tensor) -> Tensor:
        out = torch.ones_like(x)
        if high is not None:
            out = torch.where(x > high, high / x, out)
        if low is not None:
            out = torch.where(x < low, low / x, out)
        return out

    return ratio


def clamp_bounds(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float | None, float | None] | None:
    """The bounds (low, high) of a call to ``torch.clamp`` or similar, if 0 stays 0; else None.

    Args:
        name: The function's name.
        args: Its arguments, the clamped tensor first.
        kwargs: Its keyword arguments.
    """
    given = {**dict(zip(_BOUNDS[name], args[1:], strict=False)), **kwargs}
    low, high = given.get("min"), given.get("max")
    if not all(bound is None or isinstance(bound, int | float) for bound in (low, high)):
        return None
    if (low is not None and low > 0) or (high is not None and high < 0):
        return None
    return low, high


def _computed_inputs(node: Any) -> list[tuple[Any, int]]:
    return [(below, number) for below, number in node.next_functions if below is not None]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _origin(node: Any, number: int, through: frozenset[str]) -> tuple[Any, int]:
    """Where a value comes from, past nodes in ``through`` that have one computed input."""
    while node.name() in through:
        inputs = _computed_inputs(node)
        if len(inputs) != 1:
            break
        node, number = inputs[0]
    return node, number


def is_sigmoid_of(s: Tensor, x: Tensor) -> bool:
    """Whether ``s`` = σ(c ⊙ x) for a constant c, according to the autograd graph.

    Casts and constant factors of ``x`` itself make no difference: with x = c'·u, both are functions
    of the same u.
    """
    node, _ = _origin(*_edge(s), _CASTS)
    if node.name() != "SigmoidBackward0" or s.shape != x.shape:
        return False
    (below,) = _computed_inputs(node)
    return _origin(*below, _ELEMENTWISE) == _origin(*_edge(x), _ELEMENTWISE)


# ---------------------------------------------------------------- norms


_POWERS = ("pow", "__pow__")
ROOTS = ("sqrt", "rsqrt", *_POWERS)
NORMS = ("layer_norm", "rms_norm")


def is_root(name: str, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a call made the denominator of a norm: a root, one number for the last dimension."""
    if name not in ROOTS or (name in _POWERS and args[1:] not in ((0.5,), (-0.5,))):
        return False
    return isinstance(out, Tensor) and out.shape[-1:] == (1,)


class NormCall(NamedTuple):
    """The arguments of ``layer_norm`` or ``rms_norm``: y = weight ⊙ C(x)/√(mean C(x)² + eps)."""

    x: Tensor
    weight: Tensor
    eps: float
    centred: bool

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall:
        """The arguments of a call, by position or by name."""
        names = ["input", "normalized_shape", "weight", "bias", "eps"]
        centred = name == "layer_norm"
        if not centred:
            names.remove("bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, eps = given["input"], given.get("weight"), given.get("eps")
        if weight is None:
            weight = x.new_ones(1)
        if eps is None:
            eps = 1e-5 if centred else torch.finfo(x.dtype).eps
        return cls(x, weight.detach(), eps, centred)

    def moved(self, tangent: Tensor) -> Tensor:
        """The derivative of y for x's ``tangent``, with the denominator held fixed."""
        tangent = tangent - tangent.mean(-1, keepdim=True) if self.centred else tangent
        return self.weight * tangent / rules.norm_scale(self.x, self.eps, self.centred)
