"""A forward and backward the plain way or in tiles, as was chosen, with one kind of result."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import NotTileableError
from ..hooks.coverage import Coverage
from ..inputs.objective import described
from ..rules.rule_sets import RuleSet
from .memory import MemoryPlan, cannot, require_plain_fits
from .plain import run_each
from .relevance_sums import RelevanceSums

if TYPE_CHECKING:
    from .prefilled import Prefilled
    from .tiled.run import TiledResult


@dataclass(frozen=True, eq=False)
class RunResult:
    """What either way gives.

    Attributes:
        logits: [1, pos, vocab], or [1, 1, vocab] of the position explained only.
        value: Δℓ, [].
        coverage: Which component got which rule.
        kept: What the sums kept, by name.
        memory: "plain" or "tiled (tile N)".
        local: The objective for these logits, where they are not all.
    """

    logits: Tensor
    value: Tensor
    coverage: Coverage
    kept: dict[str, Tensor]
    memory: str
    local: Callable[[Tensor], Tensor] | None = None

    def row(self, pos: int) -> int:
        """Index of a position's logits."""
        return pos if self.local is None else 0

    def described(self, objective: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """See ``objective.described``."""
        if self.local is None:
            return described(objective, self.logits, self.value)
        facts = described(self.local, self.logits, self.value)
        return facts | {"objective": str(objective)}


def tiled(result: TiledResult, objective: Callable[[Tensor], Tensor]) -> RunResult:
    """Of one objective's result."""
    local = None if result.objective is objective else result.objective
    memory = f"tiled (tile {result.tile})"
    return RunResult(result.logits, result.value, result.coverage, result.kept, memory, local)


def run(
    model: Any,
    tokens: Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    sums: RelevanceSums,
    choice: MemoryPlan,
    *,
    may_fall_back: bool,
    progress: bool,
    checkpoint_dir: str | os.PathLike[str] | None,
    settings: str,
    prefilled: Prefilled | None = None,
) -> list[RunResult]:
    """Run as ``choice`` says, one forward for all objectives.

    Args:
        model, tokens, objectives, rule_set, sums: As for ``backward.run_each`` and ``run_tiled``.
        choice: From ``memory.choose``.
        may_fall_back: Take the plain way where tiles do not work and it fits.
        progress: Show a bar over tiles.
        checkpoint_dir: Where a run in tiles keeps what is finished.
        settings: What else the sums depend on.
        prefilled: The forward, if it was run before; ``choice`` is its own then.

    Raises:
        ModelStateError: it cannot run in tiles, and plainly it does not fit or was not asked for.
    """
    if choice.tile is not None:
        from .tiled.checkpoint import checkpoint_of
        from .tiled.run import run_tiled

        checkpoint, tile = checkpoint_of(checkpoint_dir, settings, choice)
        try:
            results = run_tiled(
                model, tokens, objectives, rule_set, sums, tile,
                progress=progress, checkpoint=checkpoint,
                shared=prefilled.tiled if prefilled is not None else None,
            )  # fmt: skip
            return [tiled(*pair) for pair in zip(results, objectives, strict=True)]
        except NotTileableError as error:
            if not may_fall_back:
                raise NotTileableError(cannot(choice, error)) from error
            choice = require_plain_fits(choice, str(error))
            sums.clear()
    kept: list[dict[str, Tensor]] = []
    logits, values, coverage = run_each(
        model, tokens, objectives, rule_set, sums.readings,
        then=lambda _: kept.append(sums.take()),
        shared=prefilled.plain if prefilled is not None else None,
    )  # fmt: skip
    return [
        RunResult(logits, value, coverage, found, choice.memory)
        for value, found in zip(values, kept, strict=True)
    ]
