"""What a prefill's fused attention gave, kept so that a replay need not compute it again.

A replay computes queries, keys and values again, and the backward of attention recomputes its rows
from them (``rules/query_tiles.py``). So if z, the pattern times the values, is kept, which is
linear in the prompt, the forward of attention is left out: the part of a replay that grows with the
square of the prompt. Attention at the tile's last position is computed all the same: if it is
another than in the prefill, what was kept is not used, and the replay finds out that the block
gives another output.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ...rules.precision import LOW
from ...rules.query_tiles import Attend, Attention, attend, last_row
from ...rules.visible import MaskMemory

_SLACK = 1e-3  # as for a block's output
_SLACK_LOW = 2e-2  # a few roundings of bfloat16


class KeptAttention:
    """The fused attention of each component on each tile.

    Attributes:
        tile: The number of the tile that is run.
        memory: Remembers the masks of all tiles.
    """

    def __init__(self) -> None:
        self.tile = 0
        self.memory = MaskMemory()
        self._kept: dict[tuple[str, int], tuple[Tensor, int]] = {}

    def keeping(self, path: str) -> Attend:
        """What computes a component's attention in the prefill, and keeps it."""

        def computed(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
            z = attend(q, k, v, attention)
            self._kept[path, self.tile] = z.detach(), z._version
            return z

        return computed

    def using(self, path: str) -> Attend:
        """What gives a component's attention in a replay, with its gradient."""

        def recalled(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
            z, version = self._kept.get((path, self.tile), (None, 0))
            if z is None or z._version != version:  # written into since
                return attend(q, k, v, attention)
            known = z if _agree(z[..., -1:, :], last_row(q, k, v, attention)) else None
            return attend(q, k, v, attention, known)

        return recalled


def _agree(
    z: Float[Tensor, "batch head 1 d_head"], again: Float[Tensor, "batch head 1 d_head"]
) -> bool:
    slack = _SLACK_LOW if z.dtype in LOW else _SLACK
    return bool((again - z).abs().max() <= slack * z.abs().max())
