"""What an ``AttributionGraph`` promises of its fields, checked whenever one is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .attribution import check_earlier
from .edge_slots import PATHS, POSITION
from .graph_columns import DTYPES, ORDER, first_disorder

if TYPE_CHECKING:
    from .graph import AttributionGraph

GRANULARITIES = ("block", "sublayer", "custom")


def check_graph(graph: AttributionGraph) -> None:
    """Look at every field.

    Raises:
        ValueError: the first broken promise: which field, and what it holds.
    """
    _check_facts(graph)
    _check_columns(graph)
    _check_details(graph)
    if sum(part.stop - part.start for part in graph.slices.values()) != len(graph.weight):
        raise ValueError("Some edges belong to no transition in transitions.")


def _check_facts(graph: AttributionGraph) -> None:
    """Fields that are no columns of edges."""
    sites, pos = len(graph.sites), len(graph.str_tokens)
    if sites < 2 or len(set(graph.sites)) != sites:
        raise ValueError(f"A graph needs two or more sites of different names: {graph.sites}.")
    if not all(isinstance(text, str) for text in (*graph.sites, *graph.str_tokens)):
        raise ValueError("Sites and tokens must be texts.")
    wanted = {"relevance": (sites, pos), "token_ids": (pos,), "special": (pos,)}
    for name, shape in wanted.items():
        found = tuple(getattr(graph, name).shape)
        if found != shape:
            raise ValueError(f"AttributionGraph.{name} has shape {found}, not {shape}.")
    for name in ("relevance", "weight"):
        if getattr(graph, name).dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {getattr(graph, name).dtype}, not float32 or float64.")
    if graph.special.dtype != torch.bool or graph.token_ids.dtype != torch.int64:
        raise ValueError("special must be bool and token_ids int64.")
    if not bool(torch.isfinite(graph.relevance).all()):
        raise ValueError("A node's relevance is NaN or infinite.")
    if not 0 <= graph.final_pos < pos:
        raise ValueError(f"final_pos={graph.final_pos} is outside the prompt's {pos} tokens.")
    check_earlier("final_pos", graph.final_pos, "earlier_final_pos", graph.earlier_final_pos)
    if graph.granularity not in GRANULARITIES:
        raise ValueError(f"granularity={graph.granularity!r} is none of {GRANULARITIES}.")
    if not (math.isfinite(graph.node_threshold) and graph.node_threshold >= 0):
        raise ValueError(f"node_threshold={graph.node_threshold} must be 0 or more.")
    if list(graph.transitions) != sorted(set(graph.transitions), key=lambda p: (p[1], p[0])):
        raise ValueError("transitions must be sorted by (target, source) and differ.")
    if not all(0 <= source < target < sites for source, target in graph.transitions):
        raise ValueError(f"transitions must be pairs source < target < {sites}.")


def _check_columns(graph: AttributionGraph) -> None:
    """Columns of edges: their types, limits, meaning and order."""
    names = [name for name in ORDER if getattr(graph, name) is not None]
    if ("head" in names) != ("path" in names):
        raise ValueError("Give both head and path of the edges, or neither.")
    keys = {name: getattr(graph, name) for name in names}
    for name, column in {**keys, "weight": graph.weight}.items():
        if tuple(column.shape) != (len(graph.weight),):
            raise ValueError(f"{name} has shape {tuple(column.shape)}, not ({len(graph.weight)},).")
        if name != "weight" and column.dtype != DTYPES[name]:
            raise ValueError(f"{name} is {column.dtype}, not {DTYPES[name]}; use from_columns.")
    if not len(graph.weight):
        return
    sites, pos = len(graph.sites), len(graph.str_tokens)
    limits = {"source_site": sites, "target_site": sites, "source_pos": pos, "target_pos": pos}
    for name, limit in {**limits, "path": len(PATHS)}.items():
        if name in keys:
            low, high = (int(v) for v in torch.aminmax(keys[name]))
            if low < 0 or high >= limit:
                raise ValueError(f"{name} holds {low} to {high}; it must be in 0 to {limit - 1}.")
    if not bool((graph.source_site < graph.target_site).all()):
        raise ValueError("An edge's source site must come before its target site.")
    if graph.head is not None and graph.path is not None:
        alone = graph.path == POSITION
        if int(graph.head.min()) < -1 or not torch.equal(alone, graph.head == -1):
            raise ValueError("head must be -1 exactly where path is 0 (position), else 0 or more.")
        if bool((alone & (graph.source_pos != graph.target_pos)).any()):
            raise ValueError("An edge of path 0 (position) must stay at its position.")
    if not bool(torch.isfinite(graph.weight).all()):
        at = int(torch.nonzero(~torch.isfinite(graph.weight))[0])
        raise ValueError(f"The weight of edge {at} is {float(graph.weight[at])}.")
    at_fault = first_disorder(list(keys.values()))
    if at_fault is not None:
        raise ValueError(
            f"Edge {at_fault} equals the one before it or belongs before it; sort with "
            "from_columns, and add up edges that are the same."
        )


def _check_details(graph: AttributionGraph) -> None:
    """Details of the nodes come together, and fit sites and prompt."""
    dimensions, neurons, heads = graph.dimensions, graph.neurons, graph.head_relevance
    if dimensions is None and neurons is None and heads is None:
        return
    if dimensions is None or neurons is None or heads is None:
        raise ValueError("Give dimensions, neurons and head_relevance together, or none.")
    pos = len(graph.str_tokens)
    if any(detail.ndim != 3 for detail in (dimensions, neurons, heads)) or (
        dimensions.shape[:2] != (len(graph.sites), pos)
        or neurons.shape[1] != pos
        or heads.shape[2] != pos
    ):
        raise ValueError("dimensions, neurons and head_relevance do not fit sites and prompt.")
