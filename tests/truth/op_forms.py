"""Each operation of a Hugging Face forward with its rule's gradient, by stop-gradient forms.

``RuleMode`` is a ``TorchFunctionMode``: while it is active every torch function of a forward goes
through it. A tensor is *computed* if it depends on the token embeddings (``requires_grad``; all
parameters must have it off). What has at most one computed factor is linear and passes as it is;
what is nonlinear is replaced by a form with the same value and the rule's gradient; what is
neither known to be linear nor has a rule raises ``UnknownOperationError`` with its name.

| operation | form |
| --- | --- |
| 1/sqrt, sqrt, norm of a statistic; layer_norm, rms_norm | the denominator is a constant |
| f(x) with f(0) = 0 (SiLU, GELU, ReLU, clamp, x * sigmoid(c x)) | x * (f(x)/x as a constant) |
| c * tanh(u / c) | the same, "softcap" |
| a * b, a @ b, both computed | a * b0 / 2 + a0 * b / 2 |
| softmax, sigmoid, softplus (weights, gates) | ordinary gradient; CP-LRP: constants |
| softmax of attention, GIM | the gradient at temperature 2 |
| a / sum(a) of router weights | ordinary gradient |

Nothing here knows a family: it sees operations only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from truth.op_tables import (
    ACTIVATIONS,
    CASTS,
    LINEAR,
    MATRIX_PRODUCTS,
    NARROW,
    PRODUCTS,
    QUOTIENTS,
    ROOTS,
    RULES,
    STATISTICS,
    WEIGHTED,
    OpRules,
)  # fmt: skip

__all__ = ["RULES", "OpRules", "RuleMode", "UnknownOperationError"]


class UnknownOperationError(NotImplementedError):
    """An operation on computed values that no rule and no table of linear operations knows."""


def computed(value: Any) -> bool:
    """Whether any tensor in an argument depends on the embeddings."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, (tuple, list)):
        return any(computed(item) for item in value)
    return isinstance(value, dict) and any(computed(item) for item in value.values())


