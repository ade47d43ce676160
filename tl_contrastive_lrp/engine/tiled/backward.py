"""The backward in tiles: each block is run again, one tile of positions after the other.

Blocks are run from the last to the first, and the tiles of a block from the last to the first. By
causality only later tiles send gradients to a tile's keys and values, so these gradients are
complete when the backward reaches the tile, and one run of the block on the tile gives all its
gradients, the same as in a plain backward. Only the activations of one tile, heads · tile · pos
numbers, are held at a time. Several objectives share that run: each sends its own gradient back
through it.

Rules and readings are those of the plain engine; sums are assembled from the tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import Argument, Message, ModelStateError
from ...hooks.attach import Attachment, HookFn
from ...hooks.placement import attached, reading_hooks
from ...rules.functions import at_least_float32
from ...rules.precision import LOW, WideGradient, plain
from ..fused import FusedBlocks, kind_of
from ..memory import trim_heap
from ..reading import Reading, RelevanceSums, arranged
from .cache import Enough, ReplayCache
from .prefill import Prefill, first_of
from .tiles import BackwardState, TileAccumulator, laid_out

_TRIMMED_BLOCKS = 8  # where attention is fused; trimming after each block costs 7 % of the time


class TileReader(Protocol):
    """Reads further quantities while the backward runs, such as edges (``graph/edges/tiled.py``).

    ``layer`` is the number of the block, ``tile`` of the tile and ``which`` of the objective.
    """

    def readings(self, layer: int) -> list[Reading]:
        """What to read while the block runs."""
        ...

    def begin_layer(self, layer: int, forward: Prefill) -> None:
        """Called before the first tile of a block."""
        ...

    def begin_tile(self, layer: int, tile: int, cache: Any) -> None:
        """Called before the block runs on a tile, with the cache it is given."""
        ...

    def end_tile(self, layer: int, tile: int, read: TileAccumulator, which: int) -> None:
        """Called after an objective's backward through a tile, with its sums so far."""
        ...

    def end_layer(self, layer: int) -> None:
        """Called after the last tile of a block."""
        ...

    def saved(self, layer: int, which: int) -> dict[str, Tensor]:
        """What was read of a finished block, for a checkpoint."""
        ...

    def restore(self, layer: int, which: int, tensors: dict[str, Tensor]) -> None:
        """Take back what ``saved`` gave."""
        ...


def is_of_block(path: str, layer: int | None) -> bool:
    """Whether a component takes part when block ``layer`` runs (None: outside of all blocks)."""
    head, _, rest = path.partition(".")
    if head != "blocks":
        return True
    return layer is not None and rest.split(".")[0] == str(layer)


def as_gradient(g: Tensor, like: Tensor) -> Tensor:
    """A gradient stored in float32 or finer, in the dtype that autograd accepts for ``like``."""
    g = g.to(like.device)
    return WideGradient(g.float(), like.dtype) if like.dtype in LOW else g.to(like.dtype)


@dataclass(eq=False)
class _Flow:
    """One objective's gradients in one block, [1, pos, d_model] and [1, kv_head, pos, d_head]."""

    g: Tensor
    g_in: Tensor
    g_keys: Tensor
    g_values: Tensor

    @staticmethod
    def begun(g: Tensor, keys: Tensor, values: Tensor) -> _Flow:
        at_kv = (torch.zeros_like(at_least_float32(x)) for x in (keys, values))
        return _Flow(g, torch.zeros_like(g), *at_kv)

    def arrives(self, own: slice) -> bool:
        """Whether any gradient arrives at the block's output there."""
        return bool(self.g[:, own].any())

    def is_sent(self, own: slice) -> bool:
        """Whether later tiles have sent a gradient to the keys and values there."""
        return bool(self.g_keys[..., own, :].any() | self.g_values[..., own, :].any())


