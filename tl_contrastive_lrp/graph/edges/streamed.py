"""Edges of one block from the rows of its attention, selected while a backward computes them.

Where attention is fused, its backward hands out the rows of scores and pattern, a tile of target
positions at a time, from the last to the first (``rules/query_tiles.py``). Each tile's rows are
added to a ``StreamingSelection`` at once. The diagonal is what remains of the source's relevance
after the column's other entries; the source lies below the block, so it comes last. No matrix of
pos² numbers ever exists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ...inputs.devices import with_float64
from ..columns import slots
from ..pruning import PruneRule
from ..streaming_prune import StreamingSelection


@dataclass(eq=False)
class StreamedEdges:
    """The transition through one block's attention, filled by one backward.

    Attributes:
        rule: Which edges to keep.
        length: Number of positions.
        heads: How many heads edges are split by; 0 for none.
        node_threshold: Targets with |relevance| at or below it, in logits, are not expanded.
        target: Returns the relevance of the target site's positions, which is known by then.
    """

    rule: PruneRule
    length: int
    heads: int
    node_threshold: float
    target: Callable[[], Float[Tensor, " pos"]]
    _selection: StreamingSelection = field(init=False)
    _passed: Float[Tensor, " pos"] = field(init=False)
    _alive: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._selection = StreamingSelection(self.rule)
        self._passed = torch.zeros(self.length, dtype=torch.float64)

    def add(
        self,
        start: int,
        first: int,
        total: Float[Tensor, "target source"],
        value: Float[Tensor, "head target source"] | None = None,
        key: Float[Tensor, "head target source"] | None = None,
    ) -> None:
        """Add the edges of a tile of target positions that lies above all added so far.

        Args:
            start: The first target position.
            first: The first source position.
            total: Sum over heads and paths; it is written into.
            value: The value path by head, if edges are split.
            key: The key path by head, if edges are split and the rules give it relevance.
        """
        rows, stop = total, start + len(total)
        offset = start - first
        if not self.heads:  # by heads, attention to itself is an edge of its own
            total.diagonal(offset).zero_()
        self._passed[first : first + total.shape[1]] += (
            with_float64(total).sum(0, dtype=torch.float64).cpu()
        )
        live = self._expanded(start, stop, total)
        if self.heads:
            rows = slots(value, key, total.new_zeros(len(total)), offset)
        if not bool(live.all()):
            rows[~live.to(rows.device)] = 0
        unseen = (start * (start + 1) // 2) * (2 * self.heads or 1) + self.length
        self._selection.add(rows, start, first, unseen)

    def _expanded(self, start: int, stop: int, total: Tensor) -> Tensor:
        """Which targets of a tile are expanded."""
        live = self.target()[start:stop].abs() > self.node_threshold
        if self.node_threshold == 0:  # parts may add up to exactly 0
            live = live | (total != 0).any(-1).to(live.device)
        self._alive.append(live)
        return live

    def finished(
        self, source: Float[Tensor, " pos"], target: Float[Tensor, " pos"]
    ) -> StreamingSelection:
        """The selection, once the backward has reached the source site.

        Args:
            source: The relevance of the source site's positions.
            target: That of the target site's.
        """
        live = target.abs() > self.node_threshold  # where no relevance reaches its attention
        if self._alive:
            live = torch.cat(self._alive[::-1])
        position = source - self._passed.to(source)
        position = torch.where(live, position, torch.zeros_like(position))
        self._selection.add_diagonal(position, slots=bool(self.heads))
        return self._selection
