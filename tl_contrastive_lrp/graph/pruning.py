"""Pruning: which edges of a graph to keep, as pure functions that return a mask and its account.

``PruneRule`` declares the criteria by size once: for ``AttributionGraph.prune``, for the edges that
are pruned while they are computed (``streaming_prune.py``), and for the command line. Every
function here takes a graph, leaves it as it is, and returns a boolean mask over its edges with a
``PruneStep`` that says how many edges and how much mass the mask keeps.

Mass is Σ|weight| in logits; on a graph split by heads, the edges of different heads and paths count
separately. Among edges of equal |weight|, the first in the graph's order (target site, source site,
target position, source position, head, path) is kept.

The criteria are those of arXiv:2604.17761, Appendix B, with exact bookkeeping.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import Argument, Message
from ..inputs.objective import in_words
from ..inputs.token_text import written_id
from ..render.ranking import largest_mask
from ..render.text import with_parts
from .prune_history import PruneStep, TransitionKept

if TYPE_CHECKING:
    from .data import GraphData

DEFAULT_MASS = 0.85

Pruned = tuple[Bool[Tensor, " edge"], PruneStep]


@dataclass(frozen=True)
class PruneRule:
    """Which edges to keep by their size. An edge must satisfy every criterion that is not None.

    Attributes:
        mass: Keep, per transition, the fewest largest edges that hold this share of Σ|weight|: the
            smallest m with Σ_{e ≤ m} |w_e| ≥ mass · Σ_e |w_e|, sorted by |weight|. 1 keeps all.
        threshold: Keep the edges with |weight| above this many logits.
        top_k: Keep, per transition, the k edges of largest |weight|.
        relative: Keep the edges with |weight| above this times |Δℓ|; excludes ``threshold``.

    Raises:
        ValueError: A value is out of range, or both thresholds are given.
    """

    mass: float | None = None
    threshold: float | None = None
    top_k: int | None = None
    relative: float | None = None

    def __post_init__(self) -> None:
        if self.mass is not None and not 0 <= self.mass <= 1:
            raise ValueError(
                Message(
                    Argument("mass", self.mass),
                    f" must be a share from 0 to 1, such as {DEFAULT_MASS}.",
                )
            )
        if self.threshold is not None and self.relative is not None:
            raise ValueError(
                Message(
                    "Give either ",
                    Argument("threshold"),
                    " (in logits) or ",
                    Argument("relative"),
                    " (to |Δℓ|).",
                )
            )
        for name in ("threshold", "relative"):
            value = getattr(self, name)
            if value is not None:
                _require_non_negative(name, value)
        if self.top_k is not None and (not isinstance(self.top_k, Integral) or self.top_k < 0):
            raise ValueError(
                Message(Argument("top_k", self.top_k), " must be a whole number, 0 or more.")
            )

    def __bool__(self) -> bool:
        return bool(self.criteria)

    @property
    def criteria(self) -> dict[str, Any]:
        """The criteria that are given, by name: arguments for ``AttributionGraph.prune``."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def single(self) -> PruneRule:
        """This rule, if it has at most one criterion, as pruning during a backward requires.

        Raises:
            ValueError: There are several criteria.
        """
        if len(self.criteria) > 1:
            raise ValueError(
                "Give one of mass=, threshold= and top_k= here; graph.prune(...) applies more."
            )
        return self

    def in_logits(self, delta: float) -> PruneRule:
        """The same rule with ``relative`` turned into a threshold in logits.

        Args:
            delta: Δℓ of the graph, in logits.

        Raises:
            ValueError: There is a relative threshold and Δℓ is 0.
        """
        if self.relative is None:
            return self
        if not delta:
            raise ValueError(
                Message(
                    "Δℓ is 0, so no threshold can be relative to it: use ",
                    Argument("threshold"),
                    " (in logits).",
                )
            )
        return replace(self, threshold=float(self.relative) * abs(delta), relative=None)

    def split(self) -> Iterator[PruneRule]:
        """One rule for each criterion, in the order in which their accounts are given."""
        for name in ("threshold", "relative", "mass", "top_k"):
            if name in self.criteria:
                yield PruneRule(**{name: self.criteria[name]})

    def mask(self, weight: Float[Tensor, " edge"]) -> Bool[Tensor, " edge"]:
        """Which edges of one transition a rule of one criterion, in logits, keeps."""
        size = weight.abs()
        if self.threshold is not None:
            # Compared in float64: rounded to the type of the weights, an edge at τ could pass.
            return size.double() > self.threshold
        return largest(size, self.count(size))

    def count(self, size: Float[Tensor, " edge"], total: float | None = None) -> int:
        """How many of a transition's largest edges to keep; all without ``mass`` and ``top_k``.

        Args:
            size: |weight| of the edges.
            total: Σ|weight| of the transition, if ``size`` holds only its largest edges.
        """
        if self.top_k is not None:
            return self.top_k
        if self.mass is None or self.mass == 1:
            return len(size)
        return fewest(size, self.mass, total)

    def step(self, transitions: Iterable[TransitionKept], delta: float) -> PruneStep:
        """The account of what a rule of one criterion kept.

        Args:
            transitions: What it kept of each transition.
            delta: Δℓ in logits.
        """
        rows = tuple(transitions)
        if self.mass is not None:
            return PruneStep("mass", (("share", float(self.mass)),), rows)
        if self.threshold is not None:
            return PruneStep("threshold", _threshold_settings(self.threshold, delta), rows)
        return PruneStep("top_k", (("k", int(self.top_k or 0)),), rows)


