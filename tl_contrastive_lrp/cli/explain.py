"""Explaining one prediction for the command line, and writing the files asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .exit import not_finite
from .graph_made import is_long, report_graph
from .output import Output, write
from .question import Question
from .terminal import progress, say
from .way import Run, Way

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..graph import AttributionGraph


@dataclass(frozen=True)
class Explained:
    """A result, with what was asked."""

    question: Question
    result: Attribution
    run: Run
    notes: tuple[str, ...] = ()


def explain(
    model: Any, question: Question, *, rules: str, output: Output, way: Way, graph: bool = True
) -> Explained:
    """Attribute, and write the files that were asked for.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Where to write.
        way: How memory is used.
        graph: Whether the report, if one is asked for, shows the attribution graph too.

    Raises:
        CliError: relevance that is not finite; a file that cannot be written.
        TokenError, UncoveredComponentError, ModelStateError, FileFormatError: as ``attribute``.
    """
    from ..explain import attribute

    graph = graph and output.out is not None
    run = way.run(model, question.n_tokens, "relevance")
    run.announce(output)
    words = f"Forward and backward through {question.n_tokens:,} tokens"
    # Tiles show a bar of their own; two moving things would clash.
    with run.interruptible(), progress(words, output.spins and not run.tiles):
        result = attribute(
            model,
            question.tokens,
            target=question.target,
            contrast=question.contrast,
            pos=question.at,
            rules=rules,
            progress=output.spins,
            **run.options(),
        )
    if not (math.isfinite(result.delta) and bool(result.tokens.isfinite().all())):
        raise not_finite(question.dtype)
    write(output.save, result.save)  # before what else may take long
    notes = [*question.notes, *filter(None, [run.note])]
    shown = None
    if graph:
        if is_long(question) and not output.quiet:
            say("The graph for the report comes next; --no-graph would leave it out.")
        shown, note = report_graph(model, question, rules, output, way)
        if note:
            notes.append(note)
            if not output.quiet:
                say(f"Note: {note}")
    explained = Explained(question, result, run, tuple(notes))
    with progress("Writing the report", output.spins and output.out is not None):
        write(output.out, lambda path: _write_report(explained, shown, path))
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
