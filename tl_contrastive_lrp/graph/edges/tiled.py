"""Edges from a backward in tiles: rows of each transition's matrix as they come, pruned at once.

A tile's hooks see [head, tile, keys], its rows of the matrix. The diagonal is what remains of the
source's relevance after the column's other entries; by causality those all lie in later rows,
and the backward goes from the last tile to the first, so that a tile's diagonal is known when its
turn has come. No matrix of pos² numbers ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
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
from .closed_form import BlockEdges, biased_blocks, edge_readings, needs_tangents
from .tangents import block_tangents, dual, tangent_of


class _Moving:
    """ṽ and k̃ of one block at all positions, and S̃ of one tile: ``tangents.py``, in tiles."""

    def __init__(self, edges: TiledEdges, layer: int, forward: Prefill) -> None:
        self.edges, self.layer, self.forward = edges, layer, forward
        self.keys, self.values = (
            torch.zeros_like(at_least_float32(x[layer])) for x in (forward.keys, forward.values)
        )
        for tile in range(forward.last + 1):
            try:
                self._run(tile, stop=True)
            except Enough:
                continue

    def _past(self, tile: int) -> tuple[slice, slice]:
        start, stop = self.forward.bounds[tile]
        return slice(stop - self.forward.widths[self.layer][tile], start), slice(start, stop)

    def _run(self, tile: int, *, stop: bool) -> tuple[Tensor, Tensor]:
        cache = _DualCache(self, tile, stop=stop)
        hidden = self.forward.inputs[self.layer][tile]
        args, kwargs = self.forward.call(self.layer, tile, hidden, cache)
        v, scores = block_tangents(
            self.edges.model, self.layer, BlockCall(args, kwargs), self.edges.sites,
            self.edges.rule_set,
        )  # fmt: skip
        past, own = self._past(tile)
        if not self.edges.by_operation(self.layer):  # else v is as it enters pattern·v
            v = self.values[0, :, past.start : own.stop].transpose(0, 1)
        return v, scores

    def at(self, tile: int) -> tuple[Tensor, Tensor]:
        return self._run(tile, stop=False)


class _DualCache(ReplayCache):
    def __init__(self, moving: _Moving, tile: int, *, stop: bool) -> None:
        self.moving, self.tile = moving, tile
        past, self.at = moving._past(tile)
        forward, layer = moving.forward, moving.layer
        self.found = [
            (forward.keys[layer][..., past, :], moving.keys[..., past, :]),
            (forward.values[layer][..., past, :], moving.values[..., past, :]),
        ]
        super().__init__(self.at.start, (self.found[0][0], self.found[1][0]), stop=stop)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        if self.stop:
            self.moving.keys[..., self.at, :] = plain(tangent_of(k))
            self.moving.values[..., self.at, :] = plain(tangent_of(v))
            raise Enough
        if not self.past[0].shape[-2]:
            return k, v
        before = [dual(x, as_gradient(t, x)) for x, t in self.found]
        return tuple(torch.cat([p, x], dim=-2) for p, x in zip(before, (k, v), strict=True))


def _by_position(relevance: Tensor | None) -> Tensor | None:
    """Summed over hidden dimensions, where these are kept."""
    return relevance.sum(-1) if relevance is not None and relevance.ndim > 1 else relevance


class TiledEdges:
    """Collects the edges of the given blocks' transitions, pruned by ``rule``.

    Args:
        model: The bridge.
        sites: ``find_sites(model)``.
        rule_set: The rules of the backward.
        rule: Which edges to keep.
        targets: By block, the site its attention's transition leads to.
        node_threshold: Targets with |relevance| at or below it are not expanded.
        heads: Split edges by head and by value and key path.
        objectives: How many backwards there are.

    Attributes:
        found: By objective and block.
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
        self.model, self.sites, self.rule_set, self.rule = model, sites, rule_set, rule
        self.targets, self.node_threshold, self.heads = targets, node_threshold, heads
        self.biased = biased_blocks(model)
        self.found: list[dict[int, StreamingSelection]] = [{} for _ in range(objectives)]
        self._columns: list[Tensor] = []
        self._edges: BlockEdges | None = None
        self._moving: _Moving | None = None
        self._moved: tuple[Tensor, Tensor] | None = None
        self._forward: Prefill | None = None
        self._cache: Any = None
        self._tile = 0

    def by_operation(self, layer: int) -> bool:
        return any(
            site.operation == "attention" and site.path == f"blocks.{layer}.attn"
            for site in self.sites
        )

    def readings(self, layer: int) -> list[Reading]:
        self._edges = BlockEdges(layer, by_head=self.heads, again=len(self.found) > 1)
        return edge_readings(
            self.model, self._edges, self.sites, self.rule_set, BlockCall(), self.biased,
            self._values, self._tangents,
        )  # fmt: skip

    def _values(self) -> Tensor:
        values: Tensor = self._cache.values[0]
        return values.transpose(0, 1)

    def _tangents(self) -> tuple[Tensor, Tensor]:
        assert self._moving is not None
        moved = self._moving.at(self._tile) if self._moved is None else self._moved
        if len(self.found) > 1:  # the next objective's backward needs them too
            self._moved = moved
        return moved

    def begin_layer(self, layer: int, forward: Prefill) -> None:
        self._forward = forward
        length = forward.bounds[-1][1]
        for found in self.found:
            found[layer] = StreamingSelection(self.rule)
        self._columns = [torch.zeros(length, dtype=torch.float64) for _ in self.found]
        self._moving = None
        if needs_tangents(layer, self.sites, self.rule_set, self.biased):
            self._moving = _Moving(self, layer, forward)

    def begin_tile(self, layer: int, tile: int, cache: Any) -> None:  # noqa: ARG002
        assert self._edges is not None
        self._cache, self._tile, self._moved = cache, tile, None
        self._edges.clear()
        self._edges._kept.clear()

    def end_tile(self, layer: int, tile: int, joined: TileAccumulator, which: int) -> None:
        """The tile's rows, its diagonal included."""
        assert self._edges is not None
        assert self._forward is not None
        start, stop = own = self._forward.bounds[tile]
        first = stop - self._forward.widths[layer][tile]
        source = _by_position(joined.at(f"blocks.{layer}.hook_resid_pre", own))
        target = _by_position(joined.at(self.targets[layer], own))
        edges, columns = self._edges, self._columns[which]
        total, split = edges.total, (edges.value, edges.key)
        edges.clear()
        if total is not None:
            if not self.heads:  # by heads, attention to itself is an edge of its own
                total.diagonal(start - first).zero_()
            columns[first:stop] += with_float64(total).sum(0, dtype=torch.float64).cpu()
        if source is None or target is None:
            return
        live = target.abs() > self.node_threshold
        if self.node_threshold == 0 and total is not None:  # parts may add up to exactly 0
            live = live | (total != 0).any(-1).to(live.device)
        if not bool(live.any()):
            return
        position = source - columns[start:stop].to(source)
        unseen = start * (start + 1) // 2
        if total is None:  # no relevance reaches this block's attention
            first, total = start, source.new_zeros(stop - start, stop - start)
        if self.heads:
            rows = slots(*split, position.cpu(), start - first)
            unseen *= rows.shape[-1]
        else:
            total.diagonal(start - first).copy_(position)
            rows = total
        if not bool(live.all()):
            rows[~live.to(rows.device)] = 0
        self.found[which][layer].add(rows, start, first, unseen)

    def end_layer(self, layer: int) -> None:
        """Choose, so that only what is kept stays in memory."""
        for found in self.found:
            found[layer].chosen()
        self._moving = self._cache = None

    def saved(self, layer: int, which: int) -> dict[str, Tensor]:
        return self.found[which][layer].saved()

    def restore(self, layer: int, which: int, tensors: dict[str, Tensor]) -> None:
        self.found[which][layer] = StreamingSelection.restored(self.rule, tensors)
