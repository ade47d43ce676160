"""Explaining one prediction for the command line, and writing the files asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import not_finite
from .make_graph import is_long, report_graph, report_run
from .memory import MemoryOptions, RunPlan
from .output import Output, write
from .question import Question
from .results import Explained
from .terminal import print_err, progress

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.prefilled import Prefilled
    from ..graph.graph import AttributionGraph


@dataclass(frozen=True)
class Prepared:
    """The prompt's one forward, and how relevance and the report's graph go on from it.

    graph is None where no graph is wanted, or why there can be none.
    """

    prefilled: Prefilled
    relevance: RunPlan
    graph: RunPlan | str | None

    @property
    def shared(self) -> Prefilled | None:
        """The forward, if the graph starts from it too."""
        return self.prefilled if _share(self.relevance, self.graph) else None


def _share(relevance: RunPlan, graph: RunPlan | str | None) -> bool:
    """Whether one forward serves both: a graph may need tiles where relevance does not."""
    return isinstance(graph, RunPlan) and graph.choice.tile == relevance.choice.tile


def prepare(
    model: Any,
    tokens: Tensor,
    pos: int,
    *,
    rules: str,
    output: Output,
    way: MemoryOptions,
    graph: bool,
) -> Prepared:
    """Decide how memory is used, and run the forward.

    Args:
        model: The bridge.
        tokens: The prompt, [1, pos].
        pos: The position explained.
        rules: Name of a rule set.
        output: Where to write; without a report there is no graph.
        way: How memory is used.
        graph: Whether the report, if one is asked for, shows the attribution graph too.

    Raises:
        TokenError, UncoveredComponentError, ModelStateError, FileFormatError: as ``attribute``.
    """
    from ..attribution.attribute import relevance_readings
    from ..engine.prefilled import prefill_prompt
    from ..engine.reading import BlockCall
    from ..graph.assembly.attribution_graph import plan_of
    from ..graph.assembly.plain import graph_readings

    n = int(tokens.shape[1])
    relevance = way.run(model, n, "relevance")
    of_graph = report_run(model, n, way) if graph and output.out is not None else None
    readings, calls = relevance_readings(model), dict[int, BlockCall]()
    shared = _share(relevance, of_graph)
    if shared:
        readings += graph_readings(plan_of(model, tokens, rules), calls)
    # Tiles show a bar of their own; two moving things would clash.
    with progress(f"Forward through {n:,} tokens", output.spins and not relevance.tiles):
        prefilled = prefill_prompt(
            model,
            tokens,
            rules,
            readings,
            relevance.choice,
            may_fall_back=relevance.way.memory == "auto",
            pos=pos,
            calls=calls,
            uses=1 + shared,
            progress=output.spins,
        )
    return Prepared(prefilled, relevance, of_graph)


def explain(
    model: Any, question: Question, prepared: Prepared, *, rules: str, output: Output
) -> Explained:
    """Attribute, and write the files that were asked for.

    Args:
        model: The bridge.
        question: What to explain.
        prepared: Its forward.
        rules: Name of a rule set.
        output: Where to write.

    Raises:
        CliError: relevance that is not finite; a file that cannot be written.
        TokenError, UncoveredComponentError, ModelStateError, FileFormatError: as ``attribute``.
    """
    from ..attribution.attribute import attribute

    run = prepared.relevance
    run.announce(output)
    words = f"Backward through {question.n_tokens:,} tokens"
    with run.interruptible(), progress(words, output.spins and not run.tiles):
        result = attribute(
            model,
            question.tokens,
            target=question.target,
            contrast=question.contrast,
            pos=question.at,
            rules=rules,
            progress=output.spins,
            prefilled=prepared.prefilled,
            **run.options(),
        )
    if not (math.isfinite(result.delta) and bool(result.tokens.isfinite().all())):
        raise not_finite(question.dtype)
    result = replace(result, prepended_bos=question.prepended_bos)  # it was given ids
    write(output.save, result.save)  # before what else may take long
    notes = [*question.notes, *filter(None, [run.note])]
    shown = None
    if prepared.graph is not None:
        if is_long(question) and not output.quiet:
            print_err("The graph for the report comes next; --no-graph would leave it out.")
        shown, note = report_graph(model, question, rules, output, prepared.graph, prepared.shared)
        if note:
            notes.append(note)
            if not output.quiet:
                print_err(f"Note: {note}")
    explained = Explained(question, result, run, tuple(notes))
    with progress("Writing the report", output.spins and output.out is not None):
        write(output.out, lambda path: _write_report(explained, shown, path))
    return explained


def _write_report(explained: Explained, graph: AttributionGraph | None, path: Path) -> None:
    from ..attribution.result import report_of
    from ..files import save_html

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
