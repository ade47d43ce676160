"""Graphs on disk and in other libraries: safetensors, networkx, JSON, GraphML."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from ..files import FileKind, atomic_path, read_result, rebuilding_from, write_result
from ..hooks.coverage import coverage_from
from ..inputs.segments import Segment
from .columns import EDGE_KINDS, ORDER
from .data import GraphData
from .prune_history import PruneStep, TransitionKept
from .tables import node_frame

if TYPE_CHECKING:
    import networkx as nx

GraphT = TypeVar("GraphT", bound=GraphData)

_FILE = FileKind("tl_contrastive_lrp.graph", 1, "the attribution graph")
_DETAILS = ("dimensions", "neurons", "head_relevance")
_TENSORS = ("relevance", "token_ids", "special", "weight", *ORDER, *_DETAILS)
# Characters that XML 1.0 cannot hold, and the carriage return, which its readers change.
_NOT_XML = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def save(graph: GraphData, path: str | os.PathLike[str]) -> Path:
    """See ``AttributionGraph.save``."""
    return write_result(path, _FILE, *to_parts(graph))


def to_parts(graph: GraphData) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """A graph as named tensors and the data that JSON can hold, as its file has them."""
    tensors: dict[str, Tensor | None] = {name: getattr(graph, name) for name in _TENSORS}
    rest = {f.name: getattr(graph, f.name) for f in fields(graph) if f.name not in _TENSORS}
    if graph.prepended_bos is None:
        del rest["prepended_bos"]  # the first files did not have this field
    rest["coverage"] = asdict(graph.coverage)
    rest["history"] = [asdict(step) for step in graph.history]
    if graph.attention == "eager":  # as version 0.1 writes and reads it
        del rest["attention"]
    if not graph.earlier_final_pos:  # as version 0.1 writes and reads it
        del rest["earlier_final_pos"]
    rest["segments"] = [asdict(segment) for segment in graph.segments]
    if not graph.segments:  # as version 0.1 writes and reads it
        del rest["segments"]
    if not graph.of_segments:  # as version 0.1 writes and reads it
        del rest["of_segments"]
    return tensors, rest


def load(path: str | os.PathLike[str], kind: type[GraphT]) -> GraphT:
    """See ``AttributionGraph.load``; ``kind`` is the class to instantiate."""
    tensors, data = read_result(path, _FILE)
    with rebuilding_from(path):
        return from_parts(tensors, data, kind)


def from_parts(
    tensors: Mapping[str, Tensor], parts: Mapping[str, Any], kind: type[GraphT]
) -> GraphT:
    """The graph that ``to_parts`` took apart; ``kind`` is the class to instantiate.

    Raises:
        KeyError: Something is missing.
        ValueError, TypeError: Something does not fit.
    """
    data = dict(parts)
    data["coverage"] = coverage_from(data["coverage"])
    data["history"] = tuple(_step(step) for step in data["history"])
    data["transitions"] = tuple((int(s), int(t)) for s, t in data["transitions"])
    for name in ("sites", "str_tokens"):
        data[name] = tuple(data[name])
    data["earlier_final_pos"] = tuple(data.get("earlier_final_pos", ()))
    data["segments"] = tuple(Segment(**one) for one in data.get("segments", ()))
    data |= {**dict.fromkeys(("head", "path", *_DETAILS)), **tensors}
    missing = [name for name in _TENSORS if name not in data]
    if missing:
        raise KeyError(missing[0])
    return kind(**data)


def _step(data: dict[str, Any]) -> PruneStep:
    parameters = tuple((name, value) for name, value in data["parameters"])
    return PruneStep(
        data["name"], parameters, tuple(TransitionKept(**row) for row in data["transitions"])
    )


def facts(graph: GraphData) -> dict[str, Any]:
    """The graph's texts and numbers for other formats; None is left out."""
    names = (
        "model_name", "rules", "objective", "target", "contrast", "delta", "target_logit",
        "contrast_logit", "granularity", "node_threshold", "final_pos",
    )  # fmt: skip
    values = {name: getattr(graph, name) for name in names}
    values["final_site"] = graph.sites[-1]
    if graph.earlier_final_pos:
        values["final_positions"] = ", ".join(map(str, graph.final_positions))
    values["history"] = "\n".join(map(str, graph.history))
    return {name: value for name, value in values.items() if value is not None}


def _nodes(graph: GraphData) -> list[dict[str, Any]]:
    frame = node_frame(graph).astype({"site": object})
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _edges(graph: GraphData) -> list[tuple[Any, Any, dict[str, Any]]]:
    """Edges as (source, target, attributes), with nodes as (site name, position)."""
    names = graph.sites
    columns = [column.tolist() for column in (graph.source_site, graph.target_site)]
    columns += [column.tolist() for column in (graph.source_pos, graph.target_pos, graph.weight)]
    if graph.head is None or graph.path is None:
        return [
            ((names[s], i), (names[t], j), {"weight": w})
            for s, t, i, j, w in zip(*columns, strict=True)
        ]
    columns += [graph.head.tolist(), graph.path.tolist()]
    return [
        ((names[s], i), (names[t], j), {"weight": w, "head": head, "path": EDGE_KINDS[path]})
        for s, t, i, j, w, head, path in zip(*columns, strict=True)
    ]


def to_networkx(graph: GraphData) -> nx.DiGraph[Any]:
    """See ``AttributionGraph.to_networkx``."""
    import networkx as nx

    network = nx.DiGraph() if graph.head is None else nx.MultiDiGraph()
    network.graph.update(facts(graph))
    network.add_nodes_from(((row["site"], row["pos"]), row) for row in _nodes(graph))
    network.add_edges_from(_edges(graph))
    return network


def _id(node: tuple[str, int]) -> str:
    return f"{node[0]}@{node[1]}"


def write_json(graph: GraphData, path: str | os.PathLike[str]) -> Path:
    """Write node-link JSON: directed, multigraph, graph (its facts), nodes, edges.

    Node ids are ``site@position``; weights are written exactly.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    content = {
        "directed": True,
        "multigraph": graph.head is not None,
        "graph": facts(graph) | {"sites": graph.sites, "str_tokens": graph.str_tokens},
        "nodes": [{"id": _id((row["site"], row["pos"])), **row} for row in _nodes(graph)],
        "edges": [
            {"source": _id(source), "target": _id(target), **rest}
            for source, target, rest in _edges(graph)
        ],
    }
    with atomic_path(path) as temporary, open(temporary, "x", encoding="utf-8") as file:
        json.dump(content, file, allow_nan=False)
    return Path(path)


def write_graphml(graph: GraphData, path: str | os.PathLike[str]) -> Path:
    """Write GraphML with node ids ``site@position``.

    XML cannot hold some control characters; they are written as Python escapes them.

    Raises:
        FileNotFoundError: The folder does not exist.
    """
    import networkx as nx

    network = nx.relabel_nodes(to_networkx(graph), _id)
    for attributes in (network.graph, *(data for _, data in network.nodes(data=True))):
        attributes.update({k: _xml(v) for k, v in attributes.items() if isinstance(v, str)})
    with atomic_path(path) as temporary:
        nx.write_graphml_xml(network, temporary)
    return Path(path)


def _xml(text: str) -> str:
    return _NOT_XML.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
