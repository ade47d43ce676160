"""The strongest paths of a graph: their exact order, by dynamic programming and best-first search.

What a path's strength is, ``paths`` says.
"""

from __future__ import annotations

import heapq
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from .edge_slots import PATHS
from .paths import CANCELLED, Path, Paths

if TYPE_CHECKING:
    from .graph import AttributionGraph


def strongest_paths(graph: AttributionGraph, k: int = 10) -> Paths:
    """The ``k`` paths of largest |strength| from the first site to a final node.

    Exact: the largest product from the input up to each node comes from dynamic programming, a
    site at a time; then partial paths grow down from each final node, the one that can still
    become the strongest first. Equally strong paths come in an order that depends on nothing but
    the graph.

    Args:
        graph: Any graph; on one split by heads, edges of different heads make different paths.
        k: How many; fewer come back where there are fewer.

    Raises:
        ValueError: k is no whole number, or below 1.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k} must be a whole number, 1 or more.")
    shares, closed = _edge_shares(graph)
    size = shares.abs().log_()
    best = _best(graph, size)
    found = _descend(graph, size, best, _starts(graph), k)
    made = [_path(graph, edges, shares) for edges in found]
    return Paths(tuple(made), graph.delta, k, closed)


def _starts(graph: AttributionGraph) -> list[tuple[int, float]]:
    """The final nodes with relevance, and log |R| of each, less that of the largest."""
    relevance = graph.relevance[-1, list(graph.final_positions)].double().abs()
    largest = relevance.max()
    first = (len(graph.sites) - 1) * len(graph.str_tokens)
    return [
        (first + pos, float((own / largest).log()))
        for pos, own in zip(graph.final_positions, relevance, strict=True)
        if own > 0
    ]


def _edge_shares(graph: AttributionGraph) -> tuple[Float[Tensor, " edge"], int]:
    """w · sign R(target) / D(target) of every edge, 0 at targets whose edges cancel (float64).

    Returns:
        The shares, each in -1 to 1, and the number of nodes that are closed.
    """
    shares = torch.zeros(len(graph.weight), dtype=torch.float64)
    closed = torch.zeros(graph.relevance.shape, dtype=torch.bool)
    for (_, target), part in graph.slices.items():
        weight, row = graph.weight[part].double(), graph.target_pos[part].long()
        net = graph.relevance[target].double()
        gross = torch.zeros_like(net).index_add_(0, row, weight.abs())
        cancelled = net.abs() < CANCELLED * gross
        factor = torch.sign(net) / torch.maximum(net.abs(), gross).clamp_min(1e-300)
        factor[cancelled] = 0.0
        shares[part] = weight * factor[row]
        closed[target] |= cancelled
    return shares, int(closed.sum())


def _best(graph: AttributionGraph, size: Float[Tensor, " edge"]) -> Float[Tensor, " node"]:
    """Per node, the largest Σ log |share| of a path from the first site, or -inf."""
    n = len(graph.str_tokens)
    best = torch.full((len(graph.sites), n), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    for (source, target), part in graph.slices.items():  # targets rise, so sources are complete
        through = size[part] + best[source][graph.source_pos[part].long()]
        best[target].scatter_reduce_(0, graph.target_pos[part].long(), through, "amax")
    return best.flatten()


def _descend(
    graph: AttributionGraph,
    size: Tensor,
    best: Tensor,
    finals: list[tuple[int, float]],
    k: int,
) -> list[tuple[int, ...]]:
    """Edges of the k best paths, final node first: best-first search with an exact bound."""
    n = len(graph.str_tokens)
    rows: dict[int, tuple[list[int], list[float]]] = {}

    def row(node: int) -> tuple[list[int], list[float]]:
        """A node's edges, the one with the best path below it first, and those paths' bounds."""
        if node not in rows:
            edges = _row(graph, *divmod(node, n))
            below = graph.source_site[edges].long() * n + graph.source_pos[edges]
            bound = size[edges] + best[below]
            order = torch.sort(bound, descending=True, stable=True).indices[:k]
            order = order[bound[order] > -torch.inf]
            rows[node] = edges[order].tolist(), bound[order].tolist()
        return rows[node]

    # Of a partial path: -(log of the best path it can become), a number that decides between
    # equals, its log without the last edge's bound, its edges above the last, the last edge's
    # node and rank in that node's row.
    queue: list[tuple[float, int, float, tuple[int, ...], int, int]] = []
    pushed = 0
    for final, start in finals:
        if best[final] > -torch.inf and row(final)[0]:
            heapq.heappush(queue, (-(start + row(final)[1][0]), pushed, start, (), final, 0))
            pushed += 1
    found: list[tuple[int, ...]] = []
    while queue and len(found) < k:
        _, _, above, edges, node, rank = heapq.heappop(queue)
        order, bounds = row(node)
        if rank + 1 < len(order):
            pushed += 1
            other = (-(above + bounds[rank + 1]), pushed, above, edges, node, rank + 1)
            heapq.heappush(queue, other)
        edge = order[rank]
        below = int(graph.source_site[edge]) * n + int(graph.source_pos[edge])
        if below < n:  # at the first site
            found.append((*edges, edge))
            continue
        sum_above = above + float(size[edge])
        pushed += 1
        entry = (-(sum_above + row(below)[1][0]), pushed, sum_above, (*edges, edge), below, 0)
        heapq.heappush(queue, entry)
    return found


def _row(graph: AttributionGraph, site: int, pos: int) -> Tensor:
    """Indices of the edges whose target is one node."""
    found = []
    for (_, target), part in graph.slices.items():
        if target == site:
            column = graph.target_pos[part]
            wanted = torch.tensor([pos, pos + 1], dtype=column.dtype)
            first, end = torch.searchsorted(column, wanted).tolist()
            found.append(torch.arange(part.start + first, part.start + end))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def _path(graph: AttributionGraph, edges: tuple[int, ...], shares: Tensor) -> Path:
    index = torch.tensor(edges[::-1])
    sites = [*graph.source_site[index].tolist(), len(graph.sites) - 1]
    final = int(graph.target_pos[edges[0]])
    positions = [*graph.source_pos[index].tolist(), final]
    strength = float(graph.relevance[-1, final]) * float(shares[index].prod())
    head, path = graph.head, graph.path
    return Path(
        sites=tuple(graph.sites[s] for s in sites),
        positions=tuple(positions),
        tokens=tuple(graph.str_tokens[p] for p in positions),
        relevance=tuple(graph.relevance[sites, positions].tolist()),
        weights=tuple(graph.weight[index].tolist()),
        heads=None if head is None else tuple(head[index].tolist()),
        kinds=None if path is None else tuple(PATHS[p] for p in path[index].tolist()),
        strength=strength,
        share=strength / graph.delta if graph.delta else float("nan"),
    )
