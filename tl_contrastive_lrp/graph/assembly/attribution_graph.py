"""``attribution_graph``: every transition of the residual stream, exact, from one backward.

A call goes through the same phases as ``attribute``: question, prompt, plan, run and result.
Transitions within a block come from the closed form (``graph/edges/closed_form.py``), read while
the one backward runs; transitions that span several blocks, if requested, take batched backward
signals (``graph/edges/batched.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...engine.batched import naming
from ...engine.fused import AttentionKind, fused_blocks
from ...engine.memory import (
    Memory,
    MemoryPlan,
    plain_bytes,
    plan_memory,
    require_plain_fits,
    require_room_for_edges,
    run_as_planned,
)
from ...engine.run import RunOptions
from ...hooks.user_hooks import user_hooks
from ...inputs.answers import AnswerDiff
from ...inputs.bridge import require_bridge
from ...inputs.facts import PromptFacts
from ...inputs.forced import Side
from ...inputs.objective import question as read_question
from ...inputs.objective import require_objectives
from ...rules.rule_sets import DEFAULT_RULES, RuleSet
from ...rules.threads import one_at_a_time
from ..edges.check import require_closed_form
from ..graph import AttributionGraph
from ..pruning import PruneRule
from .answers import graph_of_answers, n_read
from .plain import plain_graphs
from .plan import Granularity, GraphPlan, GraphQuestion
from .tiled import tiled_graphs

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


@one_at_a_time
def attribution_graph(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    rules: str | RuleSet = DEFAULT_RULES,
    granularity: Granularity = "block",
    layers: Sequence[int] | None = None,
    node_threshold: float = 0.0,
    heads: bool = False,
    details: bool = False,
    progress: bool = True,
    mass: float | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    memory: Memory = "auto",
    tile: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
) -> AttributionGraph:
    """Compute how the relevance of one prediction flows between tokens and layers.

    The weight of an edge is the relevance that a target node (a site of the residual stream at a
    position) passes to a source node below it, in logits and signed as the objective: positive
    supports the target token, negative the contrast. The edges of a source, over all its targets,
    add up to its own relevance (arXiv:2604.17761).

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective: A function of the logits, or ``answer_diff``, as for ``attribute``. Or give
            ``target`` and ``contrast`` instead. In the graph of two answers, positions after the
            prompt are those of their own tokens, ``[target]`` and then ``[contrast]``; edges are
            pruned when both answers' graphs are added up, so it needs the memory of a full graph.
        target: The token the model preferred (usually the wrong one).
        contrast: The token it should have preferred.
        pos: Position whose next token is explained, with ``target`` and ``contrast``.
        rules: Name of a rule set, or a ``RuleSet``.
        granularity: "block": the sites are the input of every block and the output of the last.
            "sublayer": also the residual stream between attention and MLP, in blocks that have
            such a site (parallel blocks keep one transition).
        layers: Only the inputs of these blocks as sites; the number of blocks stands for the final
            output, which is always a site. Transitions that span several blocks take batched
            backward signals, which is much slower.
        node_threshold: Targets with |relevance| at or below it, in logits, are not expanded, and
            the graph records it. With 0 all are expanded, which exact column sums need.
        heads: Split edges by head, and by value and key path; adjacent sites only.
        details: Also keep what ``graph.explain_node`` needs: the relevance of every hidden
            dimension, neuron and head at every position, (sites · d_model + layers · d_mlp) · pos
            numbers. Models with experts have no neurons there.
        progress: Show a progress bar over batched signals or tiles.
        mass: Keep, of each transition, the fewest largest edges that hold this share of Σ|weight|,
            as ``graph.prune`` does. For long prompts, whose full graph would not fit: in tiles
            edges are pruned while they are computed, with the same result.
        threshold: Keep the edges with |weight| above this, in logits; instead of ``mass``.
        top_k: Keep the k largest edges of each transition; instead of ``mass``.
        memory: "auto", "plain" or "tiled", as for ``attribute``. Tiles need adjacent sites.
        tile: Positions per tile, as for ``attribute``.
        checkpoint_dir: A folder of its own for finished blocks, as for ``attribute``.
        attention: "auto", "fused" or "eager", as for ``attribute``. Where attention is fused, edges
            are computed from its rows, a tile of positions at a time.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.
        prefilled: As for ``attribute``. Transitions that span several blocks run forwards of their
            own.

    Returns:
        An ``AttributionGraph`` with relevance [site, pos] and edges, in logits, on the CPU.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        ValueError: layers or granularity that do not fit the model; several of ``mass``,
            ``threshold`` and ``top_k``; tiles with layers that skip blocks; or as ``attribute``.
        UncoveredComponentError: as ``attribute``; also where the closed form of the edges does not
            hold for the model.
        NonFiniteError: the weight of an edge is NaN or infinite.
        TypeError, TokenError, PromptError, ModelStateError, FileFormatError: as ``attribute``.

    Example:
        >>> graph = clrp.attribution_graph(model, case.prompt, objective)
        >>> tokens = clrp.attribute(model, case.prompt, objective).tokens
        >>> bool(torch.allclose(graph.relevance[0], tokens, atol=1e-4))
        True
    """
    require_bridge(model)
    asked = read_question(model, objective, target, contrast, pos)
    facts = PromptFacts.of(model, prompt, prepend_bos)
    plan = GraphPlan.of(
        model, rules, granularity=granularity, layers=layers, heads=heads, details=details
    )
    rule = PruneRule(mass, threshold, top_k).single()
    options = RunOptions(memory, tile, progress, checkpoint_dir, attention)
    if isinstance(asked, AnswerDiff):
        options.require_own_forward(prefilled)
        return _answers_graph(plan, facts, asked, rule, node_threshold, options)
    request = GraphQuestion([asked], rule, node_threshold)
    return _graphs(plan, facts, request, options, prefilled)[0]


@one_at_a_time
def attribution_graphs(
    model: Any,
    prompt: str | Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    *,
    rules: str | RuleSet = DEFAULT_RULES,
    granularity: Granularity = "block",
    layers: Sequence[int] | None = None,
    node_threshold: float = 0.0,
    heads: bool = False,
    details: bool = False,
    progress: bool = True,
    mass: float | None = None,
    threshold: float | None = None,
    top_k: int | None = None,
    memory: Memory = "auto",
    tile: int | None = None,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
) -> list[AttributionGraph]:
    """Compute a graph for each of several objectives of one prompt.

    They share the forward and, in tiles, the second run of every block, so each further objective
    costs only a backward.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objectives: One or more functions of the logits, or differences of two answers from
            ``answer_diff``, as for ``attribution_graph``. Each difference has runs of its own.
        rules: Name of a rule set, or a ``RuleSet``.
        granularity: "block" or "sublayer", as for ``attribution_graph``.
        layers: Only the inputs of these blocks as sites.
        node_threshold: Targets with |relevance| at or below it, in logits, are not expanded.
        heads: Split edges by head, and by value and key path.
        details: Also keep what ``graph.explain_node`` needs.
        progress: Show a progress bar over batched signals or tiles.
        mass: Keep the fewest largest edges that hold this share of each transition's Σ|weight|.
        threshold: Keep the edges with |weight| above this, in logits.
        top_k: Keep the k largest edges of each transition.
        memory: "auto", "plain" or "tiled", as for ``attribute``.
        tile: Positions per tile, as for ``attribute``.
        checkpoint_dir: A folder of its own for finished blocks, as for ``attribute``.
        attention: "auto", "fused" or "eager", as for ``attribute``. Where attention is fused, edges
            are computed from its rows, a tile of positions at a time.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.
        prefilled: As for ``attribute``.

    Returns:
        One ``AttributionGraph`` per objective, in their order.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``objectives`` is not a list of functions; or as ``attribution_graph``.
        ValueError: no objectives; ``checkpoint_dir`` or ``prefilled`` with ``answer_diff``; or as
            ``attribution_graph``.
        TokenError, PromptError, ModelStateError, UncoveredComponentError, NonFiniteError,
            FileFormatError: as ``attribution_graph``.

    Example:
        >>> second = clrp.target_logit(model, case.target)
        >>> graphs = clrp.attribution_graphs(model, case.prompt, [objective, second])
        >>> graphs[0].target == graphs[1].target
        True
    """
    require_bridge(model)
    each = require_objectives(objectives)
    facts = PromptFacts.of(model, prompt, prepend_bos)
    plan = GraphPlan.of(
        model, rules, granularity=granularity, layers=layers, heads=heads, details=details
    )
    rule = PruneRule(mass, threshold, top_k).single()
    options = RunOptions(memory, tile, progress, checkpoint_dir, attention)
    differences = [which for which, one in enumerate(each) if isinstance(one, AnswerDiff)]
    if differences:
        options.require_no_part(prefilled, differences[0])
    plain = [which for which in range(len(each)) if which not in differences]
    results: dict[int, AttributionGraph] = {}
    if plain:
        request = GraphQuestion([each[i] for i in plain], rule, node_threshold)
        found = _graphs(plan, facts, request, options, prefilled)
        results.update(zip(plain, found, strict=True))
    for which in differences:
        asked = each[which]
        assert isinstance(asked, AnswerDiff)
        with naming(f"objectives[{which}]"):
            results[which] = _answers_graph(plan, facts, asked, rule, node_threshold, options)
    return [results[which] for which in range(len(each))]


def _answers_graph(
    plan: GraphPlan,
    prompt: PromptFacts,
    answers: AnswerDiff,
    rule: PruneRule,
    node_threshold: float,
    options: RunOptions,
) -> AttributionGraph:
    """The graph of the difference of two answers, whose graphs are computed one after the other.

    Raises:
        ModelStateError: as ``attribution_graph``; also where both full graphs do not fit.
    """
    if not answers.is_one_token_each:
        length = prompt.tokens.shape[1] + n_read(answers)
        whole = GraphQuestion([answers], PruneRule(), node_threshold)
        memory_plan = _memory_plan(plan, length, whole, options, None)
        if memory_plan.tile is not None:
            require_room_for_edges(memory_plan, len(plan.steps), length, graphs=3)

    def run_one(
        facts: PromptFacts,
        objective: Callable[[Tensor], Tensor],
        side: Side | None,
        rule: PruneRule,
        node_threshold: float,
    ) -> AttributionGraph:
        request = GraphQuestion([objective], rule, node_threshold)
        return _graphs(plan, facts, request, options.of_part(side), None)[0]

    return graph_of_answers(plan.model, prompt, answers, rule, node_threshold, run_one)


def _graphs(
    plan: GraphPlan,
    prompt: PromptFacts,
    question: GraphQuestion,
    options: RunOptions,
    prefilled: Prefilled | None,
) -> list[AttributionGraph]:
    """Plan the memory, and run with the engine that was planned."""
    if prefilled is not None:
        prefilled.check(plan.model, prompt.tokens, plan.rule_set)
    length = prompt.tokens.shape[1]
    memory_plan = _memory_plan(plan, length, question, options, prefilled)

    def tiled(memory_plan: MemoryPlan) -> list[AttributionGraph]:
        require_closed_form(plan.model, plan.rule_set)
        if not question.rule:
            require_room_for_edges(memory_plan, len(plan.steps), length)
        return tiled_graphs(plan, prompt, question, memory_plan, options, prefilled)

    def plain(_: MemoryPlan) -> list[AttributionGraph]:
        return plain_graphs(plan, prompt, question, options, prefilled)

    return run_as_planned(memory_plan, tiled, plain)


def _memory_plan(
    plan: GraphPlan,
    length: int,
    question: GraphQuestion,
    options: RunOptions,
    prefilled: Prefilled | None,
) -> MemoryPlan:
    """The memory plan for a run with edges, whose forward may already have been run.

    Raises:
        ValueError, ModelStateError: as ``plan_memory``.
    """
    graphs, pruned = len(question.objectives), bool(question.rule)
    # Under hooks of the user's, whole matrices are checked against the run's own graph.
    hooked = bool(user_hooks(plan.model))
    fused = 0 if hooked else fused_blocks(plan.model, options.attention, length)
    skipping = "layers=[...] that skip blocks cannot run in tiles." if plan.skips_blocks else ""
    if prefilled is None:
        return plan_memory(
            plan.model, length, options.memory, options.tile,
            graphs=graphs, by_head=plan.heads, pruned=pruned, plain_only=skipping, fused=fused,
        )  # fmt: skip
    prefilled.check_attention(options.attention)
    need = plain_bytes(
        plan.model, length, graphs=graphs, by_head=plan.heads, pruned=pruned, fused=fused
    )
    memory_plan = replace(prefilled.plan, plain_bytes=need)
    if memory_plan.tile is None:
        # The forward fell back to the plain engine; the edges have to fit as well.
        return require_plain_fits(memory_plan, memory_plan.why) if memory_plan.why else memory_plan
    if not skipping:
        return memory_plan
    if memory_plan.tiles_required:
        raise ValueError(skipping)
    return require_plain_fits(memory_plan, skipping)
