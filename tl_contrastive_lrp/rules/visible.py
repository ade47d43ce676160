"""Which keys each query of an attention may see, known by query tiles and not as a square matrix.

The terms that a component adds to its scores (masks, position biases), or the keys that it hides,
are kept as they are given, and cut to a tile of queries and to the keys which that tile sees at
all. So a sliding window costs its own width and not the prompt's length.

``LazyMask`` stands for a mask that transformers would make as [batch, 1, query, key]. It knows the
function of positions behind the mask, which gives any of its rows; whatever else is asked of it
makes the actual mask first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

_ROWS = 512  # rows of a lazy mask that are looked at together
_METADATA = frozenset(
    {"__get__", "size", "dim", "numel", "is_floating_point", "is_complex", "element_size"}
)
_UNCHANGED = frozenset({"detach", "contiguous"})


class LazyMask(Tensor):
    """An additive mask [batch, 1, query, key] whose rows are computed when they are needed."""

    _visible: Callable[[int, int], Tensor]
    _hidden: float
    _made: list[Tensor]

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        visible: Callable[[int, int], Tensor],
        hidden: float | None = None,
    ) -> LazyMask:
        """Make a mask.

        Args:
            cls: The class.
            shape: [batch, 1, query, key].
            dtype: The floating-point type that the mask would have.
            device: The device that it would be on.
            visible: Gives the rows from a first query to before another, bool, [batch or 1, 1,
                query, key or 1]; True is visible.
            hidden: What the mask has where a key is hidden; by default the lowest number.
        """
        mask: LazyMask = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        mask._visible, mask._made = visible, []
        mask._hidden = torch.finfo(dtype).min if hidden is None else hidden
        return mask

    def visible(self, start: int, stop: int) -> Bool[Tensor, "batch 1 query key"]:
        """Which keys the queries from ``start`` to before ``stop`` see."""
        batch, _, _, keys = self.shape
        return self._visible(start, stop).expand(batch, 1, stop - start, keys)

    def made(self) -> Float[Tensor, "batch 1 query key"]:
        """The actual mask, as transformers makes it."""
        if not self._made:
            visible = self.visible(0, self.shape[-2])
            self._made.append(_added(visible, self.dtype, self._hidden))
        return self._made[0]

    def forget(self) -> LazyMask:
        """Release the actual mask, if it was made; returns the lazy one."""
        self._made.clear()
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask({tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what needs no mask; run anything else on the actual mask."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if isinstance(args[0] if args else None, cls):
            if name in _METADATA:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            if name in _UNCHANGED or (name == "to" and _is_its_own(args, kwargs)):
                return args[0]
            if name in ("le", "__le__") and args[1] == args[0]._hidden:
                return _IsHidden(args[0])
            if name == "masked_fill" and isinstance(args[1], _IsHidden) and args[1].of is args[0]:
                mask = args[0]
                return cls(tuple(mask.shape), mask.dtype, mask.device, mask._visible, args[2])
            if name == "__getitem__" and _is_whole(args[0].shape, args[1]):
                return args[0]
        return func(*tree_map(_actual, tuple(args)), **tree_map(_actual, kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the actual mask."""
        return func(*tree_map(_actual, args), **tree_map(_actual, kwargs or {}))


class _IsHidden(Tensor):
    """Where a lazy mask hides keys, as ``mask <= lowest`` asks in order to put another number."""

    of: LazyMask

    @staticmethod
    def __new__(cls, of: LazyMask) -> _IsHidden:
        """Make it for a mask."""
        where: _IsHidden = Tensor._make_wrapper_subclass(
            cls, of.shape, dtype=torch.bool, device=of.device
        )
        where.of = of
        return where

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what needs no numbers; run anything else on the actual ones."""
        if getattr(func, "__name__", "") in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return func(*tree_map(_actual, tuple(args)), **tree_map(_actual, kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation on the actual numbers."""
        return func(*tree_map(_actual, args), **tree_map(_actual, kwargs or {}))


