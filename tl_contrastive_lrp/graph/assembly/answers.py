"""The graph of two answers: a graph for each, and their difference.

Edges are linear in the objective, as relevance is, so an edge of the difference of two sums of
logits is the difference of that edge in both graphs. The answers' own tokens are in one graph only:
the positions after the prompt are the target's tokens and then the contrast's, as far as the model
reads them (all but the last of each). No edge joins the two answers.

Edges are chosen by size after they are added up, since the sum of two small graphs is not the small
graph of a sum. So both graphs are computed whole, also in tiles, in memory quadratic in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...inputs.answers import AnswerDiff
from ...inputs.facts import PromptFacts
from ...inputs.forced import AnswerRun, Side, both_ways, labelled, runs_of, with_answer
from ...inputs.objective import logit_diff
from ..columns import ORDER, added_up
from ..graph import AttributionGraph
from ..pruning import PruneRule

# Computes a graph with these edges and node threshold; the side says which answer's run it is.
RunOne = Callable[
    [PromptFacts, Callable[[Tensor], Tensor], Side | None, PruneRule, float], AttributionGraph
]

_POSITION_AXES = {"relevance": 1, "dimensions": 1, "neurons": 1, "head_relevance": 2}


def graph_of_answers(
    model: Any,
    prompt: PromptFacts,
    answers: AnswerDiff,
    rule: PruneRule,
    node_threshold: float,
    run_one: RunOne,
) -> AttributionGraph:
    """Compute the graph of the difference of two answers.

    Args:
        model: A ``TransformerBridge``.
        prompt: The prompt.
        answers: What to explain.
        rule: Which edges to keep.
        node_threshold: Edges of targets with |relevance| at or below it, in logits, are left out.
        run_one: Computes the graph of one objective of one prompt.

    Raises:
        PromptError, ModelStateError: as ``forced.runs_of``; and what ``run_one`` raises.
    """
    shared, runs = runs_of(model, prompt, answers)
    if not runs:
        objective = logit_diff(model, answers.target[0], answers.contrast[0])
        return run_one(shared, objective, None, rule, node_threshold)
    graphs = [(run, run_one(run.prompt, run.objective, run.side, PruneRule(), 0.0)) for run in runs]
    whole = _difference(shared, answers, graphs, node_threshold)
    return whole.prune(**rule.criteria) if rule else whole


def n_read(answers: AnswerDiff) -> int:
    """How many tokens a graph has after the prompt: what the model reads of both answers."""
    tails = (answers.target, answers.contrast)
    return len(answers.shared) + sum(max(0, len(tail) - 1) for tail in tails)


def _difference(
    prompt: PromptFacts,
    answers: AnswerDiff,
    graphs: list[tuple[AnswerRun, AttributionGraph]],
    node_threshold: float,
) -> AttributionGraph:
    length, any_graph = len(prompt.token_ids), graphs[0][1]
    more = [len(graph.str_tokens) - length for _, graph in graphs]
    starts = [0, *accumulate(more)]
    deltas = {run.side: graph.delta for run, graph in graphs}
    tails = [graph.str_tokens[length:] for _, graph in graphs]
    texts, segments = list[str](), prompt.segments
    for (run, _), tail in zip(graphs, tails, strict=True):
        marked = labelled(run.side, tail)
        texts += marked
        segments = with_answer(segments, f"{run.side} answer", marked)

    def placed(name: str) -> Tensor:
        """The sum at the prompt's positions, then what is at those of each answer."""
        axis = _POSITION_AXES[name]
        parts = [run.sign * getattr(graph, name) for run, graph in graphs]
        common = torch.stack([part.narrow(axis, 0, length) for part in parts]).sum(0)
        own = [part.narrow(axis, length, n) for part, n in zip(parts, more, strict=True)]
        return torch.cat([common, *own], dim=axis)

    def ids(name: str) -> Tensor:
        own = [getattr(graph, name)[length:] for _, graph in graphs]
        return torch.cat([getattr(prompt, name), *own])

    relevance = placed("relevance")
    details = ("dimensions", "neurons", "head_relevance")
    columns = _summed(
        [
            _columns(graph, run.sign, length, start)
            for (run, graph), start in zip(graphs, starts, strict=False)
        ]
    )
    if node_threshold:
        target = relevance[columns["target_site"].long(), columns["target_pos"].long()]
        live = target.abs() > node_threshold
        columns = {name: column[live] for name, column in columns.items()}
    facts: dict[str, Any] = {
        name: getattr(any_graph, name)
        for name in ("sites", "transitions", "rules", "coverage", "model_name", "granularity",
                     "prepended_bos")
    }  # fmt: skip
    final = length - 1 + starts[-1]
    return AttributionGraph.from_columns(
        **columns,
        **facts,
        **{name: placed(name) for name in details if getattr(any_graph, name) is not None},
        relevance=relevance,
        token_ids=ids("token_ids"),
        special=ids("special"),
        str_tokens=(*prompt.str_tokens, *texts),
        segments=segments,
        final_pos=final,
        earlier_final_pos=tuple(range(length - 1, final)),
        delta=sum(run.sign * graph.delta for run, graph in graphs),
        target_logit=deltas.get("target", 0.0),
        contrast_logit=deltas.get("contrast"),
        objective=str(answers),
        target=answers.texts[0],
        contrast=answers.texts[1],
        node_threshold=float(node_threshold),
        memory=both_ways(graph.memory for _, graph in graphs),
        attention=both_ways(graph.attention for _, graph in graphs),
    )


def _columns(graph: AttributionGraph, sign: int, length: int, start: int) -> dict[str, Tensor]:
    """The edges of one answer's graph, its own positions moved behind those of earlier answers."""
    columns = {name: getattr(graph, name) for name in ORDER if getattr(graph, name) is not None}
    for name in ("source_pos", "target_pos"):
        columns[name] = torch.where(columns[name] < length, columns[name], columns[name] + start)
    return {**columns, "weight": sign * graph.weight}


def _summed(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The edges of several graphs as one set: those with the same ends added up, no zeros."""
    columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    weight = columns.pop("weight")
    found = added_up(columns, weight)
    found["weight"] = found["weight"].to(weight.dtype)
    kept = found["weight"] != 0
    return {name: column[kept] for name, column in found.items()}
