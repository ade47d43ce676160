"""The attribution graph: how relevance flows between hidden states, from the answer to the prompt.

``edges`` computes edges while a backward runs and ``assembly`` makes a graph of them. ``data`` has
the frozen graph, and pure functions prune, measure, draw and write it; ``AttributionGraph`` has
them as methods.
"""

from __future__ import annotations

from .assembly.attribution_graph import attribution_graph, attribution_graphs
from .graph import AttributionGraph

__all__ = ["AttributionGraph", "attribution_graph", "attribution_graphs"]
