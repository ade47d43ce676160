"""Attention in which token i is replaced, for every i at once, in the component's own code.

A batch of w + 2 rows runs through the model. Row o, position j, is the stream of position j in the
prompt whose token j − o is replaced; the last row is the prompt as it is. So row 0 holds every
replaced token's own position, row 1 the position after it, and so on. Rows differ from the clean
one only through the keys and values that they read: position j of row o reads

    the clean row's keys and values        before position j − o,
    those of row o − d, position j − d     at position j − d, for d = o … 0,

which are those of the same replaced token. This is exactly what happens at these positions in the
true intervention, and costs one forward of each row for all tokens together.

No attention is written anew. A component is watched by its operations: a product of queries and
keys, whatever it does to the scores (scale, soft-cap, mask, biases by distance, sinks), a softmax,
a product with the values. The two products are given the clean keys and values, and their diagonals
are corrected. What was done to the scores is recorded and done again to the products of clean
queries and changed keys, which the closed form of later positions needs (``later.py``). A component
that does anything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from ..errors import UncoveredComponentError
from ..hooks.sites import find_sites
from ..rules.threads import active_in

_PRODUCTS = frozenset({"matmul", "__matmul__", "bmm", "baddbmm"})


def refused(path: str, why: str) -> UncoveredComponentError:
    """The error for attention in which the effects of replaced tokens cannot be followed."""
    return UncoveredComponentError(
        f"The effects of replaced tokens cannot be followed through {path!r}: {why} Measure them "
        "instead: clrp.token_effects(..., window=None)."
    )


def attention_components(model: Any) -> dict[str, Any]:
    """The attention component of each block, by path, the first block's first.

    Raises:
        UncoveredComponentError: a part of the model that no rule covers, or a block without
            exactly one attention.
    """
    found = {
        site.path: site.component
        for site in find_sites(model)
        if site.component is not None
        and site.operation in ("softmax", "attention")
        and site.path.startswith("blocks.")
    }
    in_order = {}
    for layer in range(int(model.cfg.n_layers)):
        own = [path for path in found if path.startswith(f"blocks.{layer}.")]
        if len(own) != 1:
            raise refused(f"blocks.{layer}", f"it has {len(own)} attention components, not one.")
        in_order[own[0]] = found[own[0]]
    return in_order


@dataclass(frozen=True, eq=False)
class Operands:
    """The two factors of a product in attention, by row and head, and how to multiply them.

    Attributes:
        left: Queries or pattern, [row, head, query, n].
        right: Transposed keys, or values, [row, head, n, m].
        factor: On the product; what else is added to it does not depend on the factors.
        multiply: Multiplies other factors of the same shapes as the component did.
    """

    left: Float[Tensor, "row head query n"]
    right: Float[Tensor, "row head n m"]
    factor: float
    multiply: Callable[[Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: dict[str, Any], rows: int) -> Operands | None:
        """The factors of a call, if it is a product of two tensors that have the rows first."""
        if getattr(func, "__name__", "") not in _PRODUCTS:
            return None
        added = func.__name__ == "baddbmm"
        names = ("batch1", "batch2") if added else ("mat2",)
        given = [*args, *(kwargs[name] for name in names if name in kwargs)]
        if len(given) != 2 + added:
            return None
        left, right = given[-2:]
        both = type(left) is Tensor and type(right) is Tensor and left.ndim == right.ndim
        if not both or left.ndim not in (3, 4) or left.shape[0] != right.shape[0]:
            return None
        if left.shape[0] % rows or (left.ndim == 4 and left.shape[0] != rows):
            return None
        if left.ndim == 4 and left.shape[1] != right.shape[1]:
            return None
        alpha = float(kwargs.get("alpha", 1)) if added else 1.0
        before, rest = args[:added], {k: v for k, v in kwargs.items() if k not in names}
        shapes = left.shape, right.shape

        def multiply(left: Tensor, right: Tensor) -> Tensor:
            out: Tensor = func(*before, left.reshape(shapes[0]), right.reshape(shapes[1]), **rest)
            return out

        return cls(by_head(left, rows), by_head(right, rows), alpha, multiply)


def by_head(x: Tensor, rows: int) -> Float[Tensor, "row head n m"]:
    """A tensor [row, head, ...], which a component may hold as [row · head, ...]."""
    return x if x.ndim == 4 else rearrange(x, "(row head) n m -> row head n m", row=rows)


@dataclass(frozen=True)
class _Step:
    """An operation on the scores: it is done again to other scores."""

    func: Any
    args: Any
    kwargs: dict[str, Any]
    out: Any


class _Scores:
    """What a component does to its scores, recorded so that it can be done to others."""

    def __init__(self, product: Tensor) -> None:
        self.product = product
        self.steps: list[_Step] = []
        self._known: dict[int, Tensor] = {id(product): product}

    def holds(self, values: Any) -> bool:
        """Whether one of the arguments was computed from the scores."""
        found = False

        def look(x: Any) -> Any:
            nonlocal found
            found = found or id(x) in self._known
            return x

        tree_map(look, values)
        return found

    def record(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Record an operation on them."""
        results = _tuple(out)
        if not any(isinstance(x, Tensor) for x in results):
            return
        self.steps.append(_Step(func, args, kwargs, out))
        self._known.update((id(x), x) for x in results if isinstance(x, Tensor))

    def redo(self, product: Tensor, scores: Tensor, rows: int) -> Tensor:
        """What ``scores`` would have been with another product.

        What a component derives from whole rows of scores, such as the largest of each to subtract
        before the softmax, is that of the last row of the batch for all of them, so that a softmax
        of scores from several rows of the batch can be put together.
        """
        now: dict[int, Tensor] = {id(self.product): product}

        def instead(x: Any) -> Any:
            return now.get(id(x), x)

        def of_last(x: Tensor) -> Tensor:
            if x.numel() >= product.numel():
                return x
            by_row = rearrange(x, "(row more) ... -> row more ...", row=rows)
            return by_row[-1:].expand_as(by_row).reshape(x.shape)

        for step in self.steps:
            out = step.func(*tree_map(instead, tuple(step.args)), **tree_map(instead, step.kwargs))
            pairs = zip(_tuple(step.out), _tuple(out), strict=True)
            now.update((id(old), of_last(new)) for old, new in pairs if isinstance(old, Tensor))
        return now[id(scores)]