DEFAULT_RULE = PruneRule(mass=DEFAULT_MASS)


def by_size(graph: GraphData, rule: PruneRule) -> list[Pruned]:
    """What each criterion of a rule keeps when it is applied to the whole graph.

    Raises:
        ValueError: The rule has a relative threshold and Δℓ is 0.
    """
    results = []
    for criterion in rule.in_logits(graph.delta).split():
        mask = torch.zeros(len(graph.weight), dtype=torch.bool)
        for part in graph.slices.values():
            mask[part] = criterion.mask(graph.weight[part])
        results.append((mask, criterion.step(_kept(graph, mask), graph.delta)))
    return results


def by_node_threshold(graph: GraphData, threshold: float) -> Pruned:
    """Keep the edges whose target node has |relevance| above a threshold.

    Args:
        graph: Any graph.
        threshold: The threshold τ in logits.

    Raises:
        ValueError: τ is negative or not finite.
    """
    _require_non_negative("node_threshold", threshold)
    mask = (graph.relevance.abs().double() > threshold).flatten()[graph.target_node]
    settings = _threshold_settings(threshold, graph.delta)
    return mask, PruneStep("node threshold", settings, _kept(graph, mask))


def combined(
    graph: GraphData, steps: Iterable[Pruned]
) -> tuple[Bool[Tensor, " edge"], list[PruneStep]]:
    """The edges that all of several steps keep, and the account of what each step removed.

    Each step was applied to the same graph, so that their order does not affect the result.
    """
    mask = torch.ones(len(graph.weight), dtype=torch.bool)
    accounts = []
    for keeps, step in steps:
        accounts.append(replace(step, transitions=_kept(graph, keeps, among=mask)))
        mask = mask & keeps
    return mask, accounts


def step_of(
    graph: GraphData, name: str, parameters: dict[str, Any], mask: Bool[Tensor, " edge"]
) -> PruneStep:
    """The account of a mask over all edges of a graph."""
    return PruneStep(name, tuple(parameters.items()), _kept(graph, mask))


def _require_non_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(Message(Argument(name, value), " must be a finite number, 0 or more."))


def _threshold_settings(threshold: float, delta: float) -> tuple[tuple[str, float | None], ...]:
    """A threshold in logits and relative to |Δℓ| (None where Δℓ is 0), for a ``PruneStep``."""
    tau = float(threshold)
    return ("threshold", tau), ("relative", tau / abs(delta) if delta else None)


def _kept(
    graph: GraphData, mask: Bool[Tensor, " edge"], among: Bool[Tensor, " edge"] | None = None
) -> tuple[TransitionKept, ...]:
    """What a mask keeps of each transition, out of all its edges or only those in ``among``."""
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
    return tuple(rows)


def largest(size: Float[Tensor, " item"], count: int) -> Bool[Tensor, " item"]:
    """Mark the ``count`` largest values; among equal ones the first."""
    return torch.from_numpy(largest_mask(size.numpy(), count))


def fewest(size: Float[Tensor, " item"], share: float, total: float | None = None) -> int:
    """The number of largest values that together hold a share of their sum.

    The smallest m with Σ_{i ≤ m} x_(i) ≥ share · Σ x, sorted downwards, added up in float64.

    Args:
        size: The values, none of them negative.
        share: The share of the sum, 0 to 1.
        total: The sum, if ``size`` holds only the largest of all values.
    """
    falling = np.sort(size.numpy())[::-1].cumsum(dtype=np.float64)
    if not len(falling) or share == 0:
        return 0
    total = falling[-1] if total is None else total
    return min(int(np.searchsorted(falling, share * total)) + 1, len(falling))


