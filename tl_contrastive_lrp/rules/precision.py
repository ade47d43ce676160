"""Relevance of bfloat16 and float16 models: a float32 backward over the model's own forward.

Autograd gives every gradient the type of its activation, so in a bfloat16 model each step back
rounds to eight bits, and in a float16 model numbers below 6e-8 become 0. The forward must not
change; the gradient may. ``first_gradient`` starts the backward with a ``WideGradient``: for
autograd it is a tensor of the low type, but it holds a float32 tensor. The operations that consume
it (autograd's own formulas, the rules) read the stored activations and weights as they are and
compute in float32, so no step back rounds or underflows. Only the rounding of the model's own
forward remains; ``in_float32`` avoids that too, but explains a different forward.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import ModelStateError
from .functions import handed_on
from .threads import refused_elsewhere, turn, wrapped_parameters

LOW = (torch.bfloat16, torch.float16)

# Share of the relevance that underflow may affect before a warning is issued.
NOTABLE = 0.01

# Weights are widened only during their product, and larger ones in parts of this many numbers, so
# that a large vocabulary temporarily costs 256 MiB and not its size in float32.
_PART = 2**26


def plain(x: Any) -> Any:
    """The float32 tensor inside a ``WideGradient``; anything else unchanged."""
    return x._value if isinstance(x, WideGradient) else x


class WideGradient(Tensor):
    """A gradient of a bfloat16 or float16 tensor, held in float32.

    ``dtype`` is the type that autograd expects; all arithmetic is done in float32. ``plain``
    returns the float32 tensor inside.
    """

    _value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, value: Tensor, dtype: torch.dtype) -> WideGradient:
        """Wrap a float32 ``value`` as a gradient of type ``dtype``."""
        wrapper: WideGradient = Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=dtype,
            device=value.device,
        )
        wrapper._value = value
        return wrapper

    def __repr__(self) -> str:  # type: ignore[override]
        return f"WideGradient({self._value!r}, dtype={self.dtype})"

    def numpy(self, *, force: bool = False) -> Any:
        """The float32 numbers, in the form that an ordinary tensor returns."""
        return self._value.numpy(force=force)

    def tolist(self) -> Any:
        """The float32 numbers, in the form that an ordinary tensor returns."""
        return self._value.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute in float32 on the values inside."""
        del types
        kwargs = kwargs or {}
        if func is torch.ops.aten._has_same_storage_numel.default:
            return True  # forward mode asks whether layouts match; widening makes copies anyway
        if func._schema.is_mutable and not isinstance(args[0], WideGradient):
            # Written into an ordinary tensor, which keeps its type.
            return func(*tree_map(_rounded, args), **tree_map(_rounded, kwargs))
        nominal: list[torch.dtype] = []

        def widened(x: Any) -> Any:
            if isinstance(x, Tensor):
                if x.is_floating_point() or x.is_complex():
                    nominal.append(x.dtype)
                x = plain(x)
                return x.float() if x.dtype in LOW else x
            return torch.float32 if isinstance(x, torch.dtype) and x in LOW else x

        if func is torch.ops.aten.mm.default and _large(args[1]):
            return cls(_product_in_parts(plain(args[0]), args[1]), args[0].dtype)
        if func._schema.name == "aten::_grouped_mm" and _experts(args):
            return cls(_product_by_expert(plain(args[0]), args[1], args[2]), args[0].dtype)
        out = func(*tree_map(widened, args), **tree_map(widened, kwargs))
        if func._schema.is_mutable:
            return args[0]
        dtype = kwargs.get("dtype") or _promoted(nominal)

        def wrapped(y: Any) -> Any:
            if not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
                return y
            both_real = dtype.is_floating_point and y.is_floating_point()
            return cls(y, dtype if both_real else y.dtype)

        return tree_map(wrapped, out)


def _rounded(x: Any) -> Any:
    return x._value.to(x.dtype) if isinstance(x, WideGradient) else x


def _promoted(dtypes: list[torch.dtype]) -> torch.dtype:
    first, *rest = dtypes
    for dtype in rest:
        first = torch.promote_types(first, dtype)
    return first


def _large(weight: Tensor) -> bool:
    return not isinstance(weight, WideGradient) and weight.dtype in LOW and weight.numel() > _PART


