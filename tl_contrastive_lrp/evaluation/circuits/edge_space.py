"""Every edge a circuit could keep at a prompt, as one flat list; which of them a graph holds.

An edge joins the state of a source site at position i to that of the next site at position j ≥ i,
as in ``AttributionGraph``. All that the attention masks allow count, also those to which the
explanation gave no weight, but not those that cannot reach a position explained: targets after
the last of them, and in the last transitions all other targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...graph.columns import KEY, POSITION, VALUE

if TYPE_CHECKING:
    from ...graph.graph import AttributionGraph


@dataclass(frozen=True, eq=False)
class BlockMasks:
    """What each of several circuits keeps in one block.

    Attributes:
        value, key: What target j may take of source i's values and keys; heads 1 if not split.
        position: What it takes of its own state by the residual stream, queries (and, where the
            block is one transition, the MLP).
        after: The same from between attention and MLP; None where the block is one transition.
    """

    value: Bool[Tensor, "circuit head target source"]
    key: Bool[Tensor, "circuit head target source"]
    position: Bool[Tensor, "circuit pos"]
    after: Bool[Tensor, "circuit pos"] | None

    def to(self, device: torch.device) -> BlockMasks:
        """The same masks on a device."""
        after = None if self.after is None else self.after.to(device)
        value, key, position = (m.to(device) for m in (self.value, self.key, self.position))
        return BlockMasks(value, key, position, after)


@dataclass(frozen=True, eq=False)
class EdgeSpace:
    """The possible edges of one model, prompt and kind of graph, in the graph's order of blocks.

    Attributes:
        allowed: Per block, which edges the masks allow and the end can see.
        heads: Number of heads the graph is split by, or 0.
        between: Whether the graph has a site between attention and MLP in each block.
    """

    allowed: tuple[Bool[Tensor, "target source"], ...]
    heads: int
    between: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        graph: AttributionGraph,
        visible: Sequence[Bool[Tensor, "target source"]],
        heads: int,
    ) -> EdgeSpace:
        """The space of a graph.

        Args:
            graph: Of adjacent sites.
            visible: Per block, which source positions each target may attend to.
            heads: Query heads of a block.

        Raises:
            ValueError: the graph's sites are not those of every block in turn.
        """
        blocks = len(visible)
        between = tuple(f"blocks.{i}.hook_resid_mid" in graph.sites for i in range(blocks))
        wanted = [
            f"blocks.{i}.hook_resid_{at}"
            for i in range(blocks)
            for at in (("pre", "mid") if between[i] else ("pre",))
        ]
        if list(graph.sites) != [*wanted, f"blocks.{blocks - 1}.hook_resid_post"]:
            raise ValueError(
                "A circuit is run block by block, so its graph needs every block's sites; this one "
                f"has {len(graph.sites)} sites (granularity {graph.granularity!r}) for {blocks} "
                "blocks. Make it with clrp.attribution_graph(model, prompt, objective) without "
                "layers=, with the same model."
            )
        rows = torch.arange(len(graph.str_tokens))
        allowed = [mask & (rows <= graph.final_pos)[:, None] for mask in visible]
        allowed[-1] = allowed[-1] & torch.isin(rows, torch.tensor(graph.final_positions))[:, None]
        return cls(tuple(allowed), heads if graph.head is not None else 0, between)

    @property
    def size(self) -> int:
        """How many edges are possible."""
        return sum(int(block.sum()) for block in self._whole(self.allowed))

    def _whole(self, allowed: Sequence[Tensor]) -> list[Tensor]:
        """Each block's parts one after the other, flat, as booleans over dense slots.

        Slots of a block: [target, source], or [head, (value, key), target, source] and [pos]; then
        [pos] of the MLP's transition.
        """
        parts = []
        for block, between in zip(allowed, self.between, strict=True):
            alive = block.any(1)
            if self.heads:
                parts.append(block.expand(self.heads, 2, *block.shape).flatten())
                parts.append(alive)
            else:
                parts.append(block.flatten())
            if between:
                parts.append(alive)
        return parts

    def _slots(
        self,
        source_site: Tensor,
        source_pos: Tensor,
        target_pos: Tensor,
        head: Tensor | None = None,
        path: Tensor | None = None,
    ) -> Int[Tensor, " edge"]:
        """Dense slot of every edge."""
        n = len(self.allowed[0])
        per_block = 2 * self.heads * n * n + n if self.heads else n * n
        starts, first_site, block_of = [], 0, {}
        start = 0
        for block, between in enumerate(self.between):
            starts.append(start)
            block_of[first_site] = (block, False)
            if between:
                block_of[first_site + 1] = (block, True)
            first_site += 2 if between else 1
            start += per_block + (n if between else 0)
        base = torch.tensor([starts[block_of[s][0]] for s in range(first_site)])
        late = torch.tensor([block_of[s][1] for s in range(first_site)])
        site, j, i = source_site.long(), target_pos.long(), source_pos.long()
        inside = j * n + i
        if self.heads:
            assert head is not None
            assert path is not None
            split = (2 * head.long() + (path == KEY).long()) * n * n + inside
            inside = torch.where(path == POSITION, 2 * self.heads * n * n + j, split)
        return base[site] + torch.where(late[site], per_block + j, inside)

    def scores(self, graph: AttributionGraph) -> Float[Tensor, " possible"]:
        """|weight| of every possible edge; 0 for those the graph does not hold."""
        return self.spread(graph, graph.weight.abs())

    def held(self, graph: AttributionGraph) -> Bool[Tensor, " possible"]:
        """Which possible edges the graph holds."""
        return self.spread(graph, torch.ones_like(graph.weight)) > 0

    def spread(self, graph: AttributionGraph, values: Float[Tensor, " edge"]) -> Tensor:
        """A value for every edge of the graph, as one for every possible edge (else 0)."""
        columns = (graph.source_site, graph.source_pos, graph.target_pos, graph.head, graph.path)
        return self._dense(self._slots(*columns), values.double())

    def among(self, edges: Iterable[tuple[int, int, int]]) -> Bool[Tensor, " possible"]:
        """Which possible edges are these (source site, source pos, target pos), not split."""
        site, i, j = torch.tensor(sorted(edges)).T
        return self._dense(self._slots(site, i, j), torch.ones(len(site)).double()) > 0

    def _dense(self, slots: Tensor, values: Tensor) -> Tensor:
        whole = torch.cat(self._whole(self.allowed))
        dense = torch.zeros(len(whole), dtype=torch.float64)
        dense[slots] = values
        return dense[whole]

    def masks(self, keep: Bool[Tensor, "circuit possible"]) -> list[BlockMasks]:
        """What circuits that keep these edges keep in each block."""
        whole = torch.cat(self._whole(self.allowed))
        dense = torch.zeros(len(keep), len(whole), dtype=torch.bool)
        dense[:, whole] = keep
        n, found, at = len(self.allowed[0]), [], 0

        def take(*shape: int) -> Tensor:
            nonlocal at
            size = int(torch.tensor(shape).prod())
            part = dense[:, at : at + size].reshape(len(keep), *shape)
            at += size
            return part

        for between in self.between:
            if self.heads:
                both = take(self.heads, 2, n, n)
                value, key, position = both[:, :, VALUE - 1], both[:, :, KEY - 1], take(n)
            else:
                value = key = take(1, n, n)
                position = value[:, 0].diagonal(dim1=1, dim2=2)
            found.append(BlockMasks(value, key, position, take(n) if between else None))
        return found