class Backward:
    """The backward of some objectives through the blocks and embeddings of one prefill."""

    def __init__(
        self,
        model: Any,
        attachments: tuple[Attachment, ...],
        sums: RelevanceSums,
        reader: TileReader | None,
        forward: Prefill,
        signals: Sequence[BackwardState],
        step: Callable[[], object],
        again: bool = False,
    ) -> None:
        self.model, self.attachments, self.sums, self.reader = model, attachments, sums, reader
        self.forward, self.signals, self.step = forward, signals, step
        self.again = again  # whether the forward serves another run after this one
        self.fused: FusedBlocks | None = None  # of the current block
        self._eager: set[str] = set()  # where what is read needs the scores or the pattern

    @property
    def attention(self) -> str:
        """How attention was computed, as results record it."""
        return kind_of(self.model, (self.forward.fused or frozenset()) - self._eager)

    def layer(self, layer: int) -> None:
        """Send the gradient of every objective from the block's output back to its input."""
        forward, reader = self.forward, self.reader
        keys, values = forward.keys[layer], forward.values[layer]
        flows = [_Flow.begun(signal.g, keys, values) for signal in self.signals]
        prefix = f"blocks.{layer}."
        own_rules = tuple(a for a in self.attachments if is_of_block(a.site.path, layer))
        readings = [r for r in self.sums.readings if r.name.startswith(prefix)]
        readings += reader.readings(layer) if reader is not None else []
        hooks = arranged(self.model, own_rules, readings)
        if forward.fused is not None:
            own = {path for path in forward.fused if path.startswith(prefix)}
            others = {a.site.path for a in own_rules} - own
            self.fused = FusedBlocks(self.model, own_rules, readings, (), others)
            self._eager |= own.difference(self.fused.candidates)
        if reader is not None:
            reader.begin_layer(layer, forward)
        for tile in reversed(range(len(forward.bounds))):
            # Fused attention makes tensors of few sizes, whose memory is used again.
            if self.fused is None or layer % _TRIMMED_BLOCKS == 0:
                trim_heap(tile)
            self._tile(layer, tile, flows, own_rules, hooks)
            self.step()
        if reader is not None:
            reader.end_layer(layer)
        for signal, flow in zip(self.signals, flows, strict=True):
            signal.g = laid_out(flow.g_in)

    def _tile(
        self,
        layer: int,
        tile: int,
        flows: list[_Flow],
        own_rules: tuple[Attachment, ...],
        hooks: tuple[list[tuple[str, HookFn]], list[tuple[str, HookFn]]],
    ) -> None:
        forward = self.forward
        start, stop = forward.bounds[tile]
        own, last = slice(start, stop), tile == forward.last  # the last always runs, for its shapes
        if tile > forward.last:
            return
        idle = not last and not any(flow.arrives(own) for flow in flows)
        if idle and not any(flow.is_sent(own) for flow in flows):  # no relevance comes here
            return
        keys, values = forward.keys[layer], forward.values[layer]
        past = slice(stop - forward.widths[layer][tile], start)
        before = tuple(x[..., past, :].detach().requires_grad_(True) for x in (keys, values))
        cache = ReplayCache(start, (before[0], before[1]), stop=idle)
        x = forward.inputs[layer][tile].detach().requires_grad_(True)
        if self.reader is not None:
            self.reader.begin_tile(layer, tile, cache)
        out = self._replayed(layer, tile, x, cache, own_rules, hooks)
        assert cache.own is not None
        for which, flow in enumerate(flows):
            ends = [
                (cache.own[0], flow.g_keys[..., own, :]),
                (cache.own[1], flow.g_values[..., own, :]),
            ]
            ends += [] if out is None else [(out, flow.g[:, own])]
            ends = [(y, g_y) for y, g_y in ends if y.requires_grad]
            gradients = torch.autograd.grad(
                [y for y, _ in ends],
                [x, *before],
                [as_gradient(g_y, y) for y, g_y in ends],
                allow_unused=True,
                retain_graph=which + 1 < len(flows),
            )
            if gradients[0] is not None:
                flow.g_in[:, own] = plain(gradients[0]).to(flow.g_in)
            for total, part in zip((flow.g_keys, flow.g_values), gradients[1:], strict=True):
                if part is not None:
                    total[..., past, :] += plain(part).to(total)
            read = self.signals[which].read
            read.add(self.sums.take(), (start, stop))
            if self.reader is not None:
                self.reader.end_tile(layer, tile, read, which)
        self.sums.clear()

    @contextmanager
    def _fused(self, tile: int) -> Iterator[None]:
        """Fused attention in the current block, whose value is that of the prefill."""
        fused, kept = self.fused, self.forward.kept
        if fused is None or kept is None:
            yield
            return
        kept.tile = tile
        with fused.active(kept.memory, kept.using):
            yield

    def _replayed(
        self,
        layer: int,
        tile: int,
        x: Tensor,
        cache: Any,
        own_rules: tuple[Attachment, ...],
        hooks: tuple[list[tuple[str, HookFn]], list[tuple[str, HookFn]]],
    ) -> Tensor | None:
        """The block's output on the tile, None where it was stopped at its keys and values."""
        args, kwargs = self.forward.call(layer, tile, x, cache)
        with (
            reading_hooks(self.model, hooks[0]),
            attached(self.model, own_rules),
            reading_hooks(self.model, hooks[1]),
            self._fused(tile),
        ):
            try:
                out = first_of(self.model.blocks[layer](*args, **kwargs))
            except Enough:
                return None
        before = self.forward.after(layer, tile)
        if not bool((out.detach() - before).abs().max() <= 1e-3 * before.abs().max()):
            raise ModelStateError(
                Message(
                    f"blocks.{layer} gives a different output when it is run again, so its "
                    "relevance would be wrong. Use ",
                    Argument("memory", "plain"),
                    ", and remove hooks that change values.",
                )
            )
        return out

    def embeddings(self) -> None:
        """Send the gradient of every objective from the first block's input to the embeddings."""
        read = [TileAccumulator(s.read.length, s.read.axes) for s in self.signals]
        for tile, (start, leaves) in enumerate(self.forward.starts):
            own = self.forward.bounds[tile]
            for which, signal in enumerate(self.signals):
                g = signal.g[:, slice(*own)]
                none = tile != self.forward.last and not bool(g.any())
                if not start.requires_grad or none:
                    continue
                torch.autograd.grad(
                    start, list(leaves.values()), as_gradient(g, start), allow_unused=True,
                    retain_graph=self.again or which + 1 < len(self.signals),
                )  # fmt: skip
                read[which].add(self.sums.take(), own)
        for signal, whole in zip(self.signals, read, strict=True):  # only once every tile succeeded
            signal.read.sums |= whole.sums
