"""Graphs from the plain engine: the whole matrix of every transition, from one forward."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.plain import Forward, RunResult, run_each
from ...engine.reading import BlockCall, Reading
from ...hooks.hook_rules import HookWatch
from ...hooks.user_hooks import user_hooks
from ...inputs.facts import ObjectiveFacts, PromptFacts
from ..columns import EdgeColumns
from ..edges.batched import batched_edges
from ..edges.check import RecordedSites, require_closed_form
from ..edges.closed_form import BlockEdges, HookedBlock, biased_blocks, edge_readings
from ..graph import AttributionGraph
from .plan import GraphPlan, GraphQuestion, NodeRelevance, Step

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


def plain_graphs(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    *,
    progress: bool = False,
    prefilled: Prefilled | None = None,
) -> list[AttributionGraph]:
    """Compute a graph for each objective, and prune it.

    Args:
        plan: What the graphs hold.
        prompt: The prompt.
        question: The objectives, and which edges to keep.
        progress: Show a progress bar over transitions that span several blocks.
        prefilled: The forward, if it has already been run.

    Raises:
        ValueError: the forward was not prepared for a graph.
        ModelStateError, UncoveredComponentError: as ``plain.run_each``.
    """
    model, objectives = plan.model, question.objectives
    edges = _block_edges(plan)
    hooked = bool(user_hooks(model))
    shared, calls = _shared_forward(edges, prefilled, hooked)
    checks = _HookChecks(plan, edges) if hooked else None
    sums, heads = plan.sums()
    readings = [
        *sums.readings,
        *_edge_readings(plan, edges, calls, {} if checks is None else checks.hooked),
    ]
    scopes: list[AbstractContextManager[None]] = [
        call.recorded(model.blocks[block]) for block, call in calls.items()
    ]
    if checks is not None:
        readings = [checks.edges.listening(reading) for reading in readings]
        scopes += checks.scopes()
    if edges:
        require_closed_form(model, plan.rule_set)
    nodes: list[NodeRelevance] = []
    columns: list[EdgeColumns] = []

    def prepare(which: int) -> None:
        for block in edges.values():
            block.again = which + 1 < len(objectives)

    def take(which: int) -> None:
        """Take the results of one backward before the next one runs."""
        nodes.append(plan.nodes(sums.take(), heads))
        relevance = nodes[-1].relevance
        if checks is not None:
            checks.require(relevance)
        columns.append(_columns(plan, edges, relevance, question.node_threshold))
        for block in edges.values():
            block.clear()
        prepare(which + 1)

    prepare(0)
    logits, values, coverage = run_each(
        model, prompt.tokens, objectives, plan.rule_set, readings, scopes, then=take,
        hook_watch=None if checks is None else checks.watch, shared=shared,
    )  # fmt: skip
    sums.warn_of_underflow()
    graphs = []
    for which, objective in enumerate(objectives):
        _add_batched(
            plan, prompt, question, columns[which], nodes[which].relevance, which, progress
        )
        facts = ObjectiveFacts.of(objective, logits, values[which], prompt.tokens.shape[1])
        result = RunResult(facts, {}, coverage, "plain")
        graph = plan.graph(prompt, result, nodes[which], columns[which], question.node_threshold)
        rule = question.rule
        graphs.append(
            graph.prune(mass=rule.mass, threshold=rule.threshold, top_k=rule.top_k)
            if rule
            else graph
        )
    return graphs


def graph_readings(plan: GraphPlan, calls: dict[int, BlockCall]) -> list[Reading]:
    """What ``attribution_graph`` will read, for ``prefilled.prefill_prompt``.

    Args:
        plan: What the graph will hold.
        calls: Filled with the blocks whose arguments the forward is to record.
    """
    edges = _block_edges(plan)
    calls |= {block: BlockCall() for block in edges if block not in calls}
    return [*plan.sums()[0].readings, *_edge_readings(plan, edges, calls)]


def _block_edges(plan: GraphPlan) -> dict[int, BlockEdges]:
    return {step.block: BlockEdges(step.block, plan.heads) for step in plan.attention_steps}


def _edge_readings(
    plan: GraphPlan,
    edges: dict[int, BlockEdges],
    calls: dict[int, BlockCall],
    hooked: Mapping[int, HookedBlock] = MappingProxyType({}),
) -> list[Reading]:
    model, biased = plan.model, biased_blocks(plan.model)
    return [
        reading
        for number, block in edges.items()
        for reading in edge_readings(
            model, block, plan.covered, plan.rule_set, calls[number], biased,
            hooked=hooked.get(number),
        )
    ]  # fmt: skip


def _shared_forward(
    edges: dict[int, BlockEdges], prefilled: Prefilled | None, hooked: bool
) -> tuple[Forward | None, dict[int, BlockCall]]:
    """The forward that has already been run, if it can be used, and the arguments of the blocks.

    Raises:
        ValueError: it was not prepared for a graph.
    """
    calls = {block: BlockCall() for block in edges}
    if prefilled is None or prefilled.plain is None:
        return None, calls
    if hooked:  # edges under the user's hooks are checked in a forward of their own
        prefilled.plain.pass_over()
        return None, calls
    if missing := [block for block in edges if block not in prefilled.calls]:
        raise ValueError(
            f"The forward was not prepared for edges of block {missing[0]} (graph_readings); "
            "leave prefilled= out, or run another one."
        )
    return prefilled.plain, prefilled.calls


class _HookChecks:
    """Checks of the edges under the user's hooks, against the run's own autograd graph.

    Attributes:
        edges: Compares every transition with random backward signals.
        watch: Records what the user's hooks do.
        hooked: By number, the blocks that have hooks.
    """

    def __init__(self, plan: GraphPlan, edges: dict[int, BlockEdges]) -> None:
        self.plan, self.block_edges = plan, edges
        self.edges = RecordedSites(plan.sites)
        self.watch = HookWatch(quiet=lambda: self.edges.quiet)
        points = {f"{hook.name}." for hook in user_hooks(plan.model)}
        self.hooked = {
            block: HookedBlock(block, partial(self.watch.edited, prefix), lambda: self.edges.quiet)
            for block in edges
            if any(name.startswith(prefix := f"blocks.{block}.") for name in points)
        }

    def scopes(self) -> list[AbstractContextManager[None]]:
        """The context managers to enter around the forward."""
        blocks = [block for block in self.hooked.values() if block.at_z is not None]
        model = self.plan.model
        return [*(block.before_hooks(model) for block in blocks), self.edges.recording(model)]

    def require(self, relevance: Float[Tensor, "site pos"]) -> None:
        """Check the edges of one backward, if a hook edits.

        Raises:
            UncoveredComponentError: the edges are not those of the model with its hooks.
        """
        if not self.watch.edits:
            return
        for step in self.plan.steps:
            if step.kind == "batched":
                continue
            ends = self.plan.sites[step.source], self.plan.sites[step.target]
            matrix = self._matrix(step, relevance[step.source])
            self.edges.require(self.plan.model, *ends, matrix, self.watch)

    def _matrix(
        self, step: Step, relevance: Float[Tensor, " source"]
    ) -> Float[Tensor, "target source"]:
        total = self.block_edges[step.block].total if step.kind == "attention" else None
        return _matrix(None if total is None else total.cpu().clone(), relevance)


def _columns(
    plan: GraphPlan,
    edges: dict[int, BlockEdges],
    relevance: Float[Tensor, "site pos"],
    node_threshold: float,
) -> EdgeColumns:
    """The edges of all transitions except those that span several blocks."""
    columns = EdgeColumns(with_heads=plan.heads)
    for step in plan.steps:
        # A target without relevance passes none on; subtraction would leave rounding errors there.
        live = relevance[step.target].abs() > node_threshold
        ends = step.source, step.target
        if step.kind == "position":
            # The edge's weight is what the source passes on, also where a target adds up to 0.
            live = live if node_threshold > 0 else torch.ones_like(live)
            columns.add_diagonal(*ends, relevance[step.source], live)
        elif step.kind == "attention":
            block = edges[step.block]
            if node_threshold == 0 and block.total is not None:
                live = live | passes_on(block.total).cpu()
            _add_block(columns, ends, block, relevance[step.source], live)
    return columns


def _add_batched(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    columns: EdgeColumns,
    relevance: Float[Tensor, "site pos"],
    which: int,
    progress: bool,
) -> None:
    """Add the transitions that span several blocks."""
    steps = [step for step in plan.steps if step.kind == "batched"]
    ends = [(plan.sites[step.source], plan.sites[step.target]) for step in steps]
    matrices = batched_edges(
        plan.model, prompt.tokens, question.objectives[which], plan.rule_set, ends,
        node_threshold=question.node_threshold, progress=progress,
    )  # fmt: skip
    for step, names in zip(steps, ends, strict=True):
        live = relevance[step.target].abs() > question.node_threshold
        columns.add_dense(step.source, step.target, matrices[names], live)


def passes_on(edges: Float[Tensor, "target source"]) -> Bool[Tensor, " target"]:
    """Which targets have edges, even where their relevance has parts that add up to exactly 0."""
    return (edges != 0).any(-1)


def _add_block(
    columns: EdgeColumns,
    ends: tuple[int, int],
    block: BlockEdges,
    relevance: Float[Tensor, " source"],
    live: Bool[Tensor, " target"],
) -> None:
    """Add a block's transition: what its attention passes on, and the rest on the diagonal."""
    n = len(relevance)
    total = relevance.new_zeros(n, n) if block.total is None else block.total.cpu()
    if not columns.with_heads:
        columns.add_dense(*ends, _matrix(total, relevance), live)
        return
    any_path = block.value if block.value is not None else block.key
    if any_path is None:  # no relevance reaches the attention of this block
        columns.add_diagonal(*ends, relevance, live)
        return
    value, key = (
        x if x is not None else torch.zeros_like(any_path) for x in (block.value, block.key)
    )
    columns.add_split(*ends, value, key, relevance - total.sum(0), live)


def _matrix(
    total: Float[Tensor, "target source"] | None, relevance: Float[Tensor, " source"]
) -> Float[Tensor, "target source"]:
    """The relevance that attention passes between positions, with the rest on the diagonal."""
    if total is None:
        return torch.diag(relevance)
    off = total.fill_diagonal_(0.0)
    return off + torch.diag(relevance - off.sum(0))