def _tuple(x: Any) -> tuple[Any, ...]:
    return tuple(x) if isinstance(x, tuple | list) else (x,)


@dataclass(frozen=True, eq=False)
class Seen:
    """One attention, on one tile of positions, as later positions need it.

    Attributes:
        path: Path of the component.
        start: The first position of the tile.
        scores: Of clean queries with each row's keys, after all that is done to scores, [row, head,
            query, key], with a sink's column if there is one. The last row is the clean one.
        values: Each row's values, [row, head, key, d_v].
        pattern: The clean row's, [head, query, key].
    """

    path: str
    start: int
    scores: Float[Tensor, "row head query score"]
    values: Float[Tensor, "row head key d_v"]
    pattern: Float[Tensor, "head query key"]


class AttentionWatch(TorchFunctionMode):
    """The state of one attention component while it runs: which of its three operations are past.

    Attributes:
        path: Path of the component.
        rows: Rows of the batch.
        runs: How often the component has gone through all of them.
    """

    def __init__(self, path: str, rows: int) -> None:
        super().__init__()
        self.path, self.rows = path, rows
        self.runs = 0
        self.begin()

    def begin(self) -> None:
        """Forget what has been seen of a call."""
        self.scores: _Scores | None = None
        self.has_pattern = False
        self.done = False

    def __enter__(self) -> AttentionWatch:
        self.begin()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if self.done or name in ("__get__", "size", "dim"):
            return func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            raise refused(self.path, "it computes attention in one call, without scores.")
        operands = Operands.of(func, args, kwargs, self.rows)
        if self.has_pattern:
            if operands is None:
                return func(*args, **kwargs)
            self.done = True
            self.runs += 1
            return self.times_values(operands)
        if operands is not None:
            if self.scores is not None:
                raise refused(self.path, "it takes more than one product before its softmax.")
            out = self.product(operands)
            self.scores = _Scores(out)
            return out
        if self.scores is None or not self.scores.holds((args, kwargs)):
            return func(*args, **kwargs)
        if name == "softmax":
            self.softmax(args[0])
            self.has_pattern = True
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        self.scores.record(func, args, kwargs, out)
        return out

    def product(self, operands: Operands) -> Tensor:
        """Queries times keys."""
        return operands.multiply(operands.left, operands.right)

    def softmax(self, scores: Tensor) -> None:
        """Called with what the softmax is taken of."""

    def times_values(self, operands: Operands) -> Tensor:
        """Pattern times values."""
        return operands.multiply(operands.left, operands.right)


