"""Which edges of a graph to keep: pure functions that return a mask and what it kept.

Each takes a graph, leaves it as it is, and returns a boolean mask over its edges with a
``PruneStep`` that says how many edges and how much mass the mask keeps. Mass is Σ|weight|, in
logits; on a graph split by heads each head's and path's part counts by itself. Where edges are
equal in |weight|, the one first in the graph's order (target site, source site, target position,
source position, head, path) stays.

The rules are those of arXiv 2604.17761, Appendix B, with exact bookkeeping.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

    from .graph import AttributionGraph

DEFAULT_MASS = 0.85


@dataclass(frozen=True)
class Kept:
    """What a step kept of one transition. Masses are Σ|weight| in logits.

    Attributes:
        source, target: Indices of the sites.
        edges_before, edges_kept: Numbers of edges.
        mass_before, mass_kept: Σ|weight| in logits.
    """

    source: int
    target: int
    edges_before: int
    edges_kept: int
    mass_before: float
    mass_kept: float


@dataclass(frozen=True)
class PruneStep:
    """What one pruning step did: nothing is dropped without a word.

    Attributes:
        name: Which rule.
        parameters: Its settings, as (name, value) pairs; a threshold appears in logits and as
            ``relative``, its ratio to |Δℓ| (None where Δℓ is 0).
        transitions: What it kept of each transition.
    """

    name: str
    parameters: tuple[tuple[str, float | int | str | None], ...]
    transitions: tuple[Kept, ...]

    @property
    def edges_before(self) -> int:
        return sum(row.edges_before for row in self.transitions)

    @property
    def edges_kept(self) -> int:
        return sum(row.edges_kept for row in self.transitions)

    @property
    def mass_before(self) -> float:
        """Σ|weight| in logits before the step."""
        return math.fsum(row.mass_before for row in self.transitions)

    @property
    def mass_kept(self) -> float:
        """Σ|weight| in logits of what stayed."""
        return math.fsum(row.mass_kept for row in self.transitions)

    @property
    def share_kept(self) -> float:
        """Share of the mass that stayed; 1 where there was none."""
        return self.mass_kept / self.mass_before if self.mass_before else 1.0

    def to_frame(self) -> pd.DataFrame:
        """A row a transition: source, target, edges and mass before and kept, share_kept."""
        import pandas as pd

        columns = list(Kept.__dataclass_fields__)
        frame = pd.DataFrame([vars(row) for row in self.transitions], columns=columns)
        return frame.assign(share_kept=frame["mass_kept"] / frame["mass_before"])

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_said(value)}" for name, value in self.parameters)
        return (
            f"{self.name}{f' ({settings})' if settings else ''}: "
            f"kept {self.edges_kept:,} of {self.edges_before:,} edges, "
            f"{self.share_kept:.1%} of their mass"
        )


def _said(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


Pruned = tuple[Bool[Tensor, " edge"], PruneStep]


def step_of(
    graph: AttributionGraph,
    name: str,
    parameters: dict[str, Any],
    mask: Bool[Tensor, " edge"],
    among: Bool[Tensor, " edge"] | None = None,
) -> PruneStep:
    """The account of a mask, counted among all edges or only among those of ``among``."""
    rows = []
    for (source, target), part in graph.slices.items():
        size = graph.weight[part].abs()
        before = slice(None) if among is None else among[part]
        after = mask[part] if among is None else mask[part] & among[part]
        rows.append(
            Kept(
                source,
                target,
                len(size) if among is None else int(among[part].sum()),
                int(after.sum()),
                float(size[before].sum(dtype=torch.float64)),
                float(size[after].sum(dtype=torch.float64)),
            )
        )
    return PruneStep(name, tuple(parameters.items()), tuple(rows))


def _relative(graph: AttributionGraph, threshold: float) -> float | None:
    return threshold / abs(graph.delta) if graph.delta else None


def absolute_threshold(
    graph: AttributionGraph, threshold: float | None, relative: float | None
) -> float:
    """A threshold in logits from one in logits or one relative to |Δℓ|.

    Raises:
        ValueError: none or both are given, negative or not finite, or Δℓ is 0 with ``relative``.
    """
    if (threshold is None) == (relative is None):
        raise ValueError("Give either threshold= (in logits) or relative= (to |Δℓ|).")
    if threshold is not None:
        return _non_negative("threshold", threshold)
    assert relative is not None
    if not graph.delta:
        raise ValueError("Δℓ is 0, so nothing is relative to it: give threshold= in logits.")
    return _non_negative("relative", relative) * abs(graph.delta)


def _non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
    return float(value)


def by_threshold(
    graph: AttributionGraph, threshold: float | None = None, *, relative: float | None = None
) -> Pruned:
    """Keep edges with |weight| > τ, one τ for the whole graph.

    Args:
        graph: Any graph.
        threshold: τ in logits; or
        relative: τ / |Δℓ|.

    Raises:
        ValueError: none or both thresholds are given, or one that is no threshold.
    """
    tau = absolute_threshold(graph, threshold, relative)
    # Compared in float64: rounded to the weights' type, τ could let an edge at τ pass.
    mask = graph.weight.abs().double() > tau
    parameters = {"threshold": tau, "relative": _relative(graph, tau)}
    return mask, step_of(graph, "threshold", parameters, mask)


def by_node_threshold(
    graph: AttributionGraph, threshold: float | None = None, *, relative: float | None = None
) -> Pruned:
    """Keep edges whose target node has |relevance| > τ: the other targets are not expanded.

    Args:
        graph: Any graph.
        threshold: τ in logits; or
        relative: τ / |Δℓ|.

    Raises:
        ValueError: none or both thresholds are given, or one that is no threshold.
    """
    tau = absolute_threshold(graph, threshold, relative)
    expanded = (graph.relevance.abs().double() > tau).flatten()
    mask = expanded[graph.target_node]
    parameters = {"threshold": tau, "relative": _relative(graph, tau)}
    return mask, step_of(graph, "node threshold", parameters, mask)


def by_mass(graph: AttributionGraph, share: float = DEFAULT_MASS) -> Pruned:
    """Keep, per transition, the fewest largest edges that hold ``share`` of its mass.

    Sorted by |weight|, the smallest m with Σ_{e ≤ m} |w_e| ≥ share · Σ_e |w_e|. A share of 1
    keeps every edge.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"mass={share} must be a share from 0 to 1, such as {DEFAULT_MASS}.")
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    for part in graph.slices.values():
        size = graph.weight[part].abs()
        mask[part] = largest(size, _count_of_mass(size, share) if share < 1 else len(size))
    return mask, step_of(graph, "mass", {"share": float(share)}, mask)


