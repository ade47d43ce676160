"""What the plain way needs in memory, what there is, and which way is taken.

The plain way (``backward.run``) keeps every block's attention for the backward: a number of
[head, pos, pos] tensors a block, and a number of [pos, d_model] and [pos, d_mlp] ones. In tiles
(``tiled_backward.py``) only block inputs, keys and values are kept, and one tile's activations.
"""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_args

import torch

from ..errors import Argument, Message, ModelStateError
from ..inputs.tokens import model_device

Memory = Literal["auto", "plain", "tiled"]
T = TypeVar("T")

# Float32 tensors of [head, pos, pos] that the plain way keeps a block, and beside them at its
# peak. Measured on four blocks of eight heads (benchmarks/long_context.py): 442 MiB at 1,024 and
# 1,511 MiB at 2,048 tokens, in all 12 such tensors; rounded up to 20, since soft-caps keep more.
_KEPT_BY_BLOCK = 4.0
_PEAK = 4.0
_WIDTHS = 24.0  # [pos, d_model] tensors a block
_NEURONS = 8.0  # [pos, d_mlp] tensors a block
# Float32 tensors of [head, pos, pos] that a forward without gradients holds at its peak. Measured
# on eight heads: 2.5 such tensors in all at 2,048 tokens, 2.3 at 4,096; more with soft-caps.
_FORWARD_PEAK = 4.0
_FORWARD_WIDTHS = 8.0  # [pos, d_model] tensors
_FORWARD_NEURONS = 3.0  # [pos, d_mlp] tensors
_SAFE = 0.7  # share of the free memory that is used
_BUDGET = 1 << 30  # bytes of one tile's activations, where memory is plenty
_BY_TILE = 12.0  # [head, tile, pos] tensors alive in the backward of one tile
_TILES = (16, 1024)
_TRIMMED_EVERY = 4  # tiles
_BY_EDGE = 40  # bytes of an edge's columns, and of putting them together


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses memory.

    Attributes:
        tile: Positions a tile; None is the plain way.
        plain_bytes: What the plain way needs beside the model, estimated.
        free_bytes: What the device has free.
        why: A word on it, "" where the choice was the user's.
        given: Whether the tile is the user's.
    """

    tile: int | None
    plain_bytes: int
    free_bytes: int
    why: str = ""
    given: bool = False

    @property
    def memory(self) -> str:
        """ "plain", or "tiled (tile N)"."""
        return "plain" if self.tile is None else f"tiled (tile {self.tile})"

    def __str__(self) -> str:
        """With the figures."""
        need, free = gib(self.plain_bytes), gib(self.free_bytes)
        text = f"{self.memory}: the plain way needs about {need}, {free} are free"
        return f"{text} ({self.why})" if self.why else text


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """What the device has free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    import psutil

    return int(psutil.virtual_memory().available)


def in_smaller_tiles(attempt: Callable[[int], T], tile: int) -> T:
    """What ``attempt`` gives for a tile, halved with one warning until the GPU has room for it.

    Raises:
        torch.OutOfMemoryError: tiles of 16 positions do not fit either.
    """
    warned = False
    while True:
        try:
            return attempt(tile)
        except torch.OutOfMemoryError:
            if tile <= _TILES[0]:
                raise
            tile //= 2
            if not warned:
                warnings.warn(
                    f"The GPU ran out of memory; going on with tiles of {tile} positions (and "
                    "smaller ones, if need be).",
                    stacklevel=4,
                )
            warned = True
        if torch.cuda.is_available():  # not before the error has let go of its tensors
            torch.cuda.empty_cache()


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no such library to ask, as on Windows
        return None
    return found


def trim_heap(tile: int = 0) -> None:
    """Have the C library give memory that is free inside the process back to the system.

    Tensors whose size changes from tile to tile leave holes that glibc keeps, more than a GiB of
    them. Done at some tiles only, since what is given back has to be asked for again.
    """
    trim = _malloc_trim()
    if trim is not None and tile % _TRIMMED_EVERY == 0:
        trim(0)


def plain_bytes(model: Any, length: int, *, graphs: int = 0, by_head: bool = False) -> int:
    """Estimate of what the plain way takes beside the model, in bytes.

    Args:
        model: The bridge.
        length: Tokens of the prompt.
        graphs: For how many objectives edges are wanted too, a [pos, pos] matrix a block.
        by_head: Whether by head and path, 2 · head such matrices.
    """
    cfg = model.cfg
    layers, heads, width = int(cfg.n_layers), int(cfg.n_heads), int(cfg.d_model)
    neurons = int(getattr(cfg, "d_mlp", None) or 4 * width)
    square = heads * length * length
    numbers = layers * (_KEPT_BY_BLOCK * square + length * (_WIDTHS * width + _NEURONS * neurons))
    numbers += _PEAK * square + 2 * length * int(cfg.d_vocab)
    if graphs:
        split = 2 * heads if by_head else 1
        # the matrices, and the edges as columns, of which every objective has its own
        numbers += (layers + 3) * (1 + 3 * graphs) * split * length * length
    return int(4 * numbers)


