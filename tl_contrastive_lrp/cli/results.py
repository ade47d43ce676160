"""What the commands ``explain`` and ``graph`` have computed, to be printed and written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .memory import RunPlan
from .question import Question

if TYPE_CHECKING:
    from ..attribution.check import MapCheck
    from ..attribution.result import Attribution
    from ..graph.graph import AttributionGraph
    from ..graph.paths import Paths


@dataclass(frozen=True)
class Explained:
    """The answer of ``explain``.

    Attributes:
        question: What was explained.
        result: The result.
        run: The memory plan.
        notes: Sentences on what the user may not expect.
        check: What replacing its strongest tokens did, if that was asked for.
    """

    question: Question
    result: Attribution
    run: RunPlan
    notes: tuple[str, ...] = ()
    check: MapCheck | None = None


@dataclass(frozen=True)
class Graphed:
    """The answer of ``graph``.

    Attributes:
        question: What was explained.
        full: The full graph; of a long prompt, the graph that was pruned while it was computed.
        pruned: The graph after pruning.
        paths: The strongest paths of ``full``.
        run: How memory was used.
        notes: Sentences on what the user may not expect.
    """

    question: Question
    full: AttributionGraph
    pruned: AttributionGraph
    paths: Paths
    run: RunPlan
    notes: tuple[str, ...]
