"""Printing a graph: what pruning kept, the strongest paths and its sites; or one JSON object."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .output import Output
from .print_attribution import candidate_rows, finite, print_question, question_as_json
from .results import Graphed
from .terminal import print_out, shown, table

if TYPE_CHECKING:
    from ..graph.graph import AttributionGraph
    from ..graph.prune_history import PruneStep


def _size(logits: float | None, delta: float) -> dict[str, float | None] | None:
    """A size in logits and relative to |Δℓ|."""
    if logits is None:
        return None
    return {"logits": logits, "relative": logits / abs(delta) if delta else None}


def _weakest_kept(pruned: AttributionGraph) -> float | None:
    return float(pruned.weight.abs().min()) if len(pruned.weight) else None


def _strongest_left_out(full: AttributionGraph, pruned: AttributionGraph) -> float | None:
    """Largest |weight| of the full graph that is not in the pruned one."""
    if len(pruned.weight) == len(full.weight):
        return None
    # The kept sizes are some of all sizes. With both in descending order, the first position at
    # which they differ holds the largest size that was left out.
    kept_sizes = pruned.weight.abs().sort(descending=True).values
    all_sizes = full.weight.abs().sort(descending=True).values
    differs = (all_sizes[: len(kept_sizes)] != kept_sizes).nonzero()
    return float(all_sizes[int(differs[0]) if len(differs) else len(kept_sizes)])


def _bound(full: AttributionGraph) -> float | None:
    """An upper bound on the edges left out while a long prompt's graph was computed.

    It is None if no edge was left out. In each transition no such edge weighs more than all of them
    together, nor more than the threshold or the smallest edge that was kept.
    """
    if not full.history:
        return None
    parameters, bounds = dict(full.history[0].parameters), []
    for row in full.history[0].transitions:
        if row.edges_kept == row.edges_before:
            continue
        bound = row.mass_before - row.mass_kept
        sizes = full.weight[full.slices[row.source, row.target]].abs()
        if "threshold" in parameters:
            bound = min(bound, float(str(parameters["threshold"])))
        elif len(sizes):  # the largest edges were kept
            bound = min(bound, float(sizes.min()))
        bounds.append(bound)
    return max(bounds, default=None)


def _left_out(graphed: Graphed) -> dict[str, Any] | None:
    """The size of the largest edge left out, or an upper bound on it."""
    known, bound = _strongest_left_out(graphed.full, graphed.pruned), _bound(graphed.full)
    at_most = bound is not None and (known is None or known < bound)
    size = _size(bound if at_most else known, graphed.full.delta)
    return None if size is None else size | {"at_most": at_most}


def _account(graphed: Graphed) -> dict[str, Any]:
    """Counts and masses of both graphs, and the sizes of edges just kept and just left out."""
    full, pruned = graphed.full, graphed.pruned

    def counts(graph: AttributionGraph) -> dict[str, Any]:
        return {
            "nodes": int(graph.node_mask.sum()),
            "edges": len(graph.weight),
            "mass": graph.mass,
        }

    before, after = counts(full), counts(pruned)
    if full.history:  # pruned while computed, when nodes that lost all their edges went uncounted
        step = full.history[0]
        before = {"nodes": None, "edges": step.edges_before, "mass": step.mass_before}
    after["edge_share"] = after["edges"] / before["edges"] if before["edges"] else None
    after["mass_share"] = after["mass"] / before["mass"] if before["mass"] else None
    after["weakest_kept"] = _size(_weakest_kept(pruned), full.delta)
    after["strongest_left_out"] = _left_out(graphed)
    return {"full": before, "kept": after}


def _in_words(size: Mapping[str, Any] | None) -> str:
    if size is None:
        return "none"
    relative = "" if size["relative"] is None else f" ({100 * size['relative']:.2g} % of |Δℓ|)"
    at_most = "at most " if size.get("at_most") else ""
    return f"{at_most}{size['logits']:.3g} logits{relative}"


def _step(step: PruneStep) -> str:
    """Describe a step of pruning, with thresholds in logits and relative to |Δℓ|."""
    parameters = dict(step.parameters)
    if "threshold" not in parameters:
        return str(step)
    size = {"logits": parameters["threshold"], "relative": parameters["relative"]}
    return (
        f"{step.name} {_in_words(size)}: kept {step.edges_kept:,} of {step.edges_before:,} edges, "
        f"{step.share_kept:.1%} of their mass"
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def print_graphed(graphed: Graphed, output: Output, saved_pruned: bool) -> None:
    """Print the graph in words and tables, on stdout.

    Args:
        graphed: The answer.
        output: Where results went.
        saved_pruned: Whether the saved graph is the pruned one.
    """
    full, pruned = graphed.full, graphed.pruned
    print_question(graphed.question, full, graphed.run)
    account = _account(graphed)
    before, after = account["full"], account["kept"]
    print_out()
    split = ", split by head and path" if full.head is not None else ""
    nodes = "" if before["nodes"] is None else f"{before['nodes']:,} nodes, "
    print_out(
        f"Full graph: {len(full.sites)} sites, {nodes}{before['edges']:,} edges{split}, "
        f"Σ|weight| {before['mass']:.4g} logits"
    )
    if full.node_threshold:
        size = _in_words(_size(full.node_threshold, full.delta))
        print_out(f"Hidden states of |relevance| up to {size} were not expanded.")
    for step in pruned.history:
        print_out(f"Pruned by {_step(step)}")
    print_out(
        f"Left: {after['nodes']:,} nodes, {after['edges']:,} edges ({_share(after['edge_share'])}) "
        f"with {_share(after['mass_share'])} of Σ|weight|"
    )
    print_out(
        f"Weakest edge kept: {_in_words(after['weakest_kept'])}; strongest left out: "
        f"{_in_words(after['strongest_left_out'])}"
    )
    print_out()
    if len(graphed.paths):
        graph = "graph as it was made" if full.history else "full graph"
        print_out(f"Strongest paths of the {graph}, from the prompt to the prediction, in logits:")
    for line in str(graphed.paths).split("\n"):
        print_out(line)
    print_out()
    print_out("The pruned graph, site by site:")
    _print_sites(pruned)
    if output.save is not None:
        unpruned = "Graph as it was made" if full.history else "Full graph"
        print_out(f"{'Pruned graph' if saved_pruned else unpruned}: {output.save}")
    if output.out is not None:
        print_out(f"Page: {output.out}")
    else:
        print_out("Add --out graph.html for a picture of the pruned graph.")


def _print_sites(pruned: AttributionGraph) -> None:
    """Print a table with one line for each site of the pruned graph."""
    from ..graph.picture import site_labels
    from ..render.text import with_parts

    texts = with_parts(pruned.str_tokens)
    columns = [("site", False)]
    columns += [(name, True) for name in ("nodes", "edges in", "Σ|weight|", "stay", "lookback")]
    columns.append(("hub", False))
    rows = []
    labels = site_labels(pruned.sites)
    for label, row in zip(labels, pruned.metrics().to_dict("records"), strict=True):
        hub = row["hub"]
        # The input site has no incoming edges, so some of its figures are undefined.
        rows.append(
            (
                label,
                f"{row['nodes']:,}",
                f"{row['edges']:,}",
                f"{row['mass']:.4g}",
                _share(finite(row["verticality"])),
                f"{row['lookback']:.1f}" if math.isfinite(row["lookback"]) else "-",
                f"{hub} «{shown(texts[hub])}»" if hub >= 0 else "-",
            )
        )
    table(columns, rows)
    print_out(
        "stay: share of Σ|weight| that stays at its position; lookback: mean distance of an edge, "
        "in tokens; hub: the position that exchanges most with others."
    )


def graph_as_json(graphed: Graphed, output: Output) -> dict[str, Any]:
    """The JSON object of ``graph --json``; the command's help text documents it."""
    full, pruned = graphed.full, graphed.pruned
    steps = []
    for step in pruned.history:
        names = ("name", "edges_before", "edges_kept", "mass_before", "mass_kept")
        facts = {name: getattr(step, name) for name in names}
        steps.append(facts | {"parameters": dict(step.parameters)})
    paths = [asdict(path) for path in graphed.paths]
    for path in paths:
        path["share"] = finite(path["share"])
    metrics = [
        {name: finite(v) if isinstance(v, float) else v for name, v in row.items()}
        for row in pruned.metrics().to_dict("records")
    ]
    return (
        question_as_json(graphed.question, full, graphed.run, "graph")
        | {
            "granularity": full.granularity,
            "sites": list(full.sites),
            "node_threshold": _size(full.node_threshold, full.delta),
        }
        | _account(graphed)
        | {
            "pruning": steps,
            "paths": paths,
            "closed": graphed.paths.closed,
            "metrics": metrics,
            "candidates": candidate_rows(graphed.question.candidates),
            "page": None if output.out is None else str(output.out),
            "saved": None if output.save is None else str(output.save),
            "notes": list(graphed.notes),
        }
    )
