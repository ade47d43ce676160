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
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..inputs.objective import in_words
from ..inputs.token_text import written_id
from ..render.text import with_parts
from .prune_history import PruneStep, TransitionKept

if TYPE_CHECKING:
    from .data import GraphData

DEFAULT_MASS = 0.85


def _relative(graph: GraphData, threshold: float) -> float | None:
    return threshold / abs(graph.delta) if graph.delta else None


def _non_negative(name: str, value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value} must be a finite number, 0 or more.")
    return float(value)


def by_threshold(
    graph: GraphData, threshold: float | None = None, *, relative: float | None = None
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


def by_node_threshold(graph: GraphData, threshold: float) -> Pruned:
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


def by_mass(graph: GraphData, share: float = DEFAULT_MASS) -> Pruned:
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


def by_top_k(graph: GraphData, k: int) -> Pruned:
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
    graph: GraphData, steps: Iterable[Pruned]
) -> tuple[Bool[Tensor, " edge"], list[PruneStep]]:
    """Edges that all of several rules keep, each judged on the graph given, so that their order
    is of no importance to the result; each step's account is what it took from those before."""
    mask = torch.ones(len(graph.weight), dtype=torch.bool)
    told = []
    for kept, step in steps:
        told.append(step_of(graph, step.name, dict(step.parameters), kept, among=mask))
        mask = mask & kept
    return mask, told


Pruned = tuple[Bool[Tensor, " edge"], PruneStep]


def step_of(
    graph: GraphData,
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
            TransitionKept(
                source,
                target,
                len(size) if among is None else int(among[part].sum()),
                int(after.sum()),
                float(size[before].sum(dtype=torch.float64)),
                float(size[after].sum(dtype=torch.float64)),
            )
        )
    return PruneStep(name, tuple(parameters.items()), tuple(rows))


def largest(size: Float[Tensor, " item"], count: int) -> Bool[Tensor, " item"]:
    """Which are the ``count`` largest values; among equal ones the first.

    Linear in time but for one partition, so millions of entries take a fraction of a second.
    """
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


def fewest(size: Float[Tensor, " item"], share: float, total: float | None = None) -> int:
    """How few of the largest values, none negative, hold ``share`` (0 to 1) of their sum.

    The smallest m with Σ_{i ≤ m} x_(i) ≥ share · Σ x, sorted downwards, added up in float64.

    Args:
        size: The values.
        share: Of the sum.
        total: The sum, where ``size`` holds only the largest of all values.
    """
    falling = np.sort(size.numpy())[::-1].cumsum(dtype=np.float64)
    if not len(falling) or share == 0:
        return 0
    total = falling[-1] if total is None else total
    return min(int(np.searchsorted(falling, share * total)) + 1, len(falling))


def connected(graph: GraphData) -> Pruned:
    """Keep edges on a path of edges down from a final node (last site, a position explained)."""
    pos = len(graph.str_tokens)
    reached = torch.zeros(len(graph.sites), pos, dtype=torch.bool)
    reached[-1, list(graph.final_positions)] = True
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    # Edges only lead to earlier sites: with targets from the top, each site is complete in time.
    for source, target in sorted(graph.slices, key=lambda pair: -pair[1]):
        part = graph.slices[source, target]
        mask[part] = reached[target][graph.target_pos[part].long()]
        reached[source][graph.source_pos[part][mask[part]].long()] = True
    said: dict[str, int | str] = {"final_pos": graph.final_pos}
    if graph.earlier_final_pos:
        said = {"final_positions": in_words(graph.final_positions)}
    return mask, step_of(graph, "connected", said, mask)


