"""Propagation rules: functions with the identity as forward and another gradient as backward.

Relevance is activation × modified gradient (arXiv:2402.05602, Sec. 3; Arras et al. 2025), so a rule
is fully described by the gradient it sends back. Every function here returns the values it was
given, bit for bit, and changes only what autograd does with them. None divides by an activation:
the ratios f(x)/x are known in closed form, are finite everywhere and right at 0.

Notation: ``g`` is the gradient of the objective at an operation's output, shapes in brackets.
Arithmetic inside a backward runs in float32 at least, also for bfloat16 and float16 models.

Each autograd Function carries a ``RuleNode`` that tells the audit what it does: which inputs its
backward sends a gradient to, and whether it shares out a product. A Function without one is a
finding of the audit, and the model is refused.

Each returns its value through ``handed_on``. That is a view of what was given, which costs nothing.
Autograd lets nobody write into such a view, and what a rule has saved must stay what it was; but a
user's hook may edit in place wherever the model alone would let it. So where the user has hooks on
the model, it is a copy with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Ratio = Callable[[Tensor], Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in its own precision, or in float32 where that is higher."""
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- what every function shares


@dataclass(frozen=True)
class RuleNode:
    """What a custom autograd Function means for the audit.

    Attributes:
        follow: Positions of the inputs that its backward sends a gradient to.
        effect: "pass" hands everything on; "halve" announces a product below; "product" is one that
            has its rule inside; "norm" is a norm that has its rule inside; "ordinary" says
            that the next nonlinear node below keeps its ordinary gradient by decision.
    """

    follow: tuple[int, ...]
    effect: Literal["pass", "halve", "product", "norm", "ordinary"] = "pass"


_CONSTANT = "_tl_contrastive_lrp_constant"
_copies: ContextVar[bool] = ContextVar("tl_contrastive_lrp_copies", default=False)


@contextmanager
def writable(on: bool = True) -> Iterator[None]:
    """Let ``handed_on`` and ``started`` return copies in the block, which hooks may write into.

    Args:
        on: Whether to do so at all.
    """
    token = _copies.set(on)
    try:
        yield
    finally:
        _copies.reset(token)


def is_writable() -> bool:
    """Whether a user's hooks may write into what ``handed_on`` returns."""
    return _copies.get()


def handed_on(x: Tensor) -> Tensor:
    """``x`` as an autograd Function returns it: a view, or a copy inside ``writable``."""
    return x.clone() if _copies.get() else x.view_as(x)


def started(leaf: Tensor) -> Tensor:
    """A leaf as the model goes on with it: itself, or a copy inside ``writable``."""
    return leaf.clone() if _copies.get() else leaf


def constant_leaf(value: Tensor) -> Tensor:
    """A leaf for a constant that a user's hook put in the place of a computed value."""
    leaf = value.detach().requires_grad_(True)
    setattr(leaf, _CONSTANT, True)
    return leaf


