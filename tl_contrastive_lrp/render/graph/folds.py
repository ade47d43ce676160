"""Positions of a long prompt's graph that have no column of their own, drawn together.

A picture of thousands of columns shows nothing. In a prompt of more than ``folds.LONG`` tokens
the positions that exchange most relevance keep a column each; every run of positions between them
becomes one column, whose nodes and edges are the sums of theirs. So nothing is lost from the
picture, and what the folded ones hold can be read from it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..folds import LONG
from ..ranking import extremes, largest_mask
from .data import Edges, GraphData, merged

MAX_POSITIONS = 60
_MOST_GREYED = 6  # first and special tokens are large whatever the prompt says
_TOP = 6  # positions listed on either side


def fold_positions(data: GraphData, most: int) -> GraphData:
    """The graph with at most ``most`` positions, and the final one, apart; the rest in columns
    of several. The same graph where the prompt is short or no more positions have an edge.

    Of several final ones so many have a column to themselves as are a tenth of ``most``."""
    edges, n = data.edges, len(data.tokens)
    if most < 1:
        raise ValueError(f"max_positions must be 1 or more, not {most}")
    used = np.union1d(edges.source_pos, edges.target_pos)
    if n <= LONG or len(used) <= most:
        return data
    moves = edges.source_pos != edges.target_pos
    size = np.abs(edges.weight[moves])
    exchanged = np.bincount(edges.source_pos[moves], size, n)
    exchanged += np.bincount(edges.target_pos[moves], size, n)
    tenth = -(-most // 10)
    n_greyed = min(_MOST_GREYED, tenth)
    greyed = largest_mask(np.where(data.greyed, exchanged, 0.0), n_greyed)
    others = largest_mask(np.where(data.greyed, 0.0, exchanged), most - n_greyed or 1)
    busy = np.flatnonzero((greyed | others) & (exchanged > 0))
    own = np.abs(data.relevance[-1, data.finals])
    finals = np.append(data.finals[largest_mask(own, tenth)], data.final_pos)
    chosen = np.union1d(busy, finals).astype(np.int64)

    first = np.unique(np.concatenate([[0], chosen, chosen + 1]))
    first = first[first < n]
    last = np.append(first[1:], n) - 1
    column = np.searchsorted(first, np.arange(n), side="right") - 1
    relevance = np.add.reduceat(data.relevance, first, axis=1)
    together = Edges(
        edges.source_site,
        column[edges.source_pos],
        edges.target_site,
        column[edges.target_pos],
        edges.weight,
    )
    return replace(
        data,
        tokens=[data.tokens[at] for at in first.tolist()],
        relevance=relevance,
        greyed=data.greyed[first] & (first == last),
        edges=merged(together, *relevance.shape),
        final_pos=int(column[data.final_pos]),
        finals=np.unique(column[data.finals]).astype(np.int64),
        first=first,
        last=last,
    )


def account(data: GraphData, folded: GraphData) -> str:
    """What is folded, in a sentence; "" where nothing is."""
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
        f"exchange most relevance among them. The other {n - own:,} are folded into "
        f"{len(apart) - own:,} columns (squares), their relevance and edges added up: "
        f"{int(part.sum()):,} of {len(data.edges):,} edges, {100 * share:.1f} % of "
        "\u03a3|weight|, begin or end there."
    )


def tops(data: GraphData) -> list[list[int]]:
    """Positions of largest positive, and of largest negative relevance at the input."""
    return list(extremes(np.where(data.greyed, 0.0, data.relevance[0]), _TOP))
