"""``AttributionGraph``: the frozen graph, with its operations as methods.

The methods only call pure functions on ``GraphData`` (tables, pruning, paths, metrics,
decomposition, pictures and files). Each is in a module of its own, which is imported at first use.
The file is long because it documents every method with an example, and a class is not split.
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

    from ..inputs.segments import How
    from ..render.offline import OfflineHTML
    from ..rules.rule_sets import RuleSet
    from .decompose import Node
    from .paths import Paths


class AttributionGraph(GraphData):
    """How the relevance of one prediction flows through the hidden states down to the input tokens.

    A node is a hidden state: a site of the residual stream at a position. An edge's weight is the
    relevance, in logits, that its target node passes to its source node; positive supports the
    target token, negative the contrast. All fields are those of ``GraphData``, and all tensors are
    on the CPU. ``attribution_graph`` makes a graph.

    Graphs are frozen: ``prune``, ``connected``, ``subgraph`` and ``where`` return smaller graphs
    and never change the one they are called on.

    Source: arXiv:2604.17761.

    Example:
        >>> circuit = graph.prune(mass=0.85).connected()
        >>> len(circuit.weight) < len(graph.weight)
        True
        >>> circuit.history[0].share_kept >= 0.85
        True
    """

    # ------------------------------------------------------------ tables

    @property
    def edges(self) -> pd.DataFrame:
        """The edges, one per row, in the graph's order.

        Columns: source_site, source_pos, target_site, target_pos and weight (logits, positive
        supports the target token); on a graph split by heads also head and path. Sites are
        HookPoint names. A path is "value", "key" or "position", for which the head is -1.

        Example:
            >>> list(graph.edges.columns)
            ['source_site', 'source_pos', 'target_site', 'target_pos', 'weight']
        """
        from .tables import edge_frame

        return edge_frame(self)

    @property
    def nodes(self) -> pd.DataFrame:
        """The nodes that have an edge or are final, one per row, input first.

        Columns: site (HookPoint name), pos, token, relevance (logits, positive supports the target
        token) and special (whether the token is one of the tokenizer's special tokens).

        Example:
            >>> graph.nodes["site"].iloc[0]
            'blocks.0.hook_resid_pre'
        """
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
        """One transition as a dense matrix of weights, in logits; a missing edge is 0.

        Over all targets, the column of a source position sums to its relevance (in a full graph).

        Args:
            source: The source site, by HookPoint name or index.
            target: The target site, by HookPoint name or index.
            head: Only this head (-1: the position-wise part); None adds all of them up.
            path: Only "value", "key" or "position"; None adds all of them up.

        Returns:
            The weights, [target_pos, source_pos]; positive supports the target token.

        Raises:
            ValueError: There is no such site, transition or path, or a head or path is given for a
                graph that is not split by heads.

        Example:
            >>> matrix = graph.matrix("blocks.2.hook_resid_pre", "blocks.3.hook_resid_pre")
            >>> torch.allclose(matrix.sum(0), graph.relevance[2], atol=1e-4)
            True
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
        """Keep the edges that satisfy every given criterion; without any, ``mass=0.85``.

        Each criterion is applied to this graph, so their order does not matter. Among edges of
        equal |weight|, the first in the graph's order is kept. ``history`` of the new graph
        accounts for the edges and the mass that each criterion kept.

        Args:
            mass: Keep, per transition, the fewest largest edges that hold this share of Σ|weight|.
            threshold: Keep the edges with |weight| above this many logits.
            relative: Keep the edges with |weight| above this times |Δℓ|.
            top_k: Keep, per transition, the k edges of largest |weight|.
            node_threshold: Keep the edges whose target node has |relevance| above this many
                logits.

        Raises:
            ValueError: A value is out of range, both ``threshold`` and ``relative`` are given, or
                ``relative`` is given and Δℓ is 0.

        Source: arXiv:2604.17761, Appendix B.

        Example:
            >>> pruned = graph.prune(top_k=10)
            >>> [len(pruned.weight[part]) for part in pruned.slices.values()]
            [10, 10, 10, 10]
        """
        rule = pruning.PruneRule(mass, threshold, top_k, relative)
        if not rule and node_threshold is None:
            rule = pruning.DEFAULT_RULE
        steps = pruning.by_size(self, rule)
        if node_threshold is not None:
            steps.insert(0, pruning.by_node_threshold(self, node_threshold))
        return self.where(*pruning.combined(self, steps))

    def connected(self) -> Self:
        """Keep the edges on a path down from a final node (last site, an explained position).

        Example:
            >>> circuit = graph.prune(top_k=5).connected()
            >>> circuit.history[-1].name
            'connected'
        """
        mask, step = pruning.connected(self)
        return self.where(mask, [step])

    def subgraph(
        self,
        *,
        positions: int | Iterable[int] | None = None,
        sites: int | str | Iterable[int | str] | None = None,
        tokens: str | Iterable[str] | None = None,
    ) -> Self:
        """Keep the edges both of whose ends are at given positions, sites or tokens.

        Args:
            positions: One or more positions in the prompt; negative ones count from the end.
            sites: One or more HookPoint names or indices.
            tokens: One or more texts of tokens, exactly as in ``str_tokens`` or as paths show
                them, or token ids written ``id:123``: every position that holds one of them.

        Raises:
            ValueError: A position, site or token is not in the graph, or nothing is given.
            TypeError: A position is not a whole number.

        Example:
            >>> part = graph.subgraph(positions=[-2, -1])
            >>> sorted(set(part.source_pos.tolist()))
            [42, 43]
        """
        mask, step = pruning.within(self, positions=positions, sites=sites, tokens=tokens)
        return self.where(mask, [step])

    def by(self, how: How) -> Self:
        """The graph between segments of the prompt, such as its messages.

        Positions are put together: a node is the sum of its tokens' nodes, and an edge the sum of
        the edges between its tokens, in float64, by head and path where the graph is split by
        heads. It has the same methods; its "tokens" are the segments, with their names as texts.
        Edges within a segment become an edge from the segment to itself, one site further.
        Opposite edges cancel in a sum: divide a full graph, and prune what results.

        Args:
            how: As for ``Attribution.by``: "message", "tool", "sentence", "line", "word", a dict
                {name: (start, end)}, or a list of texts.

        Raises:
            ValueError, PromptError: As ``Attribution.by``; or this graph is between segments
                already.

        Example:
            >>> lines = graph.by("line")
            >>> len(lines.str_tokens) < len(graph.str_tokens)
            True
            >>> total = graph.weight.double().sum()
            >>> bool(torch.isclose(lines.weight.sum(), total, rtol=0, atol=1e-9))
            True
        """
        from .by_segment import by_segment

        return by_segment(self, how)

    def where(self, mask: Bool[Tensor, " edge"], steps: Iterable[PruneStep] = ()) -> Self:
        """Keep the edges that a mask marks.

        Args:
            mask: Whether to keep each edge, [edge].
            steps: What to add to ``history``; by default one step named "chosen edges".

        Raises:
            ValueError: The mask does not have one bool for each edge.

        Example:
            >>> positive = graph.where(graph.weight > 0)
            >>> bool((positive.weight > 0).all())
            True
        """
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != self.weight.shape:
            raise ValueError(
                f"The mask is {mask.dtype} of shape {tuple(mask.shape)}; give one bool per edge, "
                f"({len(self.weight)},), such as graph.weight > 0."
            )
        steps = tuple(steps) or (pruning.step_of(self, "chosen edges", {}, mask),)
        names = [name for name in (*ORDER, "weight") if getattr(self, name) is not None]
        columns: dict[str, Any] = {name: getattr(self, name)[mask] for name in names}
        return replace(self, **columns, history=(*self.history, *steps))

    def paths(self, k: int = 10, *, special: bool = True) -> Paths:
        """The strongest paths from the first site to a final node.

        A path's strength, in logits and signed as the objective, is the relevance that arrives at
        its input token when every node divides what it gets among its sources in proportion to
        the edges' weights; ``graph/paths.py`` has the formula.

        Args:
            k: The number of paths; fewer are returned if the graph has fewer.
            special: Whether paths may start at the first token and at special tokens, where
                attention of deep models rests without saying anything about the prompt. ``Paths``
                says in either case how much of Δℓ all of these paths carry.

        Returns:
            The paths by |strength|, largest first.

        Raises:
            ValueError: ``k`` is not a whole number, or below 1.

        Example:
            >>> paths = graph.paths(3)
            >>> [path.positions[-1] == graph.final_pos for path in paths]
            [True, True, True]
        """
        from .paths import strongest_paths

        return strongest_paths(self, k, special)

    # ------------------------------------------------------------ numbers

    def metrics(self) -> pd.DataFrame:
        """Numbers that describe each site, one site per row, input first.

        Counts of nodes and edges, fan-in and fan-out, sparsity, Gini coefficients, mass,
        verticality, lookback and the largest hub; ``graph/metrics.py`` defines the columns.

        Example:
            >>> bool((graph.metrics()["verticality"].dropna() <= 1).all())
            True
        """
        from .metrics import site_metrics

        return site_metrics(self)

    def hubs(self, k: int = 10) -> pd.DataFrame:
        """The positions that exchange the most relevance with other positions, over all sites.

        Args:
            k: How many positions.

        Returns:
            Columns pos, token, in_mass, out_mass and mass (Σ|weight| in logits), share.

        Raises:
            ValueError: ``k`` is not a whole number, or below 1.

        Example:
            >>> graph.hubs(3)["mass"].is_monotonic_decreasing
            True
        """
        from .metrics import hubs

        return hubs(self, k)

    def summary(self) -> pd.DataFrame:
        """The whole graph in one row, to be stacked with those of other graphs.

        ``graph/metrics.py`` defines the columns.

        Example:
            >>> graph.summary()["edges"].item() == len(graph.weight)
            True
        """
        from .metrics import graph_summary

        return graph_summary(self)

    def input_metrics(self, top: int = 5) -> pd.DataFrame:
        """How the input tokens' relevance is distributed: entropy, Gini, centre of mass.

        Args:
            top: How many tokens ``top_share`` counts.

        Returns:
            A row for all tokens, for those that support the target and for those that support the
            contrast; ``graph/metrics.py`` defines the columns.

        Raises:
            ValueError: ``top`` is below 1.

        Example:
            >>> graph.input_metrics()["part"].tolist()
            ['all', 'target', 'contrast']
        """
        from .metrics import input_metrics

        return input_metrics(self.relevance[0], top)

    # ------------------------------------------------------------ parts of a node or an edge

    def explain_node(self, site: int | str, pos: int, k: int = 10) -> pd.DataFrame:
        """Hidden dimensions, heads and neurons that carry a node's relevance.

        Args:
            site: The node's site, by HookPoint name or index.
            pos: The node's position.
            k: Rows for each kind of part.

        Returns:
            Columns part ("dimension", "head", "neuron"), name, relevance (logits, positive
            supports the target token) and share of the node's relevance, by |relevance|.

        Raises:
            ValueError: The graph was made without ``details=True``, or has no such node.

        Example:
            >>> detailed = clrp.attribution_graph(model, case.prompt, objective, details=True)
            >>> detailed.explain_node(-1, -1, k=2)["part"].value_counts().sort_index().to_dict()
            {'dimension': 2, 'head': 2, 'neuron': 2}
        """
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
        """Heads, by value and by key, and hidden dimensions that carry an edge.

        Args:
            source: The source node: (site name or index, position).
            target: The target node.
            k: Rows for each kind of part.
            model: The model that the graph explains. With it and ``objective``, one more forward
                and backward give the hidden dimensions of the source too.
            objective: The objective that the graph explains.
            rules: The rules of that backward; by default the graph's own, by name.

        Returns:
            Columns part ("head by value", "head by key", "position-wise", "dimension"), name,
            relevance (logits, positive supports the target token) and share of the edge, by
            |relevance|.

        Raises:
            ValueError: The graph was made without ``heads=True`` and no model is given, or it has
                no such edge.

        Example:
            >>> ends = ("blocks.3.hook_resid_pre", 43), ("blocks.3.hook_resid_post", 43)
            >>> parts = graph.explain_edge(*ends, k=128, model=model, objective=objective)
            >>> round(float(parts["share"].sum()), 3)
            1.0
        """
        from .decompose import explain_edge

        return explain_edge(self, source, target, k, model=model, objective=objective, rules=rules)

    # ------------------------------------------------------------ pictures

    def show(self) -> OfflineHTML:
        """The graph as a layered picture: tokens across, sites up. Prune the graph first.

        Red is positive relevance and supports the target token, blue supports the contrast. The
        picture displays in a notebook as circuitsvis' own views do, without network.

        Example:
            >>> "<svg" in graph.prune(mass=0.5).show()._repr_html_()
            True
        """
        from ..render.graph.picture import graph_picture
        from .picture import view_of

        return graph_picture(view_of(self))

    def show_matrices(self, transition: tuple[int | str, int | str] | None = None) -> OfflineHTML:
        """Transitions as matrices in signed colours, drawn by circuitsvis' ``attention_heads``.

        Args:
            transition: The (source, target) sites, by name or index, of the one transition whose
                heads to show; None shows every transition.

        Raises:
            ValueError: There is no such site or transition, or no edge between two positions.

        Example:
            >>> "AttentionHeads" in graph.show_matrices(transition=(0, 1))._repr_html_()
            True
        """
        from .picture import matrices_of

        return matrices_of(self, transition)

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture as a page that opens from disk without network.

        Args:
            path: Where to write it.

        Returns:
            The path of the page.

        Raises:
            FileNotFoundError: The folder does not exist.

        Example:
            >>> graph.prune(mass=0.5).save_html("graph.html").name
            'graph.html'
        """
        from ..render import save_html
        from ..render.graph.picture import graph_html
        from .picture import view_of

        return save_html(Path(path), graph_html(view_of(self)))

    # ------------------------------------------------------------ files and other libraries

    def to_networkx(self) -> nx.DiGraph[Any]:
        """The graph for networkx, with edges from source to target.

        Nodes are (site name, position) with the attributes site, pos, token, relevance and
        special; edges carry weight (both in logits). A graph split by heads becomes a
        ``MultiDiGraph`` whose edges also carry head and path.

        Example:
            >>> graph.to_networkx().number_of_edges() == len(graph.weight)
            True
        """
        from .export import to_networkx

        return to_networkx(self)

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write node-link JSON, as ``networkx.node_link_graph(data, edges="edges")`` reads it.

        Args:
            path: Where to write it.

        Returns:
            The path of the file.

        Raises:
            FileNotFoundError: The folder does not exist.

        Example:
            >>> graph.prune().to_json("graph.json").exists()
            True
        """
        from .export import write_json

        return write_json(self, path)

    def to_graphml(self, path: str | os.PathLike[str]) -> Path:
        """Write GraphML, with node ids ``site@position``.

        Args:
            path: Where to write it.

        Returns:
            The path of the file.

        Raises:
            FileNotFoundError: The folder does not exist.

        Example:
            >>> graph.prune().to_graphml("graph.graphml").exists()
            True
        """
        from .export import write_graphml

        return write_graphml(self, path)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the graph to a safetensors file, from which ``load`` restores it exactly.

        Args:
            path: Where to write it.

        Returns:
            The path of the file.

        Raises:
            FileNotFoundError: The folder does not exist.

        Example:
            >>> graph.prune().save("circuit.safetensors").name
            'circuit.safetensors'
        """
        from .export import save

        return save(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a graph that ``save`` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: There is no such file.
            FileFormatError: The file is damaged, foreign, or of another version.

        Example:
            >>> path = graph.save("graph.safetensors")
            >>> torch.equal(clrp.AttributionGraph.load(path).weight, graph.weight)
            True
        """
        from .export import load

        return load(path, cls)
