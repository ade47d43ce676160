"""A forward and backward the plain way or in tiles, as was chosen, with one kind of result."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .backward import run
from .coverage_table import Coverage
from .memory import Choice, cannot, instead
from .objective import described
from .rulesets import RuleSet
from .sums import Sums


@dataclass(frozen=True, eq=False)
class Ran:
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


def tiled(result: Any, objective: Callable[[Tensor], Tensor]) -> Ran:
    """Of a ``TiledResult``."""
    local = None if result.objective is objective else result.objective
    memory = f"tiled (tile {result.tile})"
    return Ran(result.logits, result.value, result.coverage, result.kept, memory, local)


def run_chosen(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: str | RuleSet,
    sums: Sums,
    choice: Choice,
    *,
    may_fall_back: bool,
    progress: bool,
    checkpoint_dir: str | os.PathLike[str] | None,
    settings: str,
) -> Ran:
    """Run as ``choice`` says.

    Args:
        model, tokens, objective, rule_set, sums: As for ``backward.run`` and ``run_tiled``.
        choice: From ``memory.choose``.
        may_fall_back: Take the plain way where tiles do not work and it fits.
        progress: Show a bar over tiles.
        checkpoint_dir: Where a run in tiles keeps what is finished.
        settings: What else the sums depend on.

    Raises:
        ModelStateError: it cannot run in tiles, and plainly it does not fit or was not asked for.
    """
    if choice.tile is not None:
        from .checkpoint import Checkpoint
        from .tile_cache import NotTileable
        from .tiled_run import run_tiled

        checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, settings)
        try:
            result, _ = run_tiled(
                model, tokens, objective, rule_set, sums, choice.tile,
                progress=progress, checkpoint=checkpoint,
            )  # fmt: skip
            return tiled(result, objective)
        except NotTileable as error:
            if not may_fall_back:
                raise NotTileable(cannot(choice, error)) from error
            choice = instead(choice, str(error))
            sums.kept.clear()
    logits, value, coverage = run(model, tokens, objective, rule_set, sums.readings)
    return Ran(logits, value, coverage, sums.kept, choice.memory)
