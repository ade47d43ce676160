"""Graphs that the package computes, to be held against ``edge_truth`` and ``circuit_truth``."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from truth import circuit_truth
from truth.edge_truth import CONTRAST, TARGET, TOKENS
from truth.families import boot, true_float64

import tl_contrastive_lrp as clrp
from support.small_tiles import small_query_tiles


def graph_of(
    model: Any, rules: str, objective: Any = None, tokens: Tensor = TOKENS, **how: Any
) -> Any:
    if objective is None:
        objective = clrp.logit_diff(model, TARGET, CONTRAST)
    double = next(model.parameters()).dtype == torch.float64
    with true_float64(model) if double else nullcontext():
        return clrp.attribution_graph(model, tokens, objective, rules=rules, **how)


@functools.cache
def graph(
    name: str,
    rules: str,
    granularity: str = "block",
    heads: bool = False,
    attention: str = "eager",
) -> Any:
    with small_query_tiles():
        return graph_of(
            boot(name), rules, granularity=granularity, heads=heads, attention=attention
        )


def circuit_graph(name: str, **how: Any) -> Any:
    """A family's model and its graph of the prompt in ``circuit_truth``."""
    model = boot(name)
    with true_float64(model):
        graph = clrp.attribution_graph(model, circuit_truth.TOKENS, **circuit_truth.ASKED, **how)
        return model, graph
