"""The forwards behind ``token_effects``: of replaced streams in tiles, and of the last position.

Both run the bridge itself over a key-value cache, so that masks, rotary embeddings and windows are
the model's own. The first keeps every row's keys and values; the second then runs the last position
once for each replaced token, with keys and values that this token's window has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache

from ..engine.plain import sees_unembed, unembedded
from ..errors import NotTileableError
from ..hooks.placement import own_hooks
from ..hooks.user_hooks import user_hooks
from ..inputs.bridge import LEAVES, hook_points, public_name
from .streams import ReplacedStreams, Seen, require_seen, watched


@dataclass(frozen=True, eq=False)
class Replaced:
    """A prompt, and what replaces each of its tokens.

    Attributes:
        tokens: The prompt, [1, pos].
        by: The token id that replaces each, [pos]; None where its embedding is set to zero.
    """

    tokens: Int[Tensor, "1 pos"]
    by: Int[Tensor, " pos"] | None

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tokens.shape[1])

    def first(self, length: int) -> Replaced:
        """The same of the first tokens alone."""
        return Replaced(self.tokens[:, :length], None if self.by is None else self.by[:length])


class _Cache(DynamicCache):  # type: ignore[misc]
    """Every layer's keys and values of all positions, also those that a sliding window drops."""

    def __init__(self) -> None:
        super().__init__()
        self.start = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Number of positions before the tile."""
        return self.start

    get_query_offset = get_seq_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        """Number of keys, and the offset of the first one."""
        return self.start + query_length, 0

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Refuse a state other than keys and values.

        Raises:
            NotTileableError: always.
        """
        raise NotTileableError("A block keeps more than keys and values in its cache.")

    update_recurrent_state = update_indexer = update_conv_state


class StreamCache(_Cache):
    """Keys and values of all rows, as they are computed tile by tile.

    Attributes:
        kept: By layer, keys and values, [row, kv_head, pos, d_head].
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.updates = 0

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Keep a tile's keys and values, and give those of all positions so far."""
        self.updates += 1
        stop = self.start + k.shape[-2]
        if layer_idx not in self.kept:
            self.kept[layer_idx] = (
                k.new_empty(*k.shape[:-2], self.length, k.shape[-1]),
                v.new_empty(*v.shape[:-2], self.length, v.shape[-1]),
            )
        for whole, tile in zip(self.kept[layer_idx], (k, v), strict=True):
            whole[..., self.start : stop, :] = tile
        keys, values = self.kept[layer_idx]
        return keys[..., :stop, :], values[..., :stop, :]


class LastCache(_Cache):
    """Keys and values for the last position, in a batch with a row for each replaced token.

    Attributes:
        positions: The replaced tokens, whose windows end before the last position.
    """

    def __init__(self, streams: StreamCache, positions: Tensor, window: int) -> None:
        super().__init__()
        self.streams, self.positions, self.window = streams, positions, window
        self.start = streams.length - 1

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """The clean keys and values, those of each row's window, and the position's own."""
        kept = self.streams.kept[layer_idx]
        return tuple(self._of_rows(*pair) for pair in zip(kept, (k, v), strict=True))

    def _of_rows(self, kept: Tensor, own: Tensor) -> Tensor:
        rows = len(self.positions)
        x = kept[-1].expand(rows, *kept.shape[1:]).clone()
        offsets = torch.arange(self.window + 1, device=x.device)
        at = self.positions[:, None] + offsets  # [row, offset]
        row = torch.arange(rows, device=x.device)[:, None]
        x[row, :, at] = kept[offsets, :, at]
        x[..., -1:, :] = own
        return x


class PrefixCache(_Cache):
    """The clean keys and values before a position, for a batch that begins there."""

    def __init__(self, clean: StreamCache, start: int) -> None:
        super().__init__()
        self.clean, self.start = clean, start

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """The clean keys and values before the position, and each row's own from there on."""
        kept = self.clean.kept[layer_idx]
        return tuple(
            torch.cat([x[..., : self.start, :].expand(len(own), -1, -1, -1), own], -2)
            for x, own in zip(kept, (k, v), strict=True)
        )


