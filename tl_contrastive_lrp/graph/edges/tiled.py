"""Edges from a backward in tiles: rows of each transition's matrix, pruned as they are computed.

A tile's hooks see [head, tile, keys], its rows of the matrix; where attention is fused, its
backward hands these rows out, some at a time. The diagonal is what remains of the
source's relevance after the column's other entries. By causality those all lie in later rows, and
the backward goes from the last tile to the first, so a tile's diagonal is known by the time the
tile is processed. No matrix of pos² numbers ever exists.

``TiledEdges`` is what the engine calls, ``_Block`` is one block while its tiles are replayed,
``_Tile`` one of them, and ``_BlockTangents`` has the derivatives of a block that needs them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ...engine.reading import BlockCall, Reading
from ...engine.tiled.backward import as_gradient
from ...engine.tiled.cache import Enough, ReplayCache
from ...engine.tiled.prefill import Prefill
from ...engine.tiled.tiles import TileAccumulator
from ...hooks.sites import Site
from ...inputs.devices import with_float64
from ...rules.functions import at_least_float32
from ...rules.precision import plain
from ...rules.rule_sets import RuleSet
from ..columns import slots
from ..pruning import PruneRule
from ..streaming_prune import StreamingSelection
from .closed_form import (
    BlockEdges,
    attention_by_operation,
    biased_blocks,
    edge_readings,
    needs_tangents,
)
from .tangents import ProductTangents, Tangents, block_tangents, dual, tangent_of

# Entries that are selected from together, where each takes up to 28 bytes for that time.
_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False)
class _Run:
    """The bridge, its sites and the rules, which all blocks of one backward share."""

    model: Any
    sites: tuple[Site, ...]
    rule_set: RuleSet


class _BlockTangents:
    """The derivatives ṽ and k̃ of one block at all positions, and S̃ of one tile at a time.

    ``tangents.py`` in tiles: one run of the block over all tiles collects ṽ and k̃, and ``of_tile``
    runs it on one tile again.

    Attributes:
        keys: The derivatives k̃, [1, kv_head, pos, d_head].
        values: The derivatives ṽ, [1, kv_head, pos, d_head].
    """

    def __init__(self, run: _Run, layer: int, forward: Prefill) -> None:
        self.run, self.layer, self.forward = run, layer, forward
        self.keys, self.values = (
            torch.zeros_like(at_least_float32(x[layer])) for x in (forward.keys, forward.values)
        )
        for tile in range(forward.last + 1):
            try:
                self._replay(tile, collect=True)
            except Enough:
                continue

    def ranges(self, tile: int) -> tuple[slice, slice]:
        """The positions before a tile that it sees, and its own."""
        start, stop = self.forward.bounds[tile]
        return slice(stop - self.forward.widths[self.layer][tile], start), slice(start, stop)

    def of_products(self, tile: int) -> ProductTangents:
        """The derivatives ṽ and k̃ of the positions that a tile sees."""
        past, own = self.ranges(tile)
        seen = slice(past.start, own.stop)
        return ProductTangents(self.values[0, :, seen], self.keys[0, :, seen])

    def of_tile(self, tile: int) -> Tangents:
        """The derivatives ṽ of the positions that a tile sees, and its S̃."""
        tangents = self._replay(tile, collect=False)
        if attention_by_operation(self.layer, self.run.sites):
            return tangents  # as it enters pattern·v
        past, own = self.ranges(tile)
        v = self.values[0, :, past.start : own.stop]
        return Tangents(
            rearrange(v, "kv_head source d_head -> source kv_head d_head"), tangents.scores
        )

    def _replay(self, tile: int, *, collect: bool) -> Tangents:
        cache = _DualCache(self, tile, collect=collect)
        hidden = self.forward.inputs[self.layer][tile]
        args, kwargs = self.forward.call(self.layer, tile, hidden, cache)
        return block_tangents(
            self.run.model, self.layer, BlockCall(args, kwargs), self.run.sites, self.run.rule_set
        )


class _DualCache(ReplayCache):
    """A replay's cache whose keys and values carry derivatives.

    Args:
        tangents: The block's derivatives; those before the tile are known.
        tile: Index of the tile.
        collect: Write the tile's own derivatives into ``tangents``, and stop there.
    """

    def __init__(self, tangents: _BlockTangents, tile: int, *, collect: bool) -> None:
        self.tangents = tangents
        past, self.own_range = tangents.ranges(tile)
        forward, layer = tangents.forward, tangents.layer
        keys, values = (x[layer][..., past, :] for x in (forward.keys, forward.values))
        self.past_tangents = (tangents.keys[..., past, :], tangents.values[..., past, :])
        super().__init__(self.own_range.start, (keys, values), stop=collect)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Give the tile the keys and values that it sees, with their derivatives.

        Raises:
            Enough: The tile's own derivatives have been collected.
        """
        if self.stop:
            self.tangents.keys[..., self.own_range, :] = plain(tangent_of(k))
            self.tangents.values[..., self.own_range, :] = plain(tangent_of(v))
            raise Enough
        if not self.past[0].shape[-2]:
            return k, v
        before = [
            dual(x, as_gradient(t, x)) for x, t in zip(self.past, self.past_tangents, strict=True)
        ]
        return tuple(torch.cat([p, x], dim=-2) for p, x in zip(before, (k, v), strict=True))


