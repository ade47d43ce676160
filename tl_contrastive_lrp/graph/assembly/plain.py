"""Graphs from one plain forward and a backward each: every transition's whole matrix."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...engine.plain import run_each
from ...engine.reading import BlockCall, Reading
from ...hooks.hook_rules import HookWatch
from ...hooks.user_hooks import user_hooks
from ...inputs.objective import described
from ..columns import EdgeColumns
from ..edges.batched import batched_edges
from ..edges.check import HookedEdges, require_closed_form
from ..edges.closed_form import BlockEdges, HookedBlock, biased_blocks, edge_readings
from ..graph import AttributionGraph
from .plan import GraphPlan

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


def graph_readings(plan: GraphPlan, calls: dict[int, BlockCall]) -> list[Reading]:
    """What ``attribution_graph`` will read, for ``prefilled.prefill_prompt``.

    Args:
        plan: With any objectives.
        calls: Filled with the blocks whose calls the forward is to record.
    """
    edges = _block_edges(plan)
    calls |= {block: BlockCall() for block in edges if block not in calls}
    return [*plan.sums()[0].readings, *_edge_readings(plan, edges, calls)]


def _block_edges(plan: GraphPlan) -> dict[int, BlockEdges]:
    return {s.block: BlockEdges(s.block, plan.heads) for s in plan.steps if s.kind == "attention"}


def _edge_readings(
    plan: GraphPlan,
    edges: dict[int, BlockEdges],
    calls: dict[int, BlockCall],
    hooked: Mapping[int, HookedBlock] = MappingProxyType({}),
) -> list[Reading]:
    model, biased = plan.model, biased_blocks(plan.model)
    return [
        reading
        for block, found in edges.items()
        for reading in edge_readings(
            model,
            found,
            plan.covered,
            plan.rule_set,
            calls[block],
            biased,
            hooked=hooked.get(block),
        )
    ]


def plain_graphs(plan: GraphPlan, prefilled: Prefilled | None = None) -> list[AttributionGraph]:
    """A graph for each objective of the plan.

    Args:
        plan: What is asked.
        prefilled: The forward, if it was run before.

    Raises:
        ValueError: the forward was not prepared for a graph.
        ModelStateError, UncoveredComponentError: as ``backward.run_each``.
    """
    model, rule_set = plan.model, plan.rule_set
    edges = _block_edges(plan)
    sums, by_head = plan.sums()
    shared = None if prefilled is None else prefilled.plain
    calls = {block: BlockCall() for block in edges}
    points = {f"{hook.name}." for hook in user_hooks(model)}
    if prefilled is not None and shared is not None and not points:
        calls = prefilled.calls
        if missing := [block for block in edges if block not in calls]:
            raise ValueError(
                f"The forward was not prepared for edges of block {missing[0]} (graph_readings); "
                "leave prefilled= out, or run another one."
            )
    elif shared is not None:  # edges under the user's hooks are checked in a forward of their own
        shared.pass_over()
        shared = None
    check = HookedEdges(plan.sites)
    watch = HookWatch(quiet=lambda: check.quiet)
    hooked = {
        block: HookedBlock(block, partial(watch.edited, prefix), lambda: check.quiet)
        for block in edges
        if any(name.startswith(prefix := f"blocks.{block}.") for name in points)
    }
    readings = _edge_readings(plan, edges, calls, hooked)
    scopes = [call.recorded(model.blocks[block]) for block, call in calls.items()]
    read_all = [*sums.readings, *readings]
    if points:
        read_all = [check.listening(reading) for reading in read_all]
        scopes += [block.before_hooks(model) for block in hooked.values() if block.at_z is not None]
        scopes.append(check.recorded(model))
    if edges:
        require_closed_form(model, rule_set)
    nodes: list[tuple[Float[Tensor, "site pos"], dict[str, Any]]] = []
    columns: list[EdgeColumns] = []

    def more(which: int) -> None:
        for found in edges.values():
            found.again = which + 1 < len(plan.objectives)

    def read(which: int) -> None:
        """Take what one backward brought, before the next."""
        nodes.append(plan.nodes(sums.take(), by_head))
        if watch.edits:
            for step in plan.steps:
                if step.kind != "packed":
                    ends = plan.sites[step.source], plan.sites[step.target]
                    relevance = nodes[-1][0][step.source]
                    total = edges[step.block].total if step.kind == "attention" else None
                    matrix = _matrix(None if total is None else total.cpu().clone(), relevance)
                    check.require(model, *ends, matrix, watch)
        columns.append(_columns(plan, edges, nodes[-1][0]))
        for found in edges.values():
            found.clear()
        more(which + 1)

    more(0)
    logits, values, coverage = run_each(
        model,
        plan.tokens,
        plan.objectives,
        rule_set,
        read_all,
        scopes,
        then=read,
        hook_watch=watch,
        shared=shared,
    )
    sums.warn_of_underflow()
    graphs = []
    for which, objective in enumerate(plan.objectives):
        _add_packed(plan, columns[which], nodes[which][0], which)
        graph = AttributionGraph.from_columns(
            **columns[which].columns(),
            relevance=nodes[which][0],
            rules=coverage.rules,
            coverage=coverage,
            **plan.facts(objective, logits),
            **nodes[which][1],
            **described(objective, logits, values[which]),
        )
        rule = plan.rule
        pruned = partial(graph.prune, mass=rule.mass, threshold=rule.threshold, top_k=rule.top_k)
        graphs.append(pruned() if rule else graph)
    return graphs


def _columns(
    plan: GraphPlan, edges: dict[int, BlockEdges], relevance: Float[Tensor, "site pos"]
) -> EdgeColumns:
    """All transitions but those over several blocks."""
    columns = EdgeColumns(with_heads=plan.heads)
    for step in plan.steps:
        # Where nothing arrives, nothing is passed on; subtraction would leave rounding there.
        live = relevance[step.target].abs() > plan.node_threshold
        ends = step.source, step.target
        if step.kind == "position":
            # One position each: what arrives is what is passed on, also where it adds up to 0.
            live = live if plan.node_threshold > 0 else torch.ones_like(live)
            columns.add_diagonal(*ends, relevance[step.source], live)
        elif step.kind == "attention":
            found = edges[step.block]
            if plan.node_threshold == 0 and found.total is not None:
                live = live | passes_on(found.total).cpu()
            _add_block(columns, ends, found, relevance[step.source], live)
    return columns


def _add_packed(
    plan: GraphPlan, columns: EdgeColumns, relevance: Float[Tensor, "site pos"], which: int
) -> None:
    """The transitions over several blocks."""
    steps = [step for step in plan.steps if step.kind == "packed"]
    ends = [(plan.sites[step.source], plan.sites[step.target]) for step in steps]
    packed = batched_edges(
        plan.model, plan.tokens, plan.objectives[which], plan.rule_set, ends,
        node_threshold=plan.node_threshold, progress=plan.progress,
    )  # fmt: skip
    for step, names in zip(steps, ends, strict=True):
        live = relevance[step.target].abs() > plan.node_threshold
        columns.add_dense(step.source, step.target, packed[names], live)


def passes_on(edges: Float[Tensor, "target source"]) -> Bool[Tensor, " target"]:
    """Targets with edges: relevance may arrive in parts that add up to exactly 0."""
    return (edges != 0).any(-1)


def _add_block(
    columns: EdgeColumns,
    ends: tuple[int, int],
    found: BlockEdges,
    relevance: Float[Tensor, " source"],
    live: Bool[Tensor, " target"],
) -> None:
    """A block's transition: what its attention passes, and the rest on the diagonal."""
    n = len(relevance)
    total = relevance.new_zeros(n, n) if found.total is None else found.total.cpu()
    if columns.with_heads:
        some = found.value if found.value is not None else found.key
        if some is None:  # no relevance reaches this block's attention
            columns.add_diagonal(*ends, relevance, live)
            return
        value, key = (
            x if x is not None else torch.zeros_like(some) for x in (found.value, found.key)
        )
        columns.add_split(*ends, value, key, relevance - total.sum(0), live)
        return
    columns.add_dense(*ends, _matrix(total, relevance), live)


def _matrix(
    total: Float[Tensor, "target source"] | None, relevance: Float[Tensor, " source"]
) -> Float[Tensor, "target source"]:
    """What attention passes between positions, and on the diagonal what is left."""
    if total is None:
        return torch.diag(relevance)
    off = total.fill_diagonal_(0.0)
    return off + torch.diag(relevance - off.sum(0))
