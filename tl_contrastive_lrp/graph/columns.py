"""Edges as columns: how they are made and put in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Lexicographic order of edges, most significant first.
ORDER = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")

DTYPES = {
    "target_site": torch.int16,
    "source_site": torch.int16,
    "target_pos": torch.int32,
    "source_pos": torch.int32,
    "head": torch.int16,
    "path": torch.int8,
}


@dataclass
class EdgeColumns:
    """Collects the transitions of a graph, in any order, as dense matrices or diagonals.

    An entry that is exactly 0 is no edge. Where ``live`` is given, rows of targets that are not
    live are left out (targets that were not expanded). Entries of one transition are given once.

    Attributes:
        with_heads: Whether every edge carries a head and a path.
    """

    with_heads: bool = False
    _parts: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)

    def add_dense(
        self,
        source: int,
        target: int,
        matrix: Float[Tensor, "target_pos source_pos"],
        live: Bool[Tensor, " target_pos"] | None = None,
    ) -> None:
        """A transition that is not split by heads.

        Raises:
            ValueError: the graph's edges are split by heads, the transition is there already, or
                no matrix.
        """
        if self.with_heads:
            raise ValueError("Edges are split by heads here: give this transition by add_split.")
        if matrix.ndim != 2:
            raise ValueError(f"A transition of shape {tuple(matrix.shape)} is no matrix.")
        matrix = _rows(matrix.detach(), live)
        target_pos, source_pos = torch.nonzero(matrix, as_tuple=True)
        self._add(source, target, target_pos, source_pos, matrix[target_pos, source_pos])

    def add_diagonal(
        self,
        source: int,
        target: int,
        values: Float[Tensor, " pos"],
        live: Bool[Tensor, " pos"] | None = None,
    ) -> None:
        """A transition in which every position keeps to itself.

        Raises:
            ValueError: the transition is there already.
        """
        values = _rows(values.detach(), live)
        (pos,) = torch.nonzero(values, as_tuple=True)
        head = torch.full_like(pos, -1)
        self._add(source, target, pos, pos, values[pos], head, torch.zeros_like(pos))

    def add_edges(
        self,
        source: int,
        target: int,
        target_pos: Int[Tensor, " edge"],
        source_pos: Int[Tensor, " edge"],
        weight: Float[Tensor, " edge"],
        slot: Int[Tensor, " edge"] | None = None,
    ) -> None:
        """A transition as columns in order, without zeros; ``slot`` where it is split by heads.

        Raises:
            ValueError: slots where edges are not split by heads, or none where they are; or the
                transition is there already.
        """
        if self.with_heads != (slot is not None):
            raise ValueError("Give slots where edges are split by heads, and only there.")
        by_head = (None, None) if slot is None else heads_and_paths(slot)
        self._add(source, target, target_pos, source_pos, weight, *by_head)

    def add_split(
        self,
        source: int,
        target: int,
        value: Float[Tensor, "head target_pos source_pos"],
        key: Float[Tensor, "head target_pos source_pos"],
        position: Float[Tensor, " pos"],
        live: Bool[Tensor, " target_pos"] | None = None,
    ) -> None:
        """A transition split by heads: what goes by value, by key, and past attention's mixing.

        Raises:
            ValueError: the graph's edges are not split by heads, or the transition is there.
        """
        if not self.with_heads:
            raise ValueError("Edges are not split by heads here: give the sum by add_dense.")
        by_slot = _rows(slots(value, key, position.detach()), live)
        target_pos, source_pos, slot = at = torch.nonzero(by_slot, as_tuple=True)
        head, path = heads_and_paths(slot)
        self._add(source, target, target_pos, source_pos, by_slot[at], head, path)

    def _add(
        self,
        source: int,
        target: int,
        target_pos: Tensor,
        source_pos: Tensor,
        weight: Tensor,
        head: Tensor | None = None,
        path: Tensor | None = None,
    ) -> None:
        if (target, source) in self._parts:
            raise ValueError(f"Transition {source} -> {target} was given twice.")
        sites = {"target_site": target, "source_site": source}
        part = {
            name: torch.full(target_pos.shape, site, dtype=DTYPES[name])
            for name, site in sites.items()
        }
        part |= {"target_pos": target_pos, "source_pos": source_pos}
        if self.with_heads:
            assert head is not None
            assert path is not None
            part |= {"head": head, "path": path}
        part = {name: column.to("cpu", DTYPES[name]) for name, column in part.items()}
        self._parts[target, source] = part | {"weight": weight.cpu()}

    def columns(self) -> dict[str, Any]:
        """What ``AttributionGraph.from_columns`` takes: the columns of all edges in order, and
        ``transitions``, also those without an edge.

        Raises:
            ValueError: no transition was given.
        """
        if not self._parts:
            raise ValueError("A graph needs at least one transition.")
        order = sorted(self._parts)
        names = list(self._parts[order[0]])
        found: dict[str, Any] = {
            name: torch.cat([self._parts[pair][name] for pair in order]) for name in names
        }
        return found | {"transitions": tuple((source, target) for target, source in order)}


def _rows(matrix: Tensor, live: Tensor | None) -> Tensor:
    if live is None:
        return matrix
    shape = (-1, *[1] * (matrix.ndim - 1))
    return torch.where(live.to(matrix.device).view(shape), matrix, torch.zeros_like(matrix))


def in_order(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same edges sorted as a graph wants them; integers of any width become the graph's.

    Raises:
        ValueError: columns of different lengths, or an integer that its column cannot hold.
    """
    lengths = {name: tuple(column.shape) for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or columns["weight"].ndim != 1:
        raise ValueError(f"The columns of edges have different shapes: {lengths}.")
    columns = {
        name: column.detach().cpu() if name == "weight" else _narrowed(name, column.detach().cpu())
        for name, column in columns.items()
    }
    keys = [columns[name] for name in ORDER if name in columns]
    if first_disorder(keys) is None:
        return columns
    order = torch.from_numpy(_sorted(keys))
    return {name: column[order] for name, column in columns.items()}


def _narrowed(name: str, column: Tensor) -> Tensor:
    dtype = DTYPES[name]
    if column.dtype == dtype:
        return column
    if column.dtype.is_floating_point or column.dtype == torch.bool:
        raise ValueError(f"{name} holds {column.dtype}, not integers.")
    limits = torch.iinfo(dtype)
    if column.numel():
        low, high = (int(v) for v in torch.aminmax(column))
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name} holds {low} to {high}, more than {dtype} can.")
    return column.to(dtype)


