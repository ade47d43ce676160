"""One forward and some backwards in tiles: prefill, what is behind the blocks, blocks, embeddings.

The counterpart of ``backward.run_each``, with the same values in memory linear in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import ModelStateError
from ...hooks.attach import Attachment, HookFn
from ...hooks.context import plan
from ...hooks.coverage import Coverage
from ...hooks.placement import attached, check_ready, check_single, reading_hooks
from ...inputs.bridge import LEAVES, hook_points
from ...inputs.objective import Objective
from ...rules.functions import at_least_float32
from ...rules.precision import first_gradient, plain
from ...rules.rule_sets import RuleSet
from ...rules.threads import frozen_parameters
from ..memory import in_smaller_tiles
from ..plain import check_value
from ..reading import Reading, Slots, arranged
from ..relevance_sums import RelevanceSums
from .accumulate import BackwardState, TileAccumulator
from .backward import Backward, TileReader, as_gradient, is_of_block
from .bounds import Range, position_of, tiles_of, wanted_positions
from .checkpoint import Checkpoint
from .prefill import Prefill, check_tileable, prefill
from .user_hooks import without_lookers

Objectives = Sequence[Callable[[Tensor], Tensor]]


@dataclass(frozen=True, eq=False)
class TiledResult:
    """A forward in tiles and one backward of it.

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


@dataclass(eq=False)
class TiledForward:
    """A prefill at which the backwards of several results start.

    Attributes:
        prefill: The forward; None once it has been let go.
        tile: Positions a tile.
        slots: Where readings outside of the blocks can be bound.
    """

    prefill: Prefill | None
    tile: int
    slots: Slots

    def of(self, tile: int, wanted: tuple[Range, ...]) -> Prefill | None:
        """The prefill if it serves a run in these tiles; else it is let go."""
        if self.prefill is not None and (tile != self.tile or wanted != self.prefill.wanted):
            self.prefill = None
        return self.prefill


@dataclass(eq=False)
class _Run:
    """What is asked, and how far it has come, so that smaller tiles can go on from there."""

    model: Any
    tokens: Tensor
    objectives: Objectives
    sums: RelevanceSums
    reader: TileReader | None
    checkpoint: Checkpoint | None
    attachments: tuple[Attachment, ...]
    coverage: Coverage
    todo: int
    shared: TiledForward | None = None
    signals: list[BackwardState] = field(default_factory=list)

    def drop_unfinished(self) -> None:
        """Forget what was read of the block that was not finished."""
        self.sums.clear()
        for signal in self.signals:
            signal.joined.drop(f"blocks.{self.todo - 1}.")


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
) -> list[TiledResult]:
    """What ``backward.run_each`` does, in tiles of ``tile`` positions.

    On a GPU that runs out of memory the tile is halved, with one warning, until it fits; blocks
    that are finished stay so.

    Args:
        model, tokens, rule_set: As for ``backward.run_each``; tokens [1, pos].
        objectives: One or more, which share the forward and every block's second run.
        sums: What to read.
        tile: Positions a tile, 1 or more.
        reader: Reads edges.
        progress: Show a bar over blocks and tiles.
        checkpoint: Where a finished block's results are kept, to go on from there.
        shared: From ``forward_in_tiles`` of these tokens under these rules. Another prefill is run
            where it has other tiles.

    Returns:
        A result for each objective.

    Raises:
        NotTileableError: the model does not run in tiles.
        ModelStateError, UncoveredComponentError: as ``backward.run_each``.
    """
    check_ready(model, "Relevance")
    check_single(model)
    n_layers = int(model.cfg.n_layers)
    placed = plan(model, rule_set)
    run = _Run(model, tokens, objectives, sums, reader, checkpoint, *placed, n_layers, shared)

    def attempt(smaller: int) -> list[TiledResult]:
        run.drop_unfinished()
        return _attempt(run, smaller, progress)

    with without_lookers(model, tokens):
        if shared is None:
            check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def forward_in_tiles(
    model: Any,
    tokens: Tensor,
    positions: tuple[Range, ...],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    tile: int,
    *,
    uses: int,
    progress: bool = False,
) -> TiledForward:
    """The prefill of ``run_tiled`` by itself, for the backwards of several results.

    Args:
        model, tokens, rule_set: As for ``run_tiled``.
        positions: (start, stop) of the positions whose logits are read.
        readings: What may be read; those inside blocks need no preparation.
        tile: Positions a tile; halved where a GPU runs out of memory.
        uses: How many results will be read.
        progress: Show a bar over tiles.

    Raises:
        NotTileableError, ModelStateError, UncoveredComponentError: as ``run_tiled``.
    """
    from tqdm.auto import tqdm

    check_ready(model, "Relevance")
    check_single(model)
    attachments, _ = plan(model, rule_set)
    around = [r for r in readings if not r.name.startswith("blocks.")]

    def attempt(smaller: int) -> TiledForward:
        slots = Slots(around, uses)
        bounds = tiles_of(tokens.shape[1], smaller, positions)
        with (
            frozen_parameters(model),
            tqdm(total=len(bounds), desc="Prompt", unit="tile", disable=not progress) as bar,
        ):
            found = _prefill(
                model, tokens, attachments, slots.readings, positions, bounds, bar.update
            )
        return TiledForward(found, smaller, slots)

    with without_lookers(model, tokens):
        check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def _prefill(
    model: Any,
    tokens: Tensor,
    attachments: tuple[Attachment, ...],
    around: list[Reading],
    wanted: tuple[Range, ...],
    bounds: tuple[Range, ...],
    step: Callable[[], object],
) -> Prefill:
    """A prefill with the rules and readings outside of the blocks attached."""
    outside = tuple(a for a in attachments if is_of_block(a.site.path, None))
    before, after = arranged(model, outside, around)
    leaves: dict[str, Tensor] = {}

    def make_leaf(tensor: Tensor, hook: Any) -> Tensor:
        leaves[hook.name] = tensor.detach().requires_grad_(True)
        return leaves[hook.name]

    hook_dict = hook_points(model)
    starts = [(name, make_leaf) for name in LEAVES if name in hook_dict]
    with _ordered(model, [*starts, *before], outside, after):
        return prefill(model, tokens, wanted, bounds, leaves, step)


