"""Numbers that describe a graph: each site, each position, and the graph as a whole.

In all formulas w is an edge's weight and R a node's relevance, both in logits and signed; mass is
Σ|w|. Edges are counted as the graph stores them: on a graph split by heads, every head and path
counts separately (``graph.merge_heads()`` merges them into pairs of nodes first).
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..render.ranking import largest_first
from ..render.text import with_parts
from .data import pair_starts
from .pruning import fewest

if TYPE_CHECKING:
    import pandas as pd

    from .data import GraphData


def _mean(sum_of_weighted: float, weight: float) -> float:
    return sum_of_weighted / weight if weight else NAN


def site_metrics(graph: GraphData) -> pd.DataFrame:
    """One row per site, input first.

    Columns of edges describe the edges whose target is at the site; they are 0 or NaN at the first
    site, which is not a target.

    Columns:
        site: HookPoint name.
        nodes: Nodes of the graph at the site.
        edges: Edges into it.
        fan_in_mean, fan_in_max: Edges into a node, over the site's nodes of the graph.
        fan_out_mean, fan_out_max: Edges out of a node (as source), likewise.
        sparsity: 1 − (pairs of nodes with an edge) / n² per transition into the site, n the
            number of tokens; a causal model's full transition has (n − 1) / 2n.
        node_mean_abs, node_gini: Mean and Gini of |R| over the site's nodes of the graph.
        edge_mean_abs, edge_gini: Mean and Gini of |w|.
        mass: Σ|w|.
        verticality: Share of the mass on edges that stay at their position.
        node_top90_pos, node_top90_neg: How few nodes hold 90 % of the positive (negative) R.
        edge_top90_pos, edge_top90_neg: The same for edges and w.
        centre: Centre of mass, Σ|R| pos / Σ|R| over the site's nodes of the graph.
        lookback: Σ|w| (target_pos − source_pos) / Σ|w|, in tokens.
        hub, hub_mass: The position with the largest Σ|w| over edges into and out of it that lead
            to another position, and that sum; -1 and 0 if there is none.
    """
    import pandas as pd

    n = len(graph.str_tokens)
    present = graph.node_mask
    fan_in, fan_out = _fans(graph)
    received, sent = _exchanged(graph)
    exchanged = received + sent
    into: list[list[slice]] = [[] for _ in graph.sites]
    for (_, target), part in graph.slices.items():
        into[target].append(part)
    rows = []
    for site, name in enumerate(graph.sites):
        here = present[site]
        relevance = graph.relevance[site][here].double()
        at = torch.nonzero(here)[:, 0].double()
        rows.append(
            {
                "site": name,
                "nodes": int(here.sum()),
                **_fan("fan_in", fan_in[site][here]),
                **_fan("fan_out", fan_out[site][here]),
                "node_mean_abs": float(relevance.abs().mean()) if len(relevance) else NAN,
                "node_gini": gini(relevance),
                **_signed_counts("node", relevance),
                "centre": _mean(float((relevance.abs() * at).sum()), float(relevance.abs().sum())),
                **_edge_row(graph, into[site], n),
                "hub": int(exchanged[site].argmax()) if exchanged[site].any() else -1,
                "hub_mass": float(exchanged[site].max()),
            }
        )
    order = [
        "site", "nodes", "edges", "fan_in_mean", "fan_in_max", "fan_out_mean", "fan_out_max",
        "sparsity", "node_mean_abs", "node_gini", "edge_mean_abs", "edge_gini", "mass",
        "verticality", "node_top90_pos", "node_top90_neg", "edge_top90_pos", "edge_top90_neg",
        "centre", "lookback", "hub", "hub_mass",
    ]  # fmt: skip
    return pd.DataFrame(rows)[order]


def _fans(graph: GraphData) -> tuple[Tensor, Tensor]:
    """The numbers of edges into each node and out of it, both [site, pos]."""
    n = len(graph.str_tokens)
    fan_in, fan_out = torch.zeros(2, *graph.relevance.shape, dtype=torch.int64)
    for (source, target), part in graph.slices.items():
        fan_in[target] += torch.bincount(graph.target_pos[part], minlength=n)
        fan_out[source] += torch.bincount(graph.source_pos[part], minlength=n)
    return fan_in, fan_out


def _exchanged(graph: GraphData) -> tuple[Tensor, Tensor]:
    """What each node receives from other positions and sends to them, Σ|w|, both [site, pos]."""
    received, sent = torch.zeros(2, *graph.relevance.shape, dtype=torch.float64)
    for (source, target), part in graph.slices.items():
        below, above = graph.source_pos[part].long(), graph.target_pos[part].long()
        size = graph.weight[part].abs().double().masked_fill_(below == above, 0.0)
        received[target].index_add_(0, above, size)
        sent[source].index_add_(0, below, size)
    return received, sent


def _fan(name: str, counts: Tensor) -> dict[str, Any]:
    if not len(counts):
        return {f"{name}_mean": NAN, f"{name}_max": 0}
    return {f"{name}_mean": float(counts.double().mean()), f"{name}_max": int(counts.max())}


def _signed_counts(name: str, values: Tensor) -> dict[str, int]:
    return {f"{name}_top90_pos": top_count(values), f"{name}_top90_neg": top_count(-values)}


def _edge_row(graph: GraphData, parts: list[slice], n: int) -> dict[str, Any]:
    # Transitions into one site lie next to each other, so that one slice holds them all.
    part = slice(parts[0].start, parts[-1].stop) if parts else slice(0, 0)
    weight = graph.weight[part]
    mass, stays, back = _sums(graph, part)
    pairs = n * n * len(parts)
    return {
        "edges": len(weight),
        "sparsity": 1 - _pairs(graph, part) / pairs if parts else NAN,
        "edge_mean_abs": mass / len(weight) if len(weight) else NAN,
        "edge_gini": gini(weight),
        "mass": mass,
        "verticality": _mean(stays, mass),
        **_signed_counts("edge", weight),
        "lookback": _mean(back, mass),
    }


def _sums(graph: GraphData, part: slice) -> tuple[float, float, float]:
    """Σ|w| of these edges, of those among them that stay at their position, and Σ|w| · distance."""
    size = graph.weight[part].abs().double()
    distance = graph.target_pos[part] - graph.source_pos[part]
    return float(size.sum()), float(size[distance == 0].sum()), float((size * distance).sum())


def _pairs(graph: GraphData, part: slice) -> int:
    """How many pairs of nodes these edges connect."""
    if graph.head is None:
        return len(graph.weight[part])
    return int(pair_starts(graph, part).sum())


def hubs(graph: GraphData, k: int = 10) -> pd.DataFrame:
    """The ``k`` positions that exchange the most relevance with other positions, over all sites.

    Edges that stay at their position are left out: the residual stream alone would make every
    position a hub. Ties: earlier position first.

    Columns:
        pos, token: The position and its token.
        in_mass: Σ|w| over the edges whose target is at the position.
        out_mass: Σ|w| over the edges whose source is there.
        mass: The sum of both.
        share: mass, relative to its sum over all positions.

    Raises:
        ValueError: ``k`` is not a whole number, or below 1.
    """
    import pandas as pd

    if not isinstance(k, Integral) or k < 1:
        raise ValueError(f"k={k} must be a whole number, 1 or more.")
    received, sent = (by_site.sum(0) for by_site in _exchanged(graph))
    both = received + sent
    order = torch.from_numpy(largest_first(both.numpy(), k))
    order = order[both[order] > 0]
    texts = with_parts(graph.str_tokens)
    return pd.DataFrame(
        {
            "pos": order.numpy(),
            "token": [texts[p] for p in order.tolist()],
            "in_mass": received[order].numpy(),
            "out_mass": sent[order].numpy(),
            "mass": both[order].numpy(),
            "share": (both[order] / both.sum()).numpy(),
        }
    )


def graph_summary(graph: GraphData) -> pd.DataFrame:
    """The whole graph in one row, to be stacked with those of other graphs.

    Columns:
        model, rules, granularity, target, contrast, delta: As in the graph.
        tokens, sites, transitions, nodes, edges: Counts.
        mass: Σ|w| over all edges, logits.
        positive_mass: Share of the mass on edges with w > 0, which support the target.
        mass_kept: Product over the pruning steps of the share of mass that each kept; 1 for a
            full graph.
        sparsity: 1 − (pairs of nodes with an edge) / (n² · transitions).
        verticality, lookback, edge_gini: As in ``site_metrics``, over all edges.
        arrives: Σ R / Δℓ over all nodes of the first site, whether in the graph or not.
        neighbour_share: Share of the edges, each counting once, that lead from a position to the
            next one (target_pos − source_pos = 1): arXiv:2604.17761's local processing ratio.
        mean_lookback: Mean of target_pos − source_pos over the edges, unweighted, in tokens.
        fan_in_gini, fan_out_gini: Gini of the numbers of edges into (out of) a node, over the
            graph's nodes.
        degree_hubs: Nodes whose number of edges, into and out of it, is above the mean plus the
            standard deviation (of the population) over the graph's nodes.
        entropy: H = −Σ q ln q, nats, with q = |R| / Σ|R| over the graph's nodes.
        entropy_share: H / ln(nodes); NaN for a graph of one node.
        early_late: Σ|R| over the graph's nodes in the lower half of the sites, over the same in
            the upper half; the middle one of an odd number of sites is in neither.
    """
    import pandas as pd

    n, weight = len(graph.str_tokens), graph.weight
    parts = [(0.0, 0.0, 0.0), *(_sums(graph, part) for part in graph.slices.values())]
    mass, stays, back = map(math.fsum, zip(*parts, strict=True))
    positive = float(weight.clamp_min(0).sum(dtype=torch.float64))
    possible = n * n * len(graph.transitions)
    share_kept = math.prod(step.share_kept for step in graph.history)
    row = {
        "model": graph.model_name,
        "rules": graph.rules,
        "granularity": graph.granularity,
        "target": graph.target,
        "contrast": graph.contrast,
        "delta": graph.delta,
        "tokens": n,
        "sites": len(graph.sites),
        "transitions": len(graph.transitions),
        "nodes": int(graph.node_mask.sum()),
        "edges": len(weight),
        "mass": mass,
        "positive_mass": _mean(positive, mass),
        "mass_kept": share_kept,
        "sparsity": 1 - _pairs(graph, slice(0, len(weight))) / possible if possible else NAN,
        "verticality": _mean(stays, mass),
        "lookback": _mean(back, mass),
        "edge_gini": gini(weight),
        "arrives": _mean(float(graph.relevance[0].sum(dtype=torch.float64)), graph.delta),
        **_by_count(graph),
        **_of_nodes(graph),
    }
    return pd.DataFrame([row])


def _by_count(graph: GraphData) -> dict[str, Any]:
    """Numbers for which each edge counts once, whatever its weight."""
    distance = (graph.target_pos - graph.source_pos).double()
    fan_in, fan_out = (fan[graph.node_mask].double() for fan in _fans(graph))
    degree = fan_in + fan_out
    high = degree.mean() + degree.std(correction=0)
    return {
        "neighbour_share": float((distance == 1).double().mean()) if len(distance) else NAN,
        "mean_lookback": float(distance.mean()) if len(distance) else NAN,
        "fan_in_gini": gini(fan_in),
        "fan_out_gini": gini(fan_out),
        "degree_hubs": int((degree > high).sum()),
    }


def _of_nodes(graph: GraphData) -> dict[str, Any]:
    """How |R| is distributed over the graph's nodes."""
    mask, sites = graph.node_mask, len(graph.sites)
    size = graph.relevance.abs().double() * mask
    spread = _distribution(size[mask], 1)
    lower, upper = size[: sites // 2], size[sites - sites // 2 :]
    return {
        "entropy": spread["entropy"],
        "entropy_share": spread["entropy_share"],
        "early_late": _mean(float(lower.sum()), float(upper.sum())),
    }


NAN = float("nan")


def gini(values: Float[Tensor, " item"]) -> float:
    """Inequality of |values|: 0 where all are equal, near 1 where one holds everything.

    With |x| sorted in increasing order and i from 1, G = Σ_i (2i − n − 1) |x|_(i) / (n Σ|x|). NaN
    if there are no values or all are 0.
    """
    size = np.sort(values.abs().numpy()).astype(np.float64)
    n, total = len(size), size.sum()
    if not total:
        return NAN
    return float(np.arange(1 - n, n, 2, dtype=np.float64) @ size / (n * total))


def top_count(values: Float[Tensor, " item"], share: float = 0.9) -> int:
    """The number of largest positive values that hold ``share`` of the sum of all positive ones.

    It is 0 if no value is positive. For negative values, pass them with their sign changed.
    """
    return fewest(values[values > 0], share)


def input_metrics(relevance: Float[Tensor, " pos"], top: int = 5) -> pd.DataFrame:
    """How the relevance of the input tokens is distributed.

    There are three rows: all tokens, by |R|; those with R > 0, which support the target; and those
    with R < 0. With q_i = |R_i| / Σ|R| over the row's tokens:

    Columns:
        part: "all", "target" or "contrast".
        tokens: How many of the row's tokens have R ≠ 0.
        mass: Σ|R|, logits.
        entropy: H = −Σ q ln q, nats.
        effective_tokens: e^H, the number of tokens with equal shares that have this entropy.
        entropy_share: H / ln n with n all tokens of the prompt; NaN for a prompt of one token.
        gini: Gini of |R| over all n tokens (those not in the row count as 0).
        top_share: Σ of the ``top`` largest q.
        centre: Σ q · pos, a position.

    Args:
        relevance: Relevance by position in logits: ``graph.relevance[0]`` or ``result.tokens``.
        top: How many tokens ``top_share`` counts.

    Raises:
        ValueError: The relevance does not have shape [pos], or ``top`` is below 1.
    """
    import pandas as pd

    if relevance.ndim != 1 or not len(relevance):
        raise ValueError(f"relevance has shape {tuple(relevance.shape)}; give one row, [pos].")
    if top < 1:
        raise ValueError(f"top={top} must be 1 or more.")
    values = relevance.detach().cpu().double()
    parts = {
        "all": values.abs(),
        "target": values.clamp_min(0),
        "contrast": (-values).clamp_min(0),
    }
    return pd.DataFrame(
        [{"part": name, **_distribution(size, top)} for name, size in parts.items()]
    )


def _distribution(size: Float[Tensor, " pos"], top: int) -> dict[str, Any]:
    n, mass = len(size), float(size.sum())
    if not mass:
        names = ("entropy", "effective_tokens", "entropy_share", "gini", "top_share", "centre")
        return {"tokens": 0, "mass": 0.0, **dict.fromkeys(names, NAN)}
    share = size / mass
    entropy = float(-torch.special.xlogy(share, share).sum())
    return {
        "tokens": int((size > 0).sum()),
        "mass": mass,
        "entropy": entropy,
        "effective_tokens": float(np.exp(entropy)),
        "entropy_share": entropy / float(np.log(n)) if n > 1 else NAN,
        "gini": gini(size),
        "top_share": float(torch.topk(share, min(top, n)).values.sum()),
        "centre": float((share * torch.arange(n)).sum()),
    }
