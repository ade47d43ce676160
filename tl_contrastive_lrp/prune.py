"""Which edges of a graph to keep by their size: pure functions that return a mask and its account.

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
from numbers import Integral
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from .prune_steps import Pruned, PruneStep, step_of
from .ranking import fewest, largest

if TYPE_CHECKING:
    from .graph import AttributionGraph

DEFAULT_MASS = 0.85


def _relative(graph: AttributionGraph, threshold: float) -> float | None:
    return threshold / abs(graph.delta) if graph.delta else None


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
        ValueError: none or both thresholds are given, one that is negative or not finite, or Δℓ
            is 0 with ``relative``.
    """
    if (threshold is None) == (relative is None):
        raise ValueError("Give either threshold= (in logits) or relative= (to |Δℓ|).")
    if threshold is not None:
        tau = _non_negative("threshold", threshold)
    else:
        assert relative is not None
        if not graph.delta:
            raise ValueError("Δℓ is 0, so nothing is relative to it: give threshold= in logits.")
        tau = _non_negative("relative", relative) * abs(graph.delta)
    # Compared in float64: rounded to the weights' type, τ could let an edge at τ pass.
    mask = graph.weight.abs().double() > tau
    parameters = {"threshold": tau, "relative": _relative(graph, tau)}
    return mask, step_of(graph, "threshold", parameters, mask)


def by_node_threshold(graph: AttributionGraph, threshold: float) -> Pruned:
    """Keep edges whose target node has |relevance| > τ: the other targets are not expanded.

    Args:
        graph: Any graph.
        threshold: τ in logits.

    Raises:
        ValueError: a τ that is negative or not finite.
    """
    tau = _non_negative("node_threshold", threshold)
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
        mask[part] = largest(size, fewest(size, share) if share < 1 else len(size))
    return mask, step_of(graph, "mass", {"share": float(share)}, mask)


def by_top_k(graph: AttributionGraph, k: int) -> Pruned:
    """Keep, per transition, the ``k`` edges of largest |weight|.

    Raises:
        ValueError: k is no whole number, or negative.
    """
    if not isinstance(k, Integral) or k < 0:
        raise ValueError(f"top_k={k} must be a whole number, 0 or more.")
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    for part in graph.slices.values():
        mask[part] = largest(graph.weight[part].abs(), k)
    return mask, step_of(graph, "top_k", {"k": int(k)}, mask)


def combined(
    graph: AttributionGraph, steps: Iterable[Pruned]
) -> tuple[Bool[Tensor, " edge"], list[PruneStep]]:
    """Edges that all of several rules keep, each judged on the graph given, so that their order
    is of no importance to the result; each step's account is what it took from those before."""
    mask = torch.ones(len(graph.weight), dtype=torch.bool)
    told = []
    for kept, step in steps:
        told.append(step_of(graph, step.name, dict(step.parameters), kept, among=mask))
        mask = mask & kept
    return mask, told