def _attempt(run: _Run, tile: int, progress: bool) -> list[TiledResult]:
    from tqdm.auto import tqdm

    model, sums = run.model, run.sums
    length, n_layers = run.tokens.shape[1], int(model.cfg.n_layers)
    wanted = wanted_positions(run.objectives, length)
    bounds = tiles_of(length, tile, wanted)
    around = [r for r in sums.readings if not r.name.startswith("blocks.")]
    found = None if run.shared is None else run.shared.of(tile, wanted)
    slots = None if run.shared is None or found is None else run.shared.slots
    steps = len(bounds) * (run.todo + (found is None))
    with (
        frozen_parameters(model),
        tqdm(total=steps, desc="Blocks × tiles", unit="tile", disable=not progress) as bar,
        nullcontext() if slots is None else slots.bound(around),
    ):
        forward = found or _prefill(
            model, run.tokens, run.attachments, around, wanted, bounds, bar.update
        )
        read = [_reading(forward, objective, length) for objective in run.objectives]
        values = [check_value(asked(logits), forward.parts) for logits, asked in read]
        sums.clear()  # so far only zeros
        again = slots is not None and slots.uses > 0
        if not run.signals:
            run.signals = _first_signals(run, forward, values, again)
        checkpoint, reader = run.checkpoint, run.reader
        if checkpoint is not None and run.todo == n_layers:
            names = [str(objective) for objective in run.objectives]
            checkpoint.open(run.tokens, values, run.coverage.rules, names, tile)
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
    return [
        TiledResult(logits.detach(), asked, signal.value, run.coverage, signal.joined.kept, tile)
        for (logits, asked), signal in zip(read, run.signals, strict=True)
    ]


def _reading(
    forward: Prefill, objective: Callable[[Tensor], Tensor], length: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The logits that an objective reads, and the objective for those alone."""
    alone = forward.logits_at(position_of(objective, length))
    if alone is None:
        return forward.logits(), objective
    assert isinstance(objective, Objective)
    return alone, replace(objective, pos=0)


def _first_signals(
    run: _Run, forward: Prefill, values: list[Tensor], again: bool
) -> list[BackwardState]:
    """Every objective's gradient at the last block's output, [1, pos, d_model].

    What sums read behind the blocks is joined. ``again``: the graph is needed after this.
    """
    signals = []
    some = next(iter(forward.finals.values()))
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
        g = at_least_float32(some.detach()).new_zeros(1, forward.bounds[-1][1], some.shape[-1])
        joined = TileAccumulator(forward.bounds[-1][1])
        for i, (tile, final) in enumerate(forward.finals.items()):
            if at_logits[i] is None:
                continue
            part = as_gradient(plain(at_logits[i]), forward.parts[i])
            (found,) = torch.autograd.grad(forward.parts[i], [final], part, retain_graph=more)
            g[:, slice(*forward.bounds[tile])] = plain(found).to(g)
            joined.take(run.sums.take(), forward.bounds[tile])
        signals.append(BackwardState(value.detach().reshape(()), g, joined))
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
