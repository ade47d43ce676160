"""A graph's edges and nodes as tables and dense matrices."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .columns import EDGE_KINDS

if TYPE_CHECKING:
    import pandas as pd

    from .data import GraphData


def _named(codes: Tensor, names: Iterable[str]) -> Any:
    """A categorical column of names, from their indices."""
    import pandas as pd

    from_codes: Any = pd.Categorical.from_codes  # its stubs refuse a numpy array of any integer
    return from_codes(codes.numpy(), categories=list(names))


def edge_frame(graph: GraphData) -> pd.DataFrame:
    """See ``AttributionGraph.edges``."""
    import pandas as pd

    columns = {
        "source_site": _named(graph.source_site, graph.sites),
        "source_pos": graph.source_pos.numpy(),
        "target_site": _named(graph.target_site, graph.sites),
        "target_pos": graph.target_pos.numpy(),
        "weight": graph.weight.numpy(),
    }
    if graph.head is not None and graph.path is not None:
        columns |= {"head": graph.head.numpy(), "path": _named(graph.path, EDGE_KINDS)}
    # A copy, so that writing into the table does not change the frozen graph.
    return pd.DataFrame(columns, copy=True)


def node_frame(graph: GraphData) -> pd.DataFrame:
    """See ``AttributionGraph.nodes``."""
    import pandas as pd

    site, pos = torch.nonzero(graph.node_mask, as_tuple=True)
    return pd.DataFrame(
        {
            "site": _named(site, graph.sites),
            "pos": pos.numpy(),
            "token": [graph.str_tokens[p] for p in pos.tolist()],
            "relevance": graph.relevance[site, pos].numpy(),
            "special": graph.special[pos].numpy(),
        }
    )


def transition_matrix(
    graph: GraphData,
    source: int | str,
    target: int | str,
    head: int | None,
    path: str | int | None,
) -> Float[Tensor, "target_pos source_pos"]:
    """See ``AttributionGraph.matrix``."""
    part = graph.slices[graph.transition(source, target)]
    n = len(graph.str_tokens)
    index = graph.target_pos[part].long() * n + graph.source_pos[part]
    weight = graph.weight[part]
    mask = _mask(graph, part, head, path)
    if mask is not None:
        index, weight = index[mask], weight[mask]
    sums = weight.new_zeros(n * n).index_add_(0, index, weight)
    return rearrange(sums, "(target source) -> target source", target=n)


def _mask(graph: GraphData, part: slice, head: int | None, path: str | int | None) -> Tensor | None:
    """Which of a transition's edges belong to a head and path; None for all of them."""
    if head is None and path is None:
        return None
    if graph.head is None or graph.path is None:
        raise ValueError("Edges are not split by heads; build the graph with heads=True.")
    mask = torch.ones(part.stop - part.start, dtype=torch.bool)
    if head is not None:
        mask &= graph.head[part] == head
    if path is not None:
        if path not in (*EDGE_KINDS, *range(len(EDGE_KINDS))):
            raise ValueError(f"path={path!r} is none of {EDGE_KINDS}.")
        mask &= graph.path[part] == (EDGE_KINDS.index(path) if isinstance(path, str) else path)
    return mask
