"""The forward in tiles of positions: a prefill through the bridge over a key-value cache.

It keeps what a backward needs to run each block again on each tile: the input of the block, its
other arguments (the model's own masks, stored as bits, and rotary tables), and all keys and values.
That takes O(layers · pos · d_model) memory, where a plain forward with gradients takes
O(layers · heads · pos²). Nothing is re-implemented: the model computes each tile as it would when
it generates text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ...errors import NotTileableError, is_out_of_memory
from ...inputs.rotary import depends_on_length
from ...rules.threads import mine
from ...rules.visible import LazyMask
from ..memory import trim_heap
from .cache import RecordingCache
from .kept import KeptAttention
from .tiles import BitMask, Range, holds, is_read, tile_bounds

_CACHE = object()  # stands for the cache among a block's recorded arguments
_HIDDEN = object()  # stands for its input


class _AfterBlocks(Exception):
    """All blocks have run on the tile, and its logits are not read."""


@dataclass(eq=False)
class Prefill:
    """What a tiled forward keeps for the backward.

    Attributes:
        bounds: (start, stop) of each tile.
        inputs: Each block's input by tile, [1, tile, d_model].
        calls: The positional and keyword arguments of each block, by tile.
        keys, values: By block, [1, kv_head, pos, d_head].
        widths: By block and tile, how many keys the tile saw.
        starts: By tile, the first block's input with its autograd graph, and the embeddings at
            which that graph starts.
        outputs: The last block's output by tile, [1, tile, d_model].
        ranges: The positions whose logits are read, in whole tiles.
        finals: The outputs of those tiles as leaves, by tile.
        parts: Their logits, [1, tile, vocab], each on the graph of its tile's leaf.
        fused: Paths of the attention components whose attention was computed fused; None if none
            was to be.
        kept: What their attention gave, for the second run of the blocks.
    """

    bounds: tuple[Range, ...]
    inputs: list[list[Tensor]]
    calls: list[list[tuple[Any, Any]]]
    ranges: tuple[Range, ...]
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    widths: list[list[int]] = field(default_factory=list)
    starts: list[tuple[Tensor, dict[str, Tensor]]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    finals: dict[int, Tensor] = field(default_factory=dict)
    parts: list[Tensor] = field(default_factory=list)
    fused: frozenset[str] | None = None
    kept: KeptAttention | None = None

    @property
    def last(self) -> int:
        """The last tile whose logits are read; by causality later tiles take no part."""
        return max(self.finals)

    def logits(self) -> Tensor:
        """The logits that are read, [1, read positions, vocab], with their autograd graph."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=1)

    def logits_around(self, positions: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The logits of the tiles that hold any of these positions, and whose they are, rising."""
        held = [
            (part, range(*self.bounds[tile]))
            for tile, part in zip(self.finals, self.parts, strict=True)
            if holds(self.bounds[tile], positions)
        ]
        parts = [part for part, _ in held]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return logits, tuple(pos for _, tile in held for pos in tile)

    def call(self, layer: int, tile: int, hidden: Tensor, cache: Any) -> tuple[Any, Any]:
        """The arguments for running a block again on a tile, with this input and this cache."""

        def restored(value: Any) -> Any:
            if value is _CACHE:
                return cache
            if value is _HIDDEN:
                return hidden
            if isinstance(value, LazyMask):
                return value.forget()
            return value.unpacked() if isinstance(value, BitMask) else value

        args, kwargs = self.calls[layer][tile]
        return tree_map(restored, args), tree_map(restored, kwargs)

    def after(self, layer: int, tile: int) -> Tensor:
        """The block's output on the tile, [1, tile, d_model]."""
        return self.outputs[tile] if layer + 1 == len(self.inputs) else self.inputs[layer + 1][tile]


def first_of(output: Any) -> Tensor:
    """A block's hidden states, without its other outputs."""
    first: Tensor = output[0] if isinstance(output, tuple | list) else output
    return first


def _hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class _Recorder:
    """Hooks on the blocks that record the arguments of each, one tile after the other."""

    def __init__(self, prefill: Prefill, cache: RecordingCache, leaves: dict[str, Tensor]) -> None:
        self.prefill = prefill
        self.cache = cache
        self.leaves = leaves
        self.packed: dict[int, tuple[Tensor, Any]] = {}

    def _kept(self, value: Any, hidden: Tensor) -> Any:
        if value is hidden:
            return _HIDDEN
        if value is self.cache:
            return _CACHE
        if not isinstance(value, Tensor) or isinstance(value, LazyMask):
            return value
        if value.requires_grad:
            raise NotTileableError(
                f"blocks.{self.cache.layer} receives more of the prompt than its residual stream."
            )
        # Many blocks receive the same mask; it is packed once, as the tile keeps it alive.
        entry = self.packed.get(id(value))
        if entry is None or entry[0] is not value:
            entry = self.packed[id(value)] = value, BitMask.of(value)
        return entry[1]

    def before(self, layer: int) -> Callable[..., Any]:
        def pre_hook(module: Any, args: Any, kwargs: Any) -> Any:  # noqa: ARG001
            self.cache.layer = layer
            live = _hidden_of(args, kwargs)
            hidden = live.detach()
            self.prefill.inputs[layer].append(hidden)
            arguments = tree_map(lambda value: self._kept(value, live), (args, kwargs))
            self.prefill.calls[layer].append(arguments)
            if layer:
                return None
            self.prefill.starts.append((live, dict(self.leaves)))
            return (hidden, *args[1:]) if args else args, kwargs if args else {
                **kwargs, "hidden_states": hidden,
            }  # fmt: skip

        return pre_hook

    def after_each(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            if layer not in self.cache.updated:
                raise NotTileableError(f"blocks.{layer} keeps no keys and values in a cache.")

        return hook

    def after_last(self, module: Any, args: Any, output: Any) -> Any:  # noqa: ARG002
        """Stop after the last block, unless the logits are read; then continue from a leaf."""
        prefill, start = self.prefill, self.cache.start
        out = first_of(output)
        prefill.outputs.append(out.detach())
        self.packed.clear()
        if not is_read(start, prefill.ranges):
            raise _AfterBlocks
        final = out.detach().clone().requires_grad_(True)
        prefill.finals[len(prefill.outputs) - 1] = final
        if isinstance(output, tuple | list):
            return type(output)((final, *output[1:]))
        return final

    @contextmanager
    def on(self, blocks: Any) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, block in enumerate(blocks):
                handle = block.register_forward_pre_hook(mine(self.before(layer)), with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(block.register_forward_hook(mine(self.after_each(layer))).remove)
            stack.callback(blocks[-1].register_forward_hook(mine(self.after_last)).remove)
            yield


def prefill(
    model: Any,
    tokens: Tensor,
    ranges: tuple[Range, ...],
    bounds: tuple[Range, ...],
    leaves: dict[str, Tensor],
    step: Callable[[], object] = lambda: None,
    kept: KeptAttention | None = None,
) -> Prefill:
    """Run the model tile by tile, keeping the autograd graph only before and after the blocks.

    Args:
        model: The bridge, with the rules and readings outside of the blocks attached.
        tokens: Token ids, [1, pos].
        ranges: Positions whose logits are read.
        bounds: Bounds of the tiles.
        leaves: A dictionary in which the caller's hooks store the tensors at which the graph of
            each tile starts.
        step: Called after each tile.
        kept: Told which tile runs.

    Raises:
        NotTileableError: a block does not work over a cache of keys and values.
    """
    n_layers = int(model.cfg.n_layers)
    forward = Prefill(bounds, [[] for _ in range(n_layers)], [[] for _ in range(n_layers)], ranges)
    try:
        cache = RecordingCache(model.original_model.config, tokens.shape[1], n_layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotTileableError(f"No cache can be made from its configuration: {error}") from error
    recorder = _Recorder(forward, cache, leaves)
    logits = forward.parts
    with recorder.on(model.blocks):
        for tile, (start, stop) in enumerate(bounds):
            trim_heap(tile)
            if start >= ranges[-1][1]:  # by causality, it does not affect the logits read
                step()
                continue
            cache.begin(start, stop)
            if kept is not None:
                kept.tile = tile
            leaves.clear()
            with suppress(_AfterBlocks):
                logits.append(model(tokens[:, start:stop], past_key_values=cache))
            if len(forward.outputs) != len(forward.inputs[0]) or not forward.starts:
                raise NotTileableError("Its blocks did not all run exactly once.")
            step()
    forward.keys, forward.values, forward.widths = cache.keys, cache.kept_values, cache.widths
    if len(logits) != len(forward.finals) or not all(isinstance(x, Tensor) for x in logits):
        raise NotTileableError("The forward gave no logits.")
    return forward


def check_tileable(model: Any, tokens: Tensor) -> None:
    """Compare a forward of the first tokens, in tiles of uneven size, with the model's own.

    Raises:
        NotTileableError: says why the model cannot be run in tiles.
    """
    if depends_on_length(model, tokens.shape[1]):
        raise NotTileableError(
            f"Its rotary positions are stretched for prompts as long as {tokens.shape[1]} tokens, "
            "so that the first tile's keys would not be those of the whole prompt."
        )
    short = tokens[:, :13]
    length = short.shape[1]
    if model.cfg.n_layers != len(getattr(model, "blocks", ())):
        raise NotTileableError("Its blocks are not one list.")
    try:
        with torch.no_grad():
            expected = model(short)
            every = ((0, length),)
            logits = prefill(model, short, every, tile_bounds(length, 5, every), {}).logits()
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, NotTileableError) or is_out_of_memory(error):
            raise
        raise NotTileableError(
            f"A forward over a cache of keys and values fails: {error}"
        ) from error
    scale = float(expected.abs().max())
    slack = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 0.05
    if not float((logits - expected).abs().max()) <= slack * scale:
        raise NotTileableError("A forward over a cache of keys and values gives other logits.")
