"""Paths of a graph from its input to the final node, and their strength.

**Strength.** Let relevance go down from the final node, and let every node divide what it receives
among its sources in proportion to the weights of its edges. What arrives along one path
n_L → n_{L-1} → ... → n_0 (n_L the final node, n_0 at the first site) is its strength, in logits:

    strength = R(n_L) · Π_l  sign R(n_l) · w_l / D(n_l),      D(n) = max(|R(n)|, Σ |w| of n's row)

Here w_l is the weight of the edge from target n_l to source n_{l-1}, and n's row is the edges of n
as target within that transition. If a node's edges do not cancel, D(n) = |R(n)| and a factor is
w / R(n): the share of its relevance that the node passes on by this edge. If that holds everywhere,
the strengths of all paths of a full graph of adjacent sites that end in an input node sum to this
node's relevance, and those of all paths to what reaches the input.

If edges of both signs cancel, w / R(n) exceeds 1 and grows without bound as R(n) approaches 0: a
few such nodes would make any path arbitrarily strong. D(n) bounds every factor by 1 and, with
adjacent sites, the sum of |strength| over all paths from n_L by |R(n_L)|. A node whose relevance is
less than ``CANCELLED`` of its edges' Σ|w| has no reliable sign: no path goes through it, and
``Paths.closed`` counts such nodes.

If an objective is a function of several positions, each of them is a final node and paths go down
from all of them.

**Sinks.** Attention heads with nothing to do look at the first token or a special one, so the
strongest paths of a deep model often start there and say nothing about the prompt. Such paths can
be left out; ``Paths.special`` is the sum of the strengths of all of them, the graph's "BOS bias".

Pruning removes edges from Σ|w| but never from R(n): a path of a pruned graph has at least the
|strength| that it has in the full graph, and at most that of the product of the factors w / R(n).
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..render.text import with_parts
from .columns import EDGE_KINDS

if TYPE_CHECKING:
    import pandas as pd

    from .data import GraphData

# About 1e-6 of float32 relevance is rounding; a thousand times that still has a reliable sign.
CANCELLED = 1e-3


@dataclass(frozen=True)
class Path:
    """One path in the direction in which information flows: input first, final node last.

    Attributes:
        sites: Site of every node.
        positions: Position of every node.
        tokens: Text of every node's token; a part of a character is shown with it ("你²⁄₃").
        relevance: Relevance of every node, in logits; positive supports the target token.
        weights: Weight of every edge, in logits: one fewer than nodes.
        heads: Head of every edge (-1: position-wise) if the graph is split by heads, else None.
        kinds: "value", "key" or "position" for every edge if the graph is split by heads, else
            None.
        strength: As the module defines it, in logits, signed as the objective.
        share: strength / Δℓ; NaN if Δℓ is 0.

    Example:
        >>> path = graph.paths(1)[0]
        >>> len(path.positions) - len(path.weights)
        1
    """

    sites: tuple[str, ...]
    positions: tuple[int, ...]
    tokens: tuple[str, ...]
    relevance: tuple[float, ...]
    weights: tuple[float, ...]
    heads: tuple[int, ...] | None
    kinds: tuple[str, ...] | None
    strength: float
    share: float

    @property
    def moves(self) -> tuple[int, ...]:
        """Indices of the edges that lead from one position to another.

        Example:
            >>> path = graph.paths(1)[0]
            >>> all(path.positions[i] != path.positions[i + 1] for i in path.moves)
            True
        """
        pairs = zip(self.positions, self.positions[1:], strict=False)
        return tuple(i for i, (source, target) in enumerate(pairs) if source != target)

    def __str__(self) -> str:
        """The path in words: its tokens, and between which sites each move happens."""
        words = [f"{self.strength:+.4f} ({self.share:.1%} of Δℓ): {self._token(0)}"]
        for edge in self.moves:
            where = _between(self.sites[edge], self.sites[edge + 1])
            if self.heads is not None and self.kinds is not None and self.heads[edge] >= 0:
                where = f"{where} head {self.heads[edge]} {self.kinds[edge]}"
            words.append(f"→ [{where}] {self._token(edge + 1)}")
        if not self.moves:
            words.append("→ stays there")
        return " ".join(words)

    def _token(self, node: int) -> str:
        return f"{self.tokens[node]!r} @{self.positions[node]}"


def _between(source: str, target: str) -> str:
    """The blocks of a transition: "block 3", "blocks 0-3", "block 3, first half"."""
    low = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid)", source)
    high = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|mid|post)", target)
    if low is None or high is None:
        return f"{source} → {target}"
    first, last = int(low[1]), int(high[1]) - (high[2] == "pre")
    half = {("pre", "mid"): ", first half", ("mid", "pre"): ", second half"}
    half[("mid", "post")] = half["mid", "pre"]
    if first == last:
        return f"block {first}{half.get((low[2], high[2]), '')}"
    return f"blocks {first}-{last}"


@dataclass(frozen=True)
class Paths:
    """The strongest paths of a graph, strongest first.

    Attributes:
        paths: The paths.
        delta: Δℓ in logits.
        requested: How many paths were requested; there may be fewer.
        closed: Number of nodes that no path goes through, because their edges cancel.
        special: Σ strength, in logits, of all paths of the graph that start at the first token or
            at a special one, whether they are among ``paths`` or not.
        left_out: Whether such paths were left out.

    Example:
        >>> paths = graph.paths(5)
        >>> abs(paths[0].strength) >= abs(paths[4].strength)
        True
    """

    paths: tuple[Path, ...]
    delta: float
    requested: int
    closed: int
    special: float = 0.0
    left_out: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __getitem__(self, index: int) -> Path:
        return self.paths[index]

    def to_frame(self) -> pd.DataFrame:
        """The paths as a table, one node of a path per row.

        Returns:
            Columns path (from 0, strongest first), step (from 0, input first), site, pos, token,
            relevance (logits), weight (logits, of the edge to the next step; NaN at the last
            step), strength (logits) and share of the path; on a graph split by heads also head
            and kind.

        Example:
            >>> graph.paths(2).to_frame()["path"].unique().tolist()
            [0, 1]
        """
        import pandas as pd

        rows = []
        for number, path in enumerate(self.paths):
            for step, site in enumerate(path.sites):
                last = step == len(path.weights)
                row = {
                    "path": number,
                    "step": step,
                    "site": site,
                    "pos": path.positions[step],
                    "token": path.tokens[step],
                    "relevance": path.relevance[step],
                    "weight": float("nan") if last else path.weights[step],
                }
                if path.heads is not None and path.kinds is not None:
                    row["head"] = -1 if last else path.heads[step]
                    row["kind"] = "" if last else path.kinds[step]
                rows.append(row | {"strength": path.strength, "share": path.share})
        columns = ["path", "step", "site", "pos", "token", "relevance", "weight"]
        return pd.DataFrame(rows, columns=None if rows else [*columns, "strength", "share"])

    def __str__(self) -> str:
        lines = [f"{i + 1}. {path}" for i, path in enumerate(self.paths)]
        if len(self.paths) < self.requested:
            which = " that start at other tokens" if self.left_out else ""
            lines.append(
                f"{len(self.paths)} paths from the first site{which} reach the final node."
            )
        if self.special and self.delta:
            lines.append(
                f"All paths from the first token and special tokens: {self.special:+.4f} "
                f"({self.special / self.delta:.1%} of Δℓ)"
                + (", left out here." if self.left_out else ".")
            )
        if self.closed:
            lines.append(
                f"No path goes through {self.closed} nodes whose edges cancel "
                f"(|relevance| < {CANCELLED:g} of their Σ|weight|)."
            )
        return "\n".join(lines)


def strongest_paths(graph: GraphData, k: int = 10, special: bool = True) -> Paths:
    """The ``k`` paths of largest |strength| from the first site to a final node.

    The result is exact. Dynamic programming gives the largest product from the input up to each
    node, one site after the other; then partial paths grow down from each final node, always the
    one that can still become the strongest. The order of equally strong paths depends on nothing
    but the graph.

    Args:
        graph: Any graph; on one split by heads, edges of different heads make different paths.
        k: The number of paths; fewer are returned if the graph has fewer.
        special: Whether paths may start at the first token and at special tokens.

    Raises:
        ValueError: ``k`` is not a whole number, or below 1.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k} must be a whole number, 1 or more.")
    shares, closed = _edge_shares(graph)
    size = shares.abs().log_()
    sinks = graph.special.clone()
    sinks[0] |= not graph.of_segments  # the first segment is no sink, the first token is
    best = _best(graph, size, None if special else sinks)
    texts = with_parts(graph.str_tokens)
    edges_by_path = _descend(graph, size, best, _starts(graph), k)
    paths = tuple(_path(graph, edges, shares, texts) for edges in edges_by_path)
    return Paths(
        paths, graph.delta, k, closed, float(_arriving(graph, shares)[sinks].sum()), not special
    )


