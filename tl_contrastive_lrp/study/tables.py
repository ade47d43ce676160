"""The tables of a study's report: raw values with their intervals, nothing formatted.

Shares are {"count", "of", "share", "low", "high"}, means {"estimate", "low", "high", "n"}. The file
is long because it holds one function for each table of one page, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..attribution.check import MapCheck
from ..attribution.check.verdict import CONTRADICTED, MEANINGS, SUPPORTED
from ..render.study.tables import Column, StudyTable
from . import published
from .agreement import label_agreement
from .analysis import CaseAnalysis
from .bootstrap import Interval, bootstrap, share
from .cases import REASONS, Case
from .criteria import automatic_label, heatmap_clue, notebook_reading, ordinary, strongest
from .labels import AUTOMATIC, OUTCOMES, PATTERNS, Label
from .planted import manifest_by_chance, planted_truth
from .results import StudyResults
from .sizes import CORRECTED, NOT_CORRECTED, SEGMENTS, checkpoints, segment_means, size_points

# Drops that no checker called wrong, so that they are no failures of the model.
NO_FAILURES = ("passes", "malformed", "unchecked", "too long", "tokens unknown")


def estimate(interval: Interval) -> dict[str, Any]:
    """A mean with its interval, as data."""
    return {
        "estimate": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
    }


def portion(count: int, of: int) -> dict[str, Any]:
    """A share of cases with its interval, as data."""
    found = share(count, of)
    return {
        "count": int(count),
        "of": int(of),
        "share": found.estimate,
        "low": found.low,
        "high": found.high,
    }


def _given(pair: tuple[int, int]) -> dict[str, Any]:
    """A published share: it has no interval."""
    return {"count": pair[0], "of": pair[1], "share": pair[0] / pair[1]}


def main_pairs(
    results: StudyResults, rules: str | None = None
) -> Iterator[tuple[Case, CaseAnalysis]]:
    """Cases with their analysis by the base model."""
    for case_id, analysis in results.of_model(results.base.name, rules).items():
        yield results.by_id[case_id], analysis


def all_labels(results: StudyResults) -> tuple[Label, ...]:
    """The automatic labels, where there is one, and people's."""
    found = (automatic_label(case, analysis) for case, analysis in main_pairs(results))
    return (*(label for label in found if label is not None), *results.labels)


def models_table(results: StudyResults) -> StudyTable:
    """Which models, and how many of the cases each analysed."""
    rows = [
        {
            "model": model.name,
            "role": model.role,
            "parameters": model.n_parameters,
            "step": model.step,
            "cases": len(results.of_model(model.name)),
        }
        for model in results.models
    ]
    columns = [
        Column("model", "model"),
        Column("role", "role"),
        Column("parameters", "parameters", "count"),
        Column("step", "training step", "count"),
        Column("cases", "cases analysed", "count"),
    ]
    return StudyTable("models", "Models", columns, rows)


def _groups(results: StudyResults) -> list[tuple[str, tuple[str, ...]]]:
    """Each benchmark, and all of them where there are several."""
    groups = [(name, (name,)) for name in results.benchmarks]
    return groups + ([("all", results.benchmarks)] if len(groups) > 1 else [])


def clean_table(results: StudyResults) -> StudyTable:
    """How many failures became cases, and why the others were dropped."""
    seen = [r for r in REASONS if any(gone.reason == r for gone in results.dropped)]
    seen += sorted({gone.reason for gone in results.dropped} - set(REASONS))
    rows = []
    for name, members in _groups(results):
        reasons = Counter(gone.reason for gone in results.dropped if gone.benchmark in members)
        kept = sum(case.benchmark in members for case in results.cases)
        failures = kept + sum(n for reason, n in reasons.items() if reason not in NO_FAILURES)
        rows.append(
            {
                "benchmark": name,
                "completions": kept + sum(reasons.values()),
                "failures": failures,
                "kept": portion(kept, failures),
                **{f"dropped: {reason}": reasons[reason] for reason in seen},
            }
        )
    columns = [
        Column("benchmark", "benchmark"),
        Column("completions", "items", "count"),
        Column("failures", "failures", "count"),
        Column("kept", "kept (clean rate)", "share"),
        *(Column(f"dropped: {reason}", reason, "count") for reason in seen),
    ]
    meanings = [f"{reason}: {REASONS[reason]}" for reason in seen if reason in REASONS]
    note = f"Not kept, by reason. {'; '.join(meanings)}." if meanings else ""
    others = [reason for reason in seen if reason in NO_FAILURES]
    if others:
        note += f" Not among the failures: {', '.join(others)}."
    return StudyTable("clean", "From completions to cases", columns, rows, note)


