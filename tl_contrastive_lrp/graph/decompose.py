"""Which heads, neurons and hidden dimensions carry a node or an edge, from the same backward.

The relevance of a node is a sum over its hidden dimensions, and what the block below wrote there is
a sum over its heads and neurons. An edge within a block is a sum over heads and paths. All of them
are kept if the graph is made with ``attribution_graph(..., details=True, heads=True)``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inputs.objective import for_one_prompt, one_position
from ..inputs.tokens import model_device
from ..render.ranking import largest_first
from ..rules.rule_sets import RuleSet, get_rule_set
from ..rules.threads import turn
from .data import require_tokens

if TYPE_CHECKING:
    import pandas as pd

    from .data import GraphData

Node = tuple[int | str, int]


def _position(graph: GraphData, pos: int) -> int:
    return one_position(pos, len(graph.str_tokens))


def _frame(rows: list[tuple[str, str, float]], whole: float, k: int) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=["part", "name", "relevance"])
    frame["share"] = frame["relevance"] / (whole or float("nan"))
    order = largest_first(frame["relevance"].abs().to_numpy(dtype=float), k)
    return frame.iloc[order].reset_index(drop=True)


def _largest(part: str, names: str, values: Tensor, k: int) -> list[tuple[str, str, float]]:
    order = largest_first(values.abs().numpy(), k).tolist()
    return [(part, names.format(i), float(values[i])) for i in order]


def writer_block(site: str) -> tuple[int | None, bool]:
    """The block that wrote last into a site, and whether its MLP had written by then."""
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", site)
    if match is None:
        return None, False
    block, place = int(match[1]), match[2]
    if place == "pre":
        return (block - 1 if block else None), True
    return block, place == "post"


def explain_node(graph: GraphData, site: int | str, pos: int, k: int = 10) -> pd.DataFrame:
    """Which dimensions, heads and neurons carry the relevance of one node.

    Args:
        graph: A graph made with ``details=True``.
        site: Name or index of the node's site.
        pos: The node's position.
        k: Rows for each kind of part.

    Returns:
        Rows by |relevance|, largest first, with the columns part ("dimension" of the hidden state;
        "head" and "neuron" of the block that wrote into it), name ("17", or "2.3" for layer 2
        head 3), relevance (logits) and share (of the node's relevance). Dimensions sum to the
        node. Heads and neurons decompose what the block wrote; the rest came along the residual
        stream.

    Raises:
        ValueError: The graph has no details, or no such node.
    """
    if graph.dimensions is None or graph.head_relevance is None or graph.neurons is None:
        raise ValueError(
            "This graph keeps no details of its nodes; make it with "
            "attribution_graph(..., details=True)."
        )
    index, pos = graph.site_index(site), _position(graph, pos)
    rows = _largest("dimension", "{}", graph.dimensions[index, pos], k)
    block, after_mlp = writer_block(graph.sites[index])
    if block is not None:
        rows += _largest("head", f"{block}.{{}}", graph.head_relevance[block, :, pos], k)
        if after_mlp:
            rows += _largest("neuron", f"{block}.{{}}", graph.neurons[block, pos], k)
    return _frame(rows, float(graph.relevance[index, pos]), len(rows))


def explain_edge(
    graph: GraphData,
    source: Node,
    target: Node,
    k: int = 10,
    *,
    model: Any = None,
    objective: Callable[[Tensor], Tensor] | None = None,
    rules: str | RuleSet | None = None,
) -> pd.DataFrame:
    """Which heads carry one edge, by value and by key, and which hidden dimensions.

    Args:
        graph: A graph, made with ``heads=True`` if heads are of interest.
        source: The source node: (site name or index, position).
        target: The target node.
        k: Rows for each kind of part.
        model: The model that the graph explains. With it and ``objective``, one more forward and
            backward give the hidden dimensions of the source that carry the edge.
        objective: The objective that the graph explains.
        rules: The rules of that backward; by default the graph's own, by name (a ``RuleSet`` of
            your own has to be given).

    Returns:
        Rows by |relevance|, largest first, with the columns part ("head by value", "head by key",
        "dimension", or "position-wise": residual stream, queries and MLP, on edges that stay at
        their position), name ("2.3"; "17"), relevance (logits) and share (of the edge). Heads and
        the position-wise part sum to the edge, and so do the dimensions.

    Raises:
        ValueError: The graph is not split by heads and no model is given, or it has no such edge.
    """
    if (model is None) != (objective is None):
        raise ValueError("Give model and objective together, or neither.")
    if model is not None:
        require_tokens(graph, "explain_edge with a model")
    if graph.head is None and model is None:
        raise ValueError(
            "This graph's edges are not split by heads; make it with "
            "attribution_graph(..., heads=True), or give model= and objective= for dimensions."
        )
    s, t = graph.site_index(source[0]), graph.site_index(target[0])
    i, j = _position(graph, source[1]), _position(graph, target[1])
    columns: list[tuple[Any, int]] = [
        (graph.source_site, s), (graph.target_site, t), (graph.source_pos, i), (graph.target_pos, j)
    ]  # fmt: skip
    here = torch.stack([column == value for column, value in columns]).all(0).nonzero()[:, 0]
    if not len(here):
        raise ValueError(
            f"There is no edge from {graph.sites[s]} @{i} to {graph.sites[t]} @{j} in this graph."
        )
    edge = float(graph.weight[here].double().sum())
    rows = [] if graph.head is None else _heads(graph, here, t, k)
    if model is not None and objective is not None:
        from .edges.batched import edge_by_dimension

        rule_set = get_rule_set(graph.rules if rules is None else rules)
        ends = (graph.sites[s], i), (graph.sites[t], j)
        tokens = graph.token_ids[None].to(model_device(model))
        with turn(model):
            by_dimension = edge_by_dimension(
                model, tokens, for_one_prompt(objective), rule_set, *ends
            )
        rows += _largest("dimension", "{}", by_dimension, k)
    return _frame(rows, edge, len(rows))


def _heads(graph: GraphData, here: Tensor, target: int, k: int) -> list[tuple[str, str, float]]:
    assert graph.head is not None
    assert graph.path is not None
    block, _ = writer_block(graph.sites[target])
    parts = {0: "position-wise", 1: "head by value", 2: "head by key"}
    rows = [
        (parts[path], f"{block}.{head}" if head >= 0 else "", weight)
        for path, head, weight in zip(
            graph.path[here].tolist(), graph.head[here].tolist(), graph.weight[here].tolist(),
            strict=True,
        )
    ]  # fmt: skip
    return sorted(rows, key=lambda row: -abs(row[2]))[:k]
