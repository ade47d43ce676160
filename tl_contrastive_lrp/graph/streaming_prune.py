"""Exact selection of a transition's edges from a stream, without holding them all.

The selection is that of ``pruning.py`` on the whole transition, ties included. Entries come in
blocks of rows, the last rows first, and entries that cannot be kept are dropped at once.

For a cumulative share p: entries below τ that have been seen weigh B(τ), and the N entries to come
can add at most N·τ. If B(τ) + N·τ < (1 − p)·M, with M the mass seen so far, which only grows, then
all entries of at least τ hold more than p of the final mass, so none below τ is ever kept. B is
known from a histogram whose bins are the leading bits of floating-point numbers. For the k largest,
τ is a size that k of the entries seen already reach.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import NonFiniteError
from ..inputs.devices import with_float64
from .prune_history import TransitionKept
from .pruning import PruneRule, largest

# Slack, because the final selection adds up in another order.
_SLACK = 1 - 1e-9

# Parts are compacted when they hold this many entries, or half as many again as after the last
# compaction.
_COMPACT_ABOVE = 1 << 20


def _bins(size: Tensor) -> tuple[Tensor, int]:
    """The histogram bin of each |weight|, and how many bins there are."""
    if size.dtype == torch.float64:
        return size.view(torch.int64) >> 47, 1 << 16
    return size.view(torch.int32) >> 18, 1 << 13


def _lower_ends(index: Int[Tensor, " bin"], dtype: torch.dtype) -> Float[Tensor, " bin"]:
    """The smallest number of each bin, in float64."""
    if dtype == torch.float64:
        return (index.long() << 47).view(torch.float64)
    return (index.int() << 18).view(torch.float32).double()


@dataclass(eq=False)
class StreamingSelection:
    """The edges of one transition that a rule keeps.

    Attributes:
        rule: At most one criterion, in logits; without any, every entry that is not 0 is kept.
        edges: Number of entries seen that are not 0.
        mass: Σ|weight| of the entries seen, in logits.
    """

    rule: PruneRule
    edges: int = 0
    mass: float = 0.0
    _tau: float = 0.0  # entries below it cannot be kept
    _mass_below: float = 0.0  # of the entries that were dropped before they were counted in bins
    _held: int = 0
    _held_when_compacted: int = 0
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)  # rows, columns, ..., weights
    _bin_masses: Tensor | None = None
    _bin_counts: Tensor | None = None
    _in_order: bool = True  # whether the parts, from the last to the first, are

    def add(
        self, matrix: Float[Tensor, "row column *slot"], row: int, column: int, unseen: int
    ) -> None:
        """Add a block of rows that lies above all rows added so far.

        Args:
            matrix: Weights in logits; an entry of 0 is not an edge. Edges split by heads have a
                last axis of slots.
            row: Target position of its first row.
            column: Source position of its first column.
            unseen: How many entries are still to come, at most.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        matrix = with_float64(matrix)
        size = matrix.abs()
        total = self._seen(size)
        # Compared in float64: rounded to the type of the weights, an edge at τ could pass.
        threshold = self.rule.threshold
        mask = size > 0 if threshold is None else size.double() > threshold
        if self._tau:
            mask &= size >= self._tau
        rows, columns, *slots = index = torch.nonzero(mask, as_tuple=True)
        weights = matrix[index]
        self._count(weights.abs(), total)
        self._tau = max(self._tau, self._bound(unseen, matrix.dtype))
        self._hold((rows + row, columns + column, *slots), weights)

    def add_diagonal(self, weights: Float[Tensor, " pos"], *, slots: bool) -> None:
        """Add the diagonal of the whole transition, after all rows have been added without it.

        Args:
            weights: Its weights in logits; 0 is not an edge.
            slots: Whether edges have a slot; the diagonal's is 0.

        Raises:
            NonFiniteError: A weight is NaN or infinite.
        """
        size = weights.abs()
        total = self._seen(size)
        threshold = self.rule.threshold
        mask = size > 0 if threshold is None else size.double() > threshold
        (at,) = torch.nonzero(mask, as_tuple=True)
        self._count(size[at], total)
        self._hold((at, at, torch.zeros_like(at)) if slots else (at, at), weights[at])
        self._in_order = False

    def _seen(self, size: Tensor) -> float:
        """Count entries, and return their mass."""
        total = float(size.sum(dtype=torch.float64))
        if not np.isfinite(total):
            raise NonFiniteError("The weight of an edge is NaN or infinite.")
        self.edges += int(torch.count_nonzero(size))
        self.mass += total
        return total

    def _hold(self, index: tuple[Tensor, ...], weights: Tensor) -> None:
        """Hold those of the entries that can still be kept."""
        part = tuple(x.to(torch.int32) for x in index)
        self._parts.append(tuple(x.cpu() for x in self._candidates((*part, weights))))
        self._held += len(self._parts[-1][-1])
        if self._held > max(1.5 * self._held_when_compacted, _COMPACT_ABOVE):
            self._parts = [self._candidates(part) for part in self._parts]
            self._held = self._held_when_compacted = sum(len(part[-1]) for part in self._parts)

    def _candidates(self, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The entries of a part that can still be kept."""
        mask = part[-1].abs() >= self._tau
        return part if bool(mask.all()) else tuple(x[mask] for x in part)

    def _count(self, size: Tensor, total: float) -> None:
        """Add entries to the histogram, and the rest of their block's mass to what lies below."""
        if self.rule.mass is None and self.rule.top_k is None:
            return
        index, length = _bins(size)
        size = size.double()
        masses = torch.bincount(index, size, minlength=length).cpu()
        counts = torch.bincount(index, minlength=length).cpu()
        self._bin_masses = masses if self._bin_masses is None else self._bin_masses + masses
        self._bin_counts = counts if self._bin_counts is None else self._bin_counts + counts
        self._mass_below += max(total - float(size.sum()), 0.0)

    def _bound(self, unseen: int, dtype: torch.dtype) -> float:
        """A size τ such that no entry below it can be kept."""
        if self._bin_masses is None or self._bin_counts is None:
            return 0.0
        if self.rule.top_k is not None:
            reached = self._bin_counts.flip(0).cumsum(0).flip(0)
            enough = torch.nonzero(reached >= max(self.rule.top_k, 1))
            return float(_lower_ends(enough[-1], dtype)) if len(enough) else 0.0
        assert self.rule.mass is not None
        spare = (1 - self.rule.mass) * self.mass * _SLACK - 1e-12 * self.mass
        below = self._bin_masses.cumsum(0) - self._bin_masses + self._mass_below
        filled = torch.nonzero(self._bin_counts)[:, 0]  # candidates for τ: lower ends of these
        ends = _lower_ends(filled, dtype)
        fits = torch.nonzero(below[filled] + unseen * ends < spare)
        return float(ends[int(fits[-1])]) if len(fits) else 0.0

    def kept(self) -> tuple[Tensor, ...]:
        """The edges to keep, in order; all others are released.

        It is called once all blocks have been added.

        Returns:
            Target positions, source positions, slots (if edges are split by heads) and weights.
        """
        if not self._parts:
            none = torch.zeros(0, dtype=torch.int32)
            return none, none, torch.zeros(0)
        self._tau = max(self._tau, self._bound(0, self._parts[0][-1].dtype))
        candidates = [self._candidates(part) for part in reversed(self._parts)]
        self._parts = []  # released before the copy
        part = tuple(torch.cat(x) for x in zip(*candidates, strict=True))
        if not self._in_order:
            order = torch.from_numpy(np.lexsort([x.numpy() for x in part[-2::-1]]))
            part, self._in_order = tuple(x[order] for x in part), True
        size = part[-1].abs()
        mask = largest(size, self.rule.count(size, self.mass))
        self._parts = [tuple(x[mask] for x in part)]
        self._bin_masses = self._bin_counts = None
        return self._parts[0]

    def saved(self) -> dict[str, Tensor]:
        """The edges to keep and the account of all, as tensors for a checkpoint."""
        edges = torch.tensor([self.edges], dtype=torch.int64)
        mass = torch.tensor([self.mass], dtype=torch.float64)
        columns = {f"column{i}": x for i, x in enumerate(self.kept())}
        return columns | {"edges": edges, "mass": mass}

    @classmethod
    def restored(cls, rule: PruneRule, tensors: dict[str, Tensor]) -> StreamingSelection:
        """The inverse of ``saved``; selecting again among what was kept changes nothing."""
        selection = cls(rule, int(tensors["edges"]), float(tensors["mass"]))
        selection._parts = [tuple(tensors[f"column{i}"] for i in range(len(tensors) - 2))]
        return selection

    def account(self, source: int, target: int, weights: Tensor) -> TransitionKept:
        """The account of what was kept of the transition.

        Args:
            source: Index of the source site.
            target: Index of the target site.
            weights: Weights of the edges kept.
        """
        mass_kept = float(weights.abs().sum(dtype=torch.float64))
        return TransitionKept(source, target, self.edges, len(weights), self.mass, mass_kept)
