"""Attention scores and patterns that are known by what they are computed from, not computed.

A component writes attention out step by step: scores = q·kᵀ, scaled, masked; pattern = softmax;
z = pattern·v. None of the rules needs a number of the scores or the pattern, so all steps can be
recorded, and z be computed by torch's fused attention, in memory linear in the prompt:

- the uniform rule at the scores halves the gradients that arrive at q and k;
- a constant pattern is one of detached q and k;
- the gradient of a softmax at temperature T, p_T ⊙ (g − Σ p_T g), is T times the backward of
  attention with scores divided by T, which fused attention computes (values detached).

``DeferredAttention`` stands for the scores and then for the pattern. It records the steps that it
knows how to fuse. Asked for anything else, it computes the actual tensor by running the recorded
steps, so what it stands for is always what the component itself would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .functions import scale_gradient

Step = Callable[[Tensor], Tensor]


class MaskMemory:
    """Remembers which masks are causal while they live, since blocks are given the same ones."""

    def __init__(self) -> None:
        self._causal = WeakTensorKeyDictionary()

    def is_causal(self, mask: Tensor) -> bool:
        """Whether a mask (bool: True is visible; else added to scores) is the causal one alone."""
        if mask not in self._causal:
            self._causal[mask] = self._compare(mask)
        return bool(self._causal[mask])

    @staticmethod
    def _compare(mask: Tensor) -> bool:
        queries, keys = mask.shape[-2:]
        if queries != keys or mask.requires_grad:
            return False
        below = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril_()
        if mask.dtype != torch.bool:
            hidden = mask <= torch.finfo(mask.dtype).min
            if bool(((mask != 0) & ~hidden).any()):
                return False
            mask = ~hidden
        return bool((mask == below).all())


@dataclass(frozen=True, eq=False)
class DeferredAttention:
    """Scores, or after the softmax the pattern, [batch, head, query, key], of one attention.

    Attributes:
        q: Queries, [batch, head, query, d_head].
        k_t: Keys, transposed, [batch, head, d_head, key].
        memory: Remembers masks.
        steps: What turns q·kᵀ into the tensor, as the component wrote it.
        scale: Factor on the scores so far.
        visible: Which keys each query may see; None for all.
        bias: What is added to the scores.
        is_pattern: Whether the softmax has been taken.
        temperature: At which the softmax has its gradient; None for the ordinary one.
        fused: Called when the attention is computed fused.
    """

    q: Float[Tensor, "batch head query d_head"]
    k_t: Float[Tensor, "batch head d_head key"]
    memory: MaskMemory
    fused: Callable[[], object]
    steps: tuple[Step, ...] = ()
    scale: float = 1.0
    visible: Bool[Tensor, "..."] | None = None
    bias: Float[Tensor, "..."] | None = None
    is_pattern: bool = False
    temperature: float | None = None
    computed: list[Tensor] = field(default_factory=list)

    # ------------------------------------------------------------ as a tensor

    @property
    def shape(self) -> torch.Size:
        """[batch, head, query, key]."""
        return torch.Size((*self.q.shape[:-1], self.k_t.shape[-1]))

    @property
    def dtype(self) -> torch.dtype:
        """The queries' dtype."""
        return self.q.dtype

    @property
    def device(self) -> torch.device:
        """The queries' device."""
        return self.q.device

    @property
    def requires_grad(self) -> bool:
        """Whether queries or keys require gradients."""
        return self.q.requires_grad or self.k_t.requires_grad

    def tensor(self) -> Tensor:
        """The actual scores or pattern, computed by the recorded steps."""
        if not self.computed:
            x = self.q @ self.k_t  # not torch.matmul, which DeferringMode defers
            for step in self.steps:
                x = step(x)
            self.computed.append(x)
        return self.computed[0]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def _then(self, step: Step, **changes: Any) -> Tensor | DeferredAttention:
        if self.computed:  # it may have been written into since
            return step(self.computed[0])
        return replace(self, steps=(*self.steps, step), computed=[], **changes)

    def __mul__(self, factor: Any) -> Any:
        plain = isinstance(factor, int | float) and self.bias is None and self.visible is None
        if self.is_pattern or not plain:
            return self.tensor() * factor
        return self._then(lambda x: x * factor, scale=self.scale * factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        plain = isinstance(divisor, int | float) and self.bias is None and self.visible is None
        if self.is_pattern or not plain:
            return self.tensor() / divisor
        return self._then(lambda x: x / divisor, scale=self.scale / divisor)

    def __add__(self, other: Any) -> Any:
        fits = isinstance(other, Tensor) and other.is_floating_point() and not other.requires_grad
        if self.is_pattern or not fits or other.ndim < 2 or self.bias is not None:
            return self.tensor() + other
        return self._then(lambda x: x + other, bias=other)

    __radd__ = __add__

    def masked_fill(self, mask: Tensor, value: Any) -> Any:
        """Hide keys from queries, if ``value`` is the lowest number; otherwise compute."""
        lowest = isinstance(value, int | float) and value <= torch.finfo(self.dtype).min
        if self.is_pattern or not lowest or self.visible is not None:
            return self.tensor().masked_fill(mask, value)
        return self._then(lambda x: x.masked_fill(mask, value), visible=~mask)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing, where the dtype stays the same; otherwise compute."""
        if (args == (self.dtype,) and not kwargs) or (not args and kwargs == {"dtype": self.dtype}):
            return self
        return self.tensor().to(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record a softmax, compute a product with values fused, and anything else as written."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, cls):
            if func.__name__ == "softmax" and first._is_own_softmax(args, kwargs):
                return first._then(lambda x: func(x, *args[1:], **kwargs), is_pattern=True)
            if func is F.dropout and not kwargs.get("training", True):
                return first
            if func is torch.matmul and first.is_pattern and isinstance(args[1], Tensor):
                return first.times(args[1])

        def actual(x: Any) -> Any:
            return x.tensor() if isinstance(x, cls) else x

        return func(*tree_map(actual, tuple(args)), **tree_map(actual, kwargs))

    def _is_own_softmax(self, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether a softmax is over keys, and its dtype that of fused attention's own."""
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        dtype = kwargs.get("dtype")
        return (
            not self.is_pattern
            and dim in (-1, 3)
            and len(args) <= 2
            and (dtype is None or self.dtype == torch.float64 or dtype == torch.float32)
        )

    # ------------------------------------------------------------ rules

    def uniform(self, rule: Step) -> Tensor | DeferredAttention:
        """The uniform rule at the scores: halving the gradients of q and k is the same."""
        if self.computed:
            return rule(self.computed[0])
        q, k_t = scale_gradient(self.q, 0.5), scale_gradient(self.k_t, 0.5)
        return replace(self, q=q, k_t=k_t, computed=[])

    def constant(self, rule: Step) -> Tensor | DeferredAttention:
        """The constant rule: q and k get no gradient."""
        if self.computed:
            return rule(self.computed[0])
        return replace(self, q=self.q.detach(), k_t=self.k_t.detach(), computed=[])

    def tempered(self, temperature: float, rule: Step) -> Tensor | DeferredAttention:
        """The softmax's gradient at a temperature; ``rule`` does the same to an actual pattern."""
        return self._then(rule, temperature=temperature)

    # ------------------------------------------------------------ fused

    def times(
        self, v: Float[Tensor, "batch head key d_v"]
    ) -> Float[Tensor, "batch head query d_v"]:
        """The pattern times values, by torch's fused attention."""
        if self.computed:
            return torch.matmul(self.computed[0], v)
        self.fused()
        mask, causal = self._mask()
        q, k = self.q, self.k_t.transpose(-2, -1)

        def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, scale=scale
            )

        if self.temperature is None or not self.requires_grad:
            return attend(q, k, v, self.scale)
        t = self.temperature
        value = attend(q.detach(), k.detach(), v, self.scale)
        moved = attend(scale_gradient(q, t), scale_gradient(k, t), v.detach(), self.scale / t)
        z: Tensor = _WithGradientOf.apply(value, moved)
        return z

    def _mask(self) -> tuple[Tensor | None, bool]:
        """The mask for fused attention, and whether it is the causal one alone."""
        masks = [m for m in (self.visible, self.bias) if m is not None]
        others = [m for m in masks if not self.memory.is_causal(m)]
        if not others:
            return None, bool(masks)
        if self.bias is None:
            return self.visible, False
        if self.visible is None:
            return self.bias.to(self.dtype), False
        lowest = torch.finfo(self.dtype).min
        return self.bias.to(self.dtype).masked_fill(~self.visible, lowest), False


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: DeferredAttention, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