def table_1(results: StudyResults, labels: Sequence[Label]) -> StudyTable:
    """The published Table 1 in its columns, for each labeller, beside the published values."""
    rows: list[dict[str, Any]] = []
    clean = {row["benchmark"]: row for row in clean_table(results).rows}
    labellers = list(dict.fromkeys(label.labeller for label in labels)) or [AUTOMATIC]
    used = set()
    for name, members in _groups(results):
        cases = [case for case in results.cases if case.benchmark in members]
        ids = {case.id for case in cases}
        for labeller in labellers:
            mine = [la for la in labels if la.labeller == labeller and la.case_id in ids]
            with_pattern = [la for la in mine if la.pattern]
            rows.append(
                {
                    "benchmark": name,
                    "source": f"here, {labeller}",
                    "failures": clean[name]["failures"],
                    "kept": clean[name]["kept"],
                    "tokens": float(np.mean([len(c.ids) for c in cases])) if cases else None,
                    "model": results.base.name,
                    "labelled": len(mine),
                    **{
                        o: portion(sum(la.outcome == o for la in mine), len(mine)) for o in OUTCOMES
                    },
                    **{
                        p: portion(sum(la.pattern == p for la in mine), len(with_pattern))
                        for p in PATTERNS
                    },
                }
            )
        for row in published.TABLE_1:
            if len(members) == 1 and name.lower() in row["names"]:
                used.add(row["benchmark"])
                rows.append(_published_row(row))
    rows += [_published_row(r) for r in published.TABLE_1 if r["benchmark"] not in used]
    columns = [
        Column("benchmark", "benchmark"),
        Column("source", "labels"),
        Column("failures", "failures", "count"),
        Column("kept", "kept", "share"),
        Column("tokens", "tokens", "number"),
        Column("model", "model"),
        Column("labelled", "labelled", "count"),
        *(Column(name, name, "share") for name in (*OUTCOMES, *PATTERNS)),
    ]
    words = "; ".join(f"{name}: {meaning}" for name, meaning in {**OUTCOMES, **PATTERNS}.items())
    note = (
        f"{words}. Patterns are shares of the cases with a pattern; tokens are means over cases. "
        "A case without a clue in the heatmap and without a graph has no automatic label."
    )
    return StudyTable("table1", "Outcomes and patterns (Table 1)", columns, rows, note)


def _published_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "published": True,
        "benchmark": row["benchmark"],
        "source": "published",
        "failures": row["failures"],
        "kept": _given(row["kept"]),
        "tokens": row["tokens"],
        "model": row["model"],
        "labelled": row["kept"][0],
        **{name: _given(pair) for name, pair in {**row["outcomes"], **row["patterns"]}.items()},
    }


def rules_table(results: StudyResults) -> StudyTable:
    """Rule sets side by side, on the same cases."""
    main = dict(results.of_model(results.base.name))
    rows = []
    for rules in results.rules:
        pairs = list(main_pairs(results, rules))
        clues = [heatmap_clue(case, analysis) for case, analysis in pairs]
        ratios = [float(a.tokens.double().sum()) / a.delta for _, a in pairs if a.delta]
        known = [clue.relevant for clue in clues if clue.relevant is not None]
        overlap = [_overlap(main[a.case_id], a) for _, a in pairs if a.case_id in main]
        labels = [automatic_label(case, analysis) for case, analysis in pairs]
        rows.append(
            {
                "rules": rules,
                "cases": len(pairs),
                "sum": estimate(bootstrap(ratios)),
                "sign": portion(sum(clue.sign for clue in clues), len(clues)),
                "half": estimate(bootstrap([clue.half for clue in clues])),
                "relevant": portion(sum(known), len(known)),
                "overlap": estimate(bootstrap(overlap)),
                "manifest": portion(
                    sum(la is not None and la.outcome == "M-IA" for la in labels), len(labels)
                ),
                "by_chance": float(np.mean([manifest_by_chance(*pair) for pair in pairs]))
                if pairs
                else None,
            }
        )
    columns = [
        Column("rules", "rule set"),
        Column("cases", "cases", "count"),
        Column("sum", "sum of all tokens / Δℓ", "estimate"),
        Column("sign", "ordinary tokens' sum has the sign of Δℓ", "share"),
        Column("half", "tokens that hold half of Σ|R|", "estimate"),
        Column("relevant", "relevant token among the five strongest", "share"),
        Column("overlap", "five strongest shared with the first rule set", "estimate"),
        Column("manifest", "M-IA (automatic)", "share"),
        Column("by_chance", "M-IA if relevance were shuffled", "percent"),
    ]
    note = (
        "Ordinary tokens are neither special nor the first; the half and the five strongest are of "
        "them too. Relevant tokens are the decisive ones where they are known, else the "
        "instruction; cases with neither do not count there."
    )
    return StudyTable("rules", "Rule sets side by side", columns, rows, note)