def _count_of_mass(size: Float[Tensor, " edge"], share: float) -> int:
    falling = np.sort(size.numpy())[::-1].cumsum(dtype=np.float64)
    if not len(falling) or share == 0:
        return 0
    return min(int(np.searchsorted(falling, share * falling[-1])) + 1, len(falling))


def largest(size: Float[Tensor, " edge"], count: int) -> Bool[Tensor, " edge"]:
    """The ``count`` largest entries; among equal ones the first. Linear in time but for one
    partition, so millions of entries take a fraction of a second."""
    if count >= len(size):
        return torch.ones(len(size), dtype=torch.bool)
    if count <= 0:
        return torch.zeros(len(size), dtype=torch.bool)
    at = len(size) - count
    smallest = float(np.partition(size.numpy(), at)[at])
    mask = size > smallest
    equal = torch.nonzero(size == smallest)[:, 0]
    mask[equal[: count - int(mask.sum())]] = True
    return mask


def by_top_k(graph: AttributionGraph, k: int) -> Pruned:
    """Keep, per transition, the ``k`` edges of largest |weight|.

    Raises:
        ValueError: a negative k.
    """
    if k < 0:
        raise ValueError(f"top_k={k} must be 0 or more.")
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    for part in graph.slices.values():
        mask[part] = largest(graph.weight[part].abs(), k)
    return mask, step_of(graph, "top_k", {"k": int(k)}, mask)