def half(product: Callable[[Any, Any], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """a * b with half the product rule's gradient to each."""
    return 0.5 * product(a, b.detach()) + 0.5 * product(a.detach(), b)


def ratio_form(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) as x * (f(x) / x), the ratio a constant; at 0 the ratio's limit is the derivative."""
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        y = f(at.clone())
        (slope,) = torch.autograd.grad(y.sum(), at)
    return x * torch.where(at == 0, slope, y.detach() / at.detach())


class _HotSoftmax(torch.autograd.Function):
    """softmax whose Jacobian is taken at temperature 2, without the factor 1/2."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward((s / 2).softmax(dim))
        ctx.dim = dim
        return s.softmax(dim)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return p * (g - (p * g).sum(ctx.dim, keepdim=True)), None


def _normalised(x: Tensor, dims: tuple[int, ...], eps: float, centred: bool) -> Tensor:
    """x, centred or not, over its root mean square, which is a constant."""
    x = x - x.mean(dims, keepdim=True) if centred else x
    return x / (x.detach().pow(2).mean(dims, keepdim=True) + eps).sqrt()


def _no_gradient(g: Tensor) -> None:
    """Hook of a value that may only shift a softmax, which does not feel a shift."""
    if g.abs().max() > 1e-9:
        raise UnknownOperationError(
            f"max() does more than shift a softmax: gradient {g.abs().max()}"
        )


class RuleMode(TorchFunctionMode):
    """Active: computed values get their rule's gradient, and float64 stays float64.

    softcap: whether the model has soft-caps at all; without, tanh raises.
    """

    def __init__(self, rules: OpRules, softcap: bool) -> None:
        super().__init__()
        self.rules, self.softcap = rules, softcap
        self.inert = 0  # inside an activation module whose operations are not looked at
        self.seen: dict[str, int] = {}  # form -> how often it was used
        self.quotients: list[Any] = []  # graph nodes of a / sum(a)
        self._matrix_products: list[Any] = []  # graph nodes of a @ b
        self._sigmoids: list[tuple[Tensor, Tensor]] = []  # (output, input)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "float" and args[0].dtype == torch.float64:
            return args[0]
        args, kwargs = _keep_float64(name, args, kwargs)
        if name == "__get__" and func == torch.Tensor.data.__get__ and computed(args):
            raise UnknownOperationError("data, which cuts the graph")
        if name == "linear" and args[0].dtype == torch.float64:  # some keep weights in float32
            args = tuple(a if a is None else a.to(torch.float64) for a in args)
        plain = name == "__get__" or self.inert or not torch.is_grad_enabled()
        if plain or self.rules.norm == "gradient" or not (computed(args) or computed(kwargs)):
            return func(*args, **kwargs)
        return self._ruled(func, name, args, kwargs)

    def _note(self, form: str) -> None:
        self.seen[form] = self.seen.get(form, 0) + 1

    def _ruled(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        rules = self.rules
        if name in LINEAR:
            return func(*args, **kwargs)
        if name in PRODUCTS | MATRIX_PRODUCTS | QUOTIENTS | {"baddbmm"}:
            return self._product(func, name, args, kwargs)
        if name in WEIGHTED:
            if computed(args[2:] if name == "addmm" else args[1:]) or computed(kwargs):
                raise UnknownOperationError(f"{name} with computed weights")
            return func(*args, **kwargs)
        if name in ("layer_norm", "rms_norm"):
            return self._norm(name, *args, **kwargs)
        if name == "normalize":
            return self._unit_length(*args, **kwargs)
        if name in STATISTICS or name in ROOTS:
            power = name in ("pow", "__pow__")
            root = args[1] in (-0.5, 0.5) if power else name in ROOTS
            y = func(*args, **kwargs)
            return self._denominator(y, name) if root else y
        if name in ACTIVATIONS:
            x = args[0].clone() if name.endswith("_") else args[0]
            y = self.activation(lambda x: func(x, *args[1:], **kwargs), x)
            return args[0].copy_(y) if name.endswith("_") else y
        if name == "tanh" and self.softcap:
            self._note("softcap")
            return ratio_form(func, args[0]) if rules.softcap == "identity" else func(*args)
        if name in ("softmax", "sigmoid", "softplus"):
            return self._probabilities(func, name, args, kwargs)
        if name in ("max", "maximum") and len(args) == 2 and isinstance(args[1], Tensor):
            if computed(args[1]) or args[1].max() > 0:
                raise UnknownOperationError(f"{name} of two computed values")
            return self.activation(lambda x: func(x, args[1]), args[0])  # a clamp
        out = func(*args, **kwargs)
        if name in ("max", "amax"):
            (out if isinstance(out, Tensor) else out.values).register_hook(_no_gradient)
            return out
        if not _is_floating(out):  # comparisons, arg-max: no gradient leaves them
            return out
        raise UnknownOperationError(f"no rule for the operation {name!r} on computed values")

    def activation(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f(x) under the rule for activations."""
        self._note("activation")
        self.inert += 1
        try:
            return ratio_form(f, x) if self.rules.activation == "identity" else f(x)
        finally:
            self.inert -= 1

    def _norm(
        self, name: str, x: Tensor, shape: Any, weight: Any = None, bias: Any = None,
        eps: float | None = None,
    ) -> Tensor:  # fmt: skip
        self._note("norm")
        dims = tuple(range(-len(shape), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        y = _normalised(x, dims, eps, centred=name == "layer_norm")
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _denominator(self, y: Tensor, name: str) -> Tensor:
        if y.ndim == 0 or y.shape[-1] != 1:
            raise UnknownOperationError(f"{name} that is no statistic over the last dimension")
        self._note("norm")
        return y.detach()

    def _unit_length(
        self, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_out: Any
    ) -> Tensor:
        self._note("norm")
        return input / input.detach().norm(p, dim, keepdim=True).clamp_min(eps)

    def _probabilities(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        self._note(name)
        if self.rules.softmax == "constant":
            return func(*args, **kwargs).detach()
        if name == "softmax" and self.rules.softmax == "hot" and self._is_attention(args[0]):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return _HotSoftmax.apply(args[0], dim)
        y = func(*args, **kwargs)
        if name == "sigmoid":
            self._sigmoids.append((y, args[0].detach()))
        return y

    def _is_attention(self, scores: Tensor) -> bool:
        """Whether values come from a product of two computed matrices, with none in between."""
        todo, stop = [scores.grad_fn], ("Mm", "Addmm", "Bmm", "Baddbmm", "Linear")
        while todo:
            node = todo.pop()
            if node is None:
                continue
            if node in self._matrix_products:
                return True
            if not node.name().startswith(stop):
                todo.extend(parent for parent, _ in node.next_functions)
        return False

    def _swish(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
        """(x, sigmoid(c x)) if a * b is one for some c, in this order; else None."""
        for x, s in ((a, b), (b, a)):
            for output, argument in self._sigmoids:
                if s is output and x.shape == argument.shape:
                    slope = (argument * x.detach()).sum() / x.detach().pow(2).sum()
                    if torch.allclose(argument, slope * x.detach(), rtol=1e-9, atol=1e-12):
                        return x, s
        return None

    def _product(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor:
        if name == "baddbmm":
            a, b = args[1:3] if len(args) > 1 else (kwargs["batch1"], kwargs["batch2"])
        elif name == "einsum":
            a, b = args[1:3] if len(args) == 3 else args[1]
        else:
            a, b = args[0], (args[1] if len(args) > 1 else kwargs["other"])
        if not (computed(a) and computed(b)):
            if name in QUOTIENTS and computed(b):
                raise UnknownOperationError(f"a constant over a computed value ({name})")
            return func(*args, **kwargs)
        if name in QUOTIENTS:
            return self._quotient(a, b)
        if name in PRODUCTS:
            if a is b or name in ("mul_", "__imul__"):
                raise UnknownOperationError(f"a square outside a norm, or in place ({name})")
            swish = self._swish(a, b)
            if swish is not None:
                return self._inline_swish(*swish)
            self._note("gate")
            return half(func, a, b) if self.rules.gate == "half" else func(a, b)
        y = self._matrix_product(func, name, a, b, args, kwargs)
        self._matrix_products.append(y.grad_fn)
        return y

    def _matrix_product(
        self, func: Any, name: str, a: Tensor, b: Tensor, args: Any, kwargs: Any
    ) -> Tensor:
        self._note("attention")
        if self.rules.attention != "half":
            return func(*args, **kwargs)
        if name == "einsum":
            return half(lambda x, y: func(args[0], x, y), a, b)
        if name == "baddbmm":
            alpha, beta = kwargs.get("alpha", 1), kwargs.get("beta", 1)
            return beta * args[0] + alpha * half(torch.bmm, a, b)
        return half(func, a, b)

    def _inline_swish(self, x: Tensor, s: Tensor) -> Tensor:
        self._note("activation")
        return x * s.detach() if self.rules.activation == "identity" else x * s

    def _quotient(self, a: Tensor, b: Tensor) -> Tensor:
        """a / sum(a), the weights of a router's chosen experts; nothing else."""
        total = a.detach().sum(-1, keepdim=True)
        if not torch.allclose(total.expand_as(b), b.detach(), rtol=1e-5):
            raise UnknownOperationError("a quotient of two computed values")
        self._note("router")
        y = a / b
        self.quotients.append(y.grad_fn)
        return y


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, (tuple, list)) and any(_is_floating(item) for item in value)


def _keep_float64(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments that ask for a narrower float than a float64 input, asking for float64."""
    if name not in CASTS or not isinstance(args[0], Tensor) or args[0].dtype != torch.float64:
        return args, kwargs
    args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in NARROW else a for a in args)
    if kwargs.get("dtype") in NARROW:
        kwargs = {**kwargs, "dtype": torch.float64}
    return args, kwargs
