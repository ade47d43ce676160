"""Run objectives with the plain or the tiled engine, as planned; both give the same results."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..inputs.objective import positions_read
from ..rules.rule_sets import RuleSet
from .fused import AttentionKind, fused_blocks, is_worth
from .memory import Memory, MemoryPlan, plan_memory, run_as_planned
from .plain import RunResult, forward, run_each
from .prefilled import Prefilled
from .reading import RelevanceSums
from .tiled.checkpoint import checkpoint_of, folder_of_part
from .tiled.run import run_tiled


@dataclass(frozen=True)
class RunOptions:
    """Options for memory, progress and checkpoints of a run; see ``attribute``."""

    memory: Memory = "auto"
    tile: int | None = None
    progress: bool = True
    checkpoint_dir: str | os.PathLike[str] | None = None
    attention: AttentionKind = "auto"

    def __post_init__(self) -> None:
        is_worth(self.attention, 0)  # refuses an unknown kind, also where tiles run

    def of_part(self, part: str | None) -> RunOptions:
        """The options for one of several runs that make up a result.

        Args:
            part: Names the run, whose checkpoints get a folder of their own in the folder given;
                None for the only run.

        Raises:
            FileNotFoundError, FileFormatError: as ``checkpoint.folder_of_part``.
        """
        if part is None or self.checkpoint_dir is None:
            return self
        return replace(self, checkpoint_dir=folder_of_part(self.checkpoint_dir, part))

    @staticmethod
    def require_own_forward(prefilled: Prefilled | None) -> None:
        """Refuse a forward that has already been run, where a result takes several forwards.

        Raises:
            ValueError: there is one.
        """
        if prefilled is not None:
            raise ValueError(
                "prefilled= is the forward of a prompt alone, but two answers take a forward each, "
                "of the prompt with the answer. Leave it out."
            )

    def require_no_part(self, prefilled: Prefilled | None, which: int) -> None:
        """Refuse a forward or a folder of a prompt alone, where an objective has runs of its own.

        Args:
            prefilled: The forward.
            which: The place of the objective in the list.

        Raises:
            ValueError: there is one.
        """
        if prefilled is not None or self.checkpoint_dir is not None:
            raise ValueError(
                f"objectives[{which}] is the difference of two answers, which has runs of its own; "
                "leave out checkpoint_dir= and prefilled=, or explain it in a call by itself."
            )

    def plan(
        self,
        model: Any,
        length: int,
        prefilled: Prefilled | None = None,
        read: Sequence[int] | None = None,
    ) -> MemoryPlan:
        """The plan for one prompt, or that of the forward that has already been run.

        Args:
            model: The bridge.
            length: Number of tokens in the prompt.
            prefilled: The forward.
            read: The positions whose logits are read; None for all.

        Raises:
            ValueError: as ``plan_memory``; another kind of attention than that forward's.
        """
        if prefilled is not None:
            prefilled.check_attention(self.attention)
            return prefilled.plan
        fused = fused_blocks(model, self.attention, length)
        rows = length if read is None else len(read)
        return plan_memory(model, length, self.memory, self.tile, fused=fused, read=rows)


def run(
    model: Any,
    tokens: Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    sums: RelevanceSums,
    plan: MemoryPlan,
    options: RunOptions,
    *,
    settings: str,
    prefilled: Prefilled | None = None,
) -> list[RunResult]:
    """Run one forward for all objectives, and a backward for each.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [1, pos].
        objectives: Functions of the logits.
        rule_set: Name of a rule set, or a ``RuleSet``.
        sums: What to keep of the relevance.
        plan: Which engine to use.
        options: Progress and checkpoints of a run in tiles.
        settings: What the sums depend on besides the objectives, in words, for checkpoints.
        prefilled: The forward, if it has already been run; ``plan`` is then its plan.

    Returns:
        One result per objective.

    Raises:
        ModelStateError: tiles do not work, and the plain engine would not fit or was not allowed.
        UncoveredComponentError, FileFormatError: as ``attribute``.
    """

    def tiled(plan: MemoryPlan) -> list[RunResult]:
        checkpoint, tile = checkpoint_of(options.checkpoint_dir, settings, plan)
        return run_tiled(
            model, tokens, objectives, rule_set, sums, tile,
            progress=options.progress, checkpoint=checkpoint,
            shared=prefilled.tiled if prefilled is not None else None,
            attention=options.attention,
        )  # fmt: skip

    def plain(plan: MemoryPlan) -> list[RunResult]:
        sums.clear()
        relevance: list[dict[str, Tensor]] = []
        shared = prefilled.plain if prefilled is not None else None
        if shared is None:
            shared = forward(
                model, tokens, rule_set, sums.readings, attention=options.attention,
                read=positions_read(objectives, tokens.shape[1]),
            )  # fmt: skip
        _, values, coverage = run_each(
            model, tokens, objectives, rule_set, sums.readings,
            then=lambda _: relevance.append(sums.take()), shared=shared,
        )  # fmt: skip
        facts = [
            shared.facts(objective, value)
            for objective, value in zip(objectives, values, strict=True)
        ]
        return [
            RunResult(fact, by_name, coverage, plan.memory, shared.attention)
            for fact, by_name in zip(facts, relevance, strict=True)
        ]

    results = run_as_planned(plan, tiled, plain)
    sums.warn_of_underflow()
    return results