@contextmanager
def zeroed(model: Any, mask: Tensor | None) -> Iterator[None]:
    """Set embeddings to zero where ``mask`` [row, pos] is true; None leaves the model as it is."""
    if mask is None:
        yield
        return

    def set_to_zero(embedded: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return embedded.masked_fill(mask[..., None], 0.0)

    with own_hooks(model, [(public_name(hook_points(model), LEAVES[0]), set_to_zero)]):
        yield


def logits_at(
    model: Any, tokens: Tensor, read: tuple[int, ...], **kwargs: Any
) -> Float[Tensor, "row read vocab"]:
    """The logits of some positions of a batch."""
    if sees_unembed(user_hooks(model)):
        whole: Tensor = model(tokens, **kwargs)
        return whole[:, list(read)]
    with unembedded(model, read):
        logits: Tensor = model(tokens, **kwargs)
    if logits.shape[:2] != (len(tokens), len(read)):
        raise NotTileableError("The model gives the logits of other positions than are asked for.")
    return logits


@dataclass(eq=False)
class Streams:
    """What the forward of replaced streams leaves.

    Attributes:
        logits: By position that is read, every row's logits, [row, vocab].
        cache: Keys and values; None for a model that keeps none.
        forwards: Rows that were run, as forwards of the prompt.
    """

    logits: dict[int, Float[Tensor, "row vocab"]] = field(default_factory=dict)
    cache: StreamCache | None = None
    forwards: float = 0.0


def run_streams(
    model: Any,
    parts: dict[str, Any],
    replaced: Replaced,
    window: int,
    read: tuple[int, ...],
    sink: Callable[[Seen], None] | None,
    tile: int | None,
    progress: bool,
) -> Streams:
    """Run the streams of all replaced tokens, in tiles of positions.

    Args:
        model: The bridge.
        parts: Its attention components by path.
        replaced: The prompt and what replaces its tokens.
        window: The number of positions after the replaced token.
        read: The positions whose logits are read, rising.
        sink: Called with each attention of each tile.
        tile: Positions in a tile; None for all at once, without a cache.
        progress: Whether to show a progress bar.

    Raises:
        UncoveredComponentError: attention that cannot be followed.
        NotTileableError: the model does not work over a cache of keys and values.
    """
    length, rows = replaced.length, window + 2
    tokens = replaced.tokens.repeat(rows, 1)
    zero = None
    if replaced.by is None:
        zero = torch.zeros_like(tokens, dtype=torch.bool)
        zero[0] = True
    else:
        tokens[0] = replaced.by
    watches = {path: ReplacedStreams(path, window, sink) for path in parts}
    streams = Streams(cache=None if tile is None else StreamCache(length))
    starts = range(0, length, tile or length)
    with watched(parts, watches), torch.no_grad():
        for start in tqdm(starts, desc="replaced streams", leave=False, disable=not progress):
            stop = min(start + (tile or length), length)
            for watch in watches.values():
                watch.start = start
            own = tuple(p for p in read if start <= p < stop)
            cached: dict[str, Any] = {}
            if streams.cache is not None:
                streams.cache.start = start
                cached["past_key_values"] = streams.cache
            with zeroed(model, None if zero is None else zero[:, start:stop]):
                logits = logits_at(
                    model, tokens[:, start:stop], tuple(p - start for p in own), **cached
                )
            streams.logits.update((p, logits[:, n]) for n, p in enumerate(own))
    require_seen(watches, len(starts))
    if streams.cache is not None and streams.cache.updates != len(starts) * len(parts):
        raise NotTileableError("A block keeps no keys and values in the cache.")
    streams.forwards = float(rows)
    return streams


def last_logits(
    model: Any,
    replaced: Replaced,
    streams: Streams,
    window: int,
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Tensor, Float[Tensor, "token vocab"]]]:
    """The last position's logits for each replaced token whose window ends before it.

    Yields:
        Positions of replaced tokens, and the logits with each of them replaced.
    """
    assert streams.cache is not None
    last = replaced.length - 1
    tokens = replaced.tokens[:, last:]
    every = torch.arange(max(0, last - window), device=tokens.device)
    parts = torch.split(every, batch_size) if len(every) else ()
    for positions in tqdm(parts, desc="last position", leave=False, disable=not progress):
        cache = LastCache(streams.cache, positions, window)
        with torch.no_grad():
            logits = model(tokens.expand(len(positions), 1), past_key_values=cache)
        streams.forwards += len(positions) / replaced.length
        yield positions, logits[:, -1]
