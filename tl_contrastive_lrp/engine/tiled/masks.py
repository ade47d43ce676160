"""Masks at one bit a number: a forward in tiles keeps one a tile, pos numbers for each position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_PACKED_FROM = 4096  # numbers; smaller tensors are kept as they are


@dataclass(frozen=True, eq=False)
class BitMask:
    """A tensor of two values, a mask, at one bit a number."""

    bits: Tensor
    shape: torch.Size
    low: Tensor
    high: Tensor

    @staticmethod
    def of(tensor: Tensor) -> Any:
        """The tensor packed, or itself where it is small or has more values than two."""
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
        places = torch.arange(8, device=self.bits.device, dtype=torch.uint8)
        set_ = self.bits[:, None].bitwise_right_shift(places).bitwise_and_(1).flatten()
        set_ = set_[: self.shape.numel()].bool()
        return torch.where(set_, self.high, self.low).view(self.shape)
