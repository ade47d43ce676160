"""Attention scores and patterns that are known by what they are computed from, not computed.

A component writes attention out step by step: scores = q·kᵀ, scaled, capped, masked; pattern =
softmax; z = pattern·v. None of the rules needs a number of the scores or the pattern, so all steps
can be recorded, and z be computed without them (``query_tiles.py``), in memory linear in the
prompt:

- the uniform rule at the scores halves the gradients that arrive at q and k;
- a constant pattern is one of detached q and k;
- soft-caps, sinks and a softmax with its gradient at a temperature are what its backward knows.

``DeferredAttention`` stands for the scores and then for the pattern. It records the steps that it
knows how to fuse. Asked for anything else, it computes the actual tensor by running the recorded
steps, so what it stands for is always what the component itself would have had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from .functions import scale_gradient
from .query_tiles import Attend, Attention, RowSink, Softcap, attend
from .softcap import CapOperand, identity_softcap
from .visible import MaskMemory, VisibleKeys

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Product:
    """The product of queries and keys that a component took, and what to do with it.

    Attributes:
        q: Queries, [batch, head, query, d_head].
        k_t: Keys, transposed, [batch, head, d_head, key].
        memory: Remembers masks.
        repeated: Remembers which keys and values were repeated for grouped queries, and from what.
        fused: Called when the attention is computed fused.
        rows: Called in the backward with the rows of the attention.
        path: Path of the attention component.
        attend: Computes the attention.
        left_to_rows: Not empty once a reading of scores or pattern has been left to ``rows``.
    """

    q: Float[Tensor, "batch head query d_head"]
    k_t: Float[Tensor, "batch head d_head key"]
    memory: MaskMemory
    repeated: Repeated
    fused: Callable[[], object]
    rows: RowSink | None = None
    path: str = ""
    attend: Attend = attend
    left_to_rows: list[bool] = field(default_factory=list)


class PatternNeededError(Exception):
    """Scores or pattern are needed after a reading of them has been left to the rows.

    Attributes:
        path: Path of the attention component.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"The scores or the pattern of {path} are needed after all.")
        self.path = path