def connected(graph: GraphData) -> Pruned:
    """Keep the edges on a path down from a final node (last site, a position explained)."""
    pos = len(graph.str_tokens)
    reached = torch.zeros(len(graph.sites), pos, dtype=torch.bool)
    reached[-1, list(graph.final_positions)] = True
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    # Edges only lead to earlier sites, so a site is complete once those above it were visited.
    for source, target in sorted(graph.slices, key=lambda pair: -pair[1]):
        part = graph.slices[source, target]
        mask[part] = reached[target][graph.target_pos[part].long()]
        reached[source][graph.source_pos[part][mask[part]].long()] = True
    settings: dict[str, int | str] = {"final_pos": graph.final_pos}
    if graph.earlier_final_pos:
        settings = {"final_positions": in_words(graph.final_positions)}
    return mask, step_of(graph, "connected", settings, mask)


def within(
    graph: GraphData,
    *,
    positions: int | Iterable[int] | None = None,
    sites: int | str | Iterable[int | str] | None = None,
    tokens: str | Iterable[str] | None = None,
) -> Pruned:
    """Keep the edges both of whose ends are at given sites and positions.

    Args:
        graph: Any graph.
        positions: One or more positions in the prompt; negative ones count from the end.
        sites: One or more HookPoint names or indices.
        tokens: One or more texts of tokens, exactly as in ``str_tokens`` or as paths show them
            ("你²⁄₃"), or token ids written ``id:123`` (anything after the number is ignored).
            Every position that holds one of them counts. If ``positions`` are given too, a
            position must satisfy both.

    Raises:
        ValueError: A position, site or token is not in the graph, or nothing is given.
        TypeError: A position is not a whole number.
    """
    n = len(graph.str_tokens)
    inside = torch.ones(n, dtype=torch.bool)
    settings: dict[str, str] = {}
    if positions is not None:
        requested = [operator.index(p) for p in _as_iterable(positions)]
        outside = [p for p in requested if not -n <= p < n]
        if outside:
            raise ValueError(f"Position {outside[0]} is outside the prompt's {n} tokens.")
        index = torch.tensor(requested).long() % n
        inside &= torch.zeros(n, dtype=torch.bool).index_fill(0, index, True)
        settings["positions"] = _listed(sorted({p % n for p in requested}))
    if tokens is not None:
        texts = set(_as_iterable(tokens))
        positions_by_text = {text: _positions_of(graph, text) for text in texts}
        missing = sorted(text for text, where in positions_by_text.items() if not where)
        if missing:
            raise ValueError(
                f"No token of the prompt is {missing[0]!r}; spaces count, as in {_few(graph)}. "
                "An id is written id:123."
            )
        holding = set().union(*positions_by_text.values())
        inside &= torch.tensor([pos in holding for pos in range(n)])
        settings["tokens"] = _listed(sorted(map(repr, texts)))
    site_mask = torch.ones(len(graph.sites), dtype=torch.bool)
    if sites is not None:
        indices = sorted({graph.site_index(site) for site in _as_iterable(sites)})
        site_mask = torch.zeros_like(site_mask).index_fill(0, torch.tensor(indices).long(), True)
        settings["sites"] = _listed(indices)
    if not settings:
        raise ValueError("Give positions=, sites= or tokens= to keep.")
    node_mask = rearrange(site_mask[:, None] & inside[None], "site pos -> (site pos)")
    mask = node_mask[graph.source_node] & node_mask[graph.target_node]
    return mask, step_of(graph, "subgraph", settings, mask)


def _positions_of(graph: GraphData, text: str) -> set[int]:
    """The positions whose token is shown as ``text``, or else those with the id that it names."""
    pairs = zip(graph.str_tokens, with_parts(graph.str_tokens), strict=True)
    positions = {pos for pos, shown in enumerate(pairs) if text in shown}
    written = written_id(text)
    if not positions and written is not None:
        positions = set(torch.nonzero(graph.token_ids == written[0])[:, 0].tolist())
    return positions


def _as_iterable(given: Any) -> Iterable[Any]:
    return [given] if isinstance(given, str | Integral) else given


def _few(graph: GraphData) -> str:
    return ", ".join(map(repr, dict.fromkeys(graph.str_tokens[:6])))


def _listed(values: list[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"
