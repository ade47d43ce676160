"""``attribution_graph``: every transition of the residual stream, exact, from one backward pass.

Transitions within a block come from the closed form (``edges.py``), read while the one backward
runs; transitions over several blocks, if asked for, from packed signals (``packed.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .attribution import special_mask
from .backward import run
from .chosen import tiled
from .edges import BlockEdges, biased_blocks, edge_readings
from .explain import add_heads, residual_sites, without_neurons
from .graph import AttributionGraph
from .graph_check import require_closed_form
from .graph_columns import EdgeColumns
from .memory import Memory, cannot, choose, instead, require_room
from .objective import described, question
from .packed import packed_edges
from .prompts import model_name, str_tokens, to_single_prompt
from .rulesets import DEFAULT_RULES, RuleSet, get_rule_set
from .selection import Rule
from .sites import find_sites
from .sums import Sums
from .tangents import BlockCall

Granularity = Literal["block", "sublayer"]


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
) -> AttributionGraph:
    """How the relevance of one prediction flows between tokens and layers.

    An edge's weight is the relevance that a target node (a site of the residual stream at a
    position) passes to a source node below it, in logits and signed as the objective. Over all
    targets a source's edges add up to its own relevance.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective, target, contrast, pos: As for ``attribute``.
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
        memory, tile, checkpoint_dir: As for ``attribute``. Tiles go with adjacent sites only,
            without ``heads`` and ``details``.

    Raises:
        ValueError: layers or granularity that do not fit the model; several prunings; tiles with
            what needs the plain way.
        TypeError, TokenError, PromptError, ModelStateError, UncoveredComponentError: as
            ``attribute``.
    """
    objective = question(model, objective, target, contrast, pos)
    rule_set = get_rule_set(rules)
    tokens = to_single_prompt(model, prompt)
    sites, steps = _plan(model, granularity, layers, heads)
    covered = find_sites(model)
    rule, choice = Rule(mass, threshold, top_k), choose(
        model, tokens.shape[1], memory, tile, graph=True
    )  # fmt: skip
    beyond = heads or details or any(step.kind == "packed" for step in steps)
    if beyond and choice.tile is not None:
        why = "heads=True, details=True and layers=[...] that skip blocks need the plain way."
        if memory == "tiled":
            raise ValueError(why)
        choice = instead(choice, why)

    sums, n_layers = Sums(), int(model.cfg.n_layers)
    for site in sites:
        whole = site.endswith("resid_mid")
        sums.add(site, (lambda r: r[0]) if details else (lambda r: r.sum(-1)[0]), stream=whole)
    by_head = [add_heads(sums, model, i) for i in range(n_layers)] if details else []
    by_neuron: list[str] = []
    if details and without_neurons(model) is None:
        by_neuron = [f"blocks.{i}.mlp.hook_post" for i in range(n_layers)]
    for name in by_neuron:
        sums.add(name, lambda r: r[0])
    facts: dict[str, Any] = {
        "sites": sites,
        "granularity": granularity if layers is None else "custom",
        "node_threshold": float(node_threshold),
    }
    if choice.tile is not None:
        from .tile_cache import NotTileable
        from .tiled_graph import tiled_graph

        require_closed_form(model, rule_set)
        require_room(len(steps), tokens.shape[1], rule, memory, choice)
        try:
            result, relevance, columns, kept = tiled_graph(
                model, tokens, objective, rule_set, sums, sites, steps, rule, choice.tile,
                node_threshold=node_threshold, progress=progress, checkpoint_dir=checkpoint_dir,
            )  # fmt: skip
        except NotTileable as error:
            if memory == "tiled":
                raise NotTileable(cannot(choice, error)) from error
            choice = instead(choice, str(error))
            sums.kept.clear()
        else:
            sums.warn_of_underflow()
            ran = tiled(result, objective)
            delta = float(result.value)
            facts["history"] = (rule.step(kept, delta),) if rule else ()
            return AttributionGraph.from_columns(
                **columns.columns(),
                relevance=relevance,
                **facts,
                **_prompt_facts(model, tokens, objective),
                rules=ran.coverage.rules,
                coverage=ran.coverage,
                memory=ran.memory,
                **ran.described(objective),
            )
    edges = {s.block: BlockEdges(s.block, heads) for s in steps if s.kind == "attention"}
    biased = biased_blocks(model)
    calls = {block: BlockCall() for block in edges}
    readings = [
        reading
        for block, found in edges.items()
        for reading in edge_readings(model, found, covered, rule_set, calls[block], biased)
    ]
    if edges:
        require_closed_form(model, rule_set)
    scopes = [call.recorded(model.blocks[block]) for block, call in calls.items()]
    logits, value, coverage = run(
        model, tokens, objective, rule_set, [*sums.readings, *readings], scopes
    )
    sums.warn_of_underflow()
    relevance = torch.stack([sums.kept[site] for site in sites])
    extra: dict[str, Any] = {}
    if details:
        none = relevance.new_zeros(n_layers, relevance.shape[1], 0)
        extra = {
            "dimensions": relevance,
            "head_relevance": torch.stack([sums.kept[name] for name in by_head]),
            "neurons": torch.stack([sums.kept[name] for name in by_neuron]) if by_neuron else none,
        }
        relevance = relevance.sum(-1)

    far = [(sites[s.source], sites[s.target]) for s in steps if s.kind == "packed"]
    packed = packed_edges(
        model, tokens, objective, rule_set, far, node_threshold=node_threshold, progress=progress
    )
    columns = EdgeColumns(with_heads=heads)
    for step in steps:
        # Where nothing arrives, nothing is passed on; subtraction would leave rounding there.
        live = relevance[step.target].abs() > node_threshold
        ends = step.source, step.target
        if step.kind == "packed":
            columns.add_dense(*ends, packed[sites[step.source], sites[step.target]], live)
        elif step.kind == "position":
            # One position each: what arrives is what is passed on, also where it adds up to 0.
            live = live if node_threshold > 0 else torch.ones_like(live)
            columns.add_diagonal(*ends, relevance[step.source], live)
        else:
            found = edges[step.block]
            if node_threshold == 0 and found.total is not None:
                live = live | passes_on(found.total).cpu()
            _add_block(columns, ends, found, relevance[step.source], live)
    graph = AttributionGraph.from_columns(
        **columns.columns(),
        relevance=relevance,
        rules=coverage.rules,
        coverage=coverage,
        **facts,
        **_prompt_facts(model, tokens, objective),
        **extra,
        **described(objective, logits, value),
    )
    return graph.prune(mass=mass, threshold=threshold, top_k=top_k) if rule else graph


def _prompt_facts(
    model: Any, tokens: Tensor, objective: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """What a graph says of the model and its prompt."""
    ids = tokens[0].cpu()
    special_ids = list(model.tokenizer.all_special_ids) if model.tokenizer is not None else []
    return {
        "token_ids": ids,
        "special": special_mask(ids, special_ids),
        "str_tokens": str_tokens(model, ids.tolist()),
        "model_name": model_name(model),
        "final_pos": int(getattr(objective, "pos", -1)) % tokens.shape[1],
    }


def passes_on(edges: Float[Tensor, "target source"]) -> Bool[Tensor, " target"]:
    """Targets with edges: relevance may arrive in parts that add up to exactly 0."""
    return (edges != 0).any(-1)


@dataclass(frozen=True)
class _Step:
    """One transition between two sites (indices) and how its edges are found.

    kind: "attention" is one block's attention (closed form), "position" mixes no positions (the
    diagonal is all), "packed" spans several blocks. block: the first block it spans.
    """

    source: int
    target: int
    kind: Literal["attention", "position", "packed"]
    block: int


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
    total.fill_diagonal_(0.0)
    columns.add_dense(*ends, total + torch.diag(relevance - total.sum(0)), live)


def _plan(
    model: Any, granularity: str, layers: Sequence[int] | None, heads: bool
) -> tuple[tuple[str, ...], list[_Step]]:
    """The sites of the graph, input first, and how each transition is found."""
    n = int(model.cfg.n_layers)
    if granularity not in ("block", "sublayer"):
        raise ValueError(f"granularity={granularity!r} is unknown; use 'block' or 'sublayer'.")
    ends = residual_sites(model)
    if layers is None:
        return _adjacent(model, ends, granularity == "sublayer")
    if not all(isinstance(layer, Integral) for layer in layers):
        raise ValueError(f"layers={list(layers)} must be whole numbers, indices of blocks.")
    chosen = sorted({*map(int, layers), n})
    if granularity != "block" or chosen[0] < 0 or chosen[-1] > n or len(chosen) < 2:
        raise ValueError(
            f"layers={list(layers)} must name blocks from 0 to {n} ({n}: the final output) and go "
            "with granularity='block'."
        )
    if heads and chosen != list(range(chosen[0], n + 1)):
        raise ValueError(
            "heads=True splits edges within one block; with layers=[...] that skip blocks there "
            "is no single head. Leave out heads, or layers."
        )
    steps = [
        _Step(i, i + 1, "attention" if to == at + 1 else "packed", at)
        for i, (at, to) in enumerate(pairwise(chosen))
    ]
    return tuple(ends[layer] for layer in chosen), steps


def _adjacent(
    model: Any, ends: tuple[str, ...], sublayers: bool
) -> tuple[tuple[str, ...], list[_Step]]:
    hook_dict = model.hook_dict
    sites, steps = [ends[0]], []
    for block, after in enumerate(ends[1:]):
        middle = f"blocks.{block}.hook_resid_mid"
        steps.append(_Step(len(sites) - 1, len(sites), "attention", block))
        if sublayers and middle in hook_dict:
            sites.append(middle)
            steps.append(_Step(len(sites) - 1, len(sites), "position", block))
        sites.append(after)
    return tuple(sites), steps
