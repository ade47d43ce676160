"""The backward in tiles: each block is run again, one tile of positions after the other.

From the last block to the first, and within a block from the last tile to the first: by causality
only later tiles send gradients to a tile's keys and values, so these are complete when its turn
comes, and one run of the block on the tile gives all its gradients, the same as a plain backward.
What it takes is a tile's activations, heads · tile · pos numbers, at a time.

The rules and readings are those of ``backward.run``; what readings keep is joined over tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .attachment import Attachment, HookFn
from .backward import Reading, arranged
from .errors import ModelStateError
from .placement import attached, reading_hooks
from .precision import LOW, WideGradient, plain
from .rules import at_least_float32
from .sums import Sums
from .tiles import Prefill, first_of


class TileReader(Protocol):
    """What else is read while the backward runs; see ``tiled_edges.py``."""

    def readings(self, layer: int) -> list[Reading]: ...

    def begin_layer(self, layer: int, forward: Prefill, last: int) -> None: ...

    def begin_tile(self, layer: int, tile: int, cache: Any) -> None: ...

    def end_tile(self, layer: int, tile: int, joined: Joined) -> None: ...

    def saved(self, layer: int) -> dict[str, Tensor]: ...

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None: ...


@dataclass(eq=False)
class Joined:
    """What readings kept of each tile, by name."""

    bounds: tuple[tuple[int, int], ...]
    parts: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def take(self, sums: Sums, tile: int) -> None:
        """What one tile's backward brought; the sums are emptied for the next."""
        for name, value in sums.kept.items():
            self.parts.setdefault(name, {})[tile] = value
        sums.kept.clear()

    def of(self, name: str, tile: int) -> Tensor | None:
        return self.parts.get(name, {}).get(tile)

    def whole(self) -> dict[str, Tensor]:
        """By name, over all positions; 0 where no relevance arrived."""
        return {name: self._whole(name, parts) for name, parts in self.parts.items()}

    def _whole(self, name: str, parts: dict[int, Tensor]) -> Tensor:
        some = next(iter(parts.values()))
        if some.ndim == 0:
            return torch.stack([parts[tile].double() for tile in sorted(parts)]).sum().to(some)
        axis = 1 if name.endswith((".hook_z", ".z")) else 0  # [head, pos]

        def zeros(tile: int) -> Tensor:
            shape = list(some.shape)
            shape[axis] = self.bounds[tile][1] - self.bounds[tile][0]
            return some.new_zeros(shape)

        tiles = range(len(self.bounds))
        return torch.cat([parts[t] if t in parts else zeros(t) for t in tiles], dim=axis)


def is_of_block(path: str, layer: int | None) -> bool:
    """Whether something at ``path`` takes part when that block runs (None: outside of all)."""
    head, _, rest = path.partition(".")
    if head != "blocks":
        return True
    return layer is not None and rest.split(".")[0] == str(layer)


def as_gradient(g: Tensor, like: Tensor) -> Tensor:
    """A gradient kept in float32 or finer, as autograd wants it for ``like``."""
    g = g.to(like.device)
    return WideGradient(g.float(), like.dtype) if like.dtype in LOW else g.to(like.dtype)


