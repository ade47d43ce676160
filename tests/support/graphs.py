"""Small made-up graphs, and slow truths about them that use nothing of the package's own."""

from __future__ import annotations

from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from tl_contrastive_lrp.graph.graph import AttributionGraph
from tl_contrastive_lrp.hooks.coverage import Coverage, CoverageRow

Edge = tuple[int, int, int, int, int, int, float]  # target site, source site, positions, ...


# Three sites, two positions; edges by value and key of heads 0, 1 and 3, and position-wise.
SPLIT: list[Edge] = [
    (1, 0, 0, 0, -1, 0, 1.0),
    (1, 0, 1, 0, 0, 1, 0.5),
    (1, 0, 1, 0, 0, 2, -0.25),
    (1, 0, 1, 0, 3, 1, 2.0),
    (2, 1, 1, 1, -1, 0, 4.0),
    (2, 1, 1, 0, 1, 2, -3.0),
]


def given(*drawn: Any, examples: int = 60, **named: Any) -> Any:
    """``hypothesis.given`` without a deadline: shared machines pause."""

    def decorate(test: Any) -> Any:
        with_settings = hypothesis.settings(deadline=None, max_examples=examples)
        return with_settings(hypothesis.given(*drawn, **named)(test))

    return decorate


def facts(
    sites: int, pos: int, relevance: torch.Tensor | None = None, **more: Any
) -> dict[str, Any]:
    """All of a graph's fields but its edges; relevance is 1 everywhere unless given."""
    names = tuple(f"blocks.{i}.hook_resid_pre" for i in range(sites - 1))
    return {
        "sites": (*names, f"blocks.{sites - 2}.hook_resid_post"),
        "relevance": torch.ones(sites, pos) if relevance is None else relevance,
        "token_ids": torch.arange(pos),
        "special": torch.arange(pos) == 0,
        "str_tokens": tuple(f" t{i}" for i in range(pos)),
        "final_pos": pos - 1,
        "delta": 2.0,
        "target_logit": 5.0,
        "contrast_logit": 3.0,
        "objective": "logit( a) − logit( b)",
        "target": " a",
        "contrast": " b",
        "rules": "attnlrp",
        "coverage": Coverage("attnlrp", (CoverageRow("blocks.0.ln1", "RMS", "norm", "ln", "x"),)),
        "model_name": "toy",
        "granularity": "block",
        **more,
    }


def made(edges: list[Edge], sites: int, pos: int, *, split: bool = False, **more: Any) -> Any:
    """A graph of edges (target site, source site, target pos, source pos, head, path, weight)."""
    dtype = more.pop("dtype", torch.float32)
    columns = list(zip(*edges, strict=True)) if edges else [()] * 7
    names = ("target_site", "source_site", "target_pos", "source_pos", "head", "path")
    given = {n: torch.tensor(c, dtype=torch.int64) for n, c in zip(names, columns, strict=False)}
    if not split:
        given |= {"head": None, "path": None}
    weight = torch.tensor(columns[6], dtype=dtype)
    return AttributionGraph.from_columns(weight=weight, **given, **facts(sites, pos, **more))


def listed(graph: AttributionGraph) -> list[Edge]:
    """The graph's edges as tuples, head -1 and path 0 where it has none."""
    found = []
    for e in range(len(graph.weight)):
        found.append(
            (
                int(graph.target_site[e]),
                int(graph.source_site[e]),
                int(graph.target_pos[e]),
                int(graph.source_pos[e]),
                -1 if graph.head is None else int(graph.head[e]),
                0 if graph.path is None else int(graph.path[e]),
                float(graph.weight[e]),
            )
        )
    return found


def same(a: AttributionGraph, b: AttributionGraph) -> None:
    for name, value in vars(a).items():
        other = vars(b).get(name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype, name
            assert torch.equal(value, other), name
        elif name != "slices":
            assert value == other, name


@st.composite
def edge_lists(
    draw: Any, weights: Any = None, adjacent: bool = False
) -> tuple[list[Edge], int, int, bool]:
    """Edges of a random graph in random order, with its numbers of sites and positions, and
    whether it is split by heads. Few different weights, so that ties are common."""
    sites, pos = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    split = draw(st.booleans())
    if weights is None:
        weights = st.sampled_from([-3.0, -1.0, -0.5, 0.5, 1.0, 1.0, 2.0])
    possible = [
        (t, s, j, i, head, path)
        for t in range(sites)
        for s in range(t)
        if not adjacent or s == t - 1
        for j in range(pos)
        for i in range(pos)
        for head, path in ([(-1, 0), (0, 1), (0, 2), (1, 1)] if split else [(-1, 0)])
        if not (split and path == 0 and i != j)
    ]
    chosen = draw(st.lists(st.sampled_from(possible), unique=True, max_size=24))
    return [(*edge, draw(weights)) for edge in chosen], sites, pos, split
