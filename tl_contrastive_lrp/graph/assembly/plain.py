"""Graphs from the plain engine, from one forward and a backward for each objective.

Where attention is fused, the edges of a block are selected while its backward computes their rows
(``edges/streamed.py``); where scores and pattern are computed, the block's whole matrix is filled
first (``edges/closed_form.py``). Both are pruned by the same selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.plain import Forward, RunResult, Scope, forward, run_each
from ...engine.reading import BlockCall, Reading, RelevanceSums
from ...engine.run import RunOptions
from ...hooks.hook_rules import HookWatch
from ...hooks.user_hooks import user_hooks
from ...inputs.facts import PromptFacts
from ...inputs.objective import positions_read
from ..columns import slots
from ..edges.batched import batched_edges
from ..edges.check import RecordedSites, require_closed_form
from ..edges.closed_form import (
    BlockEdges,
    HookedBlock,
    RowTarget,
    biased_blocks,
    edge_readings,
)
from ..edges.streamed import StreamedEdges
from ..graph import AttributionGraph
from ..streaming_prune import StreamingSelection
from .plan import GraphPlan, GraphQuestion, NodeRelevance, Step
from .selected import selected_graph, selection_of

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


def plain_graphs(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    options: RunOptions,
    prefilled: Prefilled | None = None,
) -> list[AttributionGraph]:
    """Compute a graph for each objective, keeping only the edges that the rule keeps.

    Args:
        plan: What the graphs hold.
        prompt: The prompt.
        question: The objectives, and which edges to keep.
        options: Whether to show progress over transitions that span several blocks, and how
            attention may be computed.
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
    streams = _Streams(plan, question, prompt.tokens.shape[1], sums)
    readings = [
        *sums.readings,
        *_edge_readings(
            plan, edges, calls,
            hooked={} if checks is None else checks.hooked,
            target_of=None if hooked else streams.of,
        ),
    ]  # fmt: skip
    scopes: list[Scope] = [
        partial(call.recorded, model.blocks[block]) for block, call in calls.items()
    ]
    if checks is not None:
        readings = [checks.edges.listening(reading) for reading in readings]
        scopes += checks.scopes()
    if edges:
        require_closed_form(model, plan.rule_set)
    nodes: list[NodeRelevance] = []
    selections: list[dict[tuple[int, int], StreamingSelection]] = []

    def prepare(which: int) -> None:
        streams.begin()
        for block in edges.values():
            block.again = which + 1 < len(objectives)

    def take(which: int) -> None:
        """Take the results of one backward before the next one runs."""
        nodes.append(plan.nodes(sums.take(), heads))
        relevance = nodes[-1].relevance
        if checks is not None:
            checks.require(relevance)
        selections.append(streams.selections(edges, relevance))
        for block in edges.values():
            block.clear()
        prepare(which + 1)

    prepare(0)
    run = shared or forward(
        model, prompt.tokens, plan.rule_set, readings, scopes,
        None if checks is None else checks.watch, options.attention,
        positions_read(objectives, prompt.tokens.shape[1]),
    )  # fmt: skip
    _, values, coverage = run_each(
        model, prompt.tokens, objectives, plan.rule_set, readings, then=take, shared=run
    )
    sums.warn_of_underflow()
    graphs = []
    for which, objective in enumerate(objectives):
        selections[which] |= _batched(
            plan, prompt, question, nodes[which].relevance, which, options.progress
        )
        facts = run.facts(objective, values[which])
        result = RunResult(facts, {}, coverage, "plain", run.attention)
        graphs.append(
            selected_graph(plan, prompt, question, result, nodes[which], selections[which])
        )
    return graphs


class _Streams:
    """The edges of fused attentions, of one backward at a time.

    Attributes:
        plan, question: What the graphs hold, and which edges to keep.
        length: Number of positions.
        sums: The relevance of the nodes, as far as the backward has come.
    """

    def __init__(
        self, plan: GraphPlan, question: GraphQuestion, length: int, sums: RelevanceSums
    ) -> None:
        self.plan, self.question, self.length, self.sums = plan, question, length, sums
        self._now: dict[int, StreamedEdges] = {}

    def begin(self) -> None:
        """Prepare for a backward."""
        plan, heads = self.plan, int(self.plan.model.cfg.n_heads) if self.plan.heads else 0
        self._now = {
            step.block: StreamedEdges(
                self.question.rule, self.length, heads, self.question.node_threshold,
                partial(self.sums.by_position, plan.sites[step.target]),
            )
            for step in plan.attention_steps
        }  # fmt: skip

    def of(self, block: int) -> StreamedEdges:
        """What takes the edges of a block in this backward."""
        return self._now[block]

    def selections(
        self, edges: dict[int, BlockEdges], relevance: Float[Tensor, "site pos"]
    ) -> dict[tuple[int, int], StreamingSelection]:
        """The edges of a backward that has ended, also of blocks whose attention was not fused.

        Args:
            edges: The edges of those.
            relevance: The relevance of the nodes.
        """
        found = {}
        for step in self.plan.attention_steps:
            source, target = relevance[step.source], relevance[step.target]
            block = edges[step.block]
            if block.total is None:
                selection = self._now[step.block].finished(source, target)
            else:
                selection = _selection(block, source, target, self.plan.heads, self.question)
            found[step.source, step.target] = selection
        return found


