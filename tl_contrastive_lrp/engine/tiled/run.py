"""The tiled engine: a prefill in tiles, and a backward for each objective, block by block.

The counterpart of ``plain.run_each``: the same values, in memory linear in the prompt. A backward
goes from the logits to the last block's output, through the blocks, and to the embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...errors import ModelStateError
from ...hooks.attach import Attachment, HookFn
from ...hooks.context import plan
from ...hooks.coverage import Coverage
from ...hooks.placement import attached, check_ready, check_single, embedding_leaves, reading_hooks
from ...inputs.facts import ObjectiveFacts
from ...inputs.located import LocatedObjective
from ...rules.functions import at_least_float32
from ...rules.precision import first_gradient, plain
from ...rules.rule_sets import RuleSet
from ...rules.threads import frozen_parameters
from ..fused import AttentionKind, FusedBlocks, is_worth
from ..memory import in_smaller_tiles
from ..plain import RunResult, check_value
from ..reading import Reading, RelevanceSums, Slots, arranged
from .backward import Backward, TileReader, as_gradient, is_of_block
from .checkpoint import Checkpoint
from .kept import KeptAttention
from .prefill import Prefill, check_tileable, prefill
from .tiles import (
    BackwardState,
    Range,
    TileAccumulator,
    lies_in,
    read_ranges,
    tile_bounds,
)
from .user_hooks import observers_set_aside

Objectives = Sequence[Callable[[Tensor], Tensor]]


@dataclass(eq=False)
class TiledForward:
    """A prefill at which the backwards of several results start.

    Attributes:
        prefill: The forward; None once it has been dropped.
        tile: Positions per tile.
        slots: Where readings outside of the blocks can be bound.
        fusing: Whether attention is fused where it can be, also when the blocks run again.
    """

    prefill: Prefill | None
    tile: int
    slots: Slots
    fusing: bool = False

    def serving(self, tile: int, ranges: tuple[Range, ...]) -> Prefill | None:
        """The prefill, if it serves a run in these tiles; otherwise it is dropped.

        Args:
            tile: Positions per tile.
            ranges: The positions whose logits are read; it may have those of others too.
        """
        if self.prefill is not None and (
            tile != self.tile or not all(lies_in(one, self.prefill.ranges) for one in ranges)
        ):
            self.prefill = None
        return self.prefill


@dataclass(eq=False)
class _Run:
    """A run and its progress, so that it can continue with smaller tiles.

    ``todo`` is the number of blocks whose backward is still to be run.
    """

    model: Any
    tokens: Tensor
    objectives: Objectives
    sums: RelevanceSums
    reader: TileReader | None
    checkpoint: Checkpoint | None
    attachments: tuple[Attachment, ...]
    coverage: Coverage
    todo: int
    fusing: bool
    shared: TiledForward | None = None
    signals: list[BackwardState] = field(default_factory=list)

    def drop_unfinished(self) -> None:
        """Discard what was read in the unfinished block."""
        self.sums.clear()
        for signal in self.signals:
            signal.read.drop(f"blocks.{self.todo - 1}.")


def run_tiled(
    model: Any,
    tokens: Tensor,
    objectives: Objectives,
    rule_set: str | RuleSet,
    sums: RelevanceSums,
    tile: int,
    *,
    reader: TileReader | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | None = None,
    shared: TiledForward | None = None,
    attention: AttentionKind = "eager",
) -> list[RunResult]:
    """Do what ``plain.run_each`` does, in tiles of ``tile`` positions.

    On a GPU that runs out of memory the tile is halved, with one warning, until it fits; finished
    blocks are not run again.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [1, pos].
        objectives: One or more, which share the forward and the second run of every block.
        rule_set: Name of a rule set, or a ``RuleSet``.
        sums: What to keep of the relevance.
        tile: Positions per tile, 1 or more.
        reader: Reads edges.
        progress: Show a progress bar over blocks and tiles.
        checkpoint: Where the results of finished blocks are kept, to resume from.
        shared: From ``forward_in_tiles``, for these tokens under these rules. If its tiles differ,
            the prefill is run again.
        attention: "auto", "fused" or "eager"; that of ``shared``, if it is given.

    Returns:
        One result per objective.

    Raises:
        NotTileableError: the model does not run in tiles.
        ModelStateError, UncoveredComponentError: as ``plain.run_each``.
    """
    check_ready(model, "Relevance")
    check_single(model)
    n_layers = int(model.cfg.n_layers)
    placed = plan(model, rule_set)
    fusing = is_worth(attention, tokens.shape[1]) if shared is None else shared.fusing
    run = _Run(
        model, tokens, objectives, sums, reader, checkpoint, *placed, n_layers, fusing, shared
    )

    def attempt(smaller: int) -> list[RunResult]:
        run.drop_unfinished()
        return _attempt(run, smaller, progress)

    with observers_set_aside(model, tokens, fusing=fusing):
        if shared is None:
            check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def forward_in_tiles(
    model: Any,
    tokens: Tensor,
    ranges: tuple[Range, ...],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    tile: int,
    *,
    uses: int,
    progress: bool = False,
    attention: AttentionKind = "eager",
) -> TiledForward:
    """Run only the prefill of ``run_tiled``, to be shared by several results.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [1, pos].
        ranges: Ranges (start, stop) of the positions whose logits are read.
        rule_set: Name of a rule set, or a ``RuleSet``.
        readings: What may be read. Readings inside blocks need no preparation.
        tile: Positions per tile; halved where a GPU runs out of memory.
        uses: Number of results to come.
        progress: Show a progress bar over tiles.
        attention: "auto", "fused" or "eager", for the prefill and for the results.

    Raises:
        NotTileableError, ModelStateError, UncoveredComponentError: as ``run_tiled``.
    """
    check_ready(model, "Relevance")
    check_single(model)
    attachments, _ = plan(model, rule_set)
    around = [r for r in readings if not r.name.startswith("blocks.")]
    fusing = is_worth(attention, tokens.shape[1])

    def attempt(smaller: int) -> TiledForward:
        slots = Slots(around, uses)
        bounds = tile_bounds(tokens.shape[1], smaller, ranges)
        with (
            frozen_parameters(model),
            tqdm(total=len(bounds), desc="Prompt", unit="tile", disable=not progress) as bar,
        ):
            forward = _prefill(
                model, tokens, attachments, slots.readings, ranges, bounds, bar.update, fusing
            )
        return TiledForward(forward, smaller, slots, fusing)

    with observers_set_aside(model, tokens, fusing=fusing):
        check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def _prefill(
    model: Any,
    tokens: Tensor,
    attachments: tuple[Attachment, ...],
    around: list[Reading],
    ranges: tuple[Range, ...],
    bounds: tuple[Range, ...],
    step: Callable[[], object],
    fusing: bool,
) -> Prefill:
    """Run the prefill with the rules and readings outside of the blocks attached."""
    outside = tuple(a for a in attachments if is_of_block(a.site.path, None))
    before, after = arranged(model, outside, around)
    leaves: dict[str, Tensor] = {}

    starts = embedding_leaves(model, leaves)
    if not fusing:
        with _ordered(model, [*starts, *before], outside, after):
            return prefill(model, tokens, ranges, bounds, leaves, step)
    fused, kept = FusedBlocks(model, attachments, (), ()), KeptAttention()
    with (
        _ordered(model, [*starts, *before], outside, after),
        fused.active(kept.memory, kept.keeping),
    ):
        forward = prefill(model, tokens, ranges, bounds, leaves, step, kept)
    forward.fused, forward.kept = frozenset(fused.done), kept
    return forward


def _attempt(run: _Run, tile: int, progress: bool) -> list[RunResult]:
    """Run in tiles of this size: prefill, logits, blocks from the last to the first, embeddings."""
    model, sums = run.model, run.sums
    length, n_layers = run.tokens.shape[1], int(model.cfg.n_layers)
    ranges = read_ranges(run.objectives, length)
    around = [r for r in sums.readings if not r.name.startswith("blocks.")]
    prefilled = None if run.shared is None else run.shared.serving(tile, ranges)
    bounds = tile_bounds(length, tile, ranges) if prefilled is None else prefilled.bounds
    slots = None if run.shared is None or prefilled is None else run.shared.slots
    steps = len(bounds) * (run.todo + (prefilled is None))
    with (
        frozen_parameters(model),
        tqdm(total=steps, desc="Blocks × tiles", unit="tile", disable=not progress) as bar,
        nullcontext() if slots is None else slots.bound(around),
    ):
        forward = prefilled or _prefill(
            model, run.tokens, run.attachments, around, ranges, bounds, bar.update, run.fusing
        )
        evaluations = [_evaluation(forward, objective, length) for objective in run.objectives]
        values = [check_value(local(logits), forward.parts) for logits, local in evaluations]
        sums.clear()  # so far only zeros
        again = slots is not None and slots.uses > 0
        if not run.signals:
            run.signals = _first_signals(run, forward, values, again)
        checkpoint, reader = run.checkpoint, run.reader
        if checkpoint is not None and run.todo == n_layers:
            names = [str(objective) for objective in run.objectives]
            checkpoint.open(run.tokens, values, run.coverage.rules, names, tile, fused=run.fusing)
            run.todo = checkpoint.resume(n_layers, run.signals, reader)
            bar.update((n_layers - run.todo) * len(bounds))
        backward = Backward(
            model, run.attachments, sums, reader, forward, run.signals, bar.update, again
        )
        while run.todo:
            backward.layer(run.todo - 1)
            run.todo -= 1
            if checkpoint is not None:
                checkpoint.write(run.todo, run.signals, reader)
        backward.embeddings()
    facts = [
        ObjectiveFacts.of(
            objective, logits.detach(), signal.value, length, None if local is objective else local
        )
        for objective, (logits, local), signal in zip(
            run.objectives, evaluations, run.signals, strict=True
        )
    ]
    return [
        RunResult(fact, signal.read.sums, run.coverage, f"tiled (tile {tile})", backward.attention)
        for fact, signal in zip(facts, run.signals, strict=True)
    ]


def _evaluation(
    forward: Prefill, objective: Callable[[Tensor], Tensor], length: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The logits around those that an objective reads, and it as a function of them alone."""
    if not isinstance(objective, LocatedObjective):
        return forward.logits(), objective
    logits, positions = forward.logits_around(objective.positions(length))
    return logits, objective.at(positions, length)