class Backward:
    def __init__(
        self,
        model: Any,
        attachments: tuple[Attachment, ...],
        sums: Sums,
        reader: TileReader | None,
        forward: Prefill,
        joined: Joined,
        step: Callable[[], None],
    ) -> None:
        self.model, self.attachments, self.sums, self.reader = model, attachments, sums, reader
        self.forward, self.joined, self.step = forward, joined, step
        self.last = next(  # tiles after it have no part in the objective
            t for t, (_, stop) in enumerate(forward.bounds) if forward.wanted.stop <= stop
        )

    def layer(self, layer: int, g: Tensor) -> Tensor:
        """The gradient at the block's input from that at its output, both [1, pos, d_model]."""
        from .tile_cache import ReplayCache

        forward, reader = self.forward, self.reader
        keys, values = forward.keys[layer], forward.values[layer]
        g_keys, g_values = (torch.zeros_like(at_least_float32(x)) for x in (keys, values))
        g_in = torch.zeros_like(g)
        prefix = f"blocks.{layer}."
        mine = tuple(a for a in self.attachments if is_of_block(a.site.path, layer))
        readings = [r for r in self.sums.readings if r.name.startswith(prefix)]
        readings += reader.readings(layer) if reader is not None else []
        hooks = arranged(self.model, mine, readings)
        if reader is not None:
            reader.begin_layer(layer, forward, self.last)
        for tile in reversed(range(len(forward.bounds))):
            start, stop = forward.bounds[tile]
            own = slice(start, stop)
            g_tile = g[:, own]
            idle = tile != self.last and not bool(g_tile.any())  # one is run, to find shapes
            sent = g_keys[..., own, :].any() | g_values[..., own, :].any()
            if tile > self.last or (idle and not bool(sent)):  # no relevance comes here
                self.step()
                continue
            past = slice(stop - forward.widths[layer][tile], start)
            before = tuple(x[..., past, :].detach().requires_grad_(True) for x in (keys, values))
            cache = ReplayCache(start, (before[0], before[1]), stop=idle)
            x = forward.inputs[layer][tile].detach().requires_grad_(True)
            if reader is not None:
                reader.begin_tile(layer, tile, cache)
            out = self._replayed(layer, tile, x, cache, mine, hooks)
            assert cache.own is not None
            ends = [(cache.own[0], g_keys[..., own, :]), (cache.own[1], g_values[..., own, :])]
            ends += [] if out is None else [(out, g_tile)]
            ends = [(y, g_y) for y, g_y in ends if y.requires_grad]
            found = torch.autograd.grad(
                [y for y, _ in ends],
                [x, *before],
                [as_gradient(g_y, y) for y, g_y in ends],
                allow_unused=True,
            )
            if found[0] is not None:
                g_in[:, own] = plain(found[0]).to(g_in)
            for total, part in zip((g_keys, g_values), found[1:], strict=True):
                if part is not None:
                    total[..., past, :] += plain(part).to(total)
            self.joined.take(self.sums, tile)
            if reader is not None:
                reader.end_tile(layer, tile, self.joined)
            self.step()
        return g_in

    def _replayed(
        self,
        layer: int,
        tile: int,
        x: Tensor,
        cache: Any,
        mine: tuple[Attachment, ...],
        hooks: tuple[list[tuple[str, HookFn]], list[tuple[str, HookFn]]],
    ) -> Tensor | None:
        """The block's output on the tile, None where it was stopped at its keys and values."""
        from .tile_cache import Enough

        args, kwargs = self.forward.call(layer, tile, x, cache)
        with (
            reading_hooks(self.model, hooks[0]),
            attached(self.model, mine),
            reading_hooks(self.model, hooks[1]),
        ):
            try:
                out = first_of(self.model.blocks[layer](*args, **kwargs))
            except Enough:
                return None
        wanted = self.forward.after(layer, tile)
        if not bool((out.detach() - wanted).abs().max() <= 1e-3 * wanted.abs().max()):
            raise ModelStateError(
                f"blocks.{layer} does not give the same output when it is run again, so its "
                "relevance would be wrong. Use memory='plain', and remove hooks that change values."
            )
        return out

    def embeddings(self, g: Tensor) -> None:
        """From the first block's input to the embeddings."""
        for tile, (start, leaves) in enumerate(self.forward.starts):
            own = slice(*self.forward.bounds[tile])
            none = tile != self.last and not bool(g[:, own].any())
            if tile > self.last or not start.requires_grad or none:
                continue
            torch.autograd.grad(
                start, list(leaves.values()), as_gradient(g[:, own], start), allow_unused=True
            )
            self.joined.take(self.sums, tile)
