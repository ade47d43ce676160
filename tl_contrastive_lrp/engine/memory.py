"""How much memory a run needs, how much is free, and which engine is planned for it.

The plain engine (``plain.py``) keeps the attention of every block for one backward pass: some
tensors of shape [head, pos, pos], and some of [pos, d_model] and [pos, d_mlp], per block. Where
attention is fused (``fused.py``), a block keeps none of the former. The tiled engine (``tiled/``)
keeps only block inputs, keys and values, with fused attention also what it gave, and the
activations of one tile. ``run_as_planned`` is the one place where a plan becomes a run in tiles, or
a plain run where tiles do not work after all.
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

from ..errors import Argument, Message, ModelStateError, NotTileableError
from ..inputs.tokens import model_device

Memory = Literal["auto", "plain", "tiled"]
T = TypeVar("T")

# Float32 tensors of shape [head, pos, pos] that the plain engine keeps per block, and those that
# its peak adds. Measured on four blocks of eight heads (benchmarks/long_context.py): 442 MiB at
# 1,024 and 1,511 MiB at 2,048 tokens, which is 12 such tensors; rounded up to 20, since soft-caps
# keep more.
_KEPT_BY_BLOCK = 4.0
_PEAK = 4.0
_WIDTHS = 24.0  # [pos, d_model] tensors per block
_NEURONS = 8.0  # [pos, d_mlp] tensors per block
# Float32 tensors of [head, pos, pos] that a forward without gradients holds at its peak. Measured
# on eight heads: 2.5 such tensors in all at 2,048 tokens, 2.3 at 4,096; more with soft-caps.
_FORWARD_PEAK = 4.0
# Tensors of [pos, pos] that are allowed for where all attention is fused: a mask that the model
# makes itself. Where transformers is asked for it by rows there is none. Measured on two blocks of
# width 576 (gim): 311, 650 and 1,214 MiB at 2,048, 4,096 and 8,192 tokens, which is 78 KB per block
# and position, of which widths and neurons below allow 110:
#   attribute(model, ids, objective, memory="plain", attention="fused") with benchmarks/_models.py's
#   random_bridge(2, 576, 8, 8192), resident memory before and at its highest
_MASKS = 1.0
_FORWARD_WIDTHS = 8.0  # [pos, d_model] tensors
_FORWARD_NEURONS = 3.0  # [pos, d_mlp] tensors
_LOGITS = 3.0  # [read positions, vocab] tensors in tiles: the logits, a copy, their gradient
_SAFE = 0.7  # share of the free memory that may be used
_BUDGET = 1 << 30  # bytes for the activations of one tile, where memory is plentiful
_BY_TILE = 12.0  # [head, tile, pos] tensors alive in the backward of one tile
_TILES = (16, 1024)  # the smallest and the largest tile chosen automatically
# The largest where attention is fused, and a tile costs what its positions cost. Two blocks of
# width 576, 4,097 tokens: 126, 202, 281, 475 MiB in tiles of 128, 1,024, 2,048, 4,096 positions,
# and 1.40, 1.05, 1.00, 0.96 of the time.
_LARGEST_FUSED = 2048
_EDGES_OF_TILE = 4.0  # [tile, pos] tensors for each matrix of edges, while they are selected
_TRIMMED_EVERY = 4  # tiles
# Share of a transition's edges that are allowed for where only the largest are kept. Mass 0.85 kept
# 2 to 9 % of them at 1,508 tokens of a model of 135M parameters.
_KEPT_SHARE = 0.2
_BY_EDGE = 40  # bytes per edge: its columns, and the copy made when they are concatenated


@dataclass(frozen=True)
class MemoryPlan:
    """How a run will use memory.

    Attributes:
        tile: Positions per tile; None for the plain engine.
        plain_bytes: Estimate of what the plain engine needs besides the model.
        free_bytes: What the device has free.
        why: Why tiles do not work, if the plain engine was planned for that reason; else "".
        given: Whether the user chose the tile size.
        tiles_required: Whether the user requested tiles, so that the plain engine may not be used.
    """

    tile: int | None
    plain_bytes: int
    free_bytes: int
    why: str = ""
    given: bool = False
    tiles_required: bool = False

    @property
    def memory(self) -> str:
        """Either "plain" or "tiled (tile N)", as results record it."""
        return "plain" if self.tile is None else f"tiled (tile {self.tile})"

    def __str__(self) -> str:
        need, free = gib(self.plain_bytes), gib(self.free_bytes)
        text = f"{self.memory}: without tiles about {need} are needed, {free} are free"
        return f"{text} (not in tiles: {self.why})" if self.why else text


def gib(size: float) -> str:
    """A number of bytes as text, such as "1.5 GiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def free_bytes(device: torch.device) -> int:
    """How many bytes the device has free."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + int(unused)
    import psutil

    return int(psutil.virtual_memory().available)


def in_smaller_tiles(attempt: Callable[[int], T], tile: int) -> T:
    """Call ``attempt(tile)``; while the GPU runs out of memory, halve the tile, warning once.

    Args:
        attempt: Takes the number of positions per tile. Each call starts over, so ``attempt``
            itself has to keep what earlier calls have finished.
        tile: The first tile size to try.

    Returns:
        What ``attempt`` returned.

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
                    f"The GPU ran out of memory; going on with tiles of {tile} positions (or "
                    "smaller ones, if necessary).",
                    stacklevel=4,
                )
            warned = True
        if torch.cuda.is_available():  # after the handler, when the error has released its tensors
            torch.cuda.empty_cache()


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # there is no such library, as on Windows
        return None
    return trim


