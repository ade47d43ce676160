"""Graphs of a long prompt: relevance and pruned edges from one forward and backwards in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from ...engine.memory import MemoryPlan
from ...engine.plain import RunResult
from ...engine.prefilled import Prefilled
from ...engine.run import RunOptions
from ...engine.tiled.checkpoint import checkpoint_of
from ...engine.tiled.run import run_tiled
from ...inputs.facts import PromptFacts
from ..columns import EdgeColumns
from ..edges.tiled import TiledEdges
from ..graph import AttributionGraph
from ..prune_history import TransitionKept
from ..pruning import PruneRule
from ..streaming_prune import StreamingSelection
from .plan import GraphPlan, GraphQuestion


def tiled_graphs(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    memory_plan: MemoryPlan,
    options: RunOptions,
    prefilled: Prefilled | None = None,
) -> list[AttributionGraph]:
    """Compute a graph for each objective, keeping only the edges that the rule keeps.

    Args:
        plan: What the graphs hold; every transition lies within one block.
        prompt: The prompt.
        question: The objectives, and which edges to keep.
        memory_plan: Gives the number of positions per tile.
        options: Whether to show progress, and where to keep finished blocks.
        prefilled: The forward, if it has already been run.

    Raises:
        NotTileableError, ModelStateError, UncoveredComponentError, FileFormatError: as
            ``run_tiled``.
    """
    rule, threshold = question.rule, question.node_threshold
    targets = {step.block: plan.sites[step.target] for step in plan.attention_steps}
    settings = f"graph {plan.sites} {rule} {threshold} {plan.heads} {plan.details}"
    checkpoint, tile = checkpoint_of(options.checkpoint_dir, settings, memory_plan)
    edges = TiledEdges(
        plan.model, plan.covered, plan.rule_set, rule, targets, threshold,
        heads=plan.heads, objectives=len(question.objectives),
    )  # fmt: skip
    sums, heads = plan.sums()
    results = run_tiled(
        plan.model, prompt.tokens, question.objectives, plan.rule_set, sums, tile,
        reader=edges, progress=options.progress, checkpoint=checkpoint,
        shared=None if prefilled is None else prefilled.tiled,
    )  # fmt: skip
    sums.warn_of_underflow()
    return [
        _graph(plan, prompt, question, result, selections, heads)
        for result, selections in zip(results, edges.selections, strict=True)
    ]


def _graph(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    result: RunResult,
    selections: dict[int, StreamingSelection],
    heads: list[str],
) -> AttributionGraph:
    rule, nodes = question.rule, plan.nodes(result.relevance, heads)
    columns, accounts = EdgeColumns(with_heads=plan.heads), list[TransitionKept]()
    for step in plan.steps:
        if step.kind == "attention":
            selection = selections[step.block]
        else:
            ends = nodes.relevance[step.source], nodes.relevance[step.target]
            selection = _diagonal(rule, *ends, question.node_threshold)
        rows, sources, *slots, weights = selection.kept()
        slot = (slots[0] if slots else torch.zeros_like(rows)) if plan.heads else None
        columns.add_edges(step.source, step.target, rows, sources, weights, slot)
        accounts.append(selection.account(step.source, step.target, weights))
    history = (rule.step(accounts, result.objective.delta),) if rule else ()
    return plan.graph(prompt, result, nodes, columns, question.node_threshold, history)


def _diagonal(
    rule: PruneRule, source: Tensor, target: Tensor, node_threshold: float
) -> StreamingSelection:
    """Select edges of a transition that mixes no positions: its edges are a diagonal.

    Rows are added in parts, from the last to the first. At threshold 0, a target whose relevance
    adds up to 0 still has its edge, since the edge's weight is what the source passes on.
    """
    live = target.abs() > node_threshold if node_threshold else torch.ones_like(target.bool())
    selection, values = StreamingSelection(rule), torch.where(live, source, 0)
    for stop in range(len(values), 0, -512):
        start = max(stop - 512, 0)
        selection.add(torch.diag(values[start:stop]), start, start, start)
    return selection
