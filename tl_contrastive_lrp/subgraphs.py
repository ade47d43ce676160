"""Which edges of a graph to keep by where they are: below the final node, at given nodes.

As in ``prune``, each rule returns a mask over the edges with its account and changes nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch

from .objective import in_words
from .prune_steps import Pruned, step_of

if TYPE_CHECKING:
    from .graph import AttributionGraph


def connected(graph: AttributionGraph) -> Pruned:
    """Keep edges on a path of edges down from a final node (last site, a position explained)."""
    pos = len(graph.str_tokens)
    reached = torch.zeros(len(graph.sites), pos, dtype=torch.bool)
    reached[-1, list(graph.final_positions)] = True
    mask = torch.zeros(len(graph.weight), dtype=torch.bool)
    # Edges only lead to earlier sites: with targets from the top, each site is complete in time.
    for source, target in sorted(graph.slices, key=lambda pair: -pair[1]):
        part = graph.slices[source, target]
        mask[part] = reached[target][graph.target_pos[part].long()]
        reached[source][graph.source_pos[part][mask[part]].long()] = True
    said: dict[str, int | str] = {"final_pos": graph.final_pos}
    if graph.earlier_final_pos:
        said = {"final_positions": in_words(graph.final_positions)}
    return mask, step_of(graph, "connected", said, mask)


def within(
    graph: AttributionGraph,
    *,
    positions: int | Iterable[int] | None = None,
    sites: int | str | Iterable[int | str] | None = None,
    tokens: str | Iterable[str] | None = None,
) -> Pruned:
    """Keep edges both of whose ends are at given sites and positions.

    Args:
        graph: Any graph.
        positions: Positions in the prompt, or one; negative ones count from the end.
        sites: HookPoint names or indices, or one.
        tokens: Texts of tokens, or one, exactly as in ``str_tokens``: every position that holds
            one. With ``positions`` too, a position must satisfy both.

    Raises:
        ValueError: a position, site or token that the graph does not have, or nothing given.
        TypeError: a position that is no whole number.
    """
    n = len(graph.str_tokens)
    at = torch.ones(n, dtype=torch.bool)
    said: dict[str, str] = {}
    if positions is not None:
        wanted = [operator.index(p) for p in _each(positions)]
        outside = [p for p in wanted if not -n <= p < n]
        if outside:
            raise ValueError(f"Position {outside[0]} is outside the prompt's {n} tokens.")
        at &= torch.zeros(n, dtype=torch.bool).index_fill(0, torch.tensor(wanted).long() % n, True)
        said["positions"] = _listed(sorted({p % n for p in wanted}))
    if tokens is not None:
        texts = set(_each(tokens))
        missing = sorted(texts - set(graph.str_tokens))
        if missing:
            raise ValueError(
                f"No token of the prompt is {missing[0]!r}; spaces count, as in {_few(graph)}."
            )
        at &= torch.tensor([text in texts for text in graph.str_tokens])
        said["tokens"] = _listed(sorted(map(repr, texts)))
    kept_sites = torch.ones(len(graph.sites), dtype=torch.bool)
    if sites is not None:
        indices = sorted({graph.site_index(site) for site in _each(sites)})
        kept_sites = torch.zeros_like(kept_sites).index_fill(0, torch.tensor(indices).long(), True)
        said["sites"] = _listed(indices)
    if not said:
        raise ValueError("Give positions=, sites= or tokens= to keep.")
    node = (kept_sites[:, None] & at[None]).flatten()
    mask = node[graph.source_node] & node[graph.target_node]
    return mask, step_of(graph, "subgraph", said, mask)


def _each(given: Any) -> Iterable[Any]:
    return [given] if isinstance(given, str | Integral) else given


def _few(graph: AttributionGraph) -> str:
    return ", ".join(map(repr, dict.fromkeys(graph.str_tokens[:6])))


def _listed(values: list[Any], most: int = 12) -> str:
    shown = ", ".join(map(str, values[:most]))
    return shown if len(values) <= most else f"{shown}, ... ({len(values)} in all)"
