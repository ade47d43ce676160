"""Paths of a graph from its input to the final node, and what their strength is.

**Strength.** Let relevance go down from the final node, and let every node divide what it gets
among its sources in proportion to the weights of its edges. What arrives in this way along one
path n_L → n_{L-1} → ... → n_0 (n_L the final node, n_0 at the first site) is its strength, in
logits:

    strength = R(n_L) · Π_l  sign R(n_l) · w_l / D(n_l),      D(n) = max(|R(n)|, Σ |w| of n's row),

w_l being the weight of the edge from target n_l to source n_{l-1} and the row the edges of n as
target within that transition. Where a node's edges do not cancel, D(n) = |R(n)| and a factor is
plainly w / R(n): the share of its relevance that the node hands on by this edge. If that holds
everywhere, the strengths of all paths of a full graph of adjacent sites that end in an input node
add up to this node's relevance, and those of all paths together to what reaches the input.

Where edges of both signs cancel, w / R(n) would exceed 1 and grow without bound as R(n) nears 0:
a few such nodes would make any path as strong as one likes. D(n) bounds every factor by 1 and,
with adjacent sites, the sum of |strength| over all paths from n_L by |R(n_L)|. A node whose
relevance is less than ``CANCELLED`` of its edges' Σ|w| has no sign to speak of: no path goes
through it, and ``Paths.closed`` counts such nodes.

Where an objective is a function of several positions, each is a final node of its own and paths go
down from all of them.

Pruning takes edges out of Σ|w|, never out of R(n): a path of a pruned graph has at least the
|strength| that it has in the full graph, and at most that of the plain product of w / R(n).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# Of float32 relevance about 1e-6 is rounding; a thousand times that still has a sure sign.
CANCELLED = 1e-3


@dataclass(frozen=True)
class Path:
    """One path, in the direction in which information flows: input first, final node last.

    Attributes:
        sites: Site of every node.
        positions: Position of every node.
        tokens: Text of every node's token.
        relevance: Relevance of every node, logits.
        weights: Weight of every edge, logits: one fewer than nodes.
        heads: Head of every edge (-1: position-wise), where the graph is split by heads.
        kinds: "value", "key" or "position" of every edge, where it is.
        strength: See the module's text; logits, signed as the objective.
        share: strength / Δℓ; NaN where Δℓ is 0.
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
        """Indices of the edges that lead from one position to another."""
        pairs = zip(self.positions, self.positions[1:], strict=False)
        return tuple(i for i, (source, target) in enumerate(pairs) if source != target)

    def __str__(self) -> str:
        """Read out loud: the tokens on the way and between which sites each move happens."""
        said = [f"{self.strength:+.4f} ({self.share:.1%} of Δℓ): {self._token(0)}"]
        for edge in self.moves:
            where = _between(self.sites[edge], self.sites[edge + 1])
            if self.heads is not None and self.kinds is not None and self.heads[edge] >= 0:
                where = f"{where} head {self.heads[edge]} {self.kinds[edge]}"
            said.append(f"→ [{where}] {self._token(edge + 1)}")
        if not self.moves:
            said.append("→ stays there")
        return " ".join(said)

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
        paths: See ``Path``.
        delta: Δℓ in logits.
        asked: How many were asked for; there may be fewer.
        closed: Nodes that no path was let through because their edges cancel.
    """

    paths: tuple[Path, ...]
    delta: float
    asked: int
    closed: int

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Path]:
        return iter(self.paths)

    def __getitem__(self, index: int) -> Path:
        return self.paths[index]

    def to_frame(self) -> pd.DataFrame:
        """A node of a path a row: path (from 0, strongest first), step (from 0, input first),
        site, pos, token, relevance, weight (of the edge to the next step; NaN at the last)
        [, head, kind], strength and share of the path."""
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
        if len(self.paths) < self.asked:
            lines.append(f"{len(self.paths)} paths from the first site reach the final node.")
        if self.closed:
            lines.append(
                f"No path was let through {self.closed} nodes whose edges cancel "
                f"(|relevance| < {CANCELLED:g} of their Σ|weight|)."
            )
        return "\n".join(lines)
