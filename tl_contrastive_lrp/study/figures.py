"""The figures of a study's report: SVG, and the numbers they are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ..render.study.svg import (
    COLOURS,
    Bar,
    Point,
    Series,
    grouped_bars,
    lines,
    scatter,
    stacked_shares,
)
from ..render.study.tables import StudyTable
from .labels import OUTCOMES, PATTERNS
from .results import StudyResults
from .sizes import CORRECTED, NOT_CORRECTED, SEGMENTS, checkpoints, size_points
from .tables import main_pairs


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        id: Its name in the report's JSON, and of its file.
        caption: What it shows, with the sign convention.
        svg: The SVG document.
        data: The numbers it is drawn from.
    """

    id: str
    caption: str
    svg: Markup
    data: Any


def _label_figures(table: StudyTable) -> list[Figure]:
    figures = []
    for id, names, words in (
        ("outcomes", OUTCOMES, "Outcomes"),
        ("patterns", PATTERNS, "Patterns"),
    ):
        rows = [
            (f"{row['benchmark']}, {row['source']}", [row[name]["count"] for name in names])
            for row in table.rows
        ]
        figures.append(
            Figure(
                id,
                f"{words} of the cases, here and as published; "
                + "; ".join(f"{name}: {meaning}" for name, meaning in names.items())
                + ".",
                stacked_shares(words, rows, list(names)),
                {"names": list(names), "rows": [[name, counts] for name, counts in rows]},
            )
        )
    return figures


def _flips(results: StudyResults) -> Figure | None:
    curves = {}
    for rules in results.rules:
        found = [a for _, a in main_pairs(results, rules) if a.flip_limit]
        if found:
            limit = max(a.flip_limit for a in found)
            counts = [
                sum(a.tokens_to_flip is not None and a.tokens_to_flip <= k for a in found)
                for k in range(limit + 1)
            ]
            curves[rules] = [count / len(found) for count in counts]
    if not curves:
        return None
    series = [
        Series(
            rules,
            [Point(k, y, f"{rules}: {100 * y:.1f} % flipped by {k}") for k, y in enumerate(curve)],
        )
        for rules, curve in curves.items()
    ]
    longest = max(map(len, curves.values()))
    step = 1 if longest <= 18 else -(-longest // 12)
    return Figure(
        "flips",
        "Share of cases whose wrong token is no longer the model's first choice once the k "
        "strongest tokens are removed. Higher and further left is better.",
        lines(
            "Tokens to flip",
            series,
            [(k, str(k)) for k in range(0, longest, step)],
            "share of cases flipped",
            "tokens removed",
            percent=True,
        ),
        curves,
    )


def _bars(
    id: str,
    title: str,
    caption: str,
    rows: Sequence[tuple[str, Mapping[str, Any]]],
) -> Figure:
    """Segment sums of several rows (models, groups), as bars."""
    names = [n for n in SEGMENTS if any(row.get(n) for _, row in rows)]
    series = [
        (
            name,
            [
                Bar(value["estimate"], value.get("low"), value.get("high"))
                if (value := row.get(segment))
                else Bar(None)
                for segment in names
            ],
        )
        for name, row in rows
    ]
    data = {name: {n: row.get(n) for n in names} for name, row in rows}
    svg = grouped_bars(title, names, series, "mean normalised sum")
    return Figure(id, caption, svg, data)


def _sizes(results: StudyResults, correction: StudyTable | None) -> list[Figure]:
    figures = []
    siblings = [model for model in results.models if model.role == "sibling"]
    for i, model in enumerate(siblings, 1):
        points = size_points(results, model.name)
        if not points:
            continue
        tones = {CORRECTED: COLOURS[0], NOT_CORRECTED: COLOURS[1], None: "#8a8d96"}
        series = [
            Series(
                f"{kind or 'neither'} ({len(here)})",
                [Point(p.base, p.other, f"{p.case_id}: {p.base:.2f}, {p.other:.2f}") for p in here],
                tones[kind],
            )
            for kind in tones
            if (here := [p for p in points if p.kind == kind])
        ]
        figures.append(
            Figure(
                f"scatter-{i}",
                f"Δℓ of each case under {results.base.name} and under {model.name}, in logits; "
                "positive prefers the wrong token. The dashed line is y = x.",
                scatter(
                    f"Δℓ: {results.base.name} and {model.name}",
                    series,
                    f"Δℓ of {results.base.name}",
                    f"Δℓ of {model.name}",
                    areas=(("not corrected", 1.0, 1.0), ("corrected", 1.0, -1.0)),
                ),
                [[p.case_id, p.base, p.other, p.kind] for p in points],
            )
        )
        rows = (
            [row for row in correction.rows if row["sibling"] == model.name] if correction else []
        )
        if rows:
            figures.append(
                _bars(
                    f"correction-{i}",
                    f"Segment sums by correction, {model.name}",
                    f"Segment sums of {results.base.name} and {model.name}, by whether "
                    f"{model.name} corrects the case. Positive supports the wrong token.",
                    [(f"{row['model']}, {row['kind']} ({row['cases']})", row) for row in rows],
                )
            )
    return figures


def _over_training(results: StudyResults) -> list[Figure]:
    found = checkpoints(results)
    if found is None:
        return []
    names = [(float(i), m.name) for i, m in enumerate(found.models)]
    grey = [
        Series(
            "",
            [Point(i, y, f"{case}: {y:.2f}") for i, y in enumerate(deltas)],
            "#8a8d96",
            1.0,
            0.35,
            dots=False,
        )
        for case, deltas in found.delta.items()
    ]
    mean = [
        Point(i, one.estimate, f"mean {one.estimate:.2f}", one.low, one.high)
        for i, one in enumerate(found.mean)
        if one.estimate is not None
    ]
    series = [*grey, Series(f"mean of {len(found.cases)} cases", mean, COLOURS[1], 3.0)]
    segments = [
        Series(
            name,
            [
                Point(i, value, f"{name}: {value:.2f}", table[name].low, table[name].high)
                for i, table in enumerate(found.segments)
                if name in table and (value := table[name].estimate) is not None
            ],
        )
        for name in SEGMENTS
        if any(name in table for table in found.segments)
    ]
    return [
        Figure(
            "trajectories",
            "Δℓ of each case over training, in logits, with the mean and its interval; positive "
            "prefers the wrong token.",
            lines("Δℓ over training", series, names, "Δℓ (logits)"),
            {"models": [m.name for m in found.models], "delta": dict(found.delta)},
        ),
        Figure(
            "checkpoint-segments",
            "Mean normalised segment sums of the same cases at each checkpoint.",
            lines("Segment sums over training", segments, names, "mean normalised sum"),
            {
                s.name: [[names[int(p.x)][1], p.y, p.low, p.high] for p in s.points]
                for s in segments
            },
        ),
    ]


def figures_of(results: StudyResults, tables: Mapping[str, StudyTable]) -> dict[str, Figure]:
    """All figures of the report, by id.

    Args:
        results: The study.
        tables: Its tables, whose numbers some figures show.

    Returns:
        The figures that have something to show.
    """
    figures = _label_figures(tables["table1"])
    if (flips := _flips(results)) is not None:
        figures.append(flips)
    segments = [(row["model"], row) for row in tables["segments"].rows]
    figures.append(
        _bars(
            "segments",
            "Segment sums",
            "Mean normalised segment sums for each model, here and as published. Positive supports "
            "the wrong token.",
            segments,
        )
    )
    figures += _sizes(results, tables.get("correction"))
    figures += _over_training(results)
    return {figure.id: figure for figure in figures}