def _actual(x: Any) -> Any:
    if isinstance(x, _IsHidden):
        return x.of.made() <= x.of._hidden
    return x.made() if isinstance(x, LazyMask) else x


def _is_its_own(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether ``mask.to(...)`` asks for the type and device that the mask has."""
    mask, *wanted = args
    given = [*wanted, *kwargs.values()]
    return all(x in (mask.dtype, mask.device) for x in given) and kwargs.keys() <= {
        "dtype",
        "device",
    }


def _is_whole(shape: torch.Size, index: Any) -> bool:
    """Whether an index takes everything."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if parts.count(Ellipsis) == 1:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    return len(parts) <= len(shape) and all(
        isinstance(part, slice) and part.indices(size) == (0, size, 1)
        for part, size in zip(parts, shape, strict=False)
    )


def _added(
    visible: Bool[Tensor, "*shape"], dtype: torch.dtype, hidden: float
) -> Float[Tensor, "*shape"]:
    """What is added to scores: 0 where a key is visible, else a number."""
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, hidden)


class Bounds(NamedTuple):
    """The first and the last visible key of each query, by index; lists of equal length.

    A query that sees no key has first > last. Attention gives it all keys, as in transformers.
    """

    first: list[int]
    last: list[int]


class MaskMemory:
    """What is known of masks while they live, since blocks are given the same ones."""

    def __init__(self) -> None:
        self._causal = WeakTensorKeyDictionary()
        self._bounds = WeakTensorKeyDictionary()

    def is_causal(self, mask: Tensor) -> bool:
        """Whether a mask is the causal one alone: each query sees all keys up to its own position.

        The queries are those of the last positions. A bool mask is True where a key is visible;
        any other is added to the scores.
        """
        if mask not in self._causal:
            self._causal[mask] = _is_causal(mask)
        return bool(self._causal[mask])

    def bounds(self, mask: Tensor) -> Bounds:
        """The first and the last key that each query sees."""
        if mask not in self._bounds:
            self._bounds[mask] = _bounds(mask)
        bounds: Bounds = self._bounds[mask]
        return bounds


def _seen(mask: Tensor, start: int, stop: int) -> Bool[Tensor, "batch_head query key"]:
    """Which keys the queries from ``start`` to before ``stop`` see through a mask."""
    keys = mask.shape[-1]
    if isinstance(mask, LazyMask):
        return mask.visible(start, stop)[:, 0]
    rows = mask if mask.shape[-2] == 1 else mask[..., start:stop, :]
    seen = rows if rows.dtype == torch.bool else rows > torch.finfo(rows.dtype).min
    return seen.expand(*seen.shape[:-2], stop - start, keys).reshape(-1, stop - start, keys)


def _parts(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS)]


def _is_causal(mask: Tensor) -> bool:
    queries, keys = mask.shape[-2:]
    if queries > keys or mask.requires_grad:
        return False
    if not isinstance(mask, LazyMask) and mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        if bool(((mask != 0) & ~hidden).any()):
            return False
    positions = torch.arange(keys, device=mask.device)
    own = positions[keys - queries :]
    return all(
        bool((_seen(mask, *part) == (positions <= own[slice(*part), None])).all())
        for part in _parts(queries)
    )


def _bounds(mask: Tensor) -> Bounds:
    queries, keys = mask.shape[-2:]
    first, last = [], []
    positions = torch.arange(keys, device=mask.device)
    for part in _parts(queries):
        seen = _seen(mask, *part).any(0)
        first.append(torch.where(seen, positions, keys).amin(-1))
        last.append(torch.where(seen, positions, -1).amax(-1))
    return Bounds(torch.cat(first).tolist(), torch.cat(last).tolist())