def within(
    graph: GraphData,
    *,
    positions: int | Iterable[int] | None = None,
    sites: int | str | Iterable[int | str] | None = None,
    tokens: str | Iterable[str] | None = None,
) -> Pruned:
    """Keep edges both of whose ends are at given sites and positions.

    Args:
        graph: Any graph.
        positions: Positions in the prompt, or one; negative ones count from the end.
        sites: HookPoint names or indices, or one.
        tokens: Texts of tokens, or one, exactly as in ``str_tokens`` or as paths show them
            ("你²⁄₃"), or ids as text, ``id:123`` (what may stand behind the number is not read):
            every position that holds one. With ``positions`` too, a position must satisfy both.

    Raises:
        ValueError: a position, site or token that the graph does not have, or nothing given.
        TypeError: a position that is no whole number.
    """
    n = len(graph.str_tokens)
    at = torch.ones(n, dtype=torch.bool)
    said: dict[str, str] = {}
    if positions is not None:
        wanted = [operator.index(p) for p in _each(positions)]
        outside = [p for p in wanted if not -n <= p < n]
        if outside:
            raise ValueError(f"Position {outside[0]} is outside the prompt's {n} tokens.")
        at &= torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(wanted).long() % n, True)
        said["positions"] = _listed(sorted({p % n for p in wanted}))
    if tokens is not None:
        texts = set(_each(tokens))
        found = {text: _positions_of(graph, text) for text in texts}
        missing = sorted(text for text, where in found.items() if not where)
        if missing:
            raise ValueError(
                f"No token of the prompt is {missing[0]!r}; spaces count, as in {_few(graph)}. "
                "An id is written id:123."
            )
        there = set().union(*found.values())
        at &= torch.tensor([pos in there for pos in range(n)])
        said["tokens"] = _listed(sorted(map(repr, texts)))
    kept_sites = torch.ones(len(graph.sites), dtype=torch.bool)
    if sites is not None:
        indices = sorted({graph.site_index(site) for site in _each(sites)})
        kept_sites = torch.zeros_like(kept_sites).index_fill(0, torch.tensor(indices).long(), True)
        said["sites"] = _listed(indices)
    if not said:
        raise ValueError("Give positions=, sites= or tokens= to keep.")
    node = (kept_sites[:, None] & at[None]).flatten()
    mask = node[graph.source_node] & node[graph.target_node]
    return mask, step_of(graph, "subgraph", said, mask)


def _positions_of(graph: GraphData, text: str) -> set[int]:
    """The positions whose token is shown as ``text``; if there are none, has the id it names."""
    pairs = zip(graph.str_tokens, with_parts(graph.str_tokens), strict=True)
    found = {pos for pos, shown in enumerate(pairs) if text in shown}
    written = written_id(text)
    if not found and written is not None:
        found = set(torch.nonzero(graph.token_ids == written[0])[:, 0].tolist())
    return found


def _each(given: Any) -> Iterable[Any]:
    return [given] if isinstance(given, str | Integral) else given


def _few(graph: GraphData) -> str:
    return ", ".join(map(repr, dict.fromkeys(graph.str_tokens[:6])))


def _listed(values: list[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"


@dataclass(frozen=True)
class PruneRule:
    """At most one of: cumulative share of mass, |weight| above a threshold, so many largest.

    Raises:
        ValueError: several, or a value out of range.
    """

    mass: float | None = None
    threshold: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if sum(x is not None for x in (self.mass, self.threshold, self.top_k)) > 1:
            raise ValueError(
                "Give one of mass=, threshold= and top_k= here; graph.prune(...) applies more."
            )
        if self.mass is not None and not 0 <= self.mass <= 1:
            raise ValueError(f"mass={self.mass} must be a share from 0 to 1, such as 0.85.")
        if self.threshold is not None and not 0 <= self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold} must be a finite number, 0 or more.")
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 0):
            raise ValueError(f"top_k={self.top_k} must be a whole number, 0 or more.")

    def __bool__(self) -> bool:
        return any(x is not None for x in (self.mass, self.threshold, self.top_k))

    def step(self, kept: list[TransitionKept], delta: float) -> PruneStep:
        """The account of what the rule did, as ``prune.py`` gives it."""
        rows = tuple(kept)
        if self.mass is not None:
            return PruneStep("mass", (("share", float(self.mass)),), rows)
        if self.threshold is not None:
            tau = float(self.threshold)
            relative = tau / abs(delta) if delta else None
            return PruneStep("threshold", (("threshold", tau), ("relative", relative)), rows)
        return PruneStep("top_k", (("k", int(self.top_k or 0)),), rows)