def trim_heap(tile: int = 0) -> None:
    """Return free memory that the C library holds inside the process to the system.

    Tensors whose size changes from tile to tile leave free blocks in glibc's heap, more than a GiB
    of them. The heap is trimmed at every fourth tile only, since the memory has to be requested
    again.

    Args:
        tile: Number of the tile.
    """
    trim = _malloc_trim()
    if trim is not None and tile % _TRIMMED_EVERY == 0:
        trim(0)


def plain_bytes(
    model: Any,
    length: int,
    *,
    graphs: int = 0,
    by_head: bool = False,
    pruned: bool = False,
    fused: int = 0,
    read: int | None = None,
) -> int:
    """Estimate how many bytes the plain engine needs besides the model.

    Args:
        model: The bridge.
        length: Number of tokens in the prompt.
        graphs: Number of objectives for which edges are computed too: a [pos, pos] matrix per block
            and objective; where attention is fused, only the edges that are kept.
        by_head: Whether edges are split by head and path: 2 · head such matrices.
        pruned: Whether only the largest edges are kept.
        fused: Number of blocks whose attention is fused.
        read: Number of positions whose logits are read; None for all.
    """
    cfg = model.cfg
    layers, heads = int(cfg.n_layers), int(cfg.n_heads)
    square, eager = heads * length * length, max(layers - fused, 0)
    numbers = layers * length * _by_position(model) + eager * _KEPT_BY_BLOCK * square
    numbers += _PEAK * square if eager else _MASKS * length * length
    # Where attention is fused, the logits of other positions are not computed.
    rows = length if read is None or not fused else read
    numbers += 2 * rows * int(cfg.d_vocab)
    if graphs:
        edges = (2 * heads if by_head else 1) * length * length / 2
        by_edge = _BY_EDGE / 4
        if fused >= layers:
            share = _KEPT_SHARE if pruned else 1.0
            numbers += (layers * graphs * share + 1) * by_edge * edges
        else:  # one block's matrix, and the edges of all
            numbers += (4 * graphs + layers * graphs + 1) * by_edge * edges
    return int(4 * numbers)


def _by_position(model: Any) -> float:
    """Numbers that a block with gradients holds per position, besides attention's."""
    width = int(model.cfg.d_model)
    return _WIDTHS * width + _NEURONS * int(getattr(model.cfg, "d_mlp", None) or 4 * width)


