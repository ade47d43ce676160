"""A graph from selections of each transition's edges, whichever engine filled them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.plain import RunResult
from ...inputs.facts import PromptFacts
from ..columns import EdgeColumns
from ..graph import AttributionGraph
from ..prune_history import TransitionKept
from ..pruning import PruneRule
from ..streaming_prune import StreamingSelection
from .plan import GraphPlan, GraphQuestion, NodeRelevance


def selected_graph(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    result: RunResult,
    nodes: NodeRelevance,
    selections: Mapping[tuple[int, int], StreamingSelection],
) -> AttributionGraph:
    """Assemble a graph from the edges that its rule keeps.

    Args:
        plan: What the graph holds.
        prompt: The facts about the prompt that the graph records.
        question: Which edges to keep.
        result: One objective's run.
        nodes: Relevance of the nodes.
        selections: By source and target site, the edges of each transition. Those that mix no
            positions may be missing: their edges are the source's relevance.
    """
    rule, columns = question.rule, EdgeColumns(with_heads=plan.heads)
    accounts = list[TransitionKept]()
    for step in plan.steps:
        ends = step.source, step.target
        selection = selections.get(ends)
        if selection is None:
            of_ends = nodes.relevance[step.source], nodes.relevance[step.target]
            selection = _diagonal(rule, *of_ends, question.node_threshold)
        rows, sources, *slots, weights = selection.kept()
        slot = (slots[0] if slots else torch.zeros_like(rows)) if plan.heads else None
        columns.add_edges(*ends, rows, sources, weights, slot)
        accounts.append(selection.account(*ends, weights))
    history = (rule.step(accounts, result.objective.delta),) if rule else ()
    return plan.graph(prompt, result, nodes, columns, question.node_threshold, history)


def selection_of(
    rule: PruneRule, matrix: Float[Tensor, "target source *slot"], live: Bool[Tensor, " target"]
) -> StreamingSelection:
    """Select edges of a transition whose whole matrix is known.

    Args:
        rule: Which edges to keep.
        matrix: Weights in logits; it is written into.
        live: The targets that are expanded.
    """
    selection = StreamingSelection(rule)
    if not bool(live.all()):
        matrix[~live.to(matrix.device)] = 0
    selection.add(matrix, 0, 0, 0)
    return selection


def _diagonal(
    rule: PruneRule,
    source: Float[Tensor, " pos"],
    target: Float[Tensor, " pos"],
    node_threshold: float,
) -> StreamingSelection:
    """Select edges of a transition that mixes no positions: its edges are a diagonal.

    At threshold 0, a target whose relevance adds up to 0 still has its edge, since the edge's
    weight is what the source passes on.
    """
    live = target.abs() > node_threshold if node_threshold else torch.ones_like(target.bool())
    selection = StreamingSelection(rule)
    selection.add_diagonal(torch.where(live, source, torch.zeros_like(source)), slots=False)
    return selection