def _overlap(a: CaseAnalysis, b: CaseAnalysis, k: int = 5) -> float:
    """Share of the k strongest ordinary tokens of one analysis that are among another's."""
    of_a, of_b = (set(strongest(one.tokens, ordinary(one), k).tolist()) for one in (a, b))
    return len(of_a & of_b) / max(len(of_a), 1)


def verdicts_table(results: StudyResults) -> StudyTable | None:
    """Verdicts on the maps by benchmark and rule set; None where none was checked."""
    rows: list[dict[str, Any]] = []
    for name, members in _groups(results):
        ids = [case.id for case in results.cases if case.benchmark in members]
        for rules in results.checked_rules:
            checks = [results.checks[id, rules] for id in ids if (id, rules) in results.checks]
            if not checks:
                continue
            rows.append(
                {
                    "benchmark": name,
                    "rules": rules,
                    "cases": len(checks),
                    **{
                        verdict: portion(sum(c.verdict == verdict for c in checks), len(checks))
                        for verdict in MEANINGS
                    },
                    "captured": _mean_of(checks, "captured"),
                    "sign": _mean_of(checks, "sign_agreement"),
                    "predicted": _mean_of(checks, "predicted_agreement"),
                    "forwards": float(np.mean([c.forwards for c in checks])),
                }
            )
    if not rows:
        return None
    columns = [
        Column("benchmark", "benchmark"),
        Column("rules", "rule set"),
        Column("cases", "maps checked", "count"),
        *(Column(verdict, verdict, "share") for verdict in MEANINGS),
        Column("captured", "share of the effect captured", "estimate"),
        Column("sign", "share of the strongest's with the right sign", "estimate"),
        Column("predicted", "correlation of predicted and measured", "estimate"),
        Column("forwards", "forwards of a check", "number"),
    ]
    sizes = sorted({check.k for check in results.checks.values()})
    note = (
        f"Of each map, the strongest tokens ({' or '.join(map(str, sizes))}) and some random ones "
        "were replaced, each in a run of its own. Captured is the effect in the direction that the "
        "map says, over the largest that as many tokens can have; cases without any effect have "
        f"none. Supported: {SUPPORTED:g} or more; contradicted: below {CONTRADICTED:g}."
    )
    return StudyTable("verdicts", "Verdicts on the maps", columns, rows, note)


def _mean_of(checks: Iterable[MapCheck], name: str) -> dict[str, Any]:
    """The mean of one figure over the checks that have it."""
    values = [value for check in checks if (value := check.statistics[name]) is not None]
    return estimate(bootstrap(values))


def verdict_labels_table(results: StudyResults, labels: Sequence[Label]) -> StudyTable | None:
    """Verdicts on the main rule set's maps by outcome label; None where none was checked."""
    main = next(iter(results.rules), "")
    verdicts = {id: check.verdict for (id, rules), check in results.checks.items() if rules == main}
    rows: list[dict[str, Any]] = []
    for labeller in dict.fromkeys(label.labeller for label in labels):
        outcomes = {la.case_id: la.outcome for la in labels if la.labeller == labeller}
        for verdict in MEANINGS:
            ids = [id for id, one in verdicts.items() if one == verdict]
            if not ids:
                continue
            found = Counter(outcomes[id] for id in ids if id in outcomes)
            rows.append(
                {
                    "verdict": verdict,
                    "labeller": labeller,
                    "cases": len(ids),
                    "labelled": found.total(),
                    **{name: portion(found[name], found.total()) for name in OUTCOMES},
                }
            )
    columns = [
        Column("labeller", "labels"),
        Column("verdict", "verdict"),
        Column("cases", "cases", "count"),
        Column("labelled", "labelled", "count"),
        *(Column(name, name, "share") for name in OUTCOMES),
    ]
    note = f"Verdicts on the maps under {main}; shares are of the labelled cases of a verdict."
    title = "Verdicts and outcomes"
    return StudyTable("verdictlabels", title, columns, rows, note) if rows else None