def graph_readings(plan: GraphPlan, calls: dict[int, BlockCall]) -> list[Reading]:
    """What ``attribution_graph`` will read, for ``prefilled.prefill_prompt``.

    Args:
        plan: What the graph will hold.
        calls: Filled with the blocks whose arguments the forward is to record.
    """
    edges = _block_edges(plan)
    calls |= {block: BlockCall() for block in edges if block not in calls}
    return [
        *plan.sums()[0].readings,
        *_edge_readings(plan, edges, calls, target_of=_not_yet),
    ]


def _not_yet(block: int) -> RowTarget:
    raise RuntimeError(f"The edges of block {block} were read before a graph asked for them.")


def _block_edges(plan: GraphPlan) -> dict[int, BlockEdges]:
    return {step.block: BlockEdges(step.block, plan.heads) for step in plan.attention_steps}


def _edge_readings(
    plan: GraphPlan,
    edges: dict[int, BlockEdges],
    calls: dict[int, BlockCall],
    *,
    hooked: Mapping[int, HookedBlock] = MappingProxyType({}),
    target_of: Callable[[int], RowTarget] | None = None,
) -> list[Reading]:
    model, biased = plan.model, biased_blocks(plan.model)
    return [
        reading
        for number, block in edges.items()
        for reading in edge_readings(
            model, block, plan.covered, plan.rule_set, calls[number], biased,
            hooked=hooked.get(number),
            target=None if target_of is None else partial(target_of, number),
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

    def scopes(self) -> list[Scope]:
        """What makes the context managers to enter around the forward."""
        blocks = [block for block in self.hooked.values() if block.at_z is not None]
        model = self.plan.model
        return [
            *(partial(block.before_hooks, model) for block in blocks),
            partial(self.edges.recording, model),
        ]

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


def _batched(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    relevance: Float[Tensor, "site pos"],
    which: int,
    progress: bool,
) -> dict[tuple[int, int], StreamingSelection]:
    """The edges of transitions that span several blocks."""
    steps = [step for step in plan.steps if step.kind == "batched"]
    ends = [(plan.sites[step.source], plan.sites[step.target]) for step in steps]
    matrices = batched_edges(
        plan.model, prompt.tokens, question.objectives[which], plan.rule_set, ends,
        node_threshold=question.node_threshold, progress=progress,
    )  # fmt: skip
    return {
        (step.source, step.target): selection_of(
            question.rule,
            matrices[names],
            relevance[step.target].abs() > question.node_threshold,
        )
        for step, names in zip(steps, ends, strict=True)
    }


def passes_on(edges: Float[Tensor, "target source"]) -> Bool[Tensor, " target"]:
    """Which targets have edges, even where their relevance has parts that add up to exactly 0."""
    return (edges != 0).any(-1)


def _selection(
    block: BlockEdges,
    source: Float[Tensor, " pos"],
    target: Float[Tensor, " pos"],
    heads: bool,
    question: GraphQuestion,
) -> StreamingSelection:
    """Select edges of a block: what its attention passes on, and the rest on the diagonal."""
    assert block.total is not None
    # A target without relevance passes none on; subtraction would leave rounding errors there.
    live = target.abs() > question.node_threshold
    if question.node_threshold == 0:
        live = live | passes_on(block.total).cpu()
    total = block.total.cpu()
    if heads:
        matrix = slots(block.value, block.key, source - total.sum(0))
    else:
        matrix = _matrix(total, source)
    return selection_of(question.rule, matrix, live)


def _matrix(
    total: Float[Tensor, "target source"] | None, relevance: Float[Tensor, " source"]
) -> Float[Tensor, "target source"]:
    """The relevance that attention passes between positions, with the rest on the diagonal."""
    if total is None:
        return torch.diag(relevance)
    off = total.fill_diagonal_(0.0)
    return off + torch.diag(relevance - off.sum(0))
