"""The pictures of an ``AttributionGraph``: what they show, and their words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ..render.graph.data import GraphView, exchanged
from ..render.graph.matrices import MAX_CELLS, attention_matrices, room
from ..render.ranking import largest_mask
from ..render.text import visible, with_parts

if TYPE_CHECKING:
    from ..render.offline import OfflineHTML
    from .data import GraphData

_BLOCK = re.compile(r"blocks\.(\d+)\.(?:.*\.)?hook_(?:resid_)?(.+)")
_PLACE = {"pre": "in", "mid": "mid", "post": "out"}


def view_of(graph: GraphData) -> GraphView:
    """The data for a graph's picture, with heads and paths of an edge added up.

    Special tokens and the first token are greyed. The notes say what was left out when the graph
    was made and what each pruning step did.
    """
    greyed = graph.special.clone()
    greyed[0] = True
    graph = graph.merge_heads()
    notes = []
    if graph.node_threshold:
        share = (
            f" ({graph.node_threshold / abs(graph.delta):.2%} of |\u0394\u2113|)"
            if graph.delta
            else ""
        )
        notes.append(
            f"Hidden states of |relevance| \u2264 {graph.node_threshold:g} logits{share} pass "
            "nothing on: they were not expanded when the graph was made."
        )
    notes += [f"Pruned by {step}." for step in graph.history]
    return GraphView(
        sites=graph.sites,
        site_labels=site_labels(graph.sites),
        relevance=graph.relevance,
        str_tokens=graph.str_tokens,
        greyed=greyed,
        source_site=graph.source_site,
        source_pos=graph.source_pos,
        target_site=graph.target_site,
        target_pos=graph.target_pos,
        weight=graph.weight,
        final_pos=graph.final_pos,
        earlier_final_pos=graph.earlier_final_pos,
        target=graph.target,
        contrast=graph.contrast,
        delta=graph.delta,
        objective=graph.objective,
        rules=graph.rules,
        model_name=graph.model_name,
        notes=notes,
    )


def site_labels(sites: tuple[str, ...]) -> list[str]:
    """Short names for HookPoints of the residual stream: "input", "block 3 · mid", "output"."""
    labels = []
    for index, site in enumerate(sites):
        match = _BLOCK.fullmatch(site)
        if match is None:
            labels.append(site)
        elif index == 0 and site == "blocks.0.hook_resid_pre":
            labels.append("input")
        elif index == len(sites) - 1 and site.endswith("hook_resid_post"):
            labels.append("output")
        else:
            labels.append(f"block {match[1]} \u00b7 {_PLACE.get(match[2], match[2])}")
    return labels


def _between(sites: tuple[str, ...], names: list[str], source: int, target: int) -> str:
    """A transition in words: the block or attention it passes through, or its two sites."""
    start, end = (_BLOCK.fullmatch(sites[site]) for site in (source, target))
    if start and end and start[2] == "pre":
        block, last = int(start[1]), int(end[1])
        if (last, end[2]) in ((block + 1, "pre"), (block, "post")):
            return f"block {block}"
        if (last, end[2]) == (block, "mid"):
            return f"block {block} attention"
    return f"{names[source]} \u2192 {names[target]}"


def matrices_of(
    graph: GraphData,
    transition: tuple[int | str, int | str] | None = None,
    *,
    max_cells: int = MAX_CELLS,
) -> OfflineHTML:
    """A graph's transitions, or the heads of one of them, as circuitsvis' ``attention_heads``.

    Transitions without an edge between two positions are left out. In a long prompt only the
    positions that exchange the most relevance are shown, and the view says so.

    Args:
        graph: The graph to show.
        transition: The (source, target) sites, by name or index, of the one transition whose heads
            to show, or whose matrix if the graph is not split by heads. None shows every
            transition.
        max_cells: The largest number of cells to draw, in all matrices together.

    Raises:
        ValueError: There is no such site or transition, or no edge between two positions.
    """
    weight, n = graph.weight.double().numpy(), len(graph.str_tokens)
    pair = np.stack([graph.source_site.numpy(), graph.target_site.numpy()]).astype(np.int64)
    source, target = (c.numpy().astype(np.int64) for c in (graph.source_pos, graph.target_pos))
    names, notes = site_labels(graph.sites), []
    if transition is None:
        kind = pair[0] * len(graph.sites) + pair[1]
        selected = np.ones(len(weight), dtype=bool)
    else:
        ends = graph.transition(*transition)
        selected = (pair[0] == ends[0]) & (pair[1] == ends[1])
        kind = np.zeros(len(weight), dtype=np.int64)
        if graph.head is not None:
            kind = graph.head.numpy().astype(np.int64)
            selected &= kind >= 0
            notes.append("Relevance outside the heads (residual stream, queries, MLP) is left out.")
        notes.append(f"{names[ends[0]]} to {names[ends[1]]}.")
    apart = selected & (source != target)
    kinds = np.unique(kind[apart])
    if not len(kinds):
        raise ValueError("There is no edge between two positions to show; prune less.")
    selected &= np.isin(kind, kinds)
    if transition is None:
        labels = [_between(graph.sites, names, *divmod(k, len(names))) for k in kinds.tolist()]
        missing = len(graph.transitions) - len(kinds)
        if missing:
            notes.append(f"{missing} transition(s) without an edge between positions left out.")
    elif graph.head is not None:
        labels = [f"head {k}" for k in kinds.tolist()]
    else:
        labels = ["all heads"]

    by_position = exchanged(source[apart], target[apart], np.abs(weight[apart]), n)
    # Reversed: of positions that exchange equally much, those nearest to the prediction are shown.
    positions = np.flatnonzero(largest_mask(by_position[::-1], room(len(kinds), max_cells))[::-1])
    place = np.full(n, -1)
    place[positions] = np.arange(len(positions))
    shown = selected & (place[source] >= 0) & (place[target] >= 0)
    dense = np.zeros((len(kinds), len(positions), len(positions)))
    index = (np.searchsorted(kinds, kind[shown]), place[target[shown]], place[source[shown]])
    np.add.at(dense, index, weight[shown])
    total = float(np.abs(weight[apart]).sum())
    if len(positions) < n:
        share = float(np.abs(weight[shown & apart]).sum()) / total
        notes.append(
            f"The {len(positions)} of {n:,} positions that exchange the most relevance: "
            f"{100 * share:.1f} % of \u03a3|weight| between positions."
        )
    greyed = graph.special.numpy().copy()
    greyed[0] = True
    texts = [visible(text) for text in with_parts(graph.str_tokens)]  # of the whole prompt
    return attention_matrices(
        [texts[p] for p in positions.tolist()],
        dense,
        labels,
        greyed=greyed[positions],
        target=graph.target or "the target",
        contrast=graph.contrast or "its alternatives",
        positions=positions.tolist() if len(positions) < n else None,
        notes=notes,
        max_cells=max_cells,
    )
