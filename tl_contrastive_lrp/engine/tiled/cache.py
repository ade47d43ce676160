"""Key-value caches for a forward in tiles and for running single blocks of it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...errors import NotTileableError


class Enough(Exception):
    """The keys and values have been computed; the rest of the block is not needed."""


class RecordingCache(DynamicCache):  # type: ignore[misc]
    """The model's own cache for a forward in tiles, which also keeps what sliding windows drop.

    Attributes:
        keys, values: By layer, [1, kv_head, pos, d_head].
        widths: By layer, how many keys each tile saw, including its own.
        updated: The layers that have added the keys and values of the current tile.
    """

    def __init__(self, config: Any, length: int, n_layers: int) -> None:
        super().__init__(config=config)
        self.length = length
        self.keys: dict[int, Tensor] = {}
        self.kept_values: dict[int, Tensor] = {}
        self.widths: list[list[int]] = [[] for _ in range(n_layers)]
        self.layer = -1  # the block that runs
        self.start = 0
        self.stop = 0

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See ``DynamicCache``.

        Raises:
            NotTileableError: a layer does not use the cache as causal attention does.
        """
        tile = self.stop - self.start
        if layer_idx != self.layer or k.shape[-2] != tile or v.shape[-2] != tile:
            raise NotTileableError(
                f"blocks.{self.layer} uses the key-value cache in an unknown way."
            )
        if len(self.widths[layer_idx]) and layer_idx in self.updated:
            raise NotTileableError(f"blocks.{layer_idx} computes attention twice.")
        self.updated.add(layer_idx)
        if layer_idx not in self.keys:
            self.keys[layer_idx] = k.new_empty(*k.shape[:-2], self.length, k.shape[-1])
            self.kept_values[layer_idx] = v.new_empty(*v.shape[:-2], self.length, v.shape[-1])
        self.keys[layer_idx][..., self.start : self.stop, :] = k
        self.kept_values[layer_idx][..., self.start : self.stop, :] = v
        all_k, all_v = self._seen(k, v, layer_idx, *args, **kwargs)
        self.widths[layer_idx].append(int(all_k.shape[-2]))
        return all_k, all_v

    def _seen(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """The keys and values that the tile sees; not copied if it sees all of those so far."""
        if len(self.layers) <= layer_idx or type(self.layers[layer_idx]) is not DynamicLayer:
            return super().update(k, v, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(k, v)
        layer.keys = self.keys[layer_idx][..., : self.stop, :]
        layer.values = self.kept_values[layer_idx][..., : self.stop, :]
        return layer.keys, layer.values

    def begin(self, start: int, stop: int) -> None:
        """Begin the tile of positions start to stop."""
        self.start, self.stop = start, stop
        self.updated: set[int] = set()

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Refuse a state other than keys and values.

        Raises:
            NotTileableError: always.
        """
        raise NotTileableError(f"blocks.{self.layer} keeps more than keys and values in its cache.")

    update_recurrent_state = update_indexer = update_conv_state


class ReplayCache:
    """Gives one tile of one block the keys and values before it; the tile's own keep their graph.

    Attributes:
        past: The keys and values before the tile, as far as it sees them.
        own: The tile's keys and values, as computed in this run.
        values: All values that the tile sees, detached.
    """

    def __init__(self, start: int, past: tuple[Tensor, Tensor], *, stop: bool = False) -> None:
        self.start = start
        self.past = past
        self.stop = stop
        self.own: tuple[Tensor, Tensor] | None = None
        self.values: Tensor | None = None

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """The keys and values that the tile sees.

        Raises:
            Enough: ``stop`` is set.
        """
        self.own = (k, v)
        if self.stop:
            raise Enough
        if not self.past[0].shape[-2]:
            self.values = v.detach()
            return k, v
        keys, values = (torch.cat([p, x], dim=-2) for p, x in zip(self.past, (k, v), strict=True))
        self.values = values.detach()
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Number of positions before the tile."""
        return self.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Number of keys, and the offset of the first one."""
        return self.start + query_length, 0
