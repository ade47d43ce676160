"""Edges as columns: how a graph's transitions are collected, split into paths and put in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Lexicographic order of edges, most significant column first.
ORDER = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")

DTYPES = {
    "target_site": torch.int16,
    "source_site": torch.int16,
    "target_pos": torch.int32,
    "source_pos": torch.int32,
    "head": torch.int16,
    "path": torch.int8,
}

# What the column "path" holds, and its names.
POSITION, VALUE, KEY = 0, 1, 2
EDGE_KINDS = ("position", "value", "key")


@dataclass
class EdgeColumns:
    """Collects the transitions of a graph, in any order, as dense matrices or as columns.

    An entry that is exactly 0 is not an edge. Rows of targets that are not ``live`` (targets that
    were not expanded) are left out. Every transition is added once.

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
        """Add a transition that is not split by heads.

        Raises:
            ValueError: The graph's edges are split by heads, the transition was added before, or
                ``matrix`` does not have two axes.
        """
        if self.with_heads:
            raise ValueError(
                "Edges are split by heads here: give this transition by add_edges, with slots."
            )
        if matrix.ndim != 2:
            raise ValueError(f"A transition of shape {tuple(matrix.shape)} is no matrix.")
        matrix = _live_rows(matrix.detach(), live)
        target_pos, source_pos = torch.nonzero(matrix, as_tuple=True)
        self._add(source, target, target_pos, source_pos, matrix[target_pos, source_pos])

    def add_edges(
        self,
        source: int,
        target: int,
        target_pos: Int[Tensor, " edge"],
        source_pos: Int[Tensor, " edge"],
        weight: Float[Tensor, " edge"],
        slot: Int[Tensor, " edge"] | None = None,
    ) -> None:
        """Add a transition as columns in order, without zeros; with slots if it is split by heads.

        Raises:
            ValueError: There are slots although edges are not split by heads, or none although
                they are; or the transition was added before.
        """
        if self.with_heads != (slot is not None):
            raise ValueError("Give slots where edges are split by heads, and only there.")
        head, path = (None, None) if slot is None else heads_and_paths(slot)
        self._add(source, target, target_pos, source_pos, weight, head, path)

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
        """The edges as arguments of ``AttributionGraph.from_columns``.

        Returns:
            The columns of all edges, in order, and ``transitions``, which also names those without
            an edge.

        Raises:
            ValueError: No transition was added.
        """
        if not self._parts:
            raise ValueError("A graph needs at least one transition.")
        order = sorted(self._parts)
        names = list(self._parts[order[0]])
        columns: dict[str, Any] = {
            name: torch.cat([self._parts[pair][name] for pair in order]) for name in names
        }
        return columns | {"transitions": tuple((source, target) for target, source in order)}


def _live_rows(matrix: Tensor, live: Tensor | None) -> Tensor:
    """The matrix with the rows of targets that are not live set to 0."""
    if live is None:
        return matrix
    mask = live.to(matrix.device).view(-1, *[1] * (matrix.ndim - 1))
    return torch.where(mask, matrix, torch.zeros_like(matrix))


def in_order(columns: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same edges sorted as a graph stores them, in the graph's integer types.

    Raises:
        ValueError: The columns differ in length, or an integer does not fit into its column.
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
    """An integer column in the graph's type."""
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
    combined = np.zeros(len(keys[0]), dtype=np.int64)
    for key, (low, span) in zip(keys, spans, strict=True):
        combined *= span
        combined += key.numpy()
        combined -= low
    # Edges that are equal in every key are refused later, so stability does not matter.
    return np.argsort(combined)


def first_disorder(keys: Sequence[Int[Tensor, " edge"]]) -> int | None:
    """Index of the first edge that does not come strictly after the one before it."""
    later = torch.zeros(max(len(keys[0]) - 1, 0), dtype=torch.bool)
    equal = torch.ones_like(later)
    for key in keys:
        later |= equal & (key[:-1] < key[1:])
        equal &= key[:-1] == key[1:]
    return None if later.all() else int(torch.nonzero(~later)[0]) + 1


def added_up(
    columns: Mapping[str, Int[Tensor, " edge"]], weight: Float[Tensor, " edge"]
) -> dict[str, Tensor]:
    """Edges of which those with the same ends, head and path are added up, in order.

    Args:
        columns: The integer columns, in ``ORDER``.
        weight: The weights.

    Returns:
        The columns, in the types that they came in, and ``weight`` in float64.
    """
    # One number for each edge, which rises in the graph's order; heads begin at -1.
    ranges = {
        name: (int(column.min()), int(column.max()) + 1) if len(weight) else (0, 1)
        for name, column in columns.items()
    }
    number = torch.zeros(len(weight), dtype=torch.int64)
    for name, (low, end) in ranges.items():
        number = number * (end - low) + (columns[name].long() - low)
    rest, edge = torch.unique(number, return_inverse=True)
    total = torch.zeros(len(rest), dtype=torch.float64).index_add_(0, edge, weight.double())
    found: dict[str, Tensor] = {}
    for name, (low, end) in reversed(ranges.items()):
        found[name] = (rest % (end - low) + low).to(columns[name].dtype)
        rest = rest // (end - low)
    return {**found, "weight": total}


def slots(
    value: Float[Tensor, "head target_pos source_pos"] | None,
    key: Float[Tensor, "head target_pos source_pos"] | None,
    position: Float[Tensor, " target_pos"],
    offset: int = 0,
) -> Float[Tensor, "target_pos source_pos slot"]:
    """The parts of a transition side by side, in the order in which a graph stores them.

    Slot 0 is the position-wise part, slots 1 + 2·h and 2 + 2·h are head h's value and key path.

    Args:
        value: The value path by head; None if there is none.
        key: The key path by head; None if there is none.
        position: The position-wise part.
        offset: Source position of the first target, among the sources given.
    """
    by_head = value if value is not None else key
    if by_head is None:
        parts = position.new_zeros(len(position), offset + len(position), 1)
    else:
        parts = by_head.new_zeros(*by_head.shape[1:], 1 + 2 * len(by_head))
    parts[..., 0].diagonal(offset).copy_(position)
    for start, path in ((1, value), (2, key)):
        if path is not None:
            parts[..., start::2] = rearrange(
                path.detach(), "head target source -> target source head"
            )
    return parts


def heads_and_paths(
    slot: Int[Tensor, " edge"],
) -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
    """Head (-1 for the position-wise part) and path of edges given by their slots."""
    head = torch.div(slot - 1, 2, rounding_mode="floor")
    path = torch.where(slot == 0, POSITION, torch.where(slot % 2 == 1, VALUE, KEY))
    return head, path
