"""``AttributionGraph``: the frozen graph with everything one does with it as methods.

The methods only give a name to pure functions on ``GraphData``: tables, pruning, paths, metrics,
decomposition, pictures and files, each in its own module and imported when it is first asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Self

from . import pruning
from .columns import ORDER
from .data import GraphData
from .prune_history import PruneStep

if TYPE_CHECKING:
    import networkx as nx
    import pandas as pd

    from ..render.offline import OfflineHTML
    from ..rules.rule_sets import RuleSet
    from .decompose import Node
    from .paths import Paths


class AttributionGraph(GraphData):
    """How relevance flows from one prediction down to its input tokens: ``GraphData`` with methods.

    Pruning, ``connected`` and ``subgraph`` return smaller graphs and never change the one they are
    called on; fields and their meaning are those of ``GraphData``.
    """

    # ------------------------------------------------------------ tables

    @property
    def edges(self) -> pd.DataFrame:
        """An edge a row: source_site, source_pos, target_site, target_pos, weight [, head, path].

        Sites are names, paths "value", "key" or "position" (then head is -1).
        """
        from .tables import edge_frame

        return edge_frame(self)

    @property
    def nodes(self) -> pd.DataFrame:
        """A node a row: site, pos, token, relevance (logits), special; input first."""
        from .tables import node_frame

        return node_frame(self)

    def matrix(
        self,
        source: int | str,
        target: int | str,
        *,
        head: int | None = None,
        path: str | int | None = None,
    ) -> Float[Tensor, "target_pos source_pos"]:
        """One transition as a dense matrix; what is not in the graph is 0.

        Args:
            source, target: Sites, by HookPoint name or index.
            head: Only this head (-1: the position-wise part); None adds all up.
            path: Only "value", "key" or "position"; None adds all up.

        Raises:
            ValueError: no such site, transition or path; a head or path where edges are not split.
        """
        from .tables import transition_matrix

        return transition_matrix(self, source, target, head, path)

    # ------------------------------------------------------------ smaller graphs

    def prune(
        self,
        *,
        mass: float | None = None,
        threshold: float | None = None,
        relative: float | None = None,
        top_k: int | None = None,
        node_threshold: float | None = None,
    ) -> Self:
        """A graph of the edges that satisfy every rule given; see ``pruning.py``.

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
        rule = pruning.PruneRule(mass, threshold, top_k, relative)
        if not rule and node_threshold is None:
            rule = pruning.DEFAULT_RULE
        steps = pruning.by_size(self, rule)
        if node_threshold is not None:
            steps.insert(0, pruning.by_node_threshold(self, node_threshold))
        return self.where(*pruning.combined(self, steps))

    def connected(self) -> Self:
        """Only edges on a path down from a final node (last site, a position explained)."""
        mask, step = pruning.connected(self)
        return self.where(mask, [step])

    def subgraph(
        self,
        *,
        positions: int | Iterable[int] | None = None,
        sites: int | str | Iterable[int | str] | None = None,
        tokens: str | Iterable[str] | None = None,
    ) -> Self:
        """Only edges both of whose ends are at these positions, sites, or texts of tokens.

        Raises:
            ValueError: a position, site or token that the graph does not have, or nothing given.
        """
        mask, step = pruning.within(self, positions=positions, sites=sites, tokens=tokens)
        return self.where(mask, [step])

    def where(self, mask: Bool[Tensor, " edge"], steps: Iterable[PruneStep] = ()) -> Self:
        """A graph of the edges in ``mask``; without ``steps`` its history says "chosen edges".

        Raises:
            ValueError: the mask does not say of every edge whether to keep it.
        """
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"The mask is {mask.dtype} of shape {tuple(mask.shape)}; give one bool an edge, "
                f"({len(self.weight)},), such as graph.weight > 0."
            )
        steps = tuple(steps) or (pruning.step_of(self, "chosen edges", {}, mask),)
        names = [name for name in (*ORDER, "weight") if getattr(self, name) is not None]
        kept: dict[str, Any] = {name: getattr(self, name)[mask] for name in names}
        return replace(self, **kept, history=(*self.history, *steps))

    def paths(self, k: int = 10) -> Paths:
        """The ``k`` strongest paths from the input to a final node; see ``paths.py``."""
        from .paths import strongest_paths

        return strongest_paths(self, k)

    # ------------------------------------------------------------ numbers

    def metrics(self) -> pd.DataFrame:
        """A site a row: counts, fan, sparsity, Gini, verticality, lookback; see ``metrics.py``."""
        from .metrics import site_metrics

        return site_metrics(self)

    def hubs(self, k: int = 10) -> pd.DataFrame:
        """Positions that exchange most relevance with others; see ``metrics.py``.

        Raises:
            ValueError: k below 1.
        """
        from .metrics import hubs

        return hubs(self, k)

    def summary(self) -> pd.DataFrame:
        """The whole graph in one row; see ``metrics.py``."""
        from .metrics import graph_summary

        return graph_summary(self)

    def input_metrics(self, top: int = 5) -> pd.DataFrame:
        """How the input tokens' relevance is spread: entropy, Gini, centre; see ``metrics.py``.

        Raises:
            ValueError: top below 1.
        """
        from .metrics import input_metrics

        return input_metrics(self.relevance[0], top)

    # ------------------------------------------------------------ what carries a node or an edge

    def explain_node(self, site: int | str, pos: int, k: int = 10) -> pd.DataFrame:
        """Dimensions, heads and neurons that carry a node's relevance; see ``decompose.py``."""
        from .decompose import explain_node

        return explain_node(self, site, pos, k)

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
        """Heads, by value and by key, and dimensions that carry an edge; see ``decompose.py``."""
        from .decompose import explain_edge

        return explain_edge(self, source, target, k, model=model, objective=objective, rules=rules)

    # ------------------------------------------------------------ pictures

    def show(self) -> OfflineHTML:
        """The graph as a layered picture: tokens across, sites up. Prune it first.

        Displays in a notebook as circuitsvis' own views do, without network.
        """
        from ..render.graph.picture import graph_picture
        from .picture import view_of

        return graph_picture(view_of(self))

    def show_matrices(self, transition: tuple[int | str, int | str] | None = None) -> OfflineHTML:
        """Transitions, or one's heads, as circuitsvis' ``attention_heads`` in signed colours."""
        from .picture import matrices_of

        return matrices_of(self, transition)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """The picture as a page that opens from disk without network."""
        from ..render import save_html
        from ..render.graph.picture import graph_html
        from .picture import view_of

        return save_html(Path(path), graph_html(view_of(self)))

    # ------------------------------------------------------------ files and other libraries

    def to_networkx(self) -> nx.DiGraph[Any]:
        """A ``DiGraph`` from source to target; a ``MultiDiGraph`` where split by heads."""
        from .export import to_networkx

        return to_networkx(self)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write node-link JSON, as ``networkx.node_link_graph(data, edges="edges")`` reads."""
        from .export import write_json

        return write_json(self, path)

    def to_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write GraphML."""
        from .export import write_graphml

        return write_graphml(self, path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph to a safetensors file; ``load`` reads it back exactly.

        Raises:
            FileNotFoundError: the folder does not exist.
        """
        from .export import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file written by ``save``.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is damaged, foreign, or of another version.
        """
        from .export import load

        return load(path, cls)