def _product_in_parts(g: Tensor, weight: Tensor) -> Tensor:
    """The product g @ weight for a weight [in, out] of a low type, some rows at a time."""
    rows = max(1, _PART // weight.shape[1])
    total = g.new_zeros(g.shape[0], weight.shape[1], dtype=torch.float32)
    for start in range(0, len(weight), rows):
        total.addmm_(g[:, start : start + rows].float(), weight[start : start + rows].float())
    return total


def _experts(args: tuple[Any, ...]) -> bool:
    """Whether the product is of a gradient's rows, grouped by expert, and the experts' weights."""
    plain_weights = len(args) == 3 and not isinstance(args[1], WideGradient)
    return plain_weights and args[0].ndim == 2 and args[1].ndim == 3


def _product_by_expert(g: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """The products g[rows of e] @ weights[e], with weights [expert, in, out] widened one by one.

    Torch's grouped product has no float32 form on every device.
    """
    total = g.new_zeros(g.shape[0], weights.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        torch.mm(g[start:end], weights[expert].float(), out=total[start:end])
        start = end
    return total


def wide(x: Tensor) -> Tensor:
    """``x`` as a ``WideGradient`` if its type is bfloat16 or float16."""
    return WideGradient(x.float(), x.dtype) if x.dtype in LOW else x


def is_low(model: Any, dtypes: tuple[torch.dtype, ...] = LOW) -> bool:
    """Whether any parameter of the model is bfloat16 or float16 (or one of ``dtypes``)."""
    return not {p.dtype for p in wrapped_parameters(model)}.isdisjoint(dtypes)


def first_gradient(model: Any, value: Tensor) -> Tensor | None:
    """The gradient with which to start the backward of a scalar: None is autograd's own 1."""
    if not is_low(model):
        return None
    return WideGradient(torch.ones_like(value, dtype=torch.float32), value.dtype)


def underflow(x: Tensor, g: Tensor) -> Tensor:
    """Bound on the relevance that rounding near 0 may have changed, beyond ordinary rounding.

    Below its smallest normal number t, a type rounds to multiples of t·eps, and in the end to 0. So
    the error of an entry of ``x`` there is at most ½·t·eps, and that of its relevance |g| times as
    much.

    Args:
        x: Activations [batch, ...].
        g: Their gradient, of the same shape.

    Returns:
        The sum of these bounds in each row, [batch], on the CPU.
    """
    limits = torch.finfo(x.dtype)
    at_risk: Tensor = plain(g).abs().float().masked_fill(x.abs() >= limits.tiny, 0.0)
    return at_risk.flatten(1).sum(1).cpu() * (0.5 * limits.tiny * limits.eps)


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return handed_on(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if not isinstance(g, WideGradient):
            lost, mass = underflow(g, x).sum(), (x.float() * g.float()).abs().sum().cpu()
            if bool(lost > NOTABLE * mass):
                warnings.warn(
                    "Gradients underflow in this float16 model: relevance at its input may be "
                    "lost. clrp.run_with_relevance and clrp.attribute keep gradients in float32; "
                    "inside clrp.lrp, multiply the objective by 2**10 and divide the relevance by "
                    "as much, or load the model in bfloat16.",
                    stacklevel=2,
                )
        return g


def watch(x: Tensor) -> Tensor:
    """``x``, with a warning in the backward if its float16 gradient has underflowed."""
    out: Tensor = _Watch.apply(x) if x.requires_grad and x.dtype == torch.float16 else x
    return out


_WIDENED = (
    "The model's weights are temporarily in float32: another thread is inside "
    "`with clrp.in_float32(model):` or runs clrp.verify. Run this forward inside "
    "`with clrp.model_lock(model):`, which waits until they are back in their own type."
)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Let a low-precision model compute in float32 on its own (rounded) weights for the block.

    Calls inside explain the float32 forward, whose logits are not bit for bit those of the model
    outside. Weights and buffers are copied (4 bytes per number in addition to their 2), and the
    original tensors are put back afterwards, also after an exception.

    Every thread's forward would use these weights, so inside the block a forward in another thread
    raises ``ModelStateError``. Calls of this package in other threads wait until the block is left.

    Args:
        model: A ``TransformerBridge``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ModelStateError: Weights are offloaded, so that they are loaded in their own type when
            needed, or another thread stays inside such a block for more than a minute.

    Example:
        >>> with clrp.in_float32(model):
        ...     print(clrp.attribute(model, case.prompt, objective).resid.dtype)
        torch.float32
    """
    if not hasattr(model, "original_model"):
        raise TypeError(
            f"model must be a TransformerBridge, got {type(model).__name__}; make one with "
            "TransformerBridge.boot_transformers(name_or_directory)."
        )
    with turn(model, "clrp.in_float32(model)"):
        held: dict[int, tuple[Tensor, Tensor]] = {}
        for root in (model, model.original_model):
            for tensor in (*torch.nn.Module.parameters(root), *torch.nn.Module.buffers(root)):
                if tensor.is_meta:
                    raise ModelStateError(
                        "Some weights are offloaded, so they cannot be widened here. Load the "
                        "model with dtype=torch.float32 instead of using clrp.in_float32."
                    )
                if tensor.dtype in LOW:
                    held.setdefault(id(tensor), (tensor, tensor.data))
        if not held:
            yield
            return
        with refused_elsewhere(model, _WIDENED):
            try:
                for tensor, data in held.values():
                    tensor.data = data.float()
                yield
            finally:
                for tensor, data in held.values():
                    tensor.data = data
