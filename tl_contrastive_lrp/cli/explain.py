"""Explaining one prediction for the command line, and writing the files asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .exit import not_finite
from .graph import report_graph
from .output import Output, write
from .question import Question
from .terminal import progress, say

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..graph import AttributionGraph


@dataclass(frozen=True)
class Explained:
    """A result, with what was asked."""

    question: Question
    result: Attribution
    notes: tuple[str, ...] = ()


def explain(
    model: Any, question: Question, *, rules: str, output: Output, graph: bool = True
) -> Explained:
    """Attribute, and write the files that were asked for.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Where to write.
        graph: Whether the report, if one is asked for, shows the attribution graph too.

    Raises:
        CliError: relevance that is not finite; a file that cannot be written.
        TokenError, UncoveredComponentError, ModelStateError: as ``attribute``.
    """
    from ..explain import attribute
    from ..memory import choose

    words = f"Forward and backward through {question.n_tokens} tokens"
    choice = choose(model, question.n_tokens)
    tiles = choice.tile is not None  # they show a bar of their own; two moving things would clash
    if tiles and not output.quiet:
        say(f"Memory: {choice}")
    with progress(words, output.spins and not tiles):
        result = attribute(
            model,
            question.tokens,
            target=question.target,
            contrast=question.contrast,
            pos=question.at,
            rules=rules,
            progress=output.spins,
        )
    if not (math.isfinite(result.delta) and bool(result.tokens.isfinite().all())):
        raise not_finite(question.dtype)
    notes = question.notes
    shown = None
    if graph and output.out is not None:
        shown, why_not = report_graph(model, question, rules, output)
        if why_not:
            notes = (*notes, why_not)
            if not output.quiet:
                say(f"Note: {why_not}")
    explained = Explained(question, result, notes)
    with progress("Writing the report", output.spins and output.out is not None):
        write(output.out, lambda path: _write_report(explained, shown, path))
        write(output.save, result.save)
    return explained


def _write_report(explained: Explained, graph: AttributionGraph | None, path: Path) -> None:
    from ..render.files import save_html
    from ..report import report_of

    question = explained.question
    html = report_of(
        explained.result,
        question.candidates,
        graph,
        model_name=question.model_name,
        target=[question.names[i] for i in question.target],
        contrast=[question.names[i] for i in question.contrast],
        target_is_top=question.target_is_top,
        position=None if question.pos == question.n_tokens - 1 else question.pos,
        notes=explained.notes,
    )
    save_html(path, html)