def _sorted(keys: Sequence[Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Indices that sort by ``keys``, most significant first."""
    spans = [(int(key.min()), int(key.max()) - int(key.min()) + 1) for key in keys]
    if reduce(lambda size, span: size * span[1], spans, 1) >= 2**62:
        return np.lexsort([key.numpy() for key in reversed(keys)])
    packed = np.zeros(len(keys[0]), dtype=np.int64)
    for key, (low, span) in zip(keys, spans, strict=True):
        packed *= span
        packed += key.numpy()
        packed -= low
    # Edges that are equal in every key are refused later, so stability does not matter.
    return np.argsort(packed)


def first_disorder(keys: Sequence[Int[Tensor, " edge"]]) -> int | None:
    """Index of the first edge that does not come strictly after the one before it."""
    later = torch.zeros(max(len(keys[0]) - 1, 0), dtype=torch.bool)
    equal = torch.ones_like(later)
    for key in keys:
        later |= equal & (key[:-1] < key[1:])
        equal &= key[:-1] == key[1:]
    return None if later.all() else int(torch.nonzero(~later)[0]) + 1


POSITION, VALUE, KEY = 0, 1, 2

EDGE_KINDS = ("position", "value", "key")


def slots(
    value: Float[Tensor, "head target_pos source_pos"] | None,
    key: Float[Tensor, "head target_pos source_pos"] | None,
    position: Float[Tensor, " target_pos"],
    offset: int = 0,
) -> Float[Tensor, "target_pos source_pos slot"]:
    """What goes by value, by key, and past attention's mixing, side by side.

    Args:
        value, key: By head; None is none.
        position: The position-wise part; the first target's own source is ``offset``.
    """
    some = value if value is not None else key
    if some is None:
        made = position.new_zeros(len(position), offset + len(position), 1)
    else:
        made = some.new_zeros(*some.shape[1:], 1 + 2 * len(some))
    made[..., 0].diagonal(offset).copy_(position)
    for start, path in ((1, value), (2, key)):
        if path is not None:
            made[..., start::2] = path.detach().permute(1, 2, 0)
    return made


def heads_and_paths(
    slot: Int[Tensor, " edge"],
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """Head (-1: none) and path of edges in slots."""
    head = torch.div(slot - 1, 2, rounding_mode="floor")
    path = torch.where(slot == 0, POSITION, torch.where(slot % 2 == 1, VALUE, KEY))
    return head, path
