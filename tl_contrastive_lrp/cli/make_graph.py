"""Computes the graph of a question: in full, or pruned as it is computed for a long prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..errors import (
    FileFormatError,
    ModelStateError,
    NonFiniteError,
    UncoveredComponentError,
    is_out_of_memory,
)
from .errors import CliError, message_of, not_finite
from .memory import MemoryOptions, RunPlan
from .output import Output
from .pruning import Pruning
from .question import Question
from .terminal import progress

if TYPE_CHECKING:
    from ..engine.prefilled import Prefilled
    from ..graph.graph import AttributionGraph

# A full graph grows with the square of the prompt: at 2,000 tokens it has two million edges per
# block, 32 MB. Above that, edges are pruned while they are computed.
LONG = 2000

# The most edges of one transition that the report of a long prompt shows.
REPORT_EDGES = 2000


@dataclass(frozen=True)
class GraphShape:
    """Which edges a graph has.

    Attributes:
        granularity: "block" or "sublayer".
        layers: The blocks whose inputs are sites; None for all.
        heads: Whether edges are split by head, and by value and key path.
    """

    granularity: Literal["block", "sublayer"] = "block"
    layers: tuple[int, ...] | None = None
    heads: bool = False


def is_long(question: Question) -> bool:
    """Whether a graph of the prompt is pruned while it is computed."""
    return question.n_tokens > LONG


def long_note(question: Question, *, saves_full: bool) -> str:
    """The note on a graph that is pruned while it is computed, or "".

    Args:
        question: What is explained.
        saves_full: Whether ``--save`` writes the graph as it was before any further pruning.
    """
    if not is_long(question):
        return ""
    note = (
        f"The prompt has more than {LONG:,} tokens ({question.n_tokens:,}), so its edges were "
        "pruned while they were computed. Paths are those of the remaining edges; their strengths "
        "are at least those in the full graph."
    )
    if saves_full:
        note += " --save writes that graph; --mass 1 would keep every edge."
    return note


def report_run(model: Any, length: int, memory: MemoryOptions) -> RunPlan | str:
    """The memory plan for the report's graph, or the reason why the report has none."""
    try:
        return memory.plan(model, length, "report_graph", graphs=1, pruned=length > LONG)
    except (ModelStateError, FileFormatError) as error:
        return message_of(error)


def report_graph(
    model: Any,
    question: Question,
    rules: str,
    output: Output,
    run: RunPlan | str,
    prefilled: Prefilled | None = None,
) -> tuple[AttributionGraph | None, str]:
    """Compute the graph for the report of ``explain``, pruned and connected.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Whether progress is shown.
        run: From ``report_run``.
        prefilled: The prompt's forward, where it serves the graph too.

    Returns:
        The graph, or None if it cannot be computed; and a note, which may be empty.
    """
    from ..graph.pruning import DEFAULT_MASS, PruneRule

    if isinstance(run, str):
        return None, f"The report has no graph: {run}"
    long = is_long(question)
    pruning = Pruning(PruneRule(mass=DEFAULT_MASS, top_k=REPORT_EDGES)) if long else Pruning()
    try:
        graph = make_graph(
            model, question, rules, output, run, pruning if long else None, prefilled=prefilled
        )
        pruned = pruning.apply(graph)
    except (CliError, UncoveredComponentError, ModelStateError, FileFormatError) as error:
        return None, f"The report has no graph: {message_of(error)}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, "The report has no graph: there was not enough memory for it."
    if not long:
        return pruned, ""
    mass_before = graph.history[0].mass_before
    share = pruned.mass / mass_before if mass_before else 1.0
    return pruned, (
        f"The prompt has more than {LONG:,} tokens ({question.n_tokens:,}), so the report's graph "
        f"was pruned while it was computed: of each transition it has the largest edges, with "
        f"{DEFAULT_MASS:.0%} of the mass, but at most {REPORT_EDGES:,}. Those that lead to the "
        f"prediction hold {share:.0%} of Σ|weight|. The graph command can keep others."
    )


def make_graph(
    model: Any,
    question: Question,
    rules: str,
    output: Output,
    run: RunPlan,
    pruning: Pruning | None = None,
    *,
    shape: GraphShape | None = None,
    node_threshold: float = 0.0,
    prefilled: Prefilled | None = None,
) -> AttributionGraph:
    """Compute the full graph, or one that is pruned while its edges are computed.

    Args:
        model: The bridge.
        question: What to explain.
        rules: Name of a rule set.
        output: Whether progress is shown.
        run: How memory is used.
        pruning: Prune by its ``while_computed`` while edges are computed; None keeps every edge.
        shape: Which edges the graph has; None for the defaults.
        node_threshold: Hidden states of |relevance| up to this, in logits, are not expanded.
        prefilled: The prompt's forward, if it has already been run.

    Raises:
        CliError: Relevance is not finite.
    """
    from ..graph.assembly.attribution_graph import attribution_graph

    shape = shape or GraphShape()
    streaming = {} if pruning is None else pruning.while_computed(question.delta)
    # Tiles and transitions over several blocks show a progress bar of their own.
    bar = output.shows_progress and (run.is_tiled or shape.layers is not None)
    words = f"Edges between {question.n_tokens:,} tokens"
    arguments: dict[str, Any] = {**run.arguments(), **streaming}
    with run.interruptible(), progress(words, output.shows_progress and not bar):
        try:
            graph: AttributionGraph = attribution_graph(
                model,
                question.tokens,
                target=question.target,
                contrast=question.contrast,
                pos=question.typed_pos,
                rules=rules,
                granularity=shape.granularity,
                layers=shape.layers,
                node_threshold=node_threshold,
                heads=shape.heads,
                progress=bar,
                prefilled=prefilled,
                **arguments,
            )
        except NonFiniteError as error:
            raise not_finite(question.dtype) from error
    # The graph was computed from ids, so it records neither a BOS token put before the text nor the
    # messages of a chat.
    return replace(graph, prepended_bos=question.prepended_bos, segments=question.segments)
