"""Exact choice of a transition's edges while they stream by, without holding them all.

The choice is that of ``prune.py`` on the whole transition, ties included. Entries come row block
by row block, the last rows first; what is certain to be left out is dropped at once. For a
cumulative share p: entries below τ that are seen weigh B(τ), and the N entries to come can add at
most N·τ. If B(τ) + N·τ < (1 − p)·M, with M the mass seen so far, which only grows, then all
entries of at least τ hold more than p of the final mass, so that none below τ is ever kept. B is
known from a histogram whose bins are leading bits of floating-point numbers. For the k largest, τ
is what k entries seen already reach.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NonFiniteError
from ..inputs.float64 import with_float64
from .prune_history import TransitionKept
from .pruning import PruneRule, largest

# Slack for adding up in another order than the final choice does.
_CAREFUL = 1 - 1e-9


def _bins(size: Tensor) -> tuple[Tensor, int]:
    """The histogram bin of each |weight|, and how many bins there are."""
    if size.dtype == torch.float64:
        return size.view(torch.int64) >> 47, 1 << 16
    return size.view(torch.int32) >> 18, 1 << 13


def _edge(index: int, dtype: torch.dtype) -> float:
    """The smallest number of a bin."""
    if dtype == torch.float64:
        return float(np.int64(index << 47).view(np.float64))
    return float(np.int32(index << 18).view(np.float32))


@dataclass(eq=False)
class StreamingSelection:
    """One transition's edges.

    Attributes:
        rule: What to keep; without any, every entry that is not 0.
        edges, mass: Number of entries seen, and Σ|weight| in logits.
    """

    rule: PruneRule
    edges: int = 0
    mass: float = 0.0
    _tau: float = 0.0
    _below: float = 0.0
    _held: int = 0
    _tidy: int = 0
    _parts: list[tuple[Tensor, ...]] = field(default_factory=list)  # rows, columns, ..., weights
    _masses: Tensor | None = None
    _counts: Tensor | None = None

    def add(
        self, matrix: Float[Tensor, "row column *slot"], row: int, column: int, unseen: int
    ) -> None:
        """A block of rows, before (above) all rows given so far.

        Args:
            matrix: Weights; 0 is no edge. By heads, with a last axis of slots.
            row, column: Where its corner lies.
            unseen: How many entries are still to come, at most.

        Raises:
            ValueError: a weight that is NaN or infinite.
        """
        matrix = with_float64(matrix)
        size = matrix.abs()
        total = float(size.sum(dtype=torch.float64))
        if not np.isfinite(total):
            raise NonFiniteError("The weight of an edge is NaN or infinite.")
        self.edges += int(torch.count_nonzero(size))
        self.mass += total
        threshold = self.rule.threshold  # compared in float64: rounded, it could let itself pass
        at_least = size > 0 if threshold is None else size.double() > threshold
        if self._tau:
            at_least &= size >= self._tau
        rows, columns, *slots = at = torch.nonzero(at_least, as_tuple=True)
        weights = matrix[at]
        self._count(weights.abs(), total)
        self._tau = max(self._tau, self._bound(unseen, matrix.dtype))
        part = tuple(x.to(torch.int32) for x in (rows + row, columns + column, *slots))
        self._parts.append(tuple(x.cpu() for x in self._above((*part, weights))))
        self._held += len(self._parts[-1][-1])
        if self._held > max(1.5 * self._tidy, 1 << 20):
            self._parts = [self._above(part) for part in self._parts]
            self._held = self._tidy = sum(len(part[-1]) for part in self._parts)

    def _above(self, part: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        keep = part[-1].abs() >= self._tau
        return part if bool(keep.all()) else tuple(x[keep] for x in part)

    def _count(self, size: Tensor, total: float) -> None:
        if self.rule.mass is None and self.rule.top_k is None:
            return
        index, length = _bins(size)
        heavy = size.double()
        masses = torch.bincount(index, heavy, minlength=length).cpu()
        counts = torch.bincount(index, minlength=length).cpu()
        self._masses = masses if self._masses is None else self._masses + masses
        self._counts = counts if self._counts is None else self._counts + counts
        self._below += max(total - float(heavy.sum()), 0.0)

    def _bound(self, unseen: int, dtype: torch.dtype) -> float:
        """τ: no entry below it can be kept."""
        if self._masses is None or self._counts is None:
            return 0.0
        if self.rule.top_k is not None:
            above = self._counts.flip(0).cumsum(0).flip(0)
            enough = torch.nonzero(above >= max(self.rule.top_k, 1))
            return _edge(int(enough[-1]), dtype) if len(enough) else 0.0
        assert self.rule.mass is not None
        spare = (1 - self.rule.mass) * self.mass * _CAREFUL - 1e-12 * self.mass
        below = self._masses.cumsum(0) - self._masses + self._below
        filled = torch.nonzero(self._counts)[:, 0]  # candidates for τ: lower ends of filled bins
        ends = torch.tensor([_edge(int(i), dtype) for i in filled], dtype=torch.float64)
        fits = torch.nonzero(below[filled] + unseen * ends < spare)
        return float(ends[int(fits[-1])]) if len(fits) else 0.0

    def kept(self) -> tuple[Tensor, ...]:
        """Target positions, source positions, by heads slots, and weights of the edges to keep.

        In order. Nothing is to be added afterwards; all else is let go.
        """
        if not self._parts:
            none = torch.zeros(0, dtype=torch.int32)
            return none, none, torch.zeros(0)
        self._tau = max(self._tau, self._bound(0, self._parts[0][-1].dtype))
        above = [self._above(part) for part in reversed(self._parts)]
        self._parts = []  # before the copy
        part = tuple(torch.cat(x) for x in zip(*above, strict=True))
        size = part[-1].abs()
        keep = largest(size, self.rule.count(size, self.mass))
        self._parts = [tuple(x[keep] for x in part)]
        self._masses = self._counts = None
        return self._parts[0]

    def saved(self) -> dict[str, Tensor]:
        """What was chosen and counted, as tensors."""
        counted = torch.tensor([self.edges], dtype=torch.int64)
        mass = torch.tensor([self.mass], dtype=torch.float64)
        columns = {f"column{i}": x for i, x in enumerate(self.kept())}
        return columns | {"edges": counted, "mass": mass}

    @classmethod
    def restored(cls, rule: PruneRule, tensors: dict[str, Tensor]) -> StreamingSelection:
        """From ``saved``; choosing again among what was chosen changes nothing."""
        made = cls(rule, int(tensors["edges"]), float(tensors["mass"]))
        made._parts = [tuple(tensors[f"column{i}"] for i in range(len(tensors) - 2))]
        return made

    def account(self, source: int, target: int, weights: Tensor) -> TransitionKept:
        """What was kept, between these sites."""
        kept = float(weights.abs().sum(dtype=torch.float64))
        return TransitionKept(source, target, self.edges, len(weights), self.mass, kept)
