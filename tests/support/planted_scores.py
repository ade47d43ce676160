"""How well relevance ranks what was planted first: AUROC and average precision."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from truth.planted import Case, Plan, case

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.evaluation.circuits.edge_space import EdgeSpace
from tl_contrastive_lrp.evaluation.circuits.runs import visible_positions
from tl_contrastive_lrp.evaluation.faithfulness import auroc, average_precision


def ranked(model: Any, one: Case, rules: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """(|relevance|, truth) of tokens (without BOS), and of heads, edges and neurons if known.

    Heads are (layer, head, position written at), neurons (layer, position, neuron), edges all
    those that the masks allow and the answer can depend on.
    """
    how = {"target": one.target, "contrast": one.contrast, "rules": rules}
    graph = clrp.attribution_graph(model, one.tokens, details=True, **how)
    n = one.tokens.shape[1]
    tokens = clrp.attribute(model, one.tokens, **how).tokens

    def among(shape: tuple[int, ...], known: Iterable[Any]) -> Tensor:
        truth = torch.zeros(shape, dtype=torch.bool)
        for index in known:
            truth[index] = True
        return truth

    found = {"tokens": (tokens[1:].abs(), among((n,), one.truth)[1:])}
    if not one.edges:
        return found
    visible, _ = visible_positions(model, one.tokens)
    space = EdgeSpace.of(graph, visible, int(model.cfg.n_heads))
    heads, neurons = graph.head_relevance, graph.neurons
    assert heads is not None
    assert neurons is not None
    found["heads"] = (heads.abs(), among(heads.shape, one.heads))
    found["edges"] = (space.scores(graph), space.mask_of_edges(one.edges))
    if one.neurons:
        found["neurons"] = (neurons.abs(), among(neurons.shape, one.neurons))
    return found


def measured(model: Any, one: Case, rules: Any) -> dict[str, tuple[float, float]]:
    """AUROC and average precision of what ``ranked`` gives."""
    return {
        what: (auroc(scores, truth), average_precision(scores, truth))
        for what, (scores, truth) in ranked(model, one, rules).items()
    }


def table(model: Any, plan: Plan, seeds: Iterable[int], rules: Any) -> dict[str, float]:
    """Mean AUROC over prompts."""
    rows = [measured(model, case(plan, seed), rules) for seed in seeds]
    return {what: sum(row[what][0] for row in rows) / len(rows) for what in rows[0]}