class _Tile:
    """One tile of a block while it is replayed.

    Args:
        index: Which tile.
        cache: The replay's cache.
        tangents: The block's derivatives, where the closed form needs them.
        again: Whether the backwards of several objectives go through the replay.
    """

    def __init__(
        self, index: int, cache: ReplayCache, tangents: _BlockTangents | None, again: bool
    ) -> None:
        self.index, self.cache, self.again = index, cache, again
        self._of_block = tangents
        self._tangents: Tangents | None = None

    def values(self) -> Float[Tensor, "source kv_head d_head"]:
        """The values v that the tile sees."""
        assert self.cache.values is not None
        return rearrange(self.cache.values[0], "kv_head source d_head -> source kv_head d_head")

    def product_tangents(self) -> ProductTangents:
        """The derivatives ṽ and k̃ of the positions that the tile sees."""
        assert self._of_block is not None
        return self._of_block.of_products(self.index)

    def tangents(self) -> Tangents:
        """The derivatives ṽ and S̃; computed once if several objectives need them."""
        if self._tangents is not None:
            return self._tangents
        assert self._of_block is not None
        tangents = self._of_block.of_tile(self.index)
        if self.again:
            self._tangents = tangents
        return tangents


class _Block:
    """One block while its tiles are replayed, last tile first: the inputs of its closed form.

    Attributes:
        edges: The edges of the current tile, filled by its backward.
        tile: The current tile.
        passed: By objective, the relevance that each source has received from other positions so
            far: the sums of the matrix's columns, without the diagonal, [pos].
    """

    tile: _Tile

    def __init__(self, run: _Run, layer: int, *, heads: bool, objectives: int) -> None:
        self.run, self.layer, self.objectives = run, layer, objectives
        self.edges = BlockEdges(layer, by_head=heads, again=objectives > 1)
        self.passed: list[Tensor] = []
        self._tangents: _BlockTangents | None = None

    def begin(self, forward: Prefill, biased: frozenset[int]) -> None:
        """Prepare for the tiles of a forward."""
        self.forward = forward
        length = forward.bounds[-1][1]
        self.passed = [torch.zeros(length, dtype=torch.float64) for _ in range(self.objectives)]
        if needs_tangents(self.layer, self.run.sites, self.run.rule_set, biased):
            self._tangents = _BlockTangents(self.run, self.layer, forward)

    def begin_tile(self, tile: int, cache: ReplayCache) -> None:
        """Prepare for one tile."""
        self.tile = _Tile(tile, cache, self._tangents, self.edges.again)
        self.edges.restart()

    def readings(self) -> list[Reading]:
        """No readings, since a replay's cache has the values."""
        return []

    def values(self) -> Float[Tensor, "source kv_head d_head"]:
        """The values v that the current tile sees."""
        return self.tile.values()

    def tangents(self) -> Tangents:
        """The derivatives ṽ and S̃ of the current tile."""
        return self.tile.tangents()

    def product_tangents(self) -> ProductTangents:
        """The derivatives ṽ and k̃ of what the current tile sees."""
        return self.tile.product_tangents()

    @property
    def heads(self) -> int:
        """How many heads edges are split by; 0 for none."""
        return int(self.run.model.cfg.n_heads) if self.edges.by_head else 0

    def add(
        self,
        start: int,
        first: int,
        total: Float[Tensor, "target source"],
        value: Float[Tensor, "head target source"] | None = None,
        key: Float[Tensor, "head target source"] | None = None,
    ) -> None:
        """Put rows of fused attention into the current tile's matrix."""
        begin, stop = self.forward.bounds[self.tile.index]
        seen = self.forward.widths[self.layer][self.tile.index]
        self.edges.put((stop - begin, seen), start, first, total, value, key)


def _by_position(relevance: Tensor | None) -> Tensor | None:
    """Relevance by position, summed over hidden dimensions where these are kept."""
    return relevance.sum(-1) if relevance is not None and relevance.ndim > 1 else relevance


