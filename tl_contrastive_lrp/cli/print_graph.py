"""Telling a graph: what pruning kept, the strongest paths and a line a site; or one JSON object."""

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


def _weakest_kept(kept: AttributionGraph) -> float | None:
    return float(kept.weight.abs().min()) if len(kept.weight) else None


def _strongest_left_out(full: AttributionGraph, kept: AttributionGraph) -> float | None:
    """Largest |weight| of the full graph that is not in the pruned one."""
    if len(kept.weight) == len(full.weight):
        return None
    # Of two falling lists, one a part of the other, the first that differs is missing there.
    here = kept.weight.abs().sort(descending=True).values
    all_of = full.weight.abs().sort(descending=True).values
    differs = (all_of[: len(here)] != here).nonzero()
    return float(all_of[int(differs[0]) if len(differs) else len(here)])


def _bound(made: AttributionGraph) -> float | None:
    """Of a graph that was pruned on the way, a size that no edge left out then exceeds.

    None if all are there. Besides what the rule says, none exceeds what all of them weigh.
    """
    if not made.history:
        return None
    settings, found = dict(made.history[0].parameters), []
    for row in made.history[0].transitions:
        if row.edges_kept == row.edges_before:
            continue
        bound = row.mass_before - row.mass_kept
        size = made.weight[made.slices[row.source, row.target]].abs()
        if "threshold" in settings:
            bound = min(bound, float(str(settings["threshold"])))
        elif len(size):  # the largest stayed
            bound = min(bound, float(size.min()))
        found.append(bound)
    return max(found, default=None)


def _left_out(graphed: Graphed) -> dict[str, Any] | None:
    """The size of the largest edge left out, or what it does not exceed."""
    known, bound = _strongest_left_out(graphed.made, graphed.kept), _bound(graphed.made)
    at_most = bound is not None and (known is None or known < bound)
    found = _size(bound if at_most else known, graphed.made.delta)
    return None if found is None else found | {"at_most": at_most}


def _account(graphed: Graphed) -> dict[str, Any]:
    """Counts and masses of both graphs, and at which weights pruning cut."""
    full, kept = graphed.made, graphed.kept

    def counts(graph: AttributionGraph) -> dict[str, Any]:
        return {
            "nodes": int(graph.node_mask.sum()),
            "edges": len(graph.weight),
            "mass": graph.mass,
        }

    whole, rest = counts(full), counts(kept)
    if full.history:  # pruned on the way; nodes that lost all edges then were not counted
        step = full.history[0]
        whole = {"nodes": None, "edges": step.edges_before, "mass": step.mass_before}
    rest["edge_share"] = rest["edges"] / whole["edges"] if whole["edges"] else None
    rest["mass_share"] = rest["mass"] / whole["mass"] if whole["mass"] else None
    rest["weakest_kept"] = _size(_weakest_kept(kept), full.delta)
    rest["strongest_left_out"] = _left_out(graphed)
    return {"full": whole, "kept": rest}


def _said(size: Mapping[str, Any] | None) -> str:
    if size is None:
        return "none"
    relative = "" if size["relative"] is None else f" ({100 * size['relative']:.2g} % of |Δℓ|)"
    at_most = "at most " if size.get("at_most") else ""
    return f"{at_most}{size['logits']:.3g} logits{relative}"


def _step(step: PruneStep) -> str:
    """What a step did, thresholds in logits and relative to |Δℓ|."""
    settings = dict(step.parameters)
    if "threshold" not in settings:
        return str(step)
    size = {"logits": settings["threshold"], "relative": settings["relative"]}
    return (
        f"{step.name} {_said(size)}: kept {step.edges_kept:,} of {step.edges_before:,} edges, "
        f"{step.share_kept:.1%} of their mass"
    )


def _share(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def print_graphed(graphed: Graphed, output: Output, saved_pruned: bool) -> None:
    """The graph in words and tables, on stdout."""
    full, kept = graphed.made, graphed.kept
    print_question(graphed.question, full, graphed.run)
    account = _account(graphed)
    whole, rest = account["full"], account["kept"]
    print_out()
    split = ", split by head and path" if full.head is not None else ""
    nodes = "" if whole["nodes"] is None else f"{whole['nodes']:,} nodes, "
    print_out(
        f"Full graph: {len(full.sites)} sites, {nodes}{whole['edges']:,} edges{split}, "
        f"Σ|weight| {whole['mass']:.4g} logits"
    )
    if full.node_threshold:
        said = _said(_size(full.node_threshold, full.delta))
        print_out(f"Hidden states of |relevance| up to {said} were not expanded.")
    for step in kept.history:
        print_out(f"Pruned by {_step(step)}")
    print_out(
        f"Left: {rest['nodes']:,} nodes, {rest['edges']:,} edges ({_share(rest['edge_share'])}) "
        f"with {_share(rest['mass_share'])} of Σ|weight|"
    )
    print_out(
        f"Weakest edge kept: {_said(rest['weakest_kept'])}; strongest left out: "
        f"{_said(rest['strongest_left_out'])}"
    )
    print_out()
    if len(graphed.paths):
        of = "graph as it was made" if full.history else "full graph"
        print_out(f"Strongest paths of the {of}, from the prompt to the prediction, in logits:")
    for line in str(graphed.paths).split("\n"):
        print_out(line)
    print_out()
    print_out("The pruned graph, site by site:")
    _print_sites(kept)
    if output.save is not None:
        made = "Graph as it was made" if full.history else "Full graph"
        print_out(f"{'Pruned graph' if saved_pruned else made}: {output.save}")
    if output.out is not None:
        print_out(f"Page: {output.out}")
    else:
        print_out("Add --out graph.html for a picture of the pruned graph.")


def _print_sites(kept: AttributionGraph) -> None:
    """A line a site of the pruned graph."""
    from ..graph.picture import site_labels
    from ..render.text import with_parts

    texts = with_parts(kept.str_tokens)
    columns = [("site", False)]
    columns += [(name, True) for name in ("nodes", "edges in", "Σ|weight|", "stay", "lookback")]
    columns.append(("hub", False))
    rows = []
    labels = site_labels(kept.sites)
    for label, row in zip(labels, kept.metrics().to_dict("records"), strict=True):
        hub = row["hub"]
        # The input is no target: it has no edges in.
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
    full, kept = graphed.made, graphed.kept
    steps = []
    for step in kept.history:
        names = ("name", "edges_before", "edges_kept", "mass_before", "mass_kept")
        told = {name: getattr(step, name) for name in names}
        steps.append(told | {"parameters": dict(step.parameters)})
    paths = [asdict(path) for path in graphed.paths]
    for path in paths:
        path["share"] = finite(path["share"])
    metrics = [
        {name: finite(v) if isinstance(v, float) else v for name, v in row.items()}
        for row in kept.metrics().to_dict("records")
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