def flips_table(results: StudyResults) -> StudyTable | None:
    """Tokens to flip by rule set; None where it was not measured."""
    rows: list[dict[str, Any]] = []
    for rules in results.rules:
        measured = [a for _, a in main_pairs(results, rules) if a.flip_limit]
        if not measured:
            continue
        flipped = [a.tokens_to_flip for a in measured if a.tokens_to_flip is not None]
        at_least = [
            a.flip_limit + 1 if a.tokens_to_flip is None else a.tokens_to_flip for a in measured
        ]
        rows.append(
            {
                "rules": rules,
                "flipped": portion(len(flipped), len(measured)),
                "mean": estimate(bootstrap(flipped)),
                "at_least": estimate(bootstrap(at_least)),
                "published_mean": published.TOKENS_TO_FLIP.get(rules),
            }
        )
    if not rows:
        return None
    limits = sorted({a.flip_limit for a in results.analyses if a.flip_limit})
    columns = [
        Column("rules", "rule set"),
        Column("flipped", "flipped", "share"),
        Column("mean", "tokens, where flipped", "estimate"),
        Column("at_least", "tokens, others as the limit + 1", "estimate"),
        Column("published_mean", "published (60 cases)", "number"),
    ]
    note = (
        "Tokens removed in order of relevance until the wrong token is no longer the model's first "
        f"choice, at most {' or '.join(map(str, limits))}. Fewer is better. Rule sets flip "
        "different cases: compare the column that counts all of them."
    )
    return StudyTable("flips", "Tokens to flip", columns, rows, note)


def _segment_columns(tables: Iterable[Mapping[str, Any]]) -> list[Column]:
    names = dict.fromkeys((*SEGMENTS, *(name for table in tables for name in table)))
    return [Column(name, name, "estimate") for name in names]


def segments_table(results: StudyResults) -> StudyTable:
    """Mean segment sums of the base and its siblings, beside the published ones."""
    rows: list[dict[str, Any]] = []
    found = []
    for model in results.models:
        analyses = results.of_model(model.name)
        if model.role == "checkpoint" or not analyses:
            continue
        means = {n: estimate(i) for n, i in segment_means(analyses.values()).items()}
        found.append(means)
        rows.append({"model": model.name, "cases": len(analyses), **means})
    for name, sums in published.SEGMENT_SUMS.items():
        values = {n: {"estimate": value, "n": None} for n, value in sums.items()}
        rows.append({"published": True, "model": f"{name}, IFEval (published)", **values})
    columns = [Column("model", "model"), Column("cases", "cases", "count")]
    note = (
        "Sums of relevance over the largest |relevance| of a token that is not special, mean over "
        "cases; positive supports the wrong token."
    )
    return StudyTable("segments", "Segment sums", [*columns, *_segment_columns(found)], rows, note)


def sizes_table(results: StudyResults) -> StudyTable | None:
    """Δℓ of the siblings on the base model's cases; None without siblings."""
    rows = []
    for model in results.models:
        points = size_points(results, model.name) if model.role == "sibling" else ()
        if not points:
            continue
        clear = sum(point.base > 1 for point in points)
        kinds = Counter(point.kind for point in points)
        rows.append(
            {
                "model": model.name,
                "parameters": model.n_parameters,
                "base": estimate(bootstrap([p.base for p in points])),
                "delta": estimate(bootstrap([p.other for p in points])),
                "difference": estimate(bootstrap([p.other - p.base for p in points])),
                "corrected": portion(kinds[CORRECTED], clear),
                "not corrected": portion(kinds[NOT_CORRECTED], clear),
            }
        )
    columns = [
        Column("model", "larger model"),
        Column("parameters", "parameters", "count"),
        Column("base", "Δℓ of the base", "estimate"),
        Column("delta", "Δℓ of the larger", "estimate"),
        Column("difference", "difference, case by case", "estimate"),
        Column("corrected", "corrected", "share"),
        Column("not corrected", "not corrected", "share"),
    ]
    note = "Corrected: base Δℓ > 1 and larger < −1; not corrected: both > 1. Means, in logits."
    return (
        StudyTable("sizes", "Larger models on the same cases", columns, rows, note)
        if rows
        else None
    )