class TiledEdges:
    """Collects the edges of the given blocks' transitions, pruned by ``rule``; a ``TileReader``.

    Args:
        model: The bridge.
        sites: ``find_sites(model)``.
        rule_set: The rules of the backward.
        rule: Which edges to keep.
        targets: By block, the site to which its attention's transition leads.
        node_threshold: Targets with |relevance| at or below it (logits) are not expanded.
        heads: Whether to split edges by head and by value and key path.
        objectives: The number of backwards.

    Attributes:
        selections: By objective and block, the edges to keep.
    """

    def __init__(
        self,
        model: Any,
        sites: tuple[Site, ...],
        rule_set: RuleSet,
        rule: PruneRule,
        targets: dict[int, str],
        node_threshold: float,
        *,
        heads: bool = False,
        objectives: int = 1,
    ) -> None:
        self.run, self.rule = _Run(model, sites, rule_set), rule
        self.targets, self.node_threshold, self.heads = targets, node_threshold, heads
        self.biased = biased_blocks(model)
        self.selections: list[dict[int, StreamingSelection]] = [{} for _ in range(objectives)]
        self._block: _Block | None = None

    @property
    def block(self) -> _Block:
        """The block whose tiles are being replayed."""
        assert self._block is not None
        return self._block

    def readings(self, layer: int) -> list[Reading]:
        """What to read in the backwards through a block."""
        run = self.run
        block = _Block(run, layer, heads=self.heads, objectives=len(self.selections))
        self._block = block
        return edge_readings(
            run.model,
            block.edges,
            run.sites,
            run.rule_set,
            BlockCall(),
            self.biased,
            inputs=block,
            target=lambda: block,
        )

    def begin_layer(self, layer: int, forward: Prefill) -> None:
        """Prepare for the block's tiles."""
        for selections in self.selections:
            selections[layer] = StreamingSelection(self.rule)
        self.block.begin(forward, self.biased)

    def begin_tile(self, layer: int, tile: int, cache: Any) -> None:  # noqa: ARG002
        """Prepare for one replay."""
        self.block.begin_tile(tile, cache)

    def end_tile(self, layer: int, tile: int, joined: TileAccumulator, which: int) -> None:
        """Add the tile's rows of one objective's matrix, diagonal included."""
        block = self.block
        edges, passed = block.edges, block.passed[which]
        start, stop = own = block.forward.bounds[tile]
        first = stop - block.forward.widths[layer][tile]
        source = _by_position(joined.at(f"blocks.{layer}.hook_resid_pre", own))
        target = _by_position(joined.at(self.targets[layer], own))
        total, by_path = edges.total, (edges.value, edges.key)
        edges.clear()
        if total is not None:
            if not self.heads:  # by heads, attention to itself is an edge of its own
                total.diagonal(start - first).zero_()
            passed[first:stop] += with_float64(total).sum(0, dtype=torch.float64).cpu()
        if source is None or target is None:
            return
        live = target.abs() > self.node_threshold
        if self.node_threshold == 0 and total is not None:  # parts may add up to exactly 0
            live = live | (total != 0).any(-1).to(live.device)
        if not bool(live.any()):
            return
        position = source - passed[start:stop].to(source)
        if total is None:  # no relevance reaches this block's attention
            first, total = start, source.new_zeros(stop - start, stop - start)
        if self.heads:
            rows = slots(*by_path, position.cpu(), start - first)
        else:
            total.diagonal(start - first).copy_(position)
            rows = total
        if not bool(live.all()):
            rows[~live.to(rows.device)] = 0
        self._select(self.selections[which][layer], rows, start, first)

    @staticmethod
    def _select(
        selection: StreamingSelection,
        rows: Float[Tensor, "target source *slot"],
        start: int,
        first: int,
    ) -> None:
        """Add a tile's rows, some at a time, from the last to the first."""
        slots = rows.shape[-1] if rows.ndim > 2 else 1
        size = max(_AT_ONCE // (rows.shape[1] * slots), 1)
        for stop in range(len(rows), 0, -size):
            begin = max(stop - size, 0)
            at = start + begin
            selection.add(rows[begin:stop], at, first, slots * at * (at + 1) // 2)

    def end_layer(self, layer: int) -> None:
        """Choose the edges to keep, so that only they stay in memory."""
        for selections in self.selections:
            selections[layer].kept()
        self._block = None

    def saved(self, layer: int, which: int) -> dict[str, Tensor]:
        """A finished block's edges as tensors, for a checkpoint."""
        return self.selections[which][layer].saved()

    def restore(self, layer: int, which: int, tensors: dict[str, Tensor]) -> None:
        """Take a block's edges from a checkpoint."""
        self.selections[which][layer] = StreamingSelection.restored(self.rule, tensors)
