"""The marks of a graph's picture, ready for its template: paths, circles, labels and words."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scale import NEGATIVE, POSITIVE
from ..text import percent, printable, signed, visible
from .data import CheckedGraph
from .layout import Layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

UP, DOWN, _ZERO = POSITIVE[3], NEGATIVE[3], "#8a8d96"
_CHARACTERS = 16  # how many characters of a token are shown below its column
_SQUARE = math.sqrt(math.pi) / 2  # half the side of a square over the radius of an equal circle


def places(data: CheckedGraph) -> list[str]:
    """Each position in words: its token and position, or how many tokens are folded there."""
    words = []
    for token, first, last in zip(
        data.tokens, data.first.tolist(), data.last.tolist(), strict=True
    ):
        if first == last:
            words.append(f"\u00ab{visible(token)}\u00bb position {first}")
        else:
            words.append(f"{last - first + 1:,} tokens, positions {first} to {last}")
    return words


def edges(
    data: CheckedGraph, plan: Layout, where: list[str], names: list[str]
) -> list[list[dict[str, Any]]]:
    """Edges that stay at their position, then all others: path, style and words of each."""
    edges = plan.edges
    x1, y1 = plan.column[edges.source_pos], plan.row[edges.source_site]
    x2, y2 = plan.column[edges.target_pos], plan.row[edges.target_site]
    bend = 0.5 * (y1 - y2)
    points = np.stack([x1, y1, x1, y1 - bend, x2, y2 + bend, x2, y2], axis=-1).round(1)
    # Weak edges are paler if there are many, so that together they do not hide the strong ones.
    faintest = float(np.clip(60 / max(len(edges), 1), 0.05, 0.3))
    strong = faintest + (0.85 - faintest) * np.sqrt(plan.strength)
    opacity = np.where(plan.stays, 0.25, strong).round(2)
    parts: list[list[dict[str, Any]]] = [[], []]
    columns = zip(
        points.tolist(),
        plan.thickness.round(2).tolist(),
        opacity.tolist(),
        edges.weight.tolist(),
        plan.stays.tolist(),
        plan.source.tolist(),
        plan.target.tolist(),
        strict=True,
    )
    ends = [
        f"{where[pos]}, {names[site]}"
        for site, pos in zip(plan.node_site.tolist(), plan.node_pos.tolist(), strict=True)
    ]
    for point, thickness, opacity_, weight, stays, start, end in columns:
        a, b, c, d, e, f, g, h = (f"{value:g}" for value in point)
        path = f"M{a} {b}V{h}" if stays else f"M{a} {b}C{c} {d} {e} {f} {g} {h}"
        parts[not stays].append(
            {
                "path": path,
                "thickness": f"{thickness:g}",
                "opacity": f"{opacity_:g}",
                "colour": _colour(weight),
                "ends": f"{start} {end}",
                "title": f"from {ends[start]} to {ends[end]} \u00b7 edge {_numbers(weight, data)}",
            }
        )
    return parts


def nodes(
    data: CheckedGraph, plan: Layout, where: list[str], names: list[str], sites: Sequence[str]
) -> list[dict[str, Any]]:
    """Nodes: place, size, style and words of each."""
    marks = []
    for site, pos, radius in zip(
        plan.node_site.tolist(), plan.node_pos.tolist(), plan.radius.tolist(), strict=True
    ):
        value = float(data.relevance[site, pos])
        place = f"{names[site]} ({printable(str(sites[site]))})"
        several = bool(data.first[pos] != data.last[pos])
        marks.append(
            {
                "x": rounded(plan.column[pos]),
                "y": rounded(plan.row[site]),
                "r": rounded(radius),
                "side": rounded(2 * _SQUARE * radius),
                "left": rounded(plan.column[pos] - _SQUARE * radius),
                "top": rounded(plan.row[site] - _SQUARE * radius),
                "pos": int(data.first[pos]),
                "several": several,
                "grey": bool(data.greyed[pos]),
                "colour": _colour(value),
                "title": f"{where[pos]} \u00b7 {place} "
                f"\u00b7 relevance {'summed ' if several else ''}{_numbers(value, data)}",
            }
        )
    return marks


def labels(data: CheckedGraph, plan: Layout, where: list[str]) -> list[dict[str, Any]]:
    """Tokens, to be written below their columns."""
    labels = []
    finals = set(data.finals.tolist())
    for pos in np.flatnonzero(~np.isnan(plan.column)).tolist():
        first, last = int(data.first[pos]), int(data.last[pos])
        several = first != last
        count = f"{last - first + 1:,} tokens"
        text = short(visible(data.tokens[pos]), _CHARACTERS)
        labels.append(
            {
                "x": float(plan.column[pos]),
                "at": rounded(plan.column[pos]),
                "pos": first,
                "last": last,
                "text": f"\u22ef {count}" if several else text,
                "full": f"folded: {where[pos]}" if several else where[pos],
                "grey": several or bool(data.greyed[pos]),
                "final": pos in finals,
            }
        )
    return labels


def gaps(plan: Layout) -> list[dict[str, Any]]:
    """Runs of positions without a column: place and words of each."""
    marks = []
    for gap in plan.gaps:
        words = "1 token" if gap.count == 1 else f"{gap.count:,} tokens"
        where = (
            f"position {gap.first}" if gap.count == 1 else f"positions {gap.first} to {gap.last}"
        )
        marks.append(
            {
                "x": rounded(gap.x),
                "left": rounded(gap.x - gap.width / 2),
                "width": rounded(gap.width),
                "words": f"\u22ef {words}",
                "title": f"{where}: no edge here is drawn",
                "first": gap.first,
                "last": gap.last,
            }
        )
    return marks


def rows(plan: Layout, names: list[str], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Site labels: the first, the last, and as many of the others as there is room for."""
    height = abs(float(plan.row[0] - plan.row[-1])) / max(len(names) - 1, 1)
    every = max(1, math.ceil(13 / height)) if height else 1
    last = len(names) - 1
    return [
        {
            "y": rounded(plan.row[site]),
            "text": name,
            "title": printable(str(sites[site])),
            "named": site in (0, last) or (site % every == 0 and last - site >= every),
        }
        for site, name in enumerate(names)
    ]


def _numbers(value: float, data: CheckedGraph) -> str:
    share = percent(value / data.delta if data.delta else None)
    return f"{signed(value)} logits \u00b7 {share} of \u0394\u2113"


def _colour(value: float) -> str:
    return UP if value > 0 else DOWN if value < 0 else _ZERO


def short(text: str, most: int) -> str:
    """At most ``most`` characters, ending in an ellipsis if some are missing."""
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def width(text: str) -> float:
    """The approximate width in pixels of a text that is 11 pixels high."""
    return sum(11.0 if unicodedata.east_asian_width(char) in "WF" else 6.7 for char in text)


def rounded(value: float | NDArray[np.float64]) -> str:
    """A coordinate with at most one decimal."""
    return f"{float(value):.1f}".removesuffix(".0")