def forward_bytes(model: Any, length: int, *, fused: int = 0) -> int:
    """Estimate how many bytes a forward without gradients and without tiles needs.

    Args:
        model: The bridge.
        length: Number of tokens in the prompt.
        fused: Number of blocks whose attention is fused.
    """
    cfg = model.cfg
    width = int(cfg.d_model)
    neurons = int(getattr(cfg, "d_mlp", None) or 4 * width)
    by_position = _FORWARD_WIDTHS * width + _FORWARD_NEURONS * neurons + 2 * int(cfg.d_vocab)
    all_fused = fused >= int(cfg.n_layers)
    squares = _MASKS if all_fused else _FORWARD_PEAK * int(cfg.n_heads)
    return int(4 * length * (squares * length + by_position))


def fits_forward(model: Any, length: int, *, fused: int = 0) -> bool:
    """Whether a forward without gradients and without tiles fits into the free memory."""
    return forward_bytes(model, length, fused=fused) <= _SAFE * free_bytes(model_device(model))


def tile_for(
    model: Any, length: int, free: int, *, fused: int = 0, edges: int = 0, read: int = 1
) -> int:
    """Positions per tile, a power of two, so that the activations of one tile fit the budget.

    Args:
        model: The bridge.
        length: Number of tokens in the prompt.
        free: Bytes that the device has free.
        fused: Number of blocks whose attention is fused.
        edges: Number of [tile, pos] matrices that the edges of one tile are; 0 without edges.
        read: Number of positions whose logits are kept, beside the tile's activations.
    """
    logits = 4 * _LOGITS * read * int(model.cfg.d_vocab)
    budget = min(_BUDGET, max(_SAFE * free - logits, 0) / 2)
    least, most = _TILES
    by_position = _BY_TILE * int(model.cfg.n_heads) * length
    if fused >= int(model.cfg.n_layers):
        squares = _MASKS + _EDGES_OF_TILE * edges
        by_position, most = _by_position(model) + squares * length, _LARGEST_FUSED
    room = budget / (4 * by_position)
    return max(least, min(most, 1 << int(math.log2(max(room, 1)))))


def plan_memory(
    model: Any,
    length: int,
    memory: Memory = "auto",
    tile: int | None = None,
    *,
    graphs: int = 0,
    by_head: bool = False,
    pruned: bool = False,
    plain_only: str = "",
    fused: int = 0,
    read: int | None = None,
) -> MemoryPlan:
    """Plan a run: with or without tiles, and how large they are.

    Args:
        model: The bridge.
        length: Number of tokens in the prompt.
        memory: "plain" or "tiled", or "auto", which takes tiles where the plain engine would not
            fit into the free memory.
        tile: Positions per tile, if the user chose them.
        graphs: Number of objectives for which edges are computed too.
        by_head: Whether edges are split by head and path.
        pruned: Whether only the largest edges are kept.
        plain_only: Why the request cannot be computed in tiles, as a sentence; "" if it can.
        fused: Number of blocks whose attention is fused (``fused.fused_blocks``).
        read: Number of positions whose logits are read; None for one or an unknown number.

    Raises:
        ValueError: an unknown ``memory``; a tile that is no positive number; "tiled" although
            ``plain_only`` rules it out.
        ModelStateError: ``plain_only``, and the plain engine would not fit.
    """
    if memory not in get_args(Memory):
        raise ValueError(f"memory={memory!r} is unknown; use 'auto', 'plain' or 'tiled'.")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile={tile!r} must be a number of positions, 1 or more.")
    if tile is not None and memory == "plain":
        raise ValueError("tile= belongs to memory='tiled' (or 'auto'); leave it out.")
    free = free_bytes(model_device(model))
    need = plain_bytes(
        model, length, graphs=graphs, by_head=by_head, pruned=pruned, fused=fused, read=read
    )
    if memory == "plain" or (memory == "auto" and need <= _SAFE * free):
        return MemoryPlan(None, need, free)
    required, given = memory == "tiled", tile is not None
    split = (2 * int(model.cfg.n_heads) if by_head else 1) if graphs else 0
    chosen = tile or tile_for(
        model, length, free, fused=fused, edges=split, read=1 if read is None else read
    )
    plan = MemoryPlan(chosen, need, free, given=given, tiles_required=required)
    if not plain_only:
        return plan
    if required:
        raise ValueError(plain_only)
    return require_plain_fits(plan, plain_only)