def _arriving(graph: GraphData, shares: Float[Tensor, " edge"]) -> Float[Tensor, " pos"]:
    """The sum of the strengths of all paths that start at each input node, in logits."""
    strength = torch.zeros(graph.relevance.shape, dtype=torch.float64)
    finals = list(graph.final_positions)
    strength[-1, finals] = graph.relevance[-1, finals].double()
    for (source, target), part in reversed(graph.slices.items()):  # targets fall: complete
        sent = shares[part] * strength[target][graph.target_pos[part].long()]
        strength[source].index_add_(0, graph.source_pos[part].long(), sent)
    return strength[0]


def _starts(graph: GraphData) -> list[tuple[int, float]]:
    """The final nodes with relevance, each with log(|R| / the largest |R| among them)."""
    relevance = graph.relevance[-1, list(graph.final_positions)].double().abs()
    largest = relevance.max()
    first = (len(graph.sites) - 1) * len(graph.str_tokens)
    return [
        (first + pos, float((own / largest).log()))
        for pos, own in zip(graph.final_positions, relevance, strict=True)
        if own > 0
    ]


def _edge_shares(graph: GraphData) -> tuple[Float[Tensor, " edge"], int]:
    """The factors w · sign R(target) / D(target) of every edge, 0 at targets whose edges cancel.

    Returns:
        The factors in float64, each in -1 to 1, and the number of nodes that are closed.
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


def _best(
    graph: GraphData, size: Float[Tensor, " edge"], closed: Bool[Tensor, " pos"] | None
) -> Float[Tensor, " node"]:
    """Per node, the largest Σ log |share| of a path from an open token of the first site."""
    n = len(graph.str_tokens)
    best = torch.full((len(graph.sites), n), -torch.inf, dtype=torch.float64)
    best[0] = 0.0
    if closed is not None:
        best[0, closed] = -torch.inf
    for (source, target), part in graph.slices.items():  # targets rise, so sources are complete
        through = size[part] + best[source][graph.source_pos[part].long()]
        best[target].scatter_reduce_(0, graph.target_pos[part].long(), through, "amax")
    return best.flatten()


def _descend(
    graph: GraphData,
    size: Tensor,
    best: Tensor,
    finals: list[tuple[int, float]],
    k: int,
) -> list[tuple[int, ...]]:
    """Edges of the k best paths, final node first: a best-first search with an exact bound."""
    n = len(graph.str_tokens)
    rows: dict[int, tuple[list[int], list[float]]] = {}

    def row(node: int) -> tuple[list[int], list[float]]:
        """A node's edges by the best path below each, best first, and those paths' bounds."""
        if node not in rows:
            edges = _row(graph, *divmod(node, n))
            below = graph.source_site[edges].long() * n + graph.source_pos[edges]
            bound = size[edges] + best[below]
            order = torch.sort(bound, descending=True, stable=True).indices[:k]
            order = order[bound[order] > -torch.inf]
            rows[node] = edges[order].tolist(), bound[order].tolist()
        return rows[node]

    # Each entry is a partial path: minus the log of the best path it can become, a number that
    # decides between equals, its log without the last edge's bound, its edges above the last one,
    # and that edge's target node and rank in the node's row.
    queue: list[tuple[float, int, float, tuple[int, ...], int, int]] = []
    pushed = 0
    for final, start in finals:
        if best[final] > -torch.inf and row(final)[0]:
            heapq.heappush(queue, (-(start + row(final)[1][0]), pushed, start, (), final, 0))
            pushed += 1
    complete: list[tuple[int, ...]] = []
    while queue and len(complete) < k:
        _, _, above, edges, node, rank = heapq.heappop(queue)
        order, bounds = row(node)
        if rank + 1 < len(order):
            pushed += 1
            other = (-(above + bounds[rank + 1]), pushed, above, edges, node, rank + 1)
            heapq.heappush(queue, other)
        edge = order[rank]
        below = int(graph.source_site[edge]) * n + int(graph.source_pos[edge])
        if below < n:  # at the first site
            complete.append((*edges, edge))
            continue
        sum_above = above + float(size[edge])
        pushed += 1
        entry = (-(sum_above + row(below)[1][0]), pushed, sum_above, (*edges, edge), below, 0)
        heapq.heappush(queue, entry)
    return complete


def _row(graph: GraphData, site: int, pos: int) -> Tensor:
    """Indices of the edges whose target is one node."""
    indices = []
    for (_, target), part in graph.slices.items():
        if target == site:
            column = graph.target_pos[part]
            ends = torch.tensor([pos, pos + 1], dtype=column.dtype)
            first, end = torch.searchsorted(column, ends).tolist()
            indices.append(torch.arange(part.start + first, part.start + end))
    return torch.cat(indices) if indices else torch.zeros(0, dtype=torch.int64)


def _path(graph: GraphData, edges: tuple[int, ...], shares: Tensor, texts: list[str]) -> Path:
    index = torch.tensor(edges[::-1])
    sites = [*graph.source_site[index].tolist(), len(graph.sites) - 1]
    final = int(graph.target_pos[edges[0]])
    positions = [*graph.source_pos[index].tolist(), final]
    strength = float(graph.relevance[-1, final]) * float(shares[index].prod())
    head, path = graph.head, graph.path
    return Path(
        sites=tuple(graph.sites[s] for s in sites),
        positions=tuple(positions),
        tokens=tuple(texts[p] for p in positions),
        relevance=tuple(graph.relevance[sites, positions].tolist()),
        weights=tuple(graph.weight[index].tolist()),
        heads=None if head is None else tuple(head[index].tolist()),
        kinds=None if path is None else tuple(EDGE_KINDS[p] for p in path[index].tolist()),
        strength=strength,
        share=strength / graph.delta if graph.delta else float("nan"),
    )
