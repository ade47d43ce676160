"""Graphs of a long prompt: relevance and pruned edges from one forward and backwards in tiles."""

from __future__ import annotations

from ...engine.memory import MemoryPlan
from ...engine.prefilled import Prefilled
from ...engine.run import RunOptions
from ...engine.tiled.checkpoint import checkpoint_of
from ...engine.tiled.run import run_tiled
from ...inputs.facts import PromptFacts
from ..edges.tiled import TiledEdges
from ..graph import AttributionGraph
from .plan import GraphPlan, GraphQuestion
from .selected import selected_graph


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
        shared=None if prefilled is None else prefilled.tiled, attention=options.attention,
    )  # fmt: skip
    sums.warn_of_underflow()
    ends = {step.block: (step.source, step.target) for step in plan.attention_steps}
    return [
        selected_graph(
            plan, prompt, question, result, plan.nodes(result.relevance, heads),
            {ends[block]: selection for block, selection in selections.items()},
        )
        for result, selections in zip(results, edges.selections, strict=True)
    ]  # fmt: skip
