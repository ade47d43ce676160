"""What readings bring tile by tile, joined to whole prompts; one for each objective."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bounds import Range


def laid_out(x: Tensor, like: Tensor | None = None) -> Tensor:
    """A copy that lies in memory as what torch computes does: contiguous, in its own allocation.

    Matrix kernels may add up in another order where their operands lie otherwise (MKL promises
    the same bits only for operands aligned alike), and tensors read from a file lie wherever the
    file's header ends. What goes on from a file goes through here, and so does what goes on from
    a block that was just run: both bring the next block the same shapes, strides and alignment.

    Args:
        x: What to copy, of any strides.
        like: Whose dtype and device to take; ``x``'s own if left out.
    """
    like = x if like is None else like
    return torch.empty(x.shape, dtype=like.dtype, device=like.device).copy_(x)


@dataclass(eq=False)
class TileAccumulator:
    """What was read of one objective's backward, by name.

    Attributes:
        length: Positions of the prompt.
        kept: Over all positions, 0 where no relevance arrived; numbers are added up.
    """

    length: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    def take(self, brought: dict[str, Tensor], own: Range) -> None:
        """Put in what one tile's backward brought."""
        for name, value in brought.items():
            if value.ndim == 0:
                self.kept[name] = self.kept.get(name, torch.zeros_like(value.double())) + value
                continue
            whole = self.kept.get(name)
            if whole is None:
                shape = list(value.shape)
                shape[_axis(name)] = self.length
                whole = value.new_zeros(shape)
            dtype = torch.promote_types(whole.dtype, value.dtype)  # zeros came before a float64
            self.kept[name] = whole.to(dtype)
            self._part(name, own).copy_(value)

    def of(self, name: str, own: Range) -> Tensor | None:
        """What was read at one tile's positions; None before anything was."""
        return self._part(name, own) if name in self.kept else None

    def _part(self, name: str, own: Range) -> Tensor:
        return self.kept[name].narrow(_axis(name), own[0], own[1] - own[0])

    def drop(self, prefix: str) -> None:
        """Forget what was read below ``prefix``: it will be read anew."""
        for name in [name for name in self.kept if name.startswith(prefix)]:
            del self.kept[name]


def _axis(name: str) -> int:
    return 1 if name.endswith((".hook_z", ".z")) else 0  # [head, pos]


@dataclass(eq=False)
class BackwardState:
    """One objective's backward.

    Attributes:
        value: Δℓ, [].
        g: The gradient where the backward has come to, [1, pos, d_model].
        joined: What was read on the way.
    """

    value: Tensor
    g: Tensor
    joined: TileAccumulator