def forward_bytes(model: Any, length: int) -> int:
    """Estimate of what a plain forward without gradients takes beside the model, in bytes."""
    cfg = model.cfg
    width = int(cfg.d_model)
    neurons = int(getattr(cfg, "d_mlp", None) or 4 * width)
    by_position = _FORWARD_WIDTHS * width + _FORWARD_NEURONS * neurons + 2 * int(cfg.d_vocab)
    return int(4 * length * (_FORWARD_PEAK * int(cfg.n_heads) * length + by_position))


def fits_forward(model: Any, length: int) -> bool:
    """Whether there is room for a plain forward without gradients."""
    return forward_bytes(model, length) <= _SAFE * free_bytes(model_device(model))


def tile_for(model: Any, length: int, free: int) -> int:
    """Positions a tile so that one tile's activations fit a budget: a power of two."""
    budget = min(_BUDGET, _SAFE * free / 2)
    room = budget / (4 * _BY_TILE * int(model.cfg.n_heads) * length)
    least, most = _TILES
    return max(least, min(most, 1 << int(math.log2(max(room, 1)))))


def choose(
    model: Any,
    length: int,
    memory: Memory = "auto",
    tile: int | None = None,
    *,
    graphs: int = 0,
    by_head: bool = False,
) -> MemoryPlan:
    """Plain or tiled, and the size of tiles.

    Args:
        model: The bridge.
        length: Tokens of the prompt.
        memory: "plain" and "tiled" are done as said; "auto" takes tiles where the plain way would
            not fit what the device has free.
        tile: Positions a tile, if it is not to be chosen.
        graphs, by_head: As for ``plain_bytes``.

    Raises:
        ValueError: an unknown ``memory`` or a tile that is none.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory={memory!r} is unknown; use 'auto', 'plain' or 'tiled'.")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile={tile!r} must be a number of positions, 1 or more.")
    if tile is not None and memory == "plain":
        raise ValueError("tile= belongs to memory='tiled' (or 'auto'); leave it out.")
    free = free_bytes(model_device(model))
    need = plain_bytes(model, length, graphs=graphs, by_head=by_head)
    fits = need <= _SAFE * free
    if memory == "plain" or (memory == "auto" and fits):
        return MemoryPlan(None, need, free)
    return MemoryPlan(tile or tile_for(model, length, free), need, free, given=tile is not None)


def cannot(choice: MemoryPlan, reason: object) -> Message:
    """What to say where tiles were asked for and do not work."""
    need, free = gib(choice.plain_bytes), gib(choice.free_bytes)
    return Message(
        f"This model cannot run in tiles: {reason} Use ",
        Argument("memory", "plain"),
        f", which needs about {need} for this prompt; {free} are free.",
    )


def require_plain_fits(choice: MemoryPlan, reason: str) -> MemoryPlan:
    """The plain way where tiles do not work.

    Raises:
        ModelStateError: the plain way does not fit.
    """
    if choice.plain_bytes > _SAFE * choice.free_bytes:
        raise ModelStateError(
            Message(
                f"This prompt needs about {gib(choice.plain_bytes)} the plain way, and "
                f"{gib(choice.free_bytes)} are free; in tiles it cannot run: {reason} Shorten the "
                "prompt, or give ",
                Argument("memory", "plain"),
                " to try all the same.",
            )
        )
    return MemoryPlan(None, choice.plain_bytes, choice.free_bytes, f"not in tiles: {reason}")


def require_room(
    transitions: int, length: int, pruned: object, memory: Memory, choice: MemoryPlan
) -> None:
    """Refuse a full graph whose edges alone would not fit.

    Raises:
        ModelStateError: it is not pruned on the way, and too large.
    """
    edges = transitions * length * (length + 1) // 2
    need = edges * _BY_EDGE
    if not pruned and memory == "auto" and need > _SAFE * choice.free_bytes:
        raise ModelStateError(
            Message(
                f"The full graph of this prompt has up to {edges:,} edges, about {gib(need)}; "
                f"{gib(choice.free_bytes)} are free. Keep the largest while it is made, with ",
                Argument("mass", 0.85),
                ", or give ",
                Argument("threshold"),
                " or ",
                Argument("top_k"),
                ".",
            )
        )
