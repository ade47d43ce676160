"""A prompt cut into tiles: their bounds, and tensors reassembled from them.

Tensors read tile by tile become tensors over the whole prompt in a ``TileAccumulator``. Boolean
masks, of which a forward keeps one per tile, are stored as bits.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...inputs.objective import positions_read
from ..reading import pos_axis

Range = tuple[int, int]
_PACKED_FROM = 4096  # elements; smaller tensors are kept as they are


def read_ranges(objectives: Sequence[Callable[[Tensor], Tensor]], length: int) -> tuple[Range, ...]:
    """The ranges (start, stop) of positions whose logits the objectives read, in rising order.

    Positions beside each other are one range, so a span is cut into tiles as other positions are.
    All positions are one range if it is not known which ones an objective reads.
    """
    read = positions_read(objectives, length)
    return ((0, length),) if read is None else runs(read)


def runs(positions: Sequence[int]) -> tuple[Range, ...]:
    """Rising positions as ranges (start, stop) without gaps."""
    firsts = [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p - 1]
    lasts = [p for i, p in enumerate(positions) if positions[i + 1 : i + 2] != (p + 1,)]
    return tuple((first, last + 1) for first, last in zip(firsts, lasts, strict=True))


def tile_bounds(length: int, tile: int, ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Bounds of tiles of at most ``tile`` positions, each inside one range or outside of all."""
    ends = sorted({0, length, *(end for range_ in ranges for end in range_)})
    return tuple(
        (begin, min(begin + tile, stop))
        for start, stop in pairwise(ends)
        for begin in range(start, stop, tile)
    )


def is_read(start: int, ranges: Sequence[Range]) -> bool:
    """Whether the logits of the tile that begins at ``start`` are read."""
    return any(first <= start < stop for first, stop in ranges)


def lies_in(one: Range, ranges: Sequence[Range]) -> bool:
    """Whether one of some ranges holds a range whole."""
    return any(first <= one[0] and one[1] <= stop for first, stop in ranges)


def holds(tile: Range, positions: Sequence[int]) -> bool:
    """Whether any of some rising positions lies in a tile."""
    return bisect_left(positions, tile[0]) < bisect_left(positions, tile[1])


@dataclass(frozen=True, eq=False)
class BitMask:
    """A tensor that holds two values, stored as one bit per element.

    Attributes:
        bits: Eight elements per byte.
        shape: Shape of the tensor.
        low, high: The two values.
    """

    bits: Tensor
    shape: torch.Size
    low: Tensor
    high: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Any:
        """Pack a tensor, or return it as it is if it is small or holds more than two values."""
        if tensor.numel() < _PACKED_FROM or tensor.is_complex():
            return tensor
        flat = tensor.flatten()
        low, high = flat.min(), flat.max()
        set_ = flat == high
        if not bool((set_ | (flat == low)).all()):
            return tensor
        padded = torch.nn.functional.pad(set_.to(torch.uint8), (0, -len(flat) % 8)).view(-1, 8)
        weights = 2 ** torch.arange(8, device=flat.device, dtype=torch.uint8)
        return BitMask((padded * weights).sum(-1, dtype=torch.uint8), tensor.shape, low, high)

    def unpacked(self) -> Tensor:
        """The tensor as it was."""
        places = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        set_ = self.bits[:, None].bitwise_right_shift(places).bitwise_and_(1).flatten()
        set_ = set_[: self.shape.numel()].bool()
        return torch.where(set_, self.high, self.low).view(self.shape)


def laid_out(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Copy a tensor into a contiguous allocation of its own, as if torch had just computed it.

    Matrix kernels may add in another order where their operands are laid out differently (MKL
    promises the same bits only for operands of equal alignment), and a tensor read from a file lies
    wherever the header of the file ends. Gradients pass through this function both when a block has
    just been run and when they were read from a checkpoint, so the next block receives the same
    shapes, strides and alignment in both cases.

    Args:
        x: A tensor with any strides.
        like: The tensor whose dtype and device to use; ``x`` itself by default.
    """
    like = x if like is None else like
    return torch.empty(x.shape, dtype=like.dtype, device=like.device).copy_(x)


@dataclass(eq=False)
class TileAccumulator:
    """The sums of relevance of one objective's backward, assembled from tiles.

    Attributes:
        length: Number of positions in the prompt.
        axes: The einops pattern of each sum (``RelevanceSums.axes``).
        sums: By name, over all positions; 0 where no relevance arrived. Sums without axes are added
            up over tiles.
    """

    length: int
    axes: Mapping[str, str]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, sums: dict[str, Tensor], tile: Range) -> None:
        """Add the sums of one tile's backward."""
        for name, value in sums.items():
            if value.ndim == 0:
                self.sums[name] = self.sums.get(name, torch.zeros_like(value.double())) + value
                continue
            whole = self.sums.get(name)
            if whole is None:
                shape = list(value.shape)
                shape[pos_axis(self.axes, name)] = self.length
                whole = value.new_zeros(shape)
            dtype = torch.promote_types(whole.dtype, value.dtype)  # zeros precede a float64 value
            self.sums[name] = whole.to(dtype)
            self._part(name, tile).copy_(value)

    def at(self, name: str, tile: Range) -> Tensor | None:
        """The sums under ``name`` at one tile's positions; None before there are any."""
        return self._part(name, tile) if name in self.sums else None

    def _part(self, name: str, tile: Range) -> Tensor:
        return self.sums[name].narrow(pos_axis(self.axes, name), tile[0], tile[1] - tile[0])

    def drop(self, prefix: str) -> None:
        """Discard what was read at HookPoints below ``prefix``, which will be read again."""
        for name in [name for name in self.sums if name.startswith(prefix)]:
            del self.sums[name]


@dataclass(eq=False)
class BackwardState:
    """The progress of one objective's backward.

    Attributes:
        value: Δℓ, [].
        g: The gradient at the input of the last finished block, [1, pos, d_model].
        read: The sums read so far.
    """

    value: Tensor
    g: Tensor
    read: TileAccumulator
