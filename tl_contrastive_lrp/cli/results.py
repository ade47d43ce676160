"""Explaining one prediction for the command line, and writing the files asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .memory import RunPlan
from .question import Question

if TYPE_CHECKING:
    from ..attribution.result import Attribution
    from ..graph.graph import AttributionGraph
    from ..graph.paths import Paths


@dataclass(frozen=True)
class Explained:
    """A result, with what was asked."""

    question: Question
    result: Attribution
    run: RunPlan
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Graphed:
    """A graph as it was made and what pruning left of it, with what was asked.

    made is the full graph, or of a long prompt one that was pruned while its edges came; paths are
    those of made.
    """

    question: Question
    made: AttributionGraph
    kept: AttributionGraph
    paths: Paths
    run: RunPlan
    notes: tuple[str, ...]