def is_constant(x: Tensor) -> bool:
    """Whether ``x`` was made from such leaves alone, or from nothing that has a gradient."""
    if getattr(x, _CONSTANT, False):
        return True
    seen, left = set(), [x.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not getattr(node.variable, _CONSTANT, False):
            return False
        left += [above for above, _ in node.next_functions]
    return not x.is_leaf or not x.requires_grad


# ---------------------------------------------------------------- product of computed factors


class _ScaleGradient(torch.autograd.Function):
    audit = RuleNode((0,), "halve")

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return handed_on(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return (g * ctx.factor).to(g.dtype), None


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """``x`` with its gradient multiplied by ``factor`` (a number, or elementwise)."""
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


def uniform(product: Float[Tensor, "*shape"], factors: int = 2) -> Float[Tensor, "*shape"]:
    """Uniform (half) rule for a product of ``factors`` computed tensors.

    Each factor of y = a·b would get all of y's relevance from the ordinary gradient; dividing the
    gradient that enters the product by the number of factors shares it equally. Apply it to the
    product's output (arXiv:2402.05602, Eq. 15; Arras et al. 2019, half rule).
    """
    return scale_gradient(product, 1.0 / factors)


def constant(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """AH-rule: a constant weight that takes no relevance (arXiv:2202.07304, Sec. 4)."""
    return x.detach()


# ---------------------------------------------------------------- normalisation


class _LinearNorm(torch.autograd.Function):
    audit = RuleNode((1, 2), "norm")

    @staticmethod
    def forward(ctx: Any, y: Tensor, normalized: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(normalized, scale, weight)
        return handed_on(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor, None]:
        normalized, scale, weight = ctx.saved_tensors
        u = g.to(normalized.dtype) * weight
        through_scale = (u * normalized).sum(-1, keepdim=True) / scale
        return None, u, through_scale, None


def linear_norm(
    y: Float[Tensor, "*batch d"],
    normalized: Float[Tensor, "*batch d"],
    scale: Float[Tensor, "*batch 1"],
    weight: Float[Tensor, " d"],
) -> Float[Tensor, "*batch d"]:
    """LN-rule: the norm is linear, its denominator a constant (arXiv:2202.07304, Sec. 4).

    ``y`` = weight ⊙ ``normalized`` + bias is the norm's output, ``normalized`` = C(x)/``scale``
    with C the centring of LayerNorm or nothing. Both tensors depend on x, and

        d normalized = C(dx)/scale − normalized · d scale/scale,

    so sending u = weight ⊙ g to ``normalized`` and ⟨u, normalized⟩/scale to ``scale`` leaves
    Cᵀ(u)/scale at x: exactly the gradient with the denominator held fixed. The rule never sees x,
    so it stays right whatever other hooks do between x's HookPoint and the norm.
    """
    # y's own graph is kept, so that backward hooks on it fire, but is sent no gradient: the norm's
    # ordinary backward must not run as well.
    out: Tensor = _LinearNorm.apply(y, normalized, scale, weight)
    return out


class _Normalized(torch.autograd.Function):
    audit = RuleNode((1,), "norm")

    @staticmethod
    def forward(ctx: Any, n: Tensor, x: Tensor, eps: float, centred: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.eps, ctx.centred = eps, centred
        return handed_on(n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[None, Tensor, None, None]:
        (x,) = ctx.saved_tensors
        u = u - u.mean(-1, keepdim=True) if ctx.centred else u
        return None, (u / norm_scale(x, ctx.eps, ctx.centred)).to(x.dtype), None, None


class _Weighted(torch.autograd.Function):
    audit = RuleNode((1,))

    @staticmethod
    def forward(ctx: Any, y: Tensor, n: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(weight)
        return handed_on(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return None, at_least_float32(g) * weight, None


def norm_scale(x: Tensor, eps: float, centred: bool) -> Tensor:
    """A norm's denominator: √(mean C(x)² + eps), in float32 at least."""
    x = at_least_float32(x.detach())
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def normalized_of(
    n: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], eps: float, *, centred: bool
) -> Float[Tensor, "*batch d"]:
    """LN-rule where the norm's input is at hand: C(u)/s goes to ``x``.

    ``n`` = C(x)/s, in float32 at least, with s² = mean C(x)² + ``eps``; ``centred`` for LayerNorm.
    """
    out: Tensor = _Normalized.apply(n, x, eps, centred)
    return out


def weighted(
    y: Float[Tensor, "*batch d"], n: Float[Tensor, "*batch d"], weight: Float[Tensor, "*d"]
) -> Float[Tensor, "*batch d"]:
    """A norm's ``y`` = ``weight`` ⊙ ``n`` + bias, with ordinary gradient to ``n`` alone."""
    out: Tensor = _Weighted.apply(y, n, weight)
    return out


class _Ordinary(torch.autograd.Function):
    audit = RuleNode((0,), "ordinary")

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:  # noqa: ARG004
        return handed_on(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # noqa: ARG004
        return g


def ordinary(y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``y`` unchanged: a mark that the operation which made it keeps its ordinary gradient."""
    if not torch.is_grad_enabled():
        return y  # also where a derivative is taken forward, along with the values
    out: Tensor = _Ordinary.apply(y)
    return out


# ---------------------------------------------------------------- activations


class _Ratio(torch.autograd.Function):
    audit = RuleNode((1,))

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, ratio: Ratio) -> Tensor:
        ctx.save_for_backward(x)
        ctx.ratio = ratio
        return handed_on(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:
        (x,) = ctx.saved_tensors
        return None, (at_least_float32(g) * ctx.ratio(at_least_float32(x))).to(x.dtype), None


def identity(
    y: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"], ratio: Ratio
) -> Float[Tensor, "*shape"]:
    """Identity rule for y = f(x): the gradient is f(x)/x, so all relevance of y goes to x.

    ``ratio`` computes f(x)/x in closed form (arXiv:2402.05602, Eq. 9).
    """
    out: Tensor = _Ratio.apply(y, x, ratio)
    return out


class _GatedProduct(torch.autograd.Function):
    audit = RuleNode((1, 2), "product")

    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, up: Tensor, ratio: Ratio) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.ratio = ratio
        return handed_on(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate32 = at_least_float32(gate)
        shared = at_least_float32(g) * ctx.ratio(gate32)
        to_gate = (shared * at_least_float32(up)).to(gate.dtype)
        return None, to_gate, (shared * gate32).to(up.dtype), None


def gated_product(
    y: Float[Tensor, "*shape"],
    gate: Float[Tensor, "*shape"],
    up: Float[Tensor, "*shape"],
    ratio: Ratio,
) -> Float[Tensor, "*shape"]:
    """Identity rule inside y = f(gate) ⊙ up, for places where f(gate) itself has no HookPoint.

    g·ratio(gate)·up goes to ``gate`` and g·f(gate) to ``up``, with f(gate) = ratio(gate)·gate.
    The uniform rule for the product is separate: ``uniform`` on the output.
    """
    out: Tensor = _GatedProduct.apply(y, gate, up, ratio)
    return out