@dataclass(frozen=True, eq=False)
class DeferredAttention:
    """Scores, or after the softmax the pattern, [batch, head, query, key], of one attention.

    Attributes:
        product: q·kᵀ.
        steps: What turns it into the tensor, as the component wrote it.
        scale: Factor on the product.
        operand: The number that the product was divided by for a soft-cap, as it was written.
        softcap: The soft-cap; its factor is 1 until the component has multiplied by it.
        terms: What has been added to the scores.
        hidden: The keys that stay visible, and the number that the other scores became.
        sinks: Logits that joined the scores as one more key, [head].
        has_sink_key: Whether that key is still there.
        is_pattern: Whether the softmax has been taken.
        factor: Factor on the gradients of queries and keys.
        temperature: At which the softmax has its gradient; None for the ordinary one.
    """

    product: Product
    steps: tuple[Step, ...] = ()
    scale: float = 1.0
    operand: CapOperand | None = None
    softcap: Softcap | None = None
    terms: tuple[Float[Tensor, "..."], ...] = ()
    hidden: tuple[Tensor, float] | None = None
    sinks: Float[Tensor, " head"] | None = None
    has_sink_key: bool = False
    is_pattern: bool = False
    factor: float = 1.0
    temperature: float | None = None
    computed: list[Tensor] = field(default_factory=list)

    # ------------------------------------------------------------ as a tensor

    @property
    def shape(self) -> torch.Size:
        """[batch, head, query, key]; a sink is one more key."""
        keys = self.product.k_t.shape[-1] + self.has_sink_key
        return torch.Size((*self.product.q.shape[:-1], keys))

    @property
    def dtype(self) -> torch.dtype:
        """The queries' dtype."""
        return self.product.q.dtype

    @property
    def device(self) -> torch.device:
        """The queries' device."""
        return self.product.q.device

    @property
    def requires_grad(self) -> bool:
        """Whether queries or keys require gradients, and the rules let one through."""
        return bool(self.factor) and (
            self.product.q.requires_grad or self.product.k_t.requires_grad
        )

    def tensor(self) -> Tensor:
        """The actual scores or pattern, computed by the recorded steps.

        Raises:
            PatternNeededError: a reading of them has been left to the rows, which will not come.
        """
        if self.product.left_to_rows:
            raise PatternNeededError(self.product.path)
        if not self.computed:
            x = self.product.q @ self.product.k_t  # not torch.matmul, which DeferringMode defers
            for step in self.steps:
                x = step(x)
            self.computed.append(x)
        return self.computed[0]

    def leave_to_rows(self) -> None:
        """Leave a reading of the scores or the pattern to the rows in the backward.

        Raises:
            PatternNeededError: nobody reads the rows.
        """
        if self.product.rows is None:
            raise PatternNeededError(self.product.path)
        self.product.left_to_rows.append(True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def _then(self, step: Step, **changes: Any) -> Tensor | DeferredAttention:
        if self.computed:  # it may have been written into since
            return step(self.computed[0])
        return replace(self, steps=(*self.steps, step), computed=[], **changes)

    @property
    def _is_raw(self) -> bool:
        """Whether nothing but factors has been applied to the product."""
        return self._takes_factors and self.softcap is None

    @property
    def _takes_factors(self) -> bool:
        changed = self.terms or self.hidden is not None or self.sinks is not None
        return not (self.is_pattern or changed)

    def __mul__(self, factor: Any) -> Any:
        number = isinstance(factor, int | float)
        if self._is_raw and number and self.operand is None:
            return self._then(lambda x: x * factor, scale=self.scale * factor)
        if self._takes_factors and self.softcap == Softcap(1.0, "gradient"):
            if number and self.operand is None:
                return self._then(lambda x: x * factor, softcap=Softcap(factor, "gradient"))
            operand = self.operand
            if operand is not None and factor is operand and operand.rule is identity_softcap:
                return self._then(
                    lambda x: x * factor, softcap=Softcap(operand.cap, "identity"), operand=None
                )
        return self.tensor() * factor

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> Any:
        if self._is_raw and self.operand is None:
            if isinstance(divisor, int | float):
                return self._then(lambda x: x / divisor, scale=self.scale / divisor)
            if isinstance(divisor, CapOperand):
                scale = self.scale / divisor.cap
                return self._then(lambda x: x / divisor, scale=scale, operand=divisor)
        return self.tensor() / divisor

    def _tanh(self, step: Step) -> Any:
        if not self._is_raw:
            return step(self.tensor())
        return self._then(step, softcap=Softcap(1.0, "gradient"))

    def __add__(self, other: Any) -> Any:
        fits = isinstance(other, Tensor) and other.is_floating_point() and not other.requires_grad
        fits = fits and other.ndim >= 2 and self._fits(other)
        if self.is_pattern or not fits or self.sinks is not None:
            return self.tensor() + other
        return self._then(lambda x: x + other, terms=(*self.terms, other))

    __radd__ = __add__

    def _fits(self, term: Tensor) -> bool:
        """Whether a term has one row or all, and all keys, so that it can be cut to a tile."""
        queries, keys = self.shape[-2:]
        return term.shape[-2] in (1, queries) and term.shape[-1] == keys and self.operand is None

    def masked_fill(self, mask: Tensor, value: Any) -> Any:
        """Hide keys from queries, if ``value`` is the lowest number; otherwise compute."""
        if isinstance(mask, _Derived):
            if mask.what == "row is -inf" and self._shows_every_row(mask.of):
                return self
            return self.tensor().masked_fill(mask.tensor(), value)
        lowest = isinstance(value, int | float) and value <= torch.finfo(self.dtype).min
        known = self.hidden is None and self.sinks is None and self._fits(mask)
        if self.is_pattern or not lowest or not known:
            return self.tensor().masked_fill(mask, value)
        return self._then(lambda x: x.masked_fill(mask, value), hidden=(~mask, float(value)))

    def _shows_every_row(self, scores: DeferredAttention) -> bool:
        """Whether every query sees a key, by the masks of the scores that these are or came from.

        TransformerLens' compatibility mode asks this of its scores, and looks for NaN afterwards.
        """
        same = scores.product is self.product and not scores.is_pattern
        return same and self._keys.shows_every_query

    @property
    def _keys(self) -> VisibleKeys:
        queries, keys = self.product.q.shape[-2], self.product.k_t.shape[-1]
        return VisibleKeys(queries, keys, self.product.memory, self.terms, self.hidden)

    def max(self, *args: Any, **kwargs: Any) -> Any:
        """The largest score of each row, if it is only subtracted again; otherwise computed."""
        if self.is_pattern or args or kwargs != {"dim": -1, "keepdim": True}:
            return self.tensor().max(*args, **kwargs)
        return _Derived("largest", self, lambda x: x.max(dim=-1, keepdim=True).values)

    def __sub__(self, other: Any) -> Any:
        if isinstance(other, _Derived) and other.what == "largest" and other.of is self:
            return self._then(lambda x: x - other.compute(x))  # a softmax does not change by it
        return self.tensor() - _actual(other)

    def __getitem__(self, index: Any) -> Any:
        if self.is_pattern and self.has_sink_key and index == (..., slice(None, -1)):
            return self._then(lambda x: x[index], has_sink_key=False)
        return self.tensor()[index]

    def _with_sinks(self, column: Tensor) -> Any:
        """The scores with one more key, whose score is the same for all queries."""

        def joined(x: Tensor) -> Tensor:
            return torch.cat([x, column], dim=-1)

        fits = column.ndim == 4 and column.shape == (*self.shape[:-1], 1)
        same = fits and all(column.shape[i] == 1 or column.stride(i) == 0 for i in (0, 2))
        if self.is_pattern or self.sinks is not None or not same or column.requires_grad:
            return joined(self.tensor())
        return self._then(joined, sinks=column[0, :, 0, 0], has_sink_key=True)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The queries' dtype again, after a softmax in a wider one; otherwise computed."""
        if (args == (self.dtype,) and not kwargs) or (not args and kwargs == {"dtype": self.dtype}):
            return self._then(lambda x: x.to(*args, **kwargs))
        return self.tensor().to(*args, **kwargs)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record a softmax, compute a product with values fused, and anything else as written."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if func is torch.cat and isinstance(first, list | tuple) and len(first) == 2:
            scores, column = first
            last = (*args[1:], *kwargs.values()) == (-1,) and kwargs.keys() <= {"dim"}
            if isinstance(scores, cls) and isinstance(column, Tensor) and last:
                return scores._with_sinks(column)
        if isinstance(first, cls):
            if func is torch.isneginf and not first.is_pattern:
                return _Derived("is -inf", first, torch.isneginf)
            if first.is_pattern and func in (torch.isnan, torch.zeros_like) and len(args) == 1:
                return _Derived("is nan" if func is torch.isnan else "zeros", first, func)
            if func is torch.tanh and len(args) == 1 and not kwargs:
                return first._tanh(torch.tanh)
            if func.__name__ == "softmax" and first._is_own_softmax(args, kwargs):
                return first._then(lambda x: func(x, *args[1:], **kwargs), is_pattern=True)
            if func is F.dropout and not kwargs.get("training", True):
                return first
            if func is torch.matmul and first.is_pattern and isinstance(args[1], Tensor):
                return first.times(args[1])

        return func(*_actual(tuple(args)), **_actual(kwargs))

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
        return self._then(rule, factor=0.5 * self.factor)

    def constant(self, rule: Step) -> Tensor | DeferredAttention:
        """The constant rule: q and k get no gradient."""
        return self._then(rule, factor=0.0)

    def tempered(self, temperature: float, rule: Step) -> Tensor | DeferredAttention:
        """The softmax's gradient at a temperature; ``rule`` does the same to an actual pattern."""
        return self._then(rule, temperature=temperature)

    # ------------------------------------------------------------ fused

    def times(
        self, v: Float[Tensor, "batch head key d_v"]
    ) -> Float[Tensor, "batch head query d_v"]:
        """The pattern times values, without the pattern."""
        if self.computed or self.has_sink_key or self.operand is not None:
            return torch.matmul(self.tensor(), v)
        product = self.product
        product.fused()
        k, values = product.repeated.originals(product.k_t, v)
        q = product.q
        if self.factor == 0.0:
            q, k = q.detach(), k.detach()
        elif self.factor != 1.0:
            q, k = scale_gradient(q, self.factor), scale_gradient(k, self.factor)
        attention = Attention(
            self._keys, self.scale, self.softcap, self.sinks,
            self.temperature if self.requires_grad else None, product.rows,
        )  # fmt: skip
        return product.attend(q, k, values, attention)


@dataclass(frozen=True, eq=False)
class _Derived:
    """What a component derives from scores or pattern only to put it back where it belongs.

    Such as the largest score of each row, to be subtracted before a softmax. As long as nothing
    else happens to it, the numbers are not needed.

    Attributes:
        what: Its meaning.
        of: The scores or the pattern.
        compute: Computes it from the actual scores or pattern.
    """

    what: Literal["largest", "is -inf", "row is -inf", "is nan", "zeros"]
    of: DeferredAttention
    compute: Step

    def tensor(self) -> Tensor:
        """The actual numbers."""
        return self.compute(self.of.tensor())

    @property
    def values(self) -> Any:
        """Of the largest scores: themselves, as ``scores.max(dim=-1, keepdim=True)`` has them."""
        return self if self.what == "largest" else self.tensor().values

    def all(self, *args: Any, **kwargs: Any) -> Any:
        """Of what is -inf: whether whole rows are."""
        if self.what == "is -inf" and not args and kwargs == {"dim": -1, "keepdim": True}:
            return _Derived("row is -inf", self.of, lambda x: self.compute(x).all(-1, keepdim=True))
        return self.tensor().all(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Leave out a scrub of NaN; compute anything else with the actual numbers."""
        if func is torch.where and len(args) == 3 and _is_scrub(*args):
            return args[2]
        return func(*_actual(tuple(args)), **_actual(kwargs or {}))


def _is_scrub(is_nan: Any, zeros: Any, pattern: Any) -> bool:
    """Whether ``torch.where`` puts zeros where a pattern is NaN, which rows with a key never are.

    A NaN that comes from queries or keys is kept, so that a result that is NaN is refused.
    """
    derived = isinstance(is_nan, _Derived) and isinstance(zeros, _Derived)
    return (
        derived
        and (is_nan.what, zeros.what) == ("is nan", "zeros")
        and is_nan.of is zeros.of is pattern
    )


def _actual(values: Any) -> Any:
    """The same arguments, with actual tensors."""
    return tree_map(
        lambda x: x.tensor() if isinstance(x, DeferredAttention | _Derived) else x, values
    )


class Repeated:
    """Remembers which tensors are keys or values repeated for grouped queries, and of what.

    Each key head is repeated for consecutive query heads, either as one expanded axis that is then
    merged or by ``repeat_interleave``. Attention shares them instead (``query_tiles.py``).
    """

    def __init__(self) -> None:
        self._expanded = WeakTensorKeyDictionary()
        self._original = WeakTensorKeyDictionary()

    def watch(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Remember what an operation of the component did, if it is part of a repetition."""
        x = args[0]
        if func is Tensor.expand and x.ndim == 5 and x.shape[2] == 1:
            if out.shape[:2] == x.shape[:2] and out.shape[3:] == x.shape[3:]:
                self._expanded[out] = x
        elif func is Tensor.reshape and x in self._expanded:
            merged = (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
            if out.shape == merged:
                self._original[out] = self._expanded[x].squeeze(2), out._version, False
        elif func in (Tensor.repeat_interleave, torch.repeat_interleave):
            if x.ndim == 4 and isinstance(args[1], int) and kwargs == {"dim": 1}:
                self._original[out] = x, out._version, False
        elif func is Tensor.transpose and x in self._original:
            original, version, turned = self._original[x]
            if {a % 4 for a in args[1:]} == {2, 3} and len(args) == 3:
                self._original[out] = original, version, not turned

    def originals(self, k_t: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values before they were repeated; as they are if either was not."""
        k_from, v_from = self._original.get(k_t), self._original.get(v)
        if k_from is not None and v_from is not None:
            (k, k_version, turned), (values, v_version, as_it_was) = k_from, v_from
            unchanged = k_version == k_t._version and v_version == v._version
            if turned and not as_it_was and unchanged and k.shape[1] == values.shape[1]:
                return k, values
        return k_t.transpose(-2, -1), v


def _of_the_tensor(name: str) -> Callable[..., Any]:
    def method(self: DeferredAttention, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*args)

    return method


# Operators are looked up on the class, so that ``__getattr__`` does not see them.
_BOTH_SIDES = (
    "add", "sub", "mul", "truediv", "floordiv", "matmul", "pow", "mod", "and", "or", "xor",
)  # fmt: skip
_ONE_SIDE = (
    "neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne", "getitem", "setitem", "len", "iter",
    "bool", "float", "int", "array", "contains",
)  # fmt: skip
for _class in (DeferredAttention, _Derived):
    for _name in (*_BOTH_SIDES, *(f"r{name}" for name in _BOTH_SIDES), *_ONE_SIDE):
        if f"__{_name}__" not in vars(_class):
            setattr(_class, f"__{_name}__", _of_the_tensor(f"__{_name}__"))


def is_product(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a torch function is an attention's product of queries and transposed keys.

    It is the first product of two tensors with four axes in the component.
    """
    if func is not torch.matmul or len(args) != 2 or kwargs:
        return False
    q, k_t = args
    both = isinstance(q, Tensor) and isinstance(k_t, Tensor) and q.ndim == k_t.ndim == 4
    return both and q.shape[-1] == k_t.shape[-2]


_REPEATING = (
    Tensor.expand,
    Tensor.reshape,
    Tensor.repeat_interleave,
    torch.repeat_interleave,
    Tensor.transpose,
)


class DeferringMode(TorchFunctionMode):
    """While active, a product of queries and transposed keys becomes a ``DeferredAttention``.

    Attributes:
        armed: Whether the product is still to come.
    """

    def __init__(
        self,
        memory: MaskMemory,
        fused: Callable[[], object],
        rows: RowSink | None = None,
        path: str = "",
        attend: Attend = attend,
    ) -> None:
        super().__init__()
        self.memory, self.fused, self.rows, self.path = memory, fused, rows, path
        self.attend = attend
        self.armed = True
        self.repeated = Repeated()

    def __enter__(self) -> DeferringMode:
        self.armed = True
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the product of queries and keys; run everything else."""
        if self.armed and is_product(func, args, kwargs):
            q, k_t = args
            if q.dtype == k_t.dtype:
                self.armed = False
                return DeferredAttention(
                    Product(
                        q,
                        k_t,
                        self.memory,
                        self.repeated,
                        self.fused,
                        self.rows,
                        self.path,
                        self.attend,
                    )
                )
        out = func(*args, **(kwargs or {}))
        if func in _REPEATING and isinstance(args[0], Tensor):
            self.repeated.watch(func, args, kwargs or {}, out)
        return out
