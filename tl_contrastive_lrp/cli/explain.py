"""Explaining one prediction for the command line, and writing its result and report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import message_of, not_finite
from .make_graph import is_long, report_graph, report_run
from .memory import MemoryOptions, RunPlan
from .output import Output, write
from .question import Question
from .results import Explained
from .terminal import print_err, progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..attribution.check import MapCheck
    from ..attribution.result import Attribution
    from ..engine.prefilled import Prefilled
    from ..graph.graph import AttributionGraph


@dataclass(frozen=True)
class Prepared:
    """The prompt's one forward, and how relevance and the report's graph continue from it.

    Attributes:
        prefilled: The forward.
        relevance: The memory plan for the relevance.
        graph: The memory plan for the report's graph; the reason if the report has none; or None
            if no graph was requested.
    """

    prefilled: Prefilled
    relevance: RunPlan
    graph: RunPlan | str | None

    @property
    def prefilled_for_graph(self) -> Prefilled | None:
        """The forward, if the graph starts from it too."""
        return self.prefilled if _share_forward(self.relevance, self.graph) else None


def _share_forward(relevance: RunPlan, graph: RunPlan | str | None) -> bool:
    """Whether one forward serves both: a graph may need tiles although relevance does not."""
    return isinstance(graph, RunPlan) and graph.plan.tile == relevance.plan.tile


def prepare(
    model: Any,
    tokens: Tensor,
    pos: int,
    *,
    rules: str,
    output: Output,
    memory: MemoryOptions,
    with_graph: bool,
) -> Prepared:
    """Plan the use of memory, and run the forward.

    Args:
        model: The bridge.
        tokens: The prompt, [1, pos].
        pos: The position explained.
        rules: Name of a rule set.
        output: Where results go; without a report there is no graph.
        memory: How memory may be used.
        with_graph: Whether the report, if there is one, shows the attribution graph.

    Raises:
        TokenError, UncoveredComponentError, ModelStateError, FileFormatError: As ``attribute``.
    """
    from ..attribution.attribute import relevance_readings
    from ..engine.prefilled import prefill_prompt
    from ..engine.reading import BlockCall
    from ..graph.assembly.plain import graph_readings
    from ..graph.assembly.plan import GraphPlan

    n = int(tokens.shape[1])
    relevance = memory.plan(model, n, "relevance")
    graph = report_run(model, n, memory) if with_graph and output.out is not None else None
    readings, calls = relevance_readings(model), dict[int, BlockCall]()
    shared = _share_forward(relevance, graph)
    if shared:
        readings += graph_readings(GraphPlan.of(model, rules), calls)
    # Tiles show a progress bar of their own, with which a spinner would clash.
    spinner = output.shows_progress and not relevance.is_tiled
    with progress(f"Forward through {n:,} tokens", spinner):
        prefilled = prefill_prompt(
            model,
            tokens,
            rules,
            readings,
            relevance.plan,
            pos=pos,
            calls=calls,
            uses=1 + shared,
            progress=output.shows_progress,
            attention=memory.attention,
        )
    return Prepared(prefilled, relevance, graph)


def explain(
    model: Any,
    question: Question,
    prepared: Prepared,
    *,
    rules: str,
    output: Output,
    with_check: bool = False,
) -> Explained:
    """Compute the relevance, and write the requested files.

    Args:
        model: The bridge.
        question: What to explain.
        prepared: Its forward.
        rules: Name of a rule set.
        output: Where results go.
        with_check: Whether to replace the strongest tokens, for a verdict.

    Raises:
        CliError: Relevance is not finite, or a file cannot be written.
        TokenError, UncoveredComponentError, ModelStateError, FileFormatError: As ``attribute``.
    """
    from ..attribution.attribute import attribute

    run = prepared.relevance
    run.announce(output)
    words = f"Backward through {question.n_tokens:,} tokens"
    with run.interruptible(), progress(words, output.shows_progress and not run.is_tiled):
        result = attribute(
            model,
            question.tokens,
            target=question.target,
            contrast=question.contrast,
            pos=question.typed_pos,
            rules=rules,
            progress=output.shows_progress,
            prefilled=prepared.prefilled,
            **run.arguments(),
        )
    if not (math.isfinite(result.delta) and bool(result.tokens.isfinite().all())):
        raise not_finite(question.dtype)
    # The result was computed from ids, so it records neither a BOS token put before the text nor
    # the messages of a chat.
    result = replace(result, prepended_bos=question.prepended_bos, segments=question.segments)
    write(output.save, result.save)  # before the graph, which may take long
    notes = [*question.notes, *filter(None, [run.note])]
    graph = None
    if prepared.graph is not None:
        if is_long(question) and not output.quiet:
            print_err("The graph for the report comes next; --no-graph would leave it out.")
        graph, note = report_graph(
            model, question, rules, output, prepared.graph, prepared.prefilled_for_graph
        )
        if note:
            notes.append(note)
            if not output.quiet:
                print_err(f"Note: {note}")
    check = None
    if with_check:  # after the graph, which lets go of the forward that it shares
        with progress("Replacing tokens", output.shows_progress):
            check, way = _checked(model, question, result)
        notes += way
    explained = Explained(question, result, run, tuple(notes), check)
    with progress("Writing the report", output.shows_progress and output.out is not None):
        write(output.out, lambda path: _write_report(explained, graph, path))
    return explained


def _checked(
    model: Any, question: Question, result: Attribution
) -> tuple[MapCheck | None, tuple[str, ...]]:
    """The check of a result, None if it cannot be made: the explanation is not lost then.

    Returns:
        The check, and sentences on why there is none, or on how it was made if not as usual.
    """
    from ..errors import LrpError, is_out_of_memory

    try:
        return _check(model, question, result)
    except LrpError as error:
        return None, (f"The map was not checked: {message_of(error)}",)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, ("The map was not checked: there was not enough memory for it.",)


def _check(model: Any, question: Question, result: Attribution) -> tuple[MapCheck, tuple[str, ...]]:
    """The check, with every token replaced where effects cannot be predicted."""
    from ..errors import UncoveredComponentError
    from ..inputs.objective import logit_diff

    objective = logit_diff(model, question.target, question.contrast, question.typed_pos)
    try:
        return result.check(model, objective=objective, progress=False), ()
    except UncoveredComponentError:
        check = result.check(model, objective=objective, window=None, progress=False)
    return check, (
        "Effects of replaced tokens cannot be predicted in this model, so for the check every "
        "token was replaced in a run of its own.",
    )


def _write_report(explained: Explained, graph: AttributionGraph | None, path: Path) -> None:
    from ..attribution.result import report_of
    from ..files import save_html

    question = explained.question
    html = report_of(
        explained.result,
        question.candidates,
        graph,
        explained.check,
        model_name=question.model_name,
        target=[question.names[i] for i in question.target],
        contrast=[question.names[i] for i in question.contrast],
        target_is_top=question.target_is_top,
        position=None if question.pos == question.n_tokens - 1 else question.pos,
        notes=explained.notes,
    )
    save_html(path, html)