def correction_table(results: StudyResults) -> StudyTable | None:
    """Segment sums of the base and a sibling, by whether the sibling corrects the case."""
    rows: list[dict[str, Any]] = []
    found = []
    for sibling in results.models:
        if sibling.role != "sibling":
            continue
        points = size_points(results, sibling.name)
        for kind in (CORRECTED, NOT_CORRECTED):
            ids = [point.case_id for point in points if point.kind == kind]
            for model in (results.base.name, sibling.name) if ids else ():
                analyses = results.of_model(model)
                sums = segment_means(analyses[case] for case in ids)
                means = {n: estimate(i) for n, i in sums.items()}
                found.append(means)
                rows.append(
                    {"sibling": sibling.name, "kind": kind, "model": model, "cases": len(ids),
                     **means}
                )  # fmt: skip
    columns = [
        Column("sibling", "larger model"),
        Column("kind", "cases that it"),
        Column("model", "segments of"),
        Column("cases", "cases", "count"),
    ]
    title = "Segment sums by correction"
    return (
        StudyTable("correction", title, [*columns, *_segment_columns(found)], rows)
        if rows
        else None
    )


def checkpoints_table(results: StudyResults) -> StudyTable | None:
    """Δℓ and segment sums for each checkpoint; None without checkpoints."""
    found = checkpoints(results)
    if found is None:
        return None
    rows = []
    for i, model in enumerate(found.models):
        deltas = [found.delta[case][i] for case in found.cases]
        rows.append(
            {
                "model": model.name,
                "step": model.step,
                "cases": len(found.cases),
                "delta": estimate(found.mean[i]),
                "wrong": portion(sum(d > 0 for d in deltas), len(deltas)),
                **{n: estimate(interval) for n, interval in found.segments[i].items()},
            }
        )
    columns = [
        Column("model", "checkpoint"),
        Column("step", "step", "count"),
        Column("cases", "cases", "count"),
        Column("delta", "mean Δℓ", "estimate"),
        Column("wrong", "prefers the wrong token", "share"),
        *_segment_columns(found.segments),
    ]
    return StudyTable("checkpoints", "Over training", columns, rows)


def truth_table(results: StudyResults) -> StudyTable | None:
    """Relevance and the automatic label against planted decisive tokens; None without any."""
    rows = []
    for rules in results.rules:
        for k in (1, 3, 5):
            found = planted_truth(main_pairs(results, rules), k)
            n = len(found.hit)
            if not n:
                continue
            rows.append(
                {
                    "rules": rules,
                    "k": k,
                    "hit": portion(int(found.hit.sum()), n),
                    "hit_by_chance": float(found.hit_by_chance.mean()),
                    "precision": estimate(bootstrap(found.precision)),
                    "precision_by_chance": float(found.precision_by_chance.mean()),
                    "recall": estimate(bootstrap(found.recall)),
                    "recall_by_chance": float(found.recall_by_chance.mean()),
                    "label_precision": portion(*found.label_precision),
                    "label_recall": portion(*found.label_recall),
                }
            )
    columns = [
        Column("rules", "rule set"),
        Column("k", "k", "count"),
        Column("hit", "a decisive token among the k strongest", "share"),
        Column("hit_by_chance", "by chance", "percent"),
        Column("precision", "share of the k that decide", "estimate"),
        Column("precision_by_chance", "by chance", "number"),
        Column("recall", "share of decisive tokens found", "estimate"),
        Column("recall_by_chance", "by chance", "number"),
        Column("label_precision", "of M-IA, decisive token found", "share"),
        Column("label_recall", "of found, called M-IA", "share"),
    ]
    note = (
        "Cases whose decisive tokens are known. The automatic label of the last two columns was "
        "not told them: it saw sign and concentration only. It says something about the decisive "
        "tokens only so far as its precision exceeds the share in the column of the hits."
    )
    return StudyTable("truth", "Against the planted truth", columns, rows, note) if rows else None