def run_as_planned(
    plan: MemoryPlan, tiled: Callable[[MemoryPlan], T], plain: Callable[[MemoryPlan], T]
) -> T:
    """Run in tiles if they are planned and work for the model, else with the plain engine.

    Args:
        plan: From ``plan_memory``.
        tiled: Runs in tiles of ``plan.tile`` positions.
        plain: Runs without tiles. If tiles were planned, the plan passed to it says why.

    Returns:
        The result of the function that ran.

    Raises:
        NotTileableError: tiles do not work, and the user requested them.
        ModelStateError: tiles do not work, and the plain engine would not fit.
    """
    if plan.tile is None:
        return plain(plan)
    try:
        return tiled(plan)
    except NotTileableError as error:
        reason: str = error.args[0]
        if plan.tiles_required:
            need, free = gib(plan.plain_bytes), gib(plan.free_bytes)
            raise NotTileableError(
                Message(
                    "This model cannot run in tiles: ",
                    reason,
                    " Use ",
                    Argument("memory", "plain"),
                    f", which needs about {need} for this prompt; {free} are free.",
                )
            ) from error
        return plain(require_plain_fits(plan, reason))


def require_plain_fits(plan: MemoryPlan, reason: str) -> MemoryPlan:
    """The plan for the plain engine, where tiles do not work.

    Args:
        plan: The plan for tiles.
        reason: Why they do not work, as a sentence.

    Raises:
        ModelStateError: the plain engine would not fit.
    """
    if plan.plain_bytes > _SAFE * plan.free_bytes:
        raise ModelStateError(
            Message(
                f"This prompt needs about {gib(plan.plain_bytes)} without tiles, and "
                f"{gib(plan.free_bytes)} are free; in tiles it cannot run: ",
                reason,
                " Shorten the prompt, or give ",
                Argument("memory", "plain"),
                " to try it anyway.",
            )
        )
    return MemoryPlan(None, plan.plain_bytes, plan.free_bytes, reason)


def require_room_for_edges(
    plan: MemoryPlan, transitions: int, length: int, *, graphs: int = 1
) -> None:
    """Refuse a full graph, computed in tiles, whose edges alone would not fit.

    Args:
        plan: The plan for tiles; a user who requested tiles is not refused.
        transitions: Number of transitions between sites.
        length: Number of tokens in the prompt.
        graphs: Full graphs that are in memory at once; with several, none can be pruned before.

    Raises:
        ModelStateError: the edges would not fit.
    """
    edges = transitions * length * (length + 1) // 2
    need = graphs * edges * _BY_EDGE
    if plan.tiles_required or need <= _SAFE * plan.free_bytes:
        return
    holds = (
        f"The full graph of this prompt has up to {edges:,} edges, about {gib(need)}; "
        f"{gib(plan.free_bytes)} are free. "
    )
    if graphs > 1:
        raise ModelStateError(
            f"{holds}Edges of two answers are pruned only when they are added up, so all must fit. "
            "Explain the first token where the answers differ, with clrp.logit_diff, or shorten "
            "the prompt."
        )
    raise ModelStateError(
        Message(
            f"{holds}Keep only the largest as it is computed, with ",
            Argument("mass", 0.85),
            ", or give ",
            Argument("threshold"),
            " or ",
            Argument("top_k"),
            ".",
        )
    )
