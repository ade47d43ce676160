"""``attribution_graph``: every transition of the residual stream, exact, from one backward pass.

Transitions within a block come from the closed form (``edges.py``), read while the one backward
runs, plainly or in tiles; transitions over several blocks, if asked for, from packed signals
(``packed.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, overload

from torch import Tensor
from typing_extensions import Unpack

from ...errors import NotTileableError
from ...engine.memory import Memory, cannot, choose, plain_bytes, require_plain_fits, require_room
from ...hooks.sites import find_sites
from ...inputs.bridge import require_bridge
from ...inputs.objective import questions
from ...inputs.tokens import single_prompt
from ...rules.rule_sets import DEFAULT_RULES, RuleSet, get_rule_set
from ...rules.threads import one_at_a_time
from ..edges.check import require_closed_form
from ..graph import AttributionGraph
from ..pruning import PruneRule
from .plain import plain_graphs
from .plan import Granularity, GraphPlan, transitions

if TYPE_CHECKING:
    from ...engine.prefilled import Prefilled


class Settings(TypedDict, total=False):
    """What ``attribution_graph`` takes by name, for type checkers."""

    target: object
    contrast: object
    pos: int
    rules: str | RuleSet
    granularity: Granularity
    layers: Sequence[int] | None
    node_threshold: float
    heads: bool
    details: bool
    progress: bool
    mass: float | None
    threshold: float | None
    top_k: int | None
    memory: Memory
    tile: int | None
    checkpoint_dir: str | os.PathLike[str] | None
    prepend_bos: bool | None
    prefilled: Prefilled | None


@overload
def attribution_graph(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    objectives: None = None,
    **settings: Unpack[Settings],
) -> AttributionGraph: ...


@overload
def attribution_graph(
    model: Any,
    prompt: str | Tensor,
    objective: None = None,
    *,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    **settings: Unpack[Settings],
) -> list[AttributionGraph]: ...


@one_at_a_time
def attribution_graph(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    objectives: Sequence[Callable[[Tensor], Tensor]] | None = None,
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
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
) -> AttributionGraph | list[AttributionGraph]:
    """How the relevance of one prediction flows between tokens and layers.

    An edge's weight is the relevance that a target node (a site of the residual stream at a
    position) passes to a source node below it, in logits and signed as the objective. Over all
    targets a source's edges add up to its own relevance.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective, objectives, target, contrast, pos: As for ``attribute``.
        rules: Name of a rule set, or a ``RuleSet``.
        granularity: "block": sites are every block's input and the last one's output. "sublayer":
            also between attention and MLP, where the block has such a place (parallel blocks keep
            one transition).
        layers: Only these blocks' inputs as sites (the number of blocks stands for the final
            output, which is always one); transitions over several blocks are computed by packed
            backward signals, which is much slower.
        node_threshold: Targets with |relevance| at or below it (in logits) are not expanded; the
            graph says so. 0 expands all, and is needed for column sums to be exact.
        heads: Split edges by head and by value and key path (adjacent sites only).
        details: Also keep what ``graph.explain_node`` needs: relevance of every hidden dimension,
            neuron and head at every position, (sites · d_model + layers · d_mlp) · pos numbers.
            Models with experts have no neurons there.
        progress: Show a bar where packed signals or tiles are needed.
        mass, threshold, top_k: Keep only these edges, as ``graph.prune`` does (one of them); for
            a long prompt, whose full graph would not fit. In tiles they are chosen while the edges
            come, with the same result.
        memory, tile, checkpoint_dir: As for ``attribute``. Tiles go with adjacent sites only.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.
        prefilled: As for ``attribute``. Transitions over several blocks run forwards of their own.

    Returns:
        An ``AttributionGraph``: relevance [site, pos] and edges, in logits, on the CPU; with
        ``objectives``, a list of one for each.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        ValueError: layers or granularity that do not fit the model; several prunings; tiles with
            layers that skip blocks; an unknown ``memory`` or a wrong ``tile``; no objectives;
            ``prefilled`` of another prompt, rules or hooks, not prepared for this graph, or used
            up.
        UncoveredComponentError: as ``attribute``; also where the edges' closed form does not hold
            for the model.
        TypeError, TokenError, PromptError, ModelStateError, FileFormatError: as ``attribute``.
    """
    require_bridge(model)
    asked = questions(model, objective, objectives, target, contrast, pos)
    given = single_prompt(model, prompt, prepend_bos)
    tokens = given.tokens
    if prefilled is not None:
        prefilled.check(model, tokens, rules)
    plan = replace(
        plan_of(
            model, tokens, rules, granularity=granularity, layers=layers, heads=heads,
            details=details,
        ),
        objectives=asked,
        rule=PruneRule(mass, threshold, top_k).single(),
        node_threshold=node_threshold,
        progress=progress,
        prepended_bos=given.prepended_bos,
    )  # fmt: skip
    made = _made(plan, memory, tile, checkpoint_dir, prefilled)
    return made if objectives is not None else made[0]


def plan_of(
    model: Any,
    tokens: Tensor,
    rules: str | RuleSet,
    *,
    granularity: Granularity = "block",
    layers: Sequence[int] | None = None,
    heads: bool = False,
    details: bool = False,
) -> GraphPlan:
    """What a forward has to be prepared for, before it is known what is asked of it.

    Raises:
        ValueError: layers or granularity that do not fit the model.
        UncoveredComponentError: as ``attribute``.
    """
    sites, steps = transitions(model, granularity, layers, heads)
    return GraphPlan(
        model=model,
        tokens=tokens,
        objectives=(),
        rule_set=get_rule_set(rules),
        covered=find_sites(model),
        sites=sites,
        steps=steps,
        granularity=granularity if layers is None else "custom",
        rule=PruneRule(),
        node_threshold=0.0,
        heads=heads,
        details=details,
        progress=False,
    )


def _made(
    plan: GraphPlan,
    memory: Memory,
    tile: int | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    prefilled: Prefilled | None,
) -> list[AttributionGraph]:
    """In tiles where that is chosen and works, else the plain way."""
    length, graphs = plan.tokens.shape[1], len(plan.objectives)
    if prefilled is None:
        choice = choose(plan.model, length, memory, tile, graphs=graphs, by_head=plan.heads)
    else:
        need = plain_bytes(plan.model, length, graphs=graphs, by_head=plan.heads)
        choice = replace(prefilled.choice, plain_bytes=need)
        if prefilled.why_plain:  # there may be no room for the edges, too
            require_plain_fits(choice, prefilled.why_plain)
    if choice.tile is not None and any(step.kind == "packed" for step in plan.steps):
        why = "layers=[...] that skip blocks need the plain way."
        if memory == "tiled":
            raise ValueError(why)
        choice = require_plain_fits(choice, why)
    if choice.tile is not None:
        from .tiled import tiled_graphs

        require_closed_form(plan.model, plan.rule_set)
        require_room(len(plan.steps), length, plan.rule, memory, choice)
        try:
            return tiled_graphs(plan, choice, checkpoint_dir, prefilled)
        except NotTileableError as error:
            if memory == "tiled":
                raise NotTileableError(cannot(choice, error)) from error
            require_plain_fits(choice, str(error))
    return plain_graphs(plan, prefilled)
