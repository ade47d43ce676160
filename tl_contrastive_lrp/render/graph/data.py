"""The data of a graph's picture: plain arrays, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scale import as_array, as_mask, check_tokens
from ..text import with_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class GraphView:
    """A graph to draw. Arrays may be numpy arrays, tensors or nested lists.

    A node is a hidden state: (site, position). An edge's weight is the relevance that its target
    node (later site) passes to its source node (earlier site). Relevance and weights are in
    logits; positive supports the target token, negative the contrast.

    Attributes:
        sites: One HookPoint name per site, input first; the last site holds the final node.
        site_labels: What to call each site in the picture.
        relevance: Relevance of every node in logits, ``[site, pos]``.
        str_tokens: The prompt's tokens as text, ``[pos]``.
        greyed: One bool per token, ``[pos]``: special tokens and the first token, left out of the
            scales of widths and areas. ``None`` greys none.
        source_site: Site index of each edge's source, ``[edge]``.
        source_pos: Position of each edge's source, ``[edge]``.
        target_site: Site index of each edge's target, ``[edge]``.
        target_pos: Position of each edge's target, ``[edge]``.
        weight: Weight of each edge in logits, ``[edge]``. Edges between the same two nodes (of
            several heads) are added up.
        final_pos: The position whose prediction is explained; the last of several.
        target: The token that the model preferred; "" for other objectives.
        contrast: The token that it should have preferred; "" if there is none.
        delta: Δℓ, the objective's value in logits.
        objective: The objective in words, with its sign convention.
        rules: Name of the rule set.
        model_name: The model.
        notes: Sentences below the picture, such as what was pruned and how much mass was kept.
        earlier_final_pos: The other explained positions, if there are several.
    """

    sites: Sequence[str]
    site_labels: Sequence[str]
    relevance: Any
    str_tokens: Sequence[str]
    greyed: Any
    source_site: Any
    source_pos: Any
    target_site: Any
    target_pos: Any
    weight: Any
    final_pos: int
    target: str
    contrast: str
    delta: float
    objective: str = ""
    rules: str = ""
    model_name: str = ""
    notes: Sequence[str] = field(default=())
    earlier_final_pos: Sequence[int] = field(default=())


@dataclass(frozen=True, eq=False)
class Edges:
    """Columns of edges, all ``[edge]``, without two edges between the same nodes."""

    source_site: NDArray[np.int64]
    source_pos: NDArray[np.int64]
    target_site: NDArray[np.int64]
    target_pos: NDArray[np.int64]
    weight: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.weight)

    def take(self, which: NDArray[np.int64]) -> Edges:
        """The edges at these indices."""
        return Edges(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class CheckedGraph:
    """The arrays of a :class:`GraphView`, converted and checked to fit each other.

    Attributes:
        tokens: The text of each token on its own, with parts of a character marked.
        relevance: Relevance of every node in logits, ``[site, pos]``.
        greyed: Which tokens are greyed, ``[pos]``.
        edges: The edges, those between the same two nodes added up.
        final_pos: The explained position; the last of several.
        finals: All explained positions, rising.
        delta: Δℓ in logits.
        first: First position of the prompt that a position here stands for, ``[pos]``.
        last: Last position of the prompt that it stands for: the same as ``first``, unless several
            are folded into it.
    """

    tokens: list[str]
    relevance: NDArray[np.float64]
    greyed: NDArray[np.bool_]
    edges: Edges
    final_pos: int
    finals: NDArray[np.int64]
    delta: float
    first: NDArray[np.int64]
    last: NDArray[np.int64]


def checked(view: GraphView) -> CheckedGraph:
    """Convert and check a view's arrays.

    Raises:
        ValueError: Shapes and lengths disagree, an index is out of range, an edge does not lead
            from an earlier to a later site, or a number is NaN or infinite.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    relevance = as_array(view.relevance, 2, "relevance")
    sites, positions = relevance.shape
    tokens = with_parts(check_tokens(view.str_tokens, positions))
    for name in ("sites", "site_labels"):
        if len(getattr(view, name)) != sites:
            raise ValueError(f"{len(getattr(view, name))} {name}, but relevance for {sites} sites")
    if not 0 <= view.final_pos < positions:
        raise ValueError(f"final_pos is {view.final_pos}; there are {positions} tokens")
    finals = [*map(int, view.earlier_final_pos), int(view.final_pos)]
    if finals[0] < 0 or finals != sorted(set(finals)):
        raise ValueError(
            f"earlier_final_pos is {finals[:-1]}; it must rise and lie before final_pos "
            f"{view.final_pos}"
        )
    weight = as_array(view.weight, 1, "weight")
    columns = {
        name: _index(getattr(view, name), len(weight), limit, name)
        for name, limit in (
            ("source_site", sites),
            ("source_pos", positions),
            ("target_site", sites),
            ("target_pos", positions),
        )
    }
    backward = np.flatnonzero(columns["source_site"] >= columns["target_site"])
    if len(backward):
        raise ValueError(
            f"edge {backward[0]} goes from site {columns['source_site'][backward[0]]} to site "
            f"{columns['target_site'][backward[0]]}; a source site comes before its target site"
        )
    return CheckedGraph(
        tokens=tokens,
        relevance=relevance,
        greyed=as_mask(view.greyed, positions),
        edges=merged(Edges(**columns, weight=weight), sites, positions),
        final_pos=int(view.final_pos),
        finals=np.array(finals, dtype=np.int64),
        delta=float(as_array(view.delta, 0, "delta")),
        first=np.arange(positions),
        last=np.arange(positions),
    )


def _index(values: Any, length: int, limit: int, what: str) -> NDArray[np.int64]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.shape != (length,):
        raise ValueError(f"{what} has shape {array.shape}, but there are {length} weights")
    if length and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{what} holds {array.dtype}, not integers")
    if length and not (array.min() >= 0 and array.max() < limit):
        raise ValueError(f"{what} holds {array.min()} to {array.max()}; it must be below {limit}")
    return array.astype(np.int64)


def merged(edges: Edges, sites: int, positions: int) -> Edges:
    """Add up edges between the same two nodes."""
    nodes = sites * positions
    source = edges.source_site * positions + edges.source_pos
    keys = (edges.target_site * positions + edges.target_pos) * nodes + source
    if not (len(keys) > 1 and (np.diff(np.sort(keys)) == 0).any()):
        return edges
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    weight = np.bincount(inverse.ravel(), weights=edges.weight).astype(np.float64)
    return replace(edges.take(first), weight=weight)


def exchanged(
    source_pos: NDArray[np.int64], target_pos: NDArray[np.int64], size: NDArray[Any], n: int
) -> NDArray[np.float64]:
    """The relevance that each of ``n`` positions exchanges with others, ``[pos]``.

    Args:
        source_pos: Source positions of edges that lead from one position to another, ``[edge]``.
        target_pos: Their target positions, ``[edge]``.
        size: Their |weight| in logits, ``[edge]``.
        n: Number of positions.
    """
    totals = np.bincount(source_pos, size, n) + np.bincount(target_pos, size, n)
    return totals.astype(np.float64)
