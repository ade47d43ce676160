"""All edges that a circuit could keep at a prompt, as one flat list, and which of them a graph has.

An edge joins the state of a source site at position i to the state of the next site at position
j ≥ i, as in ``AttributionGraph``. The list holds every edge that the attention masks allow, also
those to which the explanation gave no weight. It leaves out edges that cannot reach an explained
position: targets after the last explained position and, in the transitions of the last block, all
targets that are not explained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...graph.columns import KEY, POSITION

if TYPE_CHECKING:
    from ...graph.graph import AttributionGraph


@dataclass(frozen=True, eq=False)
class BlockMasks:
    """The parts of one block that several circuits keep, as masks.

    Attributes:
        value: Which source values each target may use. The head axis is 1 without a split by head.
        key: Which source keys each target may use.
        position: Which positions keep their own state, through the residual stream, queries and,
            where the block is a single transition, the MLP.
        after: Which positions keep their own state from between attention and MLP. None where the
            block is a single transition.
    """

    value: Bool[Tensor, "circuit head target source"]
    key: Bool[Tensor, "circuit head target source"]
    position: Bool[Tensor, "circuit pos"]
    after: Bool[Tensor, "circuit pos"] | None

    def to(self, device: torch.device) -> BlockMasks:
        """Move the masks to a device."""
        after = None if self.after is None else self.after.to(device)
        value, key, position = (m.to(device) for m in (self.value, self.key, self.position))
        return BlockMasks(value, key, position, after)


@dataclass(frozen=True, eq=False)
class EdgeSpace:
    """The possible edges for one model, prompt and kind of graph, in the graph's order of blocks.

    They are a selection from *slots*, which count all edges of a block, possible or not. The slots
    of a block are (target, source), or (head, path, target, source) followed by (pos) if the graph
    is split by head, where the path is value, then key. A transition from ``resid_mid`` adds (pos).

    Attributes:
        allowed: The edges of each block that the masks allow and that reach an explained position.
        heads: Number of heads by which the graph is split, or 0.
        between: Whether the graph has a site between attention and MLP, for each block.
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
        """Build the space of a graph.

        Args:
            graph: A graph of adjacent sites.
            visible: For each block, the source positions that each target may attend to.
            heads: Number of query heads per block.

        Raises:
            ValueError: The graph's sites are not those of every block in turn.
        """
        n_blocks = len(visible)
        between = tuple(f"blocks.{i}.hook_resid_mid" in graph.sites for i in range(n_blocks))
        expected = [
            f"blocks.{i}.hook_resid_{place}"
            for i in range(n_blocks)
            for place in (("pre", "mid") if between[i] else ("pre",))
        ]
        if list(graph.sites) != [*expected, f"blocks.{n_blocks - 1}.hook_resid_post"]:
            raise ValueError(
                "A circuit is run block by block, so its graph needs every block's sites; this one "
                f"has {len(graph.sites)} sites (granularity {graph.granularity!r}) for {n_blocks} "
                "blocks. Make it with clrp.attribution_graph(model, prompt, objective) without "
                "layers=, with the same model."
            )
        targets = torch.arange(len(graph.str_tokens))
        allowed = [mask & (targets <= graph.final_pos)[:, None] for mask in visible]
        explained = torch.isin(targets, torch.tensor(graph.final_positions))
        allowed[-1] = allowed[-1] & explained[:, None]
        return cls(tuple(allowed), heads if graph.head is not None else 0, between)

    @property
    def size(self) -> int:
        """Number of possible edges."""
        return int(self._possible().sum())

    @property
    def _n_attention_slots(self) -> int:
        """Number of slots of a block's first transition, the one that holds attention."""
        n = len(self.allowed[0])
        return 2 * self.heads * n * n + n if self.heads else n * n

    def _possible(self) -> Bool[Tensor, " slot"]:
        """Which slots are possible edges."""
        parts = []
        for block, between in zip(self.allowed, self.between, strict=True):
            used_targets = block.any(1)
            if self.heads:
                pattern = "target source -> (head path target source)"
                parts += [repeat(block, pattern, head=self.heads, path=2), used_targets]
            else:
                parts.append(rearrange(block, "target source -> (target source)"))
            if between:
                parts.append(used_targets)
        return torch.cat(parts)

    def _slots(
        self,
        source_site: Int[Tensor, " edge"],
        source_pos: Int[Tensor, " edge"],
        target_pos: Int[Tensor, " edge"],
        head: Int[Tensor, " edge"] | None = None,
        path: Int[Tensor, " edge"] | None = None,
    ) -> Int[Tensor, " edge"]:
        """Return the slot of each edge."""
        n = len(self.allowed[0])
        first_slots: list[int] = []  # of each transition, by its source site
        is_mlp: list[bool] = []
        n_slots = 0
        for between in self.between:
            first_slots.append(n_slots)
            is_mlp.append(False)
            n_slots += self._n_attention_slots
            if between:
                first_slots.append(n_slots)
                is_mlp.append(True)
                n_slots += n
        site, target, source = source_site.long(), target_pos.long(), source_pos.long()
        in_attention = target * n + source
        if self.heads:
            assert head is not None
            assert path is not None
            matrix = 2 * head.long() + (path == KEY).long()
            own_state = 2 * self.heads * n * n + target
            in_attention = torch.where(path == POSITION, own_state, matrix * n * n + in_attention)
        in_transition = torch.where(torch.tensor(is_mlp)[site], target, in_attention)
        return torch.tensor(first_slots)[site] + in_transition

    def scores(self, graph: AttributionGraph) -> Float[Tensor, " possible"]:
        """Return |weight| for every possible edge, 0 for those that the graph lacks."""
        return self.scatter(graph, graph.weight.abs())

    def mask_of_graph(self, graph: AttributionGraph) -> Bool[Tensor, " possible"]:
        """Return which of the possible edges the graph has."""
        return self.scatter(graph, torch.ones_like(graph.weight)) > 0

    def scatter(
        self, graph: AttributionGraph, values: Float[Tensor, " edge"]
    ) -> Float[Tensor, " possible"]:
        """Turn one value per edge of the graph into one per possible edge, 0 for the others."""
        columns = (graph.source_site, graph.source_pos, graph.target_pos, graph.head, graph.path)
        return self._scatter_slots(self._slots(*columns), values.double())

    def mask_of_edges(self, edges: Iterable[tuple[int, int, int]]) -> Bool[Tensor, " possible"]:
        """Mark edges given as (source site, source pos, target pos), for graphs without heads."""
        site, source, target = torch.tensor(sorted(edges)).T
        return self._scatter_slots(self._slots(site, source, target), torch.ones(len(site))) > 0

    def _scatter_slots(
        self, slots: Int[Tensor, " edge"], values: Float[Tensor, " edge"]
    ) -> Float[Tensor, " possible"]:
        possible = self._possible()
        by_slot = torch.zeros(len(possible), dtype=torch.float64)
        by_slot[slots] = values.double()
        return by_slot[possible]

    def masks(self, keep: Bool[Tensor, "circuit possible"]) -> list[BlockMasks]:
        """Return the masks, for each block, of circuits that keep these edges."""
        possible = self._possible()
        by_slot = torch.zeros(len(keep), len(possible), dtype=torch.bool)
        by_slot[:, possible] = keep
        n = len(self.allowed[0])
        attention_sizes = [2 * self.heads * n * n, n] if self.heads else [n * n]
        sizes = [
            size
            for between in self.between
            for size in (*attention_sizes, *([n] if between else []))
        ]
        parts = iter(torch.split_with_sizes(by_slot, sizes, dim=1))
        blocks = []
        for between in self.between:
            if self.heads:
                value, key = rearrange(
                    next(parts),
                    "circuit (head path target source) -> path circuit head target source",
                    head=self.heads,
                    path=2,
                    target=n,
                )
                position = next(parts)
            else:
                value = key = rearrange(
                    next(parts), "circuit (target source) -> circuit 1 target source", target=n
                )
                position = value[:, 0].diagonal(dim1=1, dim2=2)
            blocks.append(BlockMasks(value, key, position, next(parts) if between else None))
        return blocks
