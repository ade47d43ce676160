"""The graph of a long prompt: relevance and pruned edges from one backward in tiles."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from .checkpoint import Checkpoint
from .graph_columns import EdgeColumns
from .prune_steps import Kept
from .rulesets import RuleSet
from .selection import Rule, Selection
from .sites import find_sites
from .sums import Sums
from .tiled_backward import TileReader
from .tiled_edges import TiledEdges
from .tiled_run import TiledResult, run_tiled


class Step(Protocol):
    """One transition: see ``graph_build``."""

    @property
    def source(self) -> int: ...

    @property
    def target(self) -> int: ...

    @property
    def kind(self) -> str: ...

    @property
    def block(self) -> int: ...


def tiled_graph(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: RuleSet,
    sums: Sums,
    sites: tuple[str, ...],
    steps: Sequence[Step],
    rule: Rule,
    tile: int,
    *,
    node_threshold: float,
    progress: bool,
    checkpoint_dir: str | os.PathLike[str] | None,
) -> tuple[TiledResult, Float[Tensor, "site pos"], EdgeColumns, list[Kept]]:
    """Relevance of all nodes, the edges that ``rule`` keeps, and what it kept by transition.

    Args:
        model, tokens, objective, rule_set, sums, tile: As for ``run_tiled``.
        sites, steps: The transitions, each within one block.
        rule: Which edges to keep.
        node_threshold: Targets with |relevance| at or below it are not expanded.
        progress: Show a bar.
        checkpoint_dir: Where to keep what is finished.

    Raises:
        NotTileable, ModelStateError, UncoveredComponentError, FileFormatError: as ``run_tiled``.
    """
    covered = find_sites(model)
    targets = {step.block: sites[step.target] for step in steps if step.kind == "attention"}
    settings = f"graph {sites} {rule} {node_threshold}"
    checkpoint = None if checkpoint_dir is None else Checkpoint(checkpoint_dir, settings)

    def reader() -> TileReader:
        return TiledEdges(model, covered, rule_set, rule, targets, node_threshold)

    result, edges = run_tiled(
        model, tokens, objective, rule_set, sums, tile,
        reader=reader, progress=progress, checkpoint=checkpoint,
    )  # fmt: skip
    assert isinstance(edges, TiledEdges)
    relevance = torch.stack([result.kept[site] for site in sites])
    columns, kept = EdgeColumns(), []
    for step in steps:
        if step.kind == "attention":
            found = edges.found[step.block]
        else:
            found = _diagonal(rule, relevance[step.source], relevance[step.target], node_threshold)
        rows, sources, weights = found.chosen()
        columns.add_edges(step.source, step.target, rows, sources, weights)
        kept.append(found.account(step.source, step.target, weights))
    return result, relevance, columns, kept


def _diagonal(rule: Rule, source: Tensor, target: Tensor, node_threshold: float) -> Selection:
    """A transition in which every position keeps to itself, last rows first, in parts."""
    found, values = Selection(rule), torch.where(target.abs() > node_threshold, source, 0)
    for stop in range(len(values), 0, -512):
        start = max(stop - 512, 0)
        found.add(torch.diag(values[start:stop]), start, start, start)
    return found