def _first_signals(
    run: _Run, forward: Prefill, values: list[Tensor], again: bool
) -> list[BackwardState]:
    """Every objective's gradient at the last block's output, and what is read after the blocks.

    If ``again``, the autograd graph of the logits is kept for another result.
    """
    signals = []
    any_output = next(iter(forward.finals.values()))
    for which, value in enumerate(values):
        more = again or which + 1 < len(values)
        begin = first_gradient(run.model, value)
        at_logits = torch.autograd.grad(
            value, forward.parts, begin, allow_unused=True, retain_graph=more
        )
        if all(part is None for part in at_logits):
            raise ModelStateError(
                "The objective's value does not depend on the logits it was given, so there is "
                "nothing to explain. Compute it from its argument."
            )
        g = at_least_float32(any_output.detach()).new_zeros(
            1, forward.bounds[-1][1], any_output.shape[-1]
        )
        read = TileAccumulator(forward.bounds[-1][1], run.sums.axes)
        for i, (tile, final) in enumerate(forward.finals.items()):
            if at_logits[i] is None:
                continue
            part = as_gradient(plain(at_logits[i]), forward.parts[i])
            (at_output,) = torch.autograd.grad(forward.parts[i], [final], part, retain_graph=more)
            g[:, slice(*forward.bounds[tile])] = plain(at_output).to(g)
            read.add(run.sums.take(), forward.bounds[tile])
        signals.append(BackwardState(value.detach().reshape(()), g, read))
    run.sums.clear()
    return signals


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
