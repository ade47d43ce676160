"""Folding a long prompt's graph: positions without a column of their own share one.

A picture of thousands of columns shows nothing. In a prompt of more than ``folds.LONG`` tokens the
positions that exchange the most relevance keep a column each, and every run of positions between
them becomes one column whose nodes and edges are the sums of theirs. No relevance is lost: the
picture also shows what the folded positions hold.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..folds import LONG
from ..ranking import extremes, largest_mask
from .data import CheckedGraph, exchanged, merged

MAX_POSITIONS = 60
_MOST_GREYED = 6  # first and special tokens have large relevance whatever the prompt says
_TOP = 6  # positions listed for the target, and for the contrast


def fold_positions(data: CheckedGraph, most: int) -> CheckedGraph:
    """Give at most ``most`` positions and the final one a column each, and fold the others.

    A graph stays as it is if the prompt is short or no more positions have an edge. If there are
    several final positions, those of largest relevance get a column each, up to a tenth of
    ``most``.

    Raises:
        ValueError: ``most`` is below 1.
    """
    edges, n = data.edges, len(data.tokens)
    if most < 1:
        raise ValueError(f"max_positions must be 1 or more, not {most}")
    used = np.union1d(edges.source_pos, edges.target_pos)
    if n <= LONG or len(used) <= most:
        return data
    moves = edges.source_pos != edges.target_pos
    size = np.abs(edges.weight[moves])
    by_position = exchanged(edges.source_pos[moves], edges.target_pos[moves], size, n)
    tenth = -(-most // 10)
    n_greyed = min(_MOST_GREYED, tenth)
    greyed = largest_mask(np.where(data.greyed, by_position, 0.0), n_greyed)
    others = largest_mask(np.where(data.greyed, 0.0, by_position), most - n_greyed or 1)
    busy = np.flatnonzero((greyed | others) & (by_position > 0))
    own = np.abs(data.relevance[-1, data.finals])
    finals = np.append(data.finals[largest_mask(own, tenth)], data.final_pos)
    columns = np.union1d(busy, finals).astype(np.int64)

    first = np.unique(np.concatenate([[0], columns, columns + 1]))
    first = first[first < n]
    last = np.append(first[1:], n) - 1
    column = np.searchsorted(first, np.arange(n), side="right") - 1
    relevance = np.add.reduceat(data.relevance, first, axis=1)
    folded = replace(
        edges, source_pos=column[edges.source_pos], target_pos=column[edges.target_pos]
    )
    return replace(
        data,
        tokens=[data.tokens[at] for at in first.tolist()],
        relevance=relevance,
        greyed=data.greyed[first] & (first == last),
        edges=merged(folded, *relevance.shape),
        final_pos=int(column[data.final_pos]),
        finals=np.unique(column[data.finals]).astype(np.int64),
        first=first,
        last=last,
    )


def account(data: CheckedGraph, folded: CheckedGraph) -> str:
    """A sentence about the positions that are folded; "" if none are."""
    apart = folded.first == folded.last
    if apart.all():
        return ""
    n, own = len(data.tokens), int(apart.sum())
    inside = np.ones(n, dtype=bool)
    inside[folded.first[apart]] = False
    part = inside[data.edges.source_pos] | inside[data.edges.target_pos]
    total = float(np.abs(data.edges.weight).sum()) or 1.0
    share = float(np.abs(data.edges.weight[part]).sum()) / total
    return (
        f"This prompt is long: {own:,} of its {n:,} positions have a column each, those that "
        f"exchange the most relevance among them. The other {n - own:,} are folded into "
        f"{len(apart) - own:,} columns (squares), their relevance and edges added up: "
        f"{int(part.sum()):,} of {len(data.edges):,} edges, {100 * share:.1f} % of "
        "\u03a3|weight|, begin or end there."
    )


def tops(data: CheckedGraph) -> list[list[int]]:
    """The positions of largest positive and of largest negative relevance at the input."""
    return list(extremes(np.where(data.greyed, 0.0, data.relevance[0]), _TOP))
