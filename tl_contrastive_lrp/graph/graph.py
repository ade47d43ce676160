"""What one does with a graph: prune, measure, refine, draw, write. All of it as methods.

The work is done elsewhere, in pure functions; these methods only give it a name on the graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor

from . import pruning
from . import pruning as subgraphs
from .columns import ORDER
from .data import merged
from .prune_history import PruneStep
from .pruning import step_of

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

    from ..render.offline import OfflineHTML
    from ..rules.rule_sets import RuleSet
    from .data import AttributionGraph
    from .decompose import Node
    from .paths import Paths


class GraphTools:
    """Base of ``AttributionGraph``."""

    @property
    def _graph(self) -> AttributionGraph:
        return cast("AttributionGraph", self)

    # ------------------------------------------------------------ smaller graphs

    def prune(
        self,
        *,
        mass: float | None = None,
        threshold: float | None = None,
        relative: float | None = None,
        top_k: int | None = None,
        node_threshold: float | None = None,
    ) -> AttributionGraph:
        """A graph of the edges that satisfy every rule given; see ``prune.py``.

        Each rule is judged on this graph, so their order does not matter. Without any rule:
        ``mass=0.85``.

        Args:
            mass: Per transition, the fewest largest edges with this share of Σ|weight|.
            threshold: |weight| above this many logits.
            relative: |weight| above this times |Δℓ|.
            top_k: Per transition, so many largest edges.
            node_threshold: |relevance| of the target node above this many logits.

        Raises:
            ValueError: a value out of range, or both threshold and relative.
        """
        graph = self._graph
        if (threshold, relative, top_k, node_threshold) == (None,) * 4 and mass is None:
            mass = pruning.DEFAULT_MASS
        steps = []
        if node_threshold is not None:
            steps.append(pruning.by_node_threshold(graph, node_threshold))
        if threshold is not None or relative is not None:
            steps.append(pruning.by_threshold(graph, threshold, relative=relative))
        if mass is not None:
            steps.append(pruning.by_mass(graph, mass))
        if top_k is not None:
            steps.append(pruning.by_top_k(graph, top_k))
        return self.where(*pruning.combined(graph, steps))

    def connected(self) -> AttributionGraph:
        """Only edges on a path down from a final node (last site, a position explained)."""
        graph = self._graph
        mask, step = subgraphs.connected(graph)
        return self.where(mask, [step])

    def subgraph(
        self,
        *,
        positions: int | Iterable[int] | None = None,
        sites: int | str | Iterable[int | str] | None = None,
        tokens: str | Iterable[str] | None = None,
    ) -> AttributionGraph:
        """Only edges both of whose ends are at these positions, sites, or texts of tokens.

        Raises:
            ValueError: a position, site or token that the graph does not have, or nothing given.
        """
        graph = self._graph
        mask, step = subgraphs.within(graph, positions=positions, sites=sites, tokens=tokens)
        return self.where(mask, [step])

    def where(
        self, mask: Bool[Tensor, " edge"], steps: Iterable[PruneStep] = ()
    ) -> AttributionGraph:
        """A graph of the edges in ``mask``; without ``steps`` its history says "chosen edges".

        Raises:
            ValueError: the mask does not say of every edge whether to keep it.
        """
        graph = self._graph
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != graph.weight.shape:
            raise ValueError(
                f"The mask is {mask.dtype} of shape {tuple(mask.shape)}; give one bool an edge, "
                f"({len(graph.weight)},), such as graph.weight > 0."
            )
        steps = tuple(steps) or (step_of(graph, "chosen edges", {}, mask),)
        names = [name for name in (*ORDER, "weight") if getattr(graph, name) is not None]
        kept: dict[str, Any] = {name: getattr(graph, name)[mask] for name in names}
        return replace(graph, **kept, history=(*graph.history, *steps))

    def merge_heads(self) -> AttributionGraph:
        """The graph with each edge's heads and paths added up."""
        graph = self._graph
        if graph.head is None:
            return graph
        return replace(graph, **merged(graph), head=None, path=None)

    def paths(self, k: int = 10) -> Paths:
        """The ``k`` strongest paths from the input to a final node; see ``paths.py``."""
        graph = self._graph
        from .paths import strongest_paths

        return strongest_paths(graph, k)

    # ------------------------------------------------------------ numbers

    def metrics(self) -> pd.DataFrame:
        """A site a row: counts, fan, sparsity, Gini, verticality, lookback; see ``metrics.py``."""
        graph = self._graph
        from .metrics import site_metrics

        return site_metrics(graph)

    def hubs(self, k: int = 10) -> pd.DataFrame:
        """Positions that exchange most relevance with others; see ``metrics.py``.

        Raises:
            ValueError: k below 1.
        """
        graph = self._graph
        from .metrics import hubs

        return hubs(graph, k)

    def summary(self) -> pd.DataFrame:
        """The whole graph in one row; see ``metrics.py``."""
        graph = self._graph
        from .metrics import graph_summary

        return graph_summary(graph)

    def input_metrics(self, top: int = 5) -> pd.DataFrame:
        """How the input tokens' relevance is spread: entropy, Gini, centre; see ``spread.py``.

        Raises:
            ValueError: top below 1.
        """
        from .metrics import input_metrics

        return input_metrics(self._graph.relevance[0], top)

    # ------------------------------------------------------------ what carries a node or an edge

    def explain_node(self, site: int | str, pos: int, k: int = 10) -> pd.DataFrame:
        """Hidden dimensions, heads and neurons that carry a node's relevance; see ``refine.py``."""
        from .decompose import explain_node

        return explain_node(self._graph, site, pos, k)

    def explain_edge(
        self,
        source: Node,
        target: Node,
        k: int = 10,
        *,
        model: Any = None,
        objective: Callable[[Tensor], Tensor] | None = None,
        rules: str | RuleSet | None = None,
    ) -> pd.DataFrame:
        """Heads, by value and by key, and dimensions that carry an edge; see ``refine.py``."""
        from .decompose import explain_edge

        return explain_edge(
            self._graph, source, target, k, model=model, objective=objective, rules=rules
        )

    # ------------------------------------------------------------ pictures

    def show(self) -> OfflineHTML:
        """The graph as a layered picture: tokens across, sites up. Prune it first.

        Displays in a notebook as circuitsvis' own views do, without network.
        """
        from ..render.graph.picture import graph_picture
        from .picture import view_of

        return graph_picture(view_of(self._graph))

    def show_matrices(self, transition: tuple[int | str, int | str] | None = None) -> OfflineHTML:
        """Transitions, or one's heads, as circuitsvis' ``attention_heads`` in signed colours."""
        from .picture import matrices_of

        return matrices_of(self._graph, transition)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """The picture as a page that opens from disk without network."""
        from ..render import save_html
        from ..render.graph.picture import graph_html
        from .picture import view_of

        return save_html(Path(path), graph_html(view_of(self._graph)))

    # ------------------------------------------------------------ files and other libraries

    def to_networkx(self) -> nx.DiGraph[Any]:
        """A ``DiGraph`` from source to target; a ``MultiDiGraph`` where split by heads."""
        graph = self._graph
        from .export import to_networkx

        return to_networkx(graph)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write node-link JSON, as ``networkx.node_link_graph(data, edges="edges")`` reads."""
        graph = self._graph
        from .export import write_json

        return write_json(graph, path)

    def to_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write GraphML."""
        graph = self._graph
        from .export import write_graphml

        return write_graphml(graph, path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph to a safetensors file; ``load`` reads it back exactly.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        graph = self._graph
        from .export import save

        return save(graph, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttributionGraph:
        """Read a file written by ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is damaged, foreign, or of another version.
        """
        from .export import load

        return load(path)