class ReplacedStreams(AttentionWatch):
    """Has each row of the batch read what its replaced token leaves, see the module's docstring.

    Attributes:
        start: The first position of the tile that runs.
        sink: Called with each attention.
    """

    def __init__(self, path: str, window: int, sink: Callable[[Seen], None] | None) -> None:
        super().__init__(path, window + 2)
        self.window, self.sink = window, sink
        self.start = 0

    def product(self, operands: Operands) -> Tensor:
        """Queries times clean keys, with each replaced token's own on the diagonals."""
        q, k_t = operands.left, operands.right
        if k_t.shape[-1] != self.start + q.shape[-2]:
            raise refused(self.path, f"it has {k_t.shape[-1]} keys at once.")
        self._queries, self._keys_t, self._multiply = q, k_t, operands.multiply
        out = operands.multiply(q, k_t[-1:].expand_as(k_t))
        scores = by_head(out, self.rows)
        changed = (k_t[:-1] - k_t[-1:]).mT  # [window + 1, head, key, d_head]
        for d in range(self.window + 1):
            first, own = self._diagonal(d, q.shape[-2])
            dots = torch.linalg.vecdot(q[d:-1, :, first:], changed[: self.window + 1 - d, :, own])
            _diagonal(scores[d:-1], self.start, d).add_(dots, alpha=operands.factor)
        return out

    def _diagonal(self, d: int, queries: int) -> tuple[int, slice]:
        """The first query that has a key d positions before it, and all of those keys."""
        first = min(max(0, d - self.start), queries)
        return first, slice(self.start + first - d, max(0, self.start + queries - d))

    def softmax(self, scores: Tensor) -> None:
        """Do what was done to the scores to those of clean queries and each row's own keys."""
        assert self.scores is not None
        self._of_clean = None
        if self.sink is not None:
            q = self._queries[-1:].expand_as(self._queries)
            product = self._multiply(q, self._keys_t)
            self._of_clean = by_head(self.scores.redo(product, scores, self.rows), self.rows)

    def times_values(self, operands: Operands) -> Tensor:
        """Pattern times clean values, with each replaced token's own on the diagonals."""
        pattern, v = operands.left, operands.right
        if v.shape[-2] != self.start + pattern.shape[-2]:
            raise refused(self.path, f"it has {v.shape[-2]} values at once.")
        if pattern[-1].triu(self.start + 1).any():
            raise refused(self.path, "positions read others after their own.")
        out = operands.multiply(pattern, v[-1:].expand_as(v))
        z = by_head(out, self.rows)
        changed = v[:-1] - v[-1:]
        for d in range(self.window + 1):
            first, own = self._diagonal(d, pattern.shape[-2])
            shares = _diagonal(pattern[d:-1], self.start, d)
            z[d:-1, :, first:] += shares[..., None] * changed[: self.window + 1 - d, :, own]
        if self.sink is not None:
            assert self._of_clean is not None
            self.sink(Seen(self.path, self.start, self._of_clean, v, pattern[-1]))
        self._of_clean = self.scores = None
        return out


def _diagonal(x: Tensor, start: int, d: int) -> Tensor:
    """Of [..., query, key], the key d positions before each query that has one."""
    return torch.diagonal(x, offset=start - d, dim1=-2, dim2=-1)


@contextmanager
def watched(parts: Mapping[str, Any], watches: Mapping[str, AttentionWatch]) -> Iterator[None]:
    """Have a watch active in each component, in this thread only."""
    with ExitStack() as stack:
        for path, watch in watches.items():
            stack.enter_context(active_in(watch, parts[path]))
        yield


def require_seen(watches: Mapping[str, AttentionWatch], runs: int) -> None:
    """Refuse a forward in which a component has not gone through its three operations each time.

    Raises:
        UncoveredComponentError: names the component.
    """
    for path, watch in watches.items():
        if watch.runs != runs:
            raise refused(
                path, "its code is not a product of queries and keys, a softmax, and a product."
            )
