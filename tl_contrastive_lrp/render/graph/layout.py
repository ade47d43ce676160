"""Positions and sizes of a graph's nodes and edges in its picture: numbers only, no markup."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..ranking import largest_ascending
from ..scale import largest_among
from .data import CheckedGraph, Edges

if TYPE_CHECKING:
    from numpy.typing import NDArray

# All sizes are in pixels. The width that columns share, and the limits of a column's width.
_WIDE, _NARROWEST, _WIDEST = 1040, 15, 56
# A gap's width as a fraction of a column's, and the least width that its words need.
_GAP, _WORDS = 0.7, 12.5
# The height that rows share, and the limits of a row's height.
_TALL, _LOWEST, _HIGHEST = 620, 15, 64
TOP = 46  # above the first row, for the words at the final node
THICKEST, THINNEST = 6.5, 0.6


@dataclass(frozen=True)
class Gap:
    """A run of positions that have no edge in the picture.

    Attributes:
        x: The x coordinate of its middle.
        width: Its width.
        first: The first position.
        last: The last position.
    """

    x: float
    width: float
    first: int
    last: int

    @property
    def count(self) -> int:
        """Number of positions."""
        return self.last - self.first + 1


@dataclass(frozen=True, eq=False)
class Layout:
    """The picture in numbers.

    Attributes:
        edges: The edges to draw, weakest first.
        thickness: Their widths in pixels, ``[edge]``, linear in |weight| up to ``widest``.
        strength: |weight| / ``widest``, at most 1, ``[edge]``.
        stays: Whether an edge stays at its position, ``[edge]``.
        node_site, node_pos: The nodes with an edge to draw, and the final nodes (last; one, unless
            several positions are explained), ``[node]``.
        radius: In pixels, ``[node]``; the area is linear in |relevance| up to ``largest``.
        source, target: Index of an edge's nodes, ``[edge]``.
        column: x of every position, ``[pos]``; NaN where it has no column.
        row: y of every site, ``[site]``.
        gaps: Runs of positions without a column.
        width, below: Right end of the columns, and y below the lowest row.
        widest, largest: |weight| of full width and |relevance| of full area, in logits.
        left_out: Number of edges too weak to be drawn.
        mass: Share of Σ|weight| that is drawn.
    """

    edges: Edges
    thickness: NDArray[np.float64]
    strength: NDArray[np.float64]
    stays: NDArray[np.bool_]
    node_site: NDArray[np.int64]
    node_pos: NDArray[np.int64]
    radius: NDArray[np.float64]
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    column: NDArray[np.float64]
    row: NDArray[np.float64]
    gaps: list[Gap]
    width: float
    below: float
    widest: float
    largest: float
    left_out: int
    mass: float


def layout(data: CheckedGraph, max_edges: int) -> Layout:
    """Place the strongest ``max_edges`` edges of a graph.

    Widths and areas have one scale each for the whole picture. Full width is the largest |weight|
    among edges between two positions that are neither greyed nor folded: most of the relevance
    stays at its position and would make all other edges invisible.

    Raises:
        ValueError: ``max_edges`` is below 1.
    """
    if max_edges < 1:
        raise ValueError(f"max_edges must be 1 or more, not {max_edges}")
    size = np.abs(data.edges.weight)
    total = float(size.sum())
    drawn = largest_ascending(size, max_edges)
    edges, size = data.edges.take(drawn), size[drawn]
    stays = edges.source_pos == edges.target_pos
    outside = data.greyed | (data.first != data.last)  # left out of the scales
    grey = outside[edges.source_pos] | outside[edges.target_pos]
    widest = largest_among(size, ~stays & ~grey, ~stays, ~grey)

    sites, positions = data.relevance.shape
    finals = (sites - 1) * positions + data.finals
    ends = np.concatenate(
        [
            edges.source_site * positions + edges.source_pos,
            edges.target_site * positions + edges.target_pos,
            finals,
        ]
    ).astype(np.int64)
    nodes = np.unique(ends)
    nodes = np.append(nodes[~np.isin(nodes, finals)], finals)  # drawn last, on top
    order = np.argsort(nodes)
    index = order[np.searchsorted(nodes, ends, sorter=order)]
    node_site, node_pos = np.divmod(nodes, positions)
    relevance = np.abs(data.relevance[node_site, node_pos])
    largest = largest_among(relevance, ~outside[node_pos])

    used = np.unique(node_pos)
    column, gaps, step, width = _columns(used, positions)
    gaps = [replace(g, first=int(data.first[g.first]), last=int(data.last[g.last])) for g in gaps]
    height = float(np.clip(_TALL / max(sites - 1, 1), _LOWEST, _HIGHEST))
    row = TOP + height * np.arange(sites - 1, -1, -1, dtype=float)
    biggest = min(0.46 * step, 0.36 * height, 11.0)
    strength = np.minimum(size / widest, 1.0)
    return Layout(
        edges=edges,
        thickness=np.maximum(THICKEST * strength, THINNEST),
        strength=strength,
        stays=stays,
        node_site=node_site,
        node_pos=node_pos,
        radius=np.maximum(biggest * np.sqrt(np.minimum(relevance / largest, 1.0)), 1.6),
        source=index[: len(edges)],
        target=index[len(edges) : 2 * len(edges)],
        column=column,
        row=row,
        gaps=gaps,
        width=width,
        below=float(row[0]) + max(biggest, 4.0) + 7,
        widest=widest,
        largest=largest,
        left_out=len(data.edges) - len(edges),
        mass=float(size.sum()) / total if total else 1.0,
    )


def _columns(
    used: NDArray[np.int64], positions: int
) -> tuple[NDArray[np.float64], list[Gap], float, float]:
    """The x of every position, the gaps, the width of a column and the right end of all."""
    ends = np.concatenate([[-1], used, [positions]])
    missing = np.diff(ends) > 1  # a gap in front of each column, and after the last
    columns = len(used) + _GAP * missing.sum()
    step = float(np.clip(_WIDE / columns, _NARROWEST, _WIDEST))
    room = max(_GAP * step, _WORDS)
    left = 12.0
    before = np.cumsum(missing) * room + np.arange(len(missing)) * step  # right end of each gap
    column = np.full(positions, np.nan)
    column[used] = left + before[:-1] + step / 2
    gaps = [
        Gap(left + float(before[i]) - room / 2, room, int(ends[i]) + 1, int(ends[i + 1]) - 1)
        for i in np.flatnonzero(missing)
    ]
    return column, gaps, step, left + float(before[-1])
