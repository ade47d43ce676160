"""Graphs of a long prompt: relevance and pruned edges from one forward and backwards in tiles."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...engine.memory import MemoryPlan
from ...engine.run import tiled
from ...engine.tiled.checkpoint import checkpoint_of
from ...engine.tiled.run import TiledResult, run_tiled
from ..columns import EdgeColumns
from ..edges.tiled import TiledEdges
from ..graph import AttributionGraph
from ..prune_history import TransitionKept
from ..pruning import PruneRule
from ..streaming_prune import StreamingSelection
from .plan import GraphPlan

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


def tiled_graphs(
    plan: GraphPlan,
    choice: MemoryPlan,
    checkpoint_dir: str | os.PathLike[str] | None,
    prefilled: Prefilled | None = None,
) -> list[AttributionGraph]:
    """A graph for each objective of the plan, with the edges that its rule keeps.

    Args:
        plan: Transitions each within one block.
        choice: Of a tile.
        checkpoint_dir: Where to keep what is finished.
        prefilled: The forward, if it was run before.

    Raises:
        NotTileableError, ModelStateError, UncoveredComponentError, FileFormatError: as ``run_tiled``.
    """
    targets = {s.block: plan.sites[s.target] for s in plan.steps if s.kind == "attention"}
    settings = f"graph {plan.sites} {plan.rule} {plan.node_threshold} {plan.heads} {plan.details}"
    checkpoint, tile = checkpoint_of(checkpoint_dir, settings, choice)
    edges = TiledEdges(
        plan.model, plan.covered, plan.rule_set, plan.rule, targets, plan.node_threshold,
        heads=plan.heads, objectives=len(plan.objectives),
    )  # fmt: skip
    sums, by_head = plan.sums()
    results = run_tiled(
        plan.model, plan.tokens, plan.objectives, plan.rule_set, sums, tile,
        reader=edges, progress=plan.progress, checkpoint=checkpoint,
        shared=None if prefilled is None else prefilled.tiled,
    )  # fmt: skip
    sums.warn_of_underflow()
    return [
        _graph(plan, objective, result, found, by_head)
        for objective, result, found in zip(plan.objectives, results, edges.selections, strict=True)
    ]


def _graph(
    plan: GraphPlan,
    objective: Callable[[Tensor], Tensor],
    result: TiledResult,
    edges: dict[int, StreamingSelection],
    by_head: list[str],
) -> AttributionGraph:
    relevance, details = plan.nodes(result.kept, by_head)
    columns, kept = EdgeColumns(with_heads=plan.heads), list[TransitionKept]()
    for step in plan.steps:
        if step.kind == "attention":
            found = edges[step.block]
        else:
            ends = relevance[step.source], relevance[step.target]
            found = _diagonal(plan.rule, *ends, plan.node_threshold)
        rows, sources, *slots, weights = found.kept()
        slot = (slots[0] if slots else torch.zeros_like(rows)) if plan.heads else None
        columns.add_edges(step.source, step.target, rows, sources, weights, slot)
        kept.append(found.account(step.source, step.target, weights))
    ran, rule = tiled(result, objective), plan.rule
    return AttributionGraph.from_columns(
        **columns.columns(),
        relevance=relevance,
        rules=ran.coverage.rules,
        coverage=ran.coverage,
        memory=ran.memory,
        history=(rule.step(kept, float(result.value)),) if rule else (),
        **plan.facts(objective, ran.logits),
        **details,
        **ran.described(objective),
    )


def _diagonal(
    rule: PruneRule, source: Tensor, target: Tensor, node_threshold: float
) -> StreamingSelection:
    """A transition in which every position keeps to itself, last rows first, in parts.

    At threshold 0 also where what arrives adds up to 0: it is what is passed on.
    """
    live = target.abs() > node_threshold if node_threshold else torch.ones_like(target.bool())
    found, values = StreamingSelection(rule), torch.where(live, source, 0)
    for stop in range(len(values), 0, -512):
        start = max(stop - 512, 0)
        found.add(torch.diag(values[start:stop]), start, start, start)
    return found
