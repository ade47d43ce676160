"""The graph between segments of the prompt: positions are put together, and edges added up.

Everything is linear in relevance, so nothing else changes: a segment's node is the sum of its
tokens' nodes, and an edge between two segments the sum of the edges between their tokens, head by
head and path by path. Edges within a segment become an edge from it to itself, one site further.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..inputs.forced import labelled, unlabelled
from ..inputs.segments import How, Segment, divide
from .columns import ORDER, added_up
from .data import GraphData

GraphT = TypeVar("GraphT", bound=GraphData)


def by_segment(graph: GraphT, how: How) -> GraphT:
    """See ``AttributionGraph.by``."""
    if graph.of_segments:
        raise ValueError(
            "This graph is between segments already; call by(...) on the graph between tokens."
        )
    every = _divided(graph, how)
    segments = tuple(segment for segment in every if segment.n_tokens)
    sizes = torch.tensor([segment.n_tokens for segment in segments])
    of_token = torch.repeat_interleave(torch.arange(len(segments)), sizes)
    special = torch.ones(len(segments), dtype=torch.bool)
    special[of_token[~graph.special]] = False
    explained = sorted({int(of_token[pos]) for pos in graph.final_positions})
    details: dict[str, Any] = {
        "dimensions": None if graph.dimensions is None else _summed(graph.dimensions, of_token, 1),
        "neurons": None if graph.neurons is None else _summed(graph.neurons, of_token, 1),
        "head_relevance": (
            None if graph.head_relevance is None else _summed(graph.head_relevance, of_token, 2)
        ),
    }
    return replace(
        graph,
        **_edges(graph, of_token),
        **details,
        relevance=_summed(graph.relevance, of_token, 1),
        token_ids=torch.full((len(segments),), -1),
        special=special,
        str_tokens=tuple(segment.name for segment in segments),
        final_pos=explained[-1],
        earlier_final_pos=tuple(explained[:-1]),
        segments=segments,
        of_segments=True,
    )


def _divided(graph: GraphData, how: How) -> tuple[Segment, ...]:
    """The segments; the tokens of two answers by their own text, each answer by itself."""
    first = graph.final_positions[0]
    texts, sides = unlabelled(graph.str_tokens, first)
    if not sides or how in ("message", "tool"):
        return divide(how, graph.str_tokens, graph.segments)
    kind = how if isinstance(how, str) else "range"
    length, n_target = first + 1, sides.count("target")
    ends = (0, length, length + n_target, len(texts))
    fences = tuple(
        Segment(kind, "", kind, start, stop, "".join(texts[start:stop]))
        for start, stop in pairwise(ends)
    )
    # A message ends where an answer begins, and so does a word or a line.
    found = divide(how, texts, graph.segments or fences)
    return tuple(
        replace(one, name=labelled(sides[one.start - length], (one.name,))[0])
        if one.start >= length and one.name != "rest"
        else one
        for one in found
    )


def _summed(values: Float[Tensor, "..."], of_token: Int[Tensor, " pos"], axis: int) -> Tensor:
    """Values with the axis of positions added up by segment, in float64."""
    shape = list(values.shape)
    shape[axis] = int(of_token.max()) + 1
    return torch.zeros(shape, dtype=torch.float64).index_add_(axis, of_token, values.double())


def _edges(graph: GraphData, of_token: Int[Tensor, " pos"]) -> dict[str, Any]:
    """The columns of edges between segments, in order; weights are added up in float64."""
    columns = {name: getattr(graph, name) for name in ORDER if getattr(graph, name) is not None}
    for name in ("source_pos", "target_pos"):
        columns[name] = of_token[columns[name].long()].to(columns[name].dtype)
    return added_up(columns, graph.weight)