def connected(graph: AttributionGraph) -> Pruned:
    """Keep edges on a path of edges down from the final node (last site, position explained)."""
    pos = len(graph.str_tokens)
    reached = torch.zeros(len(graph.sites), pos, dtype=torch.bool)
    reached[-1, graph.final_pos] = True
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    # Edges only lead to earlier sites: with targets from the top, each site is complete in time.
    for source, target in sorted(graph.slices, key=lambda pair: -pair[1]):
        part = graph.slices[source, target]
        mask[part] = reached[target][graph.target_pos[part].long()]
        reached[source][graph.source_pos[part][mask[part]].long()] = True
    return mask, step_of(graph, "connected", {"final_pos": graph.final_pos}, mask)


def within(
    graph: AttributionGraph,
    *,
    positions: Iterable[int] | None = None,
    sites: Iterable[int | str] | None = None,
    tokens: Iterable[str] | None = None,
) -> Pruned:
    """Keep edges both of whose ends are at given sites and positions.

    Args:
        graph: Any graph.
        positions: Positions in the prompt; negative ones count from the end.
        sites: HookPoint names or indices.
        tokens: Texts of tokens, exactly as in ``str_tokens``: every position that holds one.
            With ``positions`` too, a position must satisfy both.

    Raises:
        ValueError: a position, site or token that the graph does not have, or nothing given.
    """
    n = len(graph.str_tokens)
    at = torch.ones(n, dtype=torch.bool)
    said: dict[str, str] = {}
    if positions is not None:
        wanted = [int(p) for p in positions]
        outside = [p for p in wanted if not -n <= p < n]
        if outside:
            raise ValueError(f"Position {outside[0]} is outside the prompt's {n} tokens.")
        at &= torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(wanted).long() % n, True)
        said["positions"] = _listed(sorted({p % n for p in wanted}))
    if tokens is not None:
        texts = {tokens} if isinstance(tokens, str) else set(tokens)
        missing = sorted(texts - set(graph.str_tokens))
        if missing:
            raise ValueError(
                f"No token of the prompt is {missing[0]!r}; spaces count, as in {_few(graph)}."
            )
        at &= torch.tensor([text in texts for text in graph.str_tokens])
        said["tokens"] = _listed(sorted(map(repr, texts)))
    kept_sites = torch.ones(len(graph.sites), dtype=torch.bool)
    if sites is not None:
        indices = sorted(
            {graph.site_index(s) for s in ([sites] if isinstance(sites, str) else sites)}
        )
        kept_sites = torch.zeros_like(kept_sites).index_fill(0, torch.tensor(indices).long(), True)
        said["sites"] = _listed(indices)
    if not said:
        raise ValueError("Give positions=, sites= or tokens= to keep.")
    node = (kept_sites[:, None] & at[None]).flatten()
    mask = node[graph.source_node] & node[graph.target_node]
    return mask, step_of(graph, "subgraph", said, mask)


def _few(graph: AttributionGraph) -> str:
    return ", ".join(map(repr, dict.fromkeys(graph.str_tokens[:6])))


def _listed(values: list[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"


def combined(graph: AttributionGraph, steps: Iterable[Pruned]) -> tuple[Tensor, list[PruneStep]]:
    """Edges that all of several rules keep, each judged on the graph given, so that their order
    is of no importance to the result; each step's account is what it took from those before."""
    mask = torch.ones(len(graph.weight), dtype=torch.bool)
    told = []
    for kept, step in steps:
        told.append(step_of(graph, step.name, dict(step.parameters), kept, among=mask))
        mask = mask & kept
    return mask, told
