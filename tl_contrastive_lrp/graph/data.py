"""The frozen attribution graph: its nodes, its columns of edges, and look-ups in them.

The file is long because it documents every field, property and check of one class.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Self

from ..errors import NonFiniteError
from ..hooks.coverage import Coverage
from ..inputs.objective import check_earlier
from ..inputs.segments import Segment, check_segments
from .columns import DTYPES, EDGE_KINDS, ORDER, POSITION, EdgeColumns, first_disorder, in_order
from .prune_history import PruneStep


@dataclass(frozen=True, eq=False, repr=False)
class GraphData:
    """The nodes and edges of an attribution graph, frozen and checked.

    A node is a hidden state: a site of the residual stream at a position. An edge's weight is the
    relevance that the target node passes to the source node, in logits, with the sign of the
    objective (positive supports the target token). Information flows from source to target, the
    explanation from target to source. The edges of one transition that share a source node sum to
    that node's relevance, over all heads, paths and targets of a full graph.

    Edges are sorted by target site, source site, target position, source position, head and path,
    and no two are the same. Tensors are on the CPU.

    Attributes:
        sites: HookPoint names, input first, the final residual stream last.
        relevance: Relevance of every node in logits, [site, pos], also of those without an edge.
        token_ids: The prompt's token ids, int64, [pos].
        special: Which tokens are special tokens of the tokenizer, bool, [pos].
        str_tokens: What each token contributes to the prompt's text; joined, they are that text.
            A character of several tokens is at the first; the others are empty.
        source_site: Index into ``sites``, int16, [edge].
        target_site: Index into ``sites``, int16, [edge].
        source_pos: Position in the prompt, int32, [edge].
        target_pos: Position in the prompt, int32, [edge].
        weight: A[target_pos, source_pos] of the transition in logits, [edge].
        head: int16, [edge]; -1 for relevance that does not pass through attention between
            positions. None on a graph that is not split by heads.
        path: int8, [edge]: 0 position-wise, 1 by value, 2 by key. None as ``head``.
        transitions: Pairs (source, target) of sites that were computed, sorted by (target,
            source); a pruned graph keeps those that lost all edges.
        final_pos: Position whose next token is explained; at the last site it is the final node.
            If there are several, the last: by causality no later position has relevance.
        delta: Δℓ, the objective's value in logits.
        target_logit: As in ``Attribution``.
        contrast_logit: As in ``Attribution``.
        objective: As in ``Attribution``.
        target: As in ``Attribution``.
        contrast: As in ``Attribution``.
        rules: As in ``Attribution``.
        coverage: As in ``Attribution``.
        model_name: As in ``Attribution``.
        granularity: "block", "sublayer" or "custom".
        node_threshold: Targets with |relevance| at or below it (logits) were not expanded when
            the graph was made; 0 if all were.
        history: What each pruning step did; () for a full graph.
        dimensions: Relevance of every hidden dimension, [site, pos, d_model], if details were
            requested.
        neurons: Relevance of every MLP neuron, [layer, pos, d_mlp], if details were requested.
        head_relevance: Relevance of every head's output, [layer, head, pos], if details were
            requested.
        memory: "plain", or "tiled (tile N)" if the backward ran on N positions at a time.
        attention: How attention was computed: "eager", "fused", or in how many blocks it was fused.
        prepended_bos: Whether a BOS token that is not in the text was put before it; None if ids
            were given (or the graph was saved by a version that did not record it).
        earlier_final_pos: The other explained positions, rising, if the objective is a function
            of several; ``final_positions`` has all of them, each a final node.
        segments: The messages of a prompt that ``chat`` made, and the template's text between
            them; () for any other prompt. In a graph between segments, its positions.
        of_segments: Whether positions are segments of the prompt and not its tokens (``by``).
            Then ``str_tokens`` are the segments' names, and ``token_ids`` are all -1.

    Raises:
        ValueError: A field does not have the documented type, shape or range.
        NonFiniteError: Relevance or a weight is NaN or infinite.

    Example:
        >>> len(graph.sites), tuple(graph.relevance.shape)
        (5, (5, 44))
        >>> round(float(graph.relevance[-1, graph.final_pos]) / graph.delta, 3)
        1.0
    """

    sites: tuple[str, ...]
    relevance: Float[Tensor, "site pos"]
    token_ids: Int[Tensor, " pos"]
    special: Bool[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    source_site: Int[Tensor, " edge"]
    target_site: Int[Tensor, " edge"]
    source_pos: Int[Tensor, " edge"]
    target_pos: Int[Tensor, " edge"]
    weight: Float[Tensor, " edge"]
    head: Int[Tensor, " edge"] | None
    path: Int[Tensor, " edge"] | None
    transitions: tuple[tuple[int, int], ...]
    final_pos: int
    delta: float
    target_logit: float
    contrast_logit: float | None
    objective: str
    target: str
    contrast: str
    rules: str
    coverage: Coverage
    model_name: str
    granularity: str
    node_threshold: float = 0.0
    history: tuple[PruneStep, ...] = ()
    dimensions: Float[Tensor, "site pos d_model"] | None = None
    neurons: Float[Tensor, "layer pos d_mlp"] | None = None
    head_relevance: Float[Tensor, "layer head pos"] | None = None
    memory: str = "plain"
    attention: str = "eager"
    prepended_bos: bool | None = None
    earlier_final_pos: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    of_segments: bool = False

    def __post_init__(self) -> None:
        check_graph(self)

    @classmethod
    def from_columns(
        cls,
        *,
        weight: Tensor,
        source_site: Tensor,
        target_site: Tensor,
        source_pos: Tensor,
        target_pos: Tensor,
        head: Tensor | None = None,
        path: Tensor | None = None,
        transitions: Iterable[tuple[int, int]] | None = None,
        final_pos: int | None = None,
        **facts: Any,
    ) -> Self:
        """Make a graph of edges in any order, with integers of any width.

        Args:
            weight: Weights in logits, [edge].
            source_site: Index of each edge's source site, [edge].
            target_site: Index of each edge's target site, [edge].
            source_pos: Position of each edge's source, [edge].
            target_pos: Position of each edge's target, [edge].
            head: Head of each edge, [edge], if edges are split by heads.
            path: Path of each edge, [edge], if edges are split by heads.
            transitions: Pairs (source, target) that were computed; by default those with an edge.
            final_pos: The explained position (the last of several, with the others in
                ``earlier_final_pos=``); by default the only one with relevance at the last site.
            facts: All other fields.

        Raises:
            ValueError: A field is invalid for ``GraphData``, or two edges are the same.
            TypeError: A field is missing.

        Example:
            >>> facts = {
            ...     field: value for field, value in vars(graph).items() if field != "slices"
            ... }
            >>> again = clrp.AttributionGraph.from_columns(**facts)
            >>> torch.equal(again.weight, graph.weight)
            True
        """
        edges = {
            "weight": weight, "source_site": source_site, "target_site": target_site,
            "source_pos": source_pos, "target_pos": target_pos, "head": head, "path": path,
        }  # fmt: skip
        columns: dict[str, Any] = {"head": None, "path": None}
        columns |= in_order({name: c for name, c in edges.items() if c is not None})
        if transitions is None:
            pairs = torch.stack([columns["target_site"], columns["source_site"]], dim=1)
            transitions = [
                (source, target)
                for target, source in torch.unique_consecutive(pairs, dim=0).tolist()
            ]
        missing = {"relevance", "token_ids", "special"} - set(facts)
        if missing:
            raise TypeError(f"A graph needs {' and '.join(sorted(missing))}.")
        for name in ("relevance", "token_ids", "special"):
            facts[name] = facts[name].detach().cpu()
        if final_pos is None:
            explained = torch.nonzero(facts["relevance"][-1])[:, 0].tolist()
            if len(explained) != 1:
                raise ValueError(
                    f"{len(explained)} positions have relevance at the last site; "
                    "name with final_pos= the one that is explained (of several the last, and with "
                    "earlier_final_pos= the others)."
                )
            final_pos = explained[0]
        return cls(
            **columns,
            transitions=tuple(sorted(set(transitions), key=lambda pair: (pair[1], pair[0]))),
            final_pos=final_pos,
            **facts,
        )

    @classmethod
    def from_matrices(
        cls,
        matrices: Mapping[tuple[int, int], Float[Tensor, "target_pos source_pos"]],
        **facts: Any,
    ) -> Self:
        """Make a graph of dense transitions.

        Transitions that are split by heads are collected in an ``EdgeColumns`` instead.

        Args:
            matrices: Weights in logits, [target_pos, source_pos], by (source, target) site index;
                an entry of 0 is not an edge.
            facts: All fields but the edges.

        Raises:
            ValueError: A field is invalid for ``GraphData``.
            TypeError: A field is missing.

        Example:
            >>> edges = ("weight", "source_site", "target_site", "source_pos", "target_pos")
            >>> unset = (*edges, "head", "path", "transitions", "slices")
            >>> facts = {field: x for field, x in vars(graph).items() if field not in unset}
            >>> diagonal = {(3, 4): torch.diag(graph.relevance[3])}
            >>> len(clrp.AttributionGraph.from_matrices(diagonal, **facts).weight)
            44
        """
        columns = EdgeColumns()
        for (source, target), matrix in matrices.items():
            columns.add_dense(source, target, matrix)
        return cls.from_columns(**columns.columns(), **facts)

    # ------------------------------------------------------------ look-ups

    @property
    def final_positions(self) -> tuple[int, ...]:
        """The explained positions, rising; one, unless the objective is a function of several.

        Example:
            >>> graph.final_positions
            (43,)
        """
        return (*self.earlier_final_pos, self.final_pos)

    @cached_property
    def slices(self) -> dict[tuple[int, int], slice]:
        """Where each transition's edges are in the columns, by (source, target) site index.

        Example:
            >>> part = graph.slices[0, 1]
            >>> bool((graph.target_site[part] == 1).all())
            True
        """
        starts = _starts(self.target_site, range(len(self.sites) + 1))
        slices = {}
        for source, target in self.transitions:
            first, end = starts[target], starts[target + 1]
            low, high = _starts(self.source_site[first:end], (source, source + 1))
            slices[source, target] = slice(first + low, first + high)
        return slices

    @property
    def source_node(self) -> Int[Tensor, " edge"]:
        """Index of each edge's source node, site · n_pos + position, [edge].

        Example:
            >>> int(graph.source_node.max()) < graph.relevance.numel()
            True
        """
        return self.source_site.long() * len(self.str_tokens) + self.source_pos

    @property
    def target_node(self) -> Int[Tensor, " edge"]:
        """Index of each edge's target node, site · n_pos + position, [edge].

        Example:
            >>> bool((graph.target_node > graph.source_node).all())
            True
        """
        return self.target_site.long() * len(self.str_tokens) + self.target_pos

    @property
    def node_mask(self) -> Bool[Tensor, "site pos"]:
        """Which nodes are in the graph, [site, pos]: those with an edge, and the final nodes.

        Example:
            >>> bool(graph.prune(top_k=1).node_mask[-1, graph.final_pos])
            True
        """
        mask = torch.zeros(self.relevance.shape, dtype=torch.bool)
        mask.view(-1)[self.source_node] = True
        mask.view(-1)[self.target_node] = True
        mask[-1, list(self.final_positions)] = True
        return mask

    @property
    def mass(self) -> float:
        """Σ|weight| in logits.

        Example:
            >>> graph.prune(mass=0.5).mass < graph.mass
            True
        """
        return float(self.weight.abs().sum(dtype=torch.float64))

    def site_index(self, site: int | str) -> int:
        """Index of a site given by name or index.

        Args:
            site: A HookPoint name, or an index; negative ones count from the end.

        Raises:
            ValueError: There is no such site.

        Example:
            >>> graph.site_index("blocks.1.hook_resid_pre"), graph.site_index(-1)
            (1, 4)
        """
        if isinstance(site, str):
            if site in self.sites:
                return self.sites.index(site)
            near = difflib.get_close_matches(site, self.sites, n=3, cutoff=0.3)
            hint = ", ".join(near or self.sites[:3])
            raise ValueError(f"The graph has no site {site!r}; it has for example {hint}.")
        if not -len(self.sites) <= site < len(self.sites):
            raise ValueError(f"Site {site} is outside the graph's {len(self.sites)} sites.")
        return site % len(self.sites)

    def transition(self, source: int | str, target: int | str) -> tuple[int, int]:
        """One of ``transitions``, its sites given by name or index.

        Args:
            source: The source site.
            target: The target site.

        Raises:
            ValueError: There is no such site or transition.

        Example:
            >>> graph.transition("blocks.3.hook_resid_pre", -1)
            (3, 4)
        """
        pair = (self.site_index(source), self.site_index(target))
        if pair not in self.slices:
            near = [self.sites[s] for s, t in self.transitions if t == pair[1]]
            raise ValueError(
                f"The graph has no transition {self.sites[pair[0]]} -> {self.sites[pair[1]]}; "
                f"into the latter it has those from {', '.join(near) or 'no site'}."
            )
        return pair

    def merge_heads(self) -> Self:
        """Add up the heads and paths of each pair of nodes; a graph without heads stays as it is.

        Example:
            >>> split = clrp.attribution_graph(model, case.prompt, objective, heads=True)
            >>> merged = split.merge_heads()
            >>> torch.allclose(merged.matrix(0, 1), graph.matrix(0, 1), atol=1e-4)
            True
        """
        if self.head is None:
            return self
        return replace(self, **merged(self), head=None, path=None)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.model_name}, {len(self.str_tokens)} tokens, "
            f"{len(self.sites)} sites, {len(self.weight):,} edges, "
            f"{self.target!r} vs {self.contrast!r}, Δℓ={self.delta:+.4f}, rules={self.rules!r})"
        )

    def __str__(self) -> str:
        lines = [repr(self)]
        if self.node_threshold:
            relative = (
                f" ({self.node_threshold / abs(self.delta):.2%} of |Δℓ|)" if self.delta else ""
            )
            lines.append(
                f"when built: targets with |relevance| ≤ {self.node_threshold:g} logits{relative} "
                "were not expanded"
            )
        return "\n".join([*lines, *map(str, self.history)])


def _starts(column: Tensor, values: Iterable[int]) -> list[int]:
    """Where each value would start in a sorted column."""
    starts: list[int] = torch.searchsorted(
        column.contiguous(), torch.tensor(list(values), dtype=column.dtype)
    ).tolist()
    return starts


def require_tokens(graph: GraphData, purpose: str) -> None:
    """Refuse a graph between segments where the model has to run on the prompt's tokens.

    Args:
        graph: A graph.
        purpose: What it is needed for, as the beginning of a sentence.

    Raises:
        ValueError: Its positions are segments.
    """
    if graph.of_segments:
        raise ValueError(
            f"{purpose} needs the graph between tokens, and this one is between segments; use the "
            "graph that by(...) was called on."
        )


GRANULARITIES = ("block", "sublayer", "custom")


def check_graph(graph: GraphData) -> None:
    """Check every field of a graph.

    Raises:
        ValueError: A field is invalid; the message names it and what it holds.
        NonFiniteError: Relevance or a weight is NaN or infinite.
    """
    _check_facts(graph)
    _check_columns(graph)
    _check_details(graph)
    if sum(part.stop - part.start for part in graph.slices.values()) != len(graph.weight):
        raise ValueError("Some edges belong to no transition in transitions.")


def _check_facts(graph: GraphData) -> None:
    """Check the fields that are not columns of edges."""
    sites, pos = len(graph.sites), len(graph.str_tokens)
    if sites < 2 or len(set(graph.sites)) != sites:
        raise ValueError(f"A graph needs two or more sites of different names: {graph.sites}.")
    if not all(isinstance(text, str) for text in (*graph.sites, *graph.str_tokens)):
        raise ValueError("Sites and tokens must be texts.")
    shapes = {"relevance": (sites, pos), "token_ids": (pos,), "special": (pos,)}
    for name, shape in shapes.items():
        actual = tuple(getattr(graph, name).shape)
        if actual != shape:
            raise ValueError(f"AttributionGraph.{name} has shape {actual}, not {shape}.")
    for name in ("relevance", "weight"):
        if getattr(graph, name).dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {getattr(graph, name).dtype}, not float32 or float64.")
    if graph.special.dtype != torch.bool or graph.token_ids.dtype != torch.int64:
        raise ValueError("special must be bool and token_ids int64.")
    if not bool(torch.isfinite(graph.relevance).all()):
        raise NonFiniteError("A node's relevance is NaN or infinite.")
    if not 0 <= graph.final_pos < pos:
        raise ValueError(f"final_pos={graph.final_pos} is outside the prompt's {pos} tokens.")
    if not graph.of_segments:
        check_segments(graph.segments, pos)
    elif len(graph.segments) != pos:
        raise ValueError(f"A graph between {pos} segments has {len(graph.segments)} segments.")
    check_earlier("final_pos", graph.final_pos, "earlier_final_pos", graph.earlier_final_pos)
    if graph.granularity not in GRANULARITIES:
        raise ValueError(f"granularity={graph.granularity!r} is none of {GRANULARITIES}.")
    if not (math.isfinite(graph.node_threshold) and graph.node_threshold >= 0):
        raise ValueError(f"node_threshold={graph.node_threshold} must be 0 or more.")
    if list(graph.transitions) != sorted(set(graph.transitions), key=lambda p: (p[1], p[0])):
        raise ValueError("transitions must be sorted by (target, source) and differ.")
    if not all(0 <= source < target < sites for source, target in graph.transitions):
        raise ValueError(f"transitions must be pairs source < target < {sites}.")


def _check_columns(graph: GraphData) -> None:
    """Check the columns of edges: types, limits, meaning and order."""
    names = [name for name in ORDER if getattr(graph, name) is not None]
    if ("head" in names) != ("path" in names):
        raise ValueError("Give both head and path of the edges, or neither.")
    keys = {name: getattr(graph, name) for name in names}
    for name, column in {**keys, "weight": graph.weight}.items():
        if tuple(column.shape) != (len(graph.weight),):
            raise ValueError(f"{name} has shape {tuple(column.shape)}, not ({len(graph.weight)},).")
        if name != "weight" and column.dtype != DTYPES[name]:
            raise ValueError(f"{name} is {column.dtype}, not {DTYPES[name]}; use from_columns.")
    if not len(graph.weight):
        return
    sites, pos = len(graph.sites), len(graph.str_tokens)
    limits = {"source_site": sites, "target_site": sites, "source_pos": pos, "target_pos": pos}
    for name, limit in {**limits, "path": len(EDGE_KINDS)}.items():
        if name in keys:
            low, high = (int(v) for v in torch.aminmax(keys[name]))
            if low < 0 or high >= limit:
                raise ValueError(f"{name} holds {low} to {high}; it must be in 0 to {limit - 1}.")
    if not bool((graph.source_site < graph.target_site).all()):
        raise ValueError("An edge's source site must come before its target site.")
    if graph.head is not None and graph.path is not None:
        alone = graph.path == POSITION
        if int(graph.head.min()) < -1 or not torch.equal(alone, graph.head == -1):
            raise ValueError("head must be -1 exactly where path is 0 (position), else 0 or more.")
        if bool((alone & (graph.source_pos != graph.target_pos)).any()):
            raise ValueError("An edge of path 0 (position) must stay at its position.")
    if not bool(torch.isfinite(graph.weight).all()):
        at = int(torch.nonzero(~torch.isfinite(graph.weight))[0])
        raise NonFiniteError(f"The weight of edge {at} is {float(graph.weight[at])}.")
    at_fault = first_disorder(list(keys.values()))
    if at_fault is not None:
        raise ValueError(
            f"Edge {at_fault} equals the one before it or belongs before it; sort with "
            "from_columns, and add up edges that are the same."
        )


def _check_details(graph: GraphData) -> None:
    """Check that the nodes' details are given together and fit sites and prompt."""
    dimensions, neurons, heads = graph.dimensions, graph.neurons, graph.head_relevance
    if dimensions is None and neurons is None and heads is None:
        return
    if dimensions is None or neurons is None or heads is None:
        raise ValueError("Give dimensions, neurons and head_relevance together, or none.")
    pos = len(graph.str_tokens)
    if any(detail.ndim != 3 for detail in (dimensions, neurons, heads)) or (
        dimensions.shape[:2] != (len(graph.sites), pos)
        or neurons.shape[1] != pos
        or heads.shape[2] != pos
    ):
        raise ValueError("dimensions, neurons and head_relevance do not fit sites and prompt.")


def pair_starts(graph: GraphData, part: slice = slice(None)) -> Bool[Tensor, " edge"]:
    """Which edges of ``part`` are the first of their pair of nodes.

    A pair's heads and paths follow each other in the graph's order.
    """
    new = torch.zeros(len(graph.weight[part]), dtype=torch.bool)
    new[:1] = True
    for name in ORDER[:4]:
        column = getattr(graph, name)[part]
        new[1:] |= column[1:] != column[:-1]
    return new


def merged(graph: GraphData) -> dict[str, Any]:
    """The columns of a graph's edges with heads and paths added up, in float64."""
    new = pair_starts(graph)
    total = torch.zeros(int(new.sum()), dtype=torch.float64)
    total.index_add_(0, new.cumsum(0) - 1, graph.weight.double())
    ends = {name: getattr(graph, name)[new] for name in ORDER[:4]}
    return ends | {"weight": total.to(graph.weight.dtype)}