def notebook_table(results: StudyResults) -> StudyTable | None:
    """The published notebooks' own readings beside the automatic label."""
    pairs = [
        (notebook_reading(analysis), automatic_label(case, analysis))
        for case, analysis in main_pairs(results)
    ]
    if not pairs:
        return None
    readings = ("underweighted", "under- and overweighted", "looks right", "neutral")
    rows = []
    for name in readings:
        here = [(reading, label) for reading, label in pairs if reading.reading == name]
        if not here:
            continue
        labels = [label for _, label in here]
        rows.append(
            {
                "reading": name,
                "share": portion(len(here), len(pairs)),
                "graph": portion(sum(reading.graph_needed for reading, _ in here), len(here)),
                **{o: sum(la is not None and la.outcome == o for la in labels) for o in OUTCOMES},
                **{p: sum(la is not None and la.pattern == p for la in labels) for p in PATTERNS},
            }
        )
    columns = [
        Column("reading", "notebooks' reading"),
        Column("share", "cases", "share"),
        Column("graph", "graph needed (sum < 0)", "share"),
        *(Column(name, f"automatic {name}", "count") for name in (*OUTCOMES, *PATTERNS)),
    ]
    note = (
        "By the signs of segment sums: instruction < 0 and sum > 0, underweighted; instruction < 0 "
        "else, looks right; instruction > 0, phrases with the target > 0, the others ≤ 0, under- "
        "and overweighted; instruction > 0 else, underweighted; no instruction, neutral."
    )
    return StudyTable("notebooks", "The notebooks' own criteria", columns, rows, note)


def agreement_table(labels: Sequence[Label]) -> StudyTable | None:
    """Agreement between labellers, the automatic one included; None with fewer than two."""
    rows: list[dict[str, Any]] = []
    for field in ("outcome", "pattern"):
        for found in label_agreement(labels, field):
            rows.append(
                {
                    "field": field,
                    "first": found.first,
                    "second": found.second,
                    "cases": found.same.n,
                    "same": portion(
                        sum(n for (a, b), n in found.table.items() if a == b), found.same.n
                    ),
                    "kappa": estimate(found.kappa),
                }
            )
    if not rows:
        return None
    for field, value in published.AGREEMENT.items():
        rows.append(
            {"published": True, "field": field, "first": "two people", "second": "published",
             "same_published": value}
        )  # fmt: skip
    columns = [
        Column("field", "label"),
        Column("first", "by"),
        Column("second", "and"),
        Column("cases", "cases", "count"),
        Column("same", "the same", "share"),
        Column("same_published", "published", "percent"),
        Column("kappa", "Cohen's κ", "estimate"),
    ]
    note = "Cases without a pattern count as a pattern of their own. Published: after calibration."
    return StudyTable("agreement", "Agreement of labellers", columns, rows, note)


def metrics_table(results: StudyResults) -> StudyTable | None:
    """Means of the graph metrics by automatic outcome; None without graphs."""
    values: dict[str, dict[str, list[float]]] = {}
    for case, analysis in main_pairs(results):
        label = automatic_label(case, analysis)
        for name, value in analysis.metrics.items():
            if np.isfinite(value):
                groups = ["all", *([label.outcome] if label is not None else [])]
                for group in groups:
                    values.setdefault(name, {}).setdefault(group, []).append(float(value))
    if not values:
        return None
    rows = [
        {"metric": name, **{group: estimate(bootstrap(v)) for group, v in by_group.items()}}
        for name, by_group in values.items()
    ]
    columns = [
        Column("metric", "metric of the pruned graph"),
        Column("all", "all cases", "estimate"),
        *(Column(name, f"{name} (automatic)", "estimate") for name in OUTCOMES),
    ]
    return StudyTable("metrics", "Graph metrics", columns, rows)


def tables_of(results: StudyResults, labels: Sequence[Label]) -> dict[str, StudyTable]:
    """All tables of the report, by id, in the order of the page.

    Args:
        results: The study.
        labels: The automatic labels and people's.

    Returns:
        The tables that have something to show.
    """
    tables = (
        models_table(results),
        clean_table(results),
        table_1(results, labels),
        rules_table(results),
        verdicts_table(results),
        verdict_labels_table(results, labels),
        flips_table(results),
        segments_table(results),
        sizes_table(results),
        correction_table(results),
        checkpoints_table(results),
        metrics_table(results),
        truth_table(results),
        notebook_table(results),
        agreement_table(labels),
    )
    return {table.id: table for table in tables if table is not None}
