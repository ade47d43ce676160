"""Making the graph of a question: whole, or of a long prompt pruned while its edges come."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import CliError, not_finite, words_of
from .memory import MemoryOptions, RunPlan
from .output import Output
from .pruning import Pruning
from .question import Question
from .terminal import progress

if TYPE_CHECKING:
    from ..engine.prefilled import Prefilled
    from ..graph.graph import AttributionGraph

# A full graph grows with the square of the prompt: at 2,000 tokens it holds two million edges, or
# 32 MB, a block. Above that edges are pruned while they come.
LONG = 2000

# What the report of a long prompt shows at most of a transition.
REPORT_EDGES = 2000


def is_long(question: Question) -> bool:
    """Whether a graph of the prompt is pruned while it is made."""
    return question.n_tokens > LONG


def long_note(question: Question, saves_made: bool) -> str:
    """What is to be said of a graph that is pruned on the way, and of the file it is saved to."""
    if not is_long(question):
        return ""
    note = (
        f"The prompt has more than {LONG:,} tokens ({question.n_tokens:,}), so its edges were "
        "pruned while they came. Paths are those of the edges left then; their strengths are at "
        "least those in the full graph."
    )
    if saves_made:
        note += " --save writes that graph; --mass 1 would keep every edge."
    return note


def report_run(model: Any, length: int, way: MemoryOptions) -> RunPlan | str:
    """How memory is used for the report's graph, or why there is none."""
    from ..errors import FileFormatError, ModelStateError

    try:
        return way.run(model, length, "report_graph", graphs=1)
    except (ModelStateError, FileFormatError) as error:
        return words_of(error)


def report_graph(
    model: Any,
    question: Question,
    rules: str,
    output: Output,
    run: RunPlan | str,
    prefilled: Prefilled | None = None,
) -> tuple[AttributionGraph | None, str]:
    """The graph for the report of ``explain``, pruned and connected, or None; and a note on it.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Whether progress is shown.
        run: From ``report_run``.
        prefilled: The prompt's forward, where it serves the graph too.
    """
    from ..errors import FileFormatError, ModelStateError, UncoveredComponentError
    from ..graph.pruning import DEFAULT_MASS, PruneRule

    if isinstance(run, str):
        return None, f"The report has no graph: {run}"
    long = is_long(question)
    pruning = Pruning(PruneRule(mass=DEFAULT_MASS, top_k=REPORT_EDGES)) if long else Pruning()
    try:
        graph = make_graph(
            model, question, rules, output, run, pruning if long else None, prefilled=prefilled
        )
        kept = pruning.apply(graph)
        if not long:
            return kept, ""
        share = kept.mass / graph.history[0].mass_before if graph.history[0].mass_before else 1.0
        return kept, (
            f"The prompt has more than {LONG:,} tokens ({question.n_tokens:,}), so the report's "
            f"graph was pruned while it was made: of each transition the largest edges, with "
            f"{DEFAULT_MASS:.0%} of the mass, but at most {REPORT_EDGES:,}. Those that lead to the "
            f"prediction hold {share:.0%} of Σ|weight|. The graph command makes others."
        )
    except (CliError, UncoveredComponentError, ModelStateError, FileFormatError) as error:
        return None, f"The report has no graph: {words_of(error)}"
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        return None, "The report has no graph: there was not enough memory for it."


def make_graph(
    model: Any,
    question: Question,
    rules: str,
    output: Output,
    run: RunPlan,
    pruning: Pruning | None = None,
    **options: Any,
) -> AttributionGraph:
    """The full graph, or one that is pruned on the way.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Whether progress is shown.
        run: How memory is used.
        pruning: What ``Pruning.while_computed`` of it keeps; None keeps all.
        options: As for ``attribution_graph``; the forward, too.

    Raises:
        CliError: relevance that is not finite.
    """
    from ..errors import NonFiniteError
    from ..graph.assembly.attribution_graph import attribution_graph

    if pruning is not None:
        options |= pruning.while_computed(question.delta)
    # Tiles and transitions over several blocks show a bar of their own; two things would clash.
    bar = output.spins and (run.tiles or options.get("layers") is not None)
    words = f"Edges between {question.n_tokens:,} tokens"
    with run.interruptible(), progress(words, output.spins and not bar):
        try:
            graph: AttributionGraph = attribution_graph(
                model,
                question.tokens,
                target=question.target,
                contrast=question.contrast,
                pos=question.at,
                rules=rules,
                progress=bar,
                **run.options(),
                **options,
            )
        except NonFiniteError as error:
            raise not_finite(question.dtype) from error
        except ValueError as error:
            if type(error) is ValueError and re.search(r"\b(nan|inf|infinite)\b", str(error), re.I):
                raise not_finite(question.dtype) from error
            raise
    return replace(graph, prepended_bos=question.prepended_bos)  # it was given ids