class TileKeys(NamedTuple):
    """The keys that a tile of queries sees.

    Attributes:
        first, stop: Their range; no query of the tile sees a key outside of it.
        added: What is added to the tile's scores, [batch or 1, head or 1, query or 1, key], with
            the lowest number where a key is hidden; None if nothing is.
    """

    first: int
    stop: int
    added: Float[Tensor, "..."] | None


@dataclass(frozen=True, eq=False)
class VisibleKeys:
    """What an attention adds to its scores, and which keys it hides.

    Attributes:
        queries, keys: Their numbers.
        memory: Remembers masks.
        terms: Tensors that are added to the scores, [..., query or 1, key].
        hidden: The keys that stay visible, bool [..., query, key], and the number that the scores
            of all others become.
    """

    queries: int
    keys: int
    memory: MaskMemory
    terms: tuple[Float[Tensor, "..."], ...] = ()
    hidden: tuple[Bool[Tensor, "..."], float] | None = None

    @property
    def is_all(self) -> bool:
        """Whether every query sees all keys, and nothing is added."""
        return not self.terms and self.hidden is None

    @property
    def is_causal(self) -> bool:
        """Whether each query sees itself and what comes before, and nothing else is added.

        The queries are those of the last positions.
        """
        return bool(self._masks) and all(self.memory.is_causal(mask) for mask in self._masks)

    @property
    def shows_every_query(self) -> bool:
        """Whether every query certainly sees a key."""
        bounds = [self.memory.bounds(mask) for mask in self._masks]
        first = [max(each) for each in zip(*(b.first for b in bounds), strict=False)]
        last = [min(each) for each in zip(*(b.last for b in bounds), strict=False)]
        return len(bounds) <= 1 and all(a <= b for a, b in zip(first, last, strict=True))

    @property
    def _masks(self) -> tuple[Tensor, ...]:
        return self.terms if self.hidden is None else (*self.terms, self.hidden[0])

    def tile(self, start: int, stop: int, dtype: torch.dtype) -> TileKeys:
        """The keys that the queries from ``start`` to before ``stop`` see.

        Args:
            start: The first query of the tile.
            stop: The query after its last.
            dtype: The type of ``added``.
        """
        if self.is_all:
            return TileKeys(0, self.keys, None)
        first, last = 0, self.keys - 1
        for mask in self._masks:
            bounds = self.memory.bounds(mask)
            own = slice(start, stop) if mask.shape[-2] > 1 else slice(None)
            own_first, own_last = bounds.first[own], bounds.last[own]
            if all(a <= b for a, b in zip(own_first, own_last, strict=True)):
                first, last = max(first, min(own_first)), min(last, max(own_last))
            else:
                first, last = 0, self.keys - 1
                break
        if first > last:
            first, last = 0, self.keys - 1
        cut = slice(first, last + 1)
        parts = [self._term(term, start, stop, cut, dtype) for term in self.terms]
        if self.hidden is not None:
            visible, value = self.hidden
            rows = visible if visible.shape[-2] == 1 else visible[..., start:stop, :]
            zero = torch.zeros((), dtype=dtype, device=visible.device)
            parts.append(torch.where(rows[..., cut], zero, max(value, torch.finfo(dtype).min)))
        added = parts[0]
        for part in parts[1:]:
            added = (added + part).clamp_min(torch.finfo(dtype).min)
        return TileKeys(cut.start, cut.stop, added)

    def _term(
        self, term: Tensor, start: int, stop: int, cut: slice, dtype: torch.dtype
    ) -> Float[Tensor, "..."]:
        if isinstance(term, LazyMask):
            return _added(term.visible(start, stop)[..., cut], dtype, torch.finfo(dtype).min)
        rows = term if term.shape[-2] == 1 else term[..., start:stop, :]
        lowest = torch.finfo(term.dtype).min
        part = rows[..., cut]
        return part.to(dtype).masked_fill(part <= lowest, torch.finfo(dtype).min)
