"""Propagation rules: functions with the identity as forward and another gradient as backward.

Relevance is activation × modified gradient (arXiv:2402.05602, Sec. 3; Arras et al. 2025), so a rule
is fully described by the gradient it sends back. Every function here returns the values of its
argument, bit for bit, and changes only their gradient. None divides by an activation: the ratios
f(x)/x are known in closed form, are finite everywhere and correct at 0.

Notation: ``g`` is the gradient of the objective at an operation's output, shapes in brackets.
Arithmetic inside a backward runs in float32 at least, also for bfloat16 and float16 models.

Each autograd Function carries a ``RuleNode`` that describes it for the audit: which inputs its
backward sends a gradient to, and whether it divides the relevance of a product. A Function without
one is a finding of the audit, and the model is refused.

Each returns its value through ``handed_on``, usually as a view of its argument, which costs
nothing. Autograd does not allow in-place writes into such a view, and values saved by a rule must
not change; but a user's hook may edit in place wherever it could without the rules. So if the user
has hooks on the model, ``handed_on`` returns a copy with the same bits.
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
    """``x`` in its own precision, or in float32 if that is higher.

    Args:
        x: A floating-point tensor of any shape.

    Returns:
        ``x`` itself if it is float32 or float64, else a float32 copy on the same graph.

    Example:
        >>> clrp.rules.at_least_float32(torch.ones(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- shared by all functions


@dataclass(frozen=True)
class RuleNode:
    """What a custom autograd Function means for the audit.

    Attributes:
        follow: Positions of the inputs that its backward sends a gradient to.
        effect: "pass" passes the gradient on; "halve" expects a product below; "product" is a
            product that contains its rule; "norm" is a norm that contains its rule; "ordinary"
            lets the next nonlinear node below keep its ordinary gradient by decision.
    """

    follow: tuple[int, ...]
    effect: Literal["pass", "halve", "product", "norm", "ordinary"] = "pass"


_CONSTANT = "_tl_contrastive_lrp_constant"
_copies: ContextVar[bool] = ContextVar("tl_contrastive_lrp_copies", default=False)


@contextmanager
def writable(on: bool = True) -> Iterator[None]:
    """Make ``handed_on`` and ``started`` return copies in the block, which hooks may write into.

    Args:
        on: Whether to return copies; False has no effect.
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
    """The tensor with which the model continues from a leaf: itself, or a copy in ``writable``."""
    return leaf.clone() if _copies.get() else leaf


def constant_leaf(value: Tensor) -> Tensor:
    """A leaf for a constant with which a user's hook replaced a computed value."""
    leaf = value.detach().requires_grad_(True)
    setattr(leaf, _CONSTANT, True)
    return leaf


def is_constant(x: Tensor) -> bool:
    """Whether ``x`` was computed only from such leaves and from tensors without a gradient."""
    if getattr(x, _CONSTANT, False):
        return True
    seen, pending = set(), [x.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and not getattr(node.variable, _CONSTANT, False):
            return False
        pending += [earlier for earlier, _ in node.next_functions]
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
    """``x`` with its gradient multiplied by a factor.

    Args:
        x: Any tensor.
        factor: A number, or a tensor that broadcasts to the shape of ``x``.

    Returns:
        The values of ``x``, bit for bit.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(clrp.rules.scale_gradient(2 * x, 0.5), x)
        (tensor(1.),)
    """
    out: Tensor = _ScaleGradient.apply(x, factor)
    return out


def uniform(product: Float[Tensor, "*shape"], factors: int = 2) -> Float[Tensor, "*shape"]:
    """Uniform (half) rule for a product of ``factors`` computed tensors.

    The ordinary gradient would give each factor of y = a·b all of y's relevance. Dividing the
    gradient that enters the product by the number of factors shares it equally. Apply the rule to
    the product's output (arXiv:2402.05602, Eq. 15; half rule of Arras et al. 2019).

    Args:
        product: The product, of any shape.
        factors: How many computed tensors were multiplied.

    Returns:
        The values of ``product``, bit for bit.

    Example:
        >>> a, b = torch.tensor([3.0, 5.0], requires_grad=True)
        >>> grads = torch.autograd.grad(clrp.rules.uniform(a * b), (a, b))
        >>> [(x * g).item() for x, g in zip((a, b), grads)]  # each takes half of the product, 15
        [7.5, 7.5]
    """
    return scale_gradient(product, 1.0 / factors)


def constant(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """AH-rule: a constant weight, which receives no relevance (arXiv:2202.07304, Sec. 4).

    Args:
        x: The weight, of any shape.

    Returns:
        The values of ``x`` without a gradient.

    Example:
        >>> clrp.rules.constant(torch.ones(2, requires_grad=True)).requires_grad
        False
    """
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
    """LN-rule: the norm is linear, and its denominator a constant (arXiv:2202.07304, Sec. 4).

    With ``y`` = ``weight`` ⊙ ``normalized`` + bias and ``normalized`` = C(x)/``scale``, where C
    centres x for LayerNorm and does nothing for RMSNorm, both tensors depend on x, and

        d normalized = C(dx)/scale − normalized · d scale/scale.

    So sending u = weight ⊙ g to ``normalized`` and ⟨u, normalized⟩/scale to ``scale`` leaves
    Cᵀ(u)/scale at x: exactly the gradient with the denominator held fixed. The rule never sees x,
    so it remains correct whatever other hooks do between x's HookPoint and the norm.

    Args:
        y: The norm's output.
        normalized: C(x)/``scale``.
        scale: The denominator √(mean C(x)² + eps).
        weight: The factor on ``normalized``.

    Returns:
        The values of ``y``, bit for bit.

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> scale = x.pow(2).mean(-1, keepdim=True).sqrt()
        >>> y = clrp.rules.linear_norm(x / scale, x / scale, scale, torch.ones(2))
        >>> (gradient,) = torch.autograd.grad(y.sum(), x)
        >>> torch.allclose(gradient, 1 / scale)
        True
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
    """A norm's denominator √(mean C(x)² + eps), without a gradient and in float32 at least.

    Args:
        x: The norm's input [..., d].
        eps: The number that the norm adds under the root.
        centred: Whether C centres ``x`` (LayerNorm) or does nothing (RMSNorm).

    Returns:
        The denominator [..., 1].

    Example:
        >>> clrp.rules.norm_scale(torch.tensor([3.0, 4.0]), 0.0, False) ** 2
        tensor([12.5000])
    """
    x = at_least_float32(x.detach())
    x = x - x.mean(-1, keepdim=True) if centred else x
    return (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def normalized_of(
    n: Float[Tensor, "*batch d"], x: Float[Tensor, "*batch d"], eps: float, *, centred: bool
) -> Float[Tensor, "*batch d"]:
    """LN-rule if the norm's input is available: a gradient u at ``n`` becomes C(u)/s at ``x``.

    Args:
        n: C(x)/s in float32 at least, with s as ``norm_scale`` gives it.
        x: The norm's input.
        eps: The number that the norm adds under the root.
        centred: Whether C centres (LayerNorm) or does nothing (RMSNorm).

    Returns:
        The values of ``n``, bit for bit.

    Example:
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> scale = clrp.rules.norm_scale(x, 0.0, False)
        >>> n = clrp.rules.normalized_of((x / scale).detach(), x, 0.0, centred=False)
        >>> torch.allclose(torch.autograd.grad(n.sum(), x)[0], 1 / scale)
        True
    """
    out: Tensor = _Normalized.apply(n, x, eps, centred)
    return out


def weighted(
    y: Float[Tensor, "*batch d"], n: Float[Tensor, "*batch d"], weight: Float[Tensor, "*d"]
) -> Float[Tensor, "*batch d"]:
    """A norm's output ``y`` = ``weight`` ⊙ ``n`` + bias, with its ordinary gradient to ``n`` alone.

    Args:
        y: The norm's output.
        n: The normalised input, as from ``normalized_of``.
        weight: The factor on ``n``.

    Returns:
        The values of ``y``, bit for bit.

    Example:
        >>> n = torch.ones(2, requires_grad=True)
        >>> y = clrp.rules.weighted(torch.tensor([5.0, 7.0]), n, torch.tensor([2.0, 3.0]))
        >>> torch.autograd.grad(y.sum(), n)
        (tensor([2., 3.]),)
    """
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
    """Mark ``y``, so that the operation that computed it may keep its ordinary gradient.

    The audit then accepts the operation. Use this in a hook function for an operation without a
    rule whose ordinary gradient is what you want.

    Args:
        y: The operation's output, of any shape.

    Returns:
        The values of ``y``, bit for bit.

    Example:
        >>> x = torch.tensor(0.0, requires_grad=True)
        >>> torch.autograd.grad(clrp.rules.ordinary(torch.sigmoid(x)), x)
        (tensor(0.2500),)
    """
    if not torch.is_grad_enabled():
        return y  # also in forward-mode differentiation
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

    Args:
        y: The activation's output.
        x: Its input.
        ratio: f(x)/x in closed form (arXiv:2402.05602, Eq. 9), so that nothing is divided by x.

    Returns:
        The values of ``y``, bit for bit.

    Example:
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> y = clrp.rules.identity(torch.nn.functional.silu(x), x, torch.sigmoid)
        >>> torch.allclose(x * torch.autograd.grad(y.sum(), x)[0], y)
        True
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
    """Identity rule inside y = f(gate) ⊙ up, where f(gate) itself has no HookPoint.

    g·ratio(gate)·up goes to ``gate`` and g·f(gate) to ``up``, with f(gate) = ratio(gate)·gate. The
    uniform rule for the product is separate: apply ``uniform`` to the output.

    Args:
        y: The product.
        gate: The activation's input.
        up: The other factor.
        ratio: f(x)/x in closed form.

    Returns:
        The values of ``y``, bit for bit.

    Example:
        >>> gate, up = torch.tensor([2.0, 3.0], requires_grad=True)
        >>> y = torch.nn.functional.silu(gate) * up
        >>> out = clrp.rules.gated_product(y.detach(), gate, up, torch.sigmoid)
        >>> grads = torch.autograd.grad(clrp.rules.uniform(out), (gate, up))
        >>> torch.allclose(gate * grads[0] + up * grads[1], y)
        True
    """
    out: Tensor = _GatedProduct.apply(y, gate, up, ratio)
    return out