# Operators are looked up on the class, so that ``__getattr__`` does not see them.
for _name in (
    "add", "sub", "mul", "truediv", "floordiv", "matmul", "pow", "mod", "and", "or", "xor",
):  # fmt: skip
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        if _operator not in vars(DeferredAttention):
            setattr(DeferredAttention, _operator, _of_the_tensor(_operator))
for _name in (
    "neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len", "iter",
    "bool", "float", "int", "array", "contains",
):  # fmt: skip
    if f"__{_name}__" not in vars(DeferredAttention):
        setattr(DeferredAttention, f"__{_name}__", _of_the_tensor(f"__{_name}__"))


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, moved: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return g, g


class DeferringMode(TorchFunctionMode):
    """While active, a product of queries and transposed keys becomes a ``DeferredAttention``.

    Attributes:
        armed: Whether the product is still to come.
    """

    def __init__(self, memory: MaskMemory, fused: Callable[[], object]) -> None:
        super().__init__()
        self.memory, self.fused, self.armed = memory, fused, True

    def __enter__(self) -> DeferringMode:
        self.armed = True
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the product of queries and keys; run everything else."""
        if self.armed and func is torch.matmul and len(args) == 2 and not kwargs:
            q, k_t = args
            if (
                isinstance(q, Tensor)
                and isinstance(k_t, Tensor)
                and q.ndim == k_t.ndim == 4
                and q.dtype == k_t.dtype
                and q.shape[-1] == k_t.shape[-2]
            ):
                self.armed = False
                return DeferredAttention(q, k_t, self.memory, self.fused)
        return func(*args, **(kwargs or {}))
