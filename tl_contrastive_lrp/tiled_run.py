"""One forward and backward in tiles: prefill, what is behind the blocks, the blocks, embeddings.

The counterpart of ``backward.run``, with the same values in memory linear in the prompt.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .attachment import Attachment, HookFn
from .backward import arranged, frozen_parameters
from .checkpoint import Checkpoint
from .context import plan
from .coverage_table import Coverage
from .errors import ModelStateError
from .objective import Objective
from .placement import attached, check_ready, check_single, reading_hooks
from .precision import first_gradient, plain
from .rules import at_least_float32
from .rulesets import RuleSet
from .sites import LEAVES
from .sums import Sums
from .tiled_backward import Backward, Joined, TileReader, as_gradient, is_of_block
from .tiles import Prefill, check_tileable, prefill, tiles_of, wanted_positions

HEAD = -1  # the "tile" of what is read behind the blocks, and downwards for more than one


@dataclass(frozen=True, eq=False)
class TiledResult:
    """A forward and backward in tiles.

    Attributes:
        logits: [1, wanted, vocab], of the position explained (or all).
        objective: The objective, reading those.
        value: Δℓ, [].
        coverage: Which component got which rule.
        kept: What the sums kept, by name.
        tile: Positions a tile in the end.
    """

    logits: Tensor
    objective: Callable[[Tensor], Tensor]
    value: Tensor
    coverage: Coverage
    kept: dict[str, Tensor]
    tile: int


def _local(objective: Callable[[Tensor], Tensor], wanted: slice) -> Callable[[Tensor], Tensor]:
    """The objective for logits of the wanted positions only."""
    if isinstance(objective, Objective) and wanted.stop - wanted.start == 1:
        return replace(objective, pos=0)
    return objective


def run_tiled(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: str | RuleSet,
    sums: Sums,
    tile: int,
    *,
    reader: Callable[[], TileReader] | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
) -> tuple[TiledResult, TileReader | None]:
    """What ``backward.run`` does, in tiles of ``tile`` positions.

    On a GPU that runs out of memory the tile is halved, with one warning, until it fits.

    Args:
        model, tokens, objective, rule_set: As for ``backward.run``; tokens [1, pos].
        sums: What to read.
        tile: Positions a tile, 1 or more.
        reader: Makes what reads edges.
        progress: Show a bar over blocks and tiles.
        checkpoint: Where a finished block's results are kept, to go on from there.

    Raises:
        NotTileable: the model does not run in tiles.
        ModelStateError, UncoveredComponentError: as ``backward.run``.
    """
    check_ready(model, "Relevance")
    check_single(model)
    check_tileable(model, tokens)
    warned = False
    while True:
        try:
            made = None if reader is None else reader()
            made_result = _attempt(
                model, tokens, objective, rule_set, sums, tile, made, progress, checkpoint
            )
            return made_result, made
        except torch.OutOfMemoryError:
            if tile <= 16:
                raise
            tile //= 2
            if not warned:
                warnings.warn(
                    f"The GPU ran out of memory; going on with tiles of {tile} positions (and "
                    "smaller ones, if need be).",
                    stacklevel=3,
                )
            warned = True
        sums.kept.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _attempt(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: str | RuleSet,
    sums: Sums,
    tile: int,
    reader: TileReader | None,
    progress: bool,
    checkpoint: Checkpoint | None,
) -> TiledResult:
    from tqdm.auto import tqdm

    attachments, coverage = plan(model, rule_set)
    wanted = wanted_positions(objective, tokens.shape[1])
    bounds = tiles_of(tokens.shape[1], tile, wanted)
    n_layers = int(model.cfg.n_layers)
    outside = tuple(a for a in attachments if is_of_block(a.site.path, None))
    around = [r for r in sums.readings if not r.name.startswith("blocks.")]
    before, after = arranged(model, outside, around)
    leaves: dict[str, Tensor] = {}

    def make_leaf(tensor: Tensor, hook: Any) -> Tensor:
        leaves[hook.name] = tensor.detach().requires_grad_(True)
        return leaves[hook.name]

    hook_dict = model.hook_dict
    starts = [(name, make_leaf) for name in LEAVES if name in hook_dict]
    joined, steps = Joined(bounds), len(bounds) * (n_layers + 1)
    with (
        frozen_parameters(model),
        tqdm(total=steps, desc="Blocks × tiles", unit="tile", disable=not progress) as bar,
    ):
        with _ordered(model, [*starts, *before], outside, after):
            forward = prefill(model, tokens, wanted, bounds, leaves, bar.update)
            asked = _local(objective, wanted)
            assert forward.logits is not None
            value = asked(forward.logits)
        sums.kept.clear()  # so far only zeros
        g = _first_gradient(model, forward, value, lambda i: joined.take(sums, HEAD - i))
        backward = Backward(model, attachments, sums, reader, forward, joined, bar.update)
        first = n_layers
        if checkpoint is not None:
            checkpoint.open(tokens, value, coverage.rules, str(objective), tile)
            first, g = checkpoint.resume(n_layers, g, joined.parts, reader)
            bar.update((n_layers - first) * len(bounds))
        for layer in reversed(range(first)):
            g = backward.layer(layer, g)
            if checkpoint is not None:
                checkpoint.write(layer, g, joined.parts, reader)
        backward.embeddings(g)
    result = joined.whole()
    return TiledResult(
        forward.logits.detach(), asked, value.detach().reshape(()), coverage, result, tile
    )


def _first_gradient(
    model: Any, forward: Prefill, value: object, read: Callable[[int], None]
) -> Tensor:
    """The gradient of the objective at the last block's output, [1, pos, d_model].

    Args:
        read: Called after each tile's backward through what is behind the blocks.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ModelStateError(
            "The objective must turn logits [batch, pos, vocab] into one differentiable number. "
            "Use clrp.logit_diff(...), or a function that detaches nothing."
        )
    begin = first_gradient(model, value)
    at_logits = torch.autograd.grad(value, forward.parts, begin, allow_unused=True)
    if all(part is None for part in at_logits):
        raise ModelStateError(
            "The objective's value does not depend on the logits it was given, so there is "
            "nothing to explain. Compute it from its argument."
        )
    some = next(iter(forward.finals.values()))
    g = at_least_float32(some.detach()).new_zeros(1, forward.bounds[-1][1], some.shape[-1])
    for i, (tile, final) in enumerate(forward.finals.items()):
        if at_logits[i] is None:
            continue
        part = as_gradient(plain(at_logits[i]), forward.parts[i])
        (found,) = torch.autograd.grad(forward.parts[i], [final], part)
        g[:, slice(*forward.bounds[tile])] = plain(found).to(g)
        read(i)
    return g


def _ordered(
    model: Any,
    before: Iterable[tuple[str, HookFn]],
    attachments: tuple[Attachment, ...],
    after: Iterable[tuple[str, HookFn]],
) -> Any:
    stack = ExitStack()
    try:
        stack.enter_context(reading_hooks(model, list(before)))
        stack.enter_context(attached(model, attachments))
        stack.enter_context(reading_hooks(model, list(after)))
    except BaseException:
        stack.close()
        raise
    return stack
