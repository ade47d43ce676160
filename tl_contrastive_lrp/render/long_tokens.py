"""Tokens of a long prompt coloured by relevance and folded: a view of our own.

circuitsvis makes a React element for every token, whether the token matters or not: with twelve
thousand tokens a page takes seconds to open and is hard to search. Beyond ``folds.LONG`` tokens,
plain markup and a small script show the same colours, legend and numbers. If there are
several sites, their relevance is sent once, as float16 times one unit per site (three digits), and
the selected site colours the one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from markupsafe import Markup

from .folds import ranges_of, sums
from .offline import LegendLine, PlainHTML, source, templates
from .ranking import extremes
from .scale import GREY, LIGHT_NEGATIVE, LIGHT_POSITIVE, colours
from .text import (
    inline_script,
    magnitude,
    packed,
    packed_half,
    printable,
    script_json,
    signed,
    visible,
    visible_tokens,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCRIPTS = ("look", "folded", "find")
_TOP = 8  # tokens listed for the target, and for the contrast
_RAMPS = (("#ffffff", LIGHT_POSITIVE), ("#ffffff", LIGHT_NEGATIVE))


def long_tokens(
    tokens: Sequence[str],
    values: NDArray[np.float64],
    labels: Sequence[str],
    scales: NDArray[np.float64],
    greyed: NDArray[np.bool_],
    *,
    legend: Sequence[LegendLine],
    target: str,
    contrast: str,
) -> PlainHTML:
    """A long prompt, folded, with a search box and lists of its most relevant tokens.

    Args:
        tokens: The tokens as text, ``[pos]``.
        values: Relevance in logits, ``[site, pos]``.
        labels: One name per site; with several sites, the reader can select one.
        scales: The relevance of full colour in logits, ``[site]``.
        greyed: One bool per token, ``[pos]``.
        legend: Lines above the view.
        target: Words for what positive relevance supports.
        contrast: Words for what negative relevance supports.
    """
    ranges = ranges_of(np.abs(values), greyed, tokens)  # one folding for all sites
    shown = visible_tokens(tokens)
    uid = f"tokens-{uuid4().hex[:13]}"
    data = _facts(values, ranges, greyed)
    backs = colours(values[0] / scales[0], *_RAMPS)[0]
    body = (
        templates()
        .get_template("long_tokens.html")
        .render(
            uid=uid,
            style=Markup(source("folded.css") + source("long_tokens.css")),
            grey=GREY,
            legend=legend,
            labels=[printable(label) for label in labels],
            parts=_parts(shown, tokens, backs, greyed, ranges, data),
            words={
                "all": f"{len(tokens):,}",
                "shown": f"{len(tokens) - _count(ranges):,}",
                "folded": f"{_count(ranges):,}",
                "pieces": f"{len(ranges):,} piece{'s' * (len(ranges) != 1)}",
                "share": data["share"][0],
                "total": data["total"][0],
            },
            folds=len(ranges),
        )
    )
    units = None
    relevance = packed(values)
    if len(values) > 1:
        relevance, units = packed_half(values)
    data |= {
        "tokens": shown,
        "folds": ranges.tolist(),
        "greyed": np.flatnonzero(greyed).tolist(),
        "values": relevance,
        "units": units,
        "scales": scales.tolist(),
        "labels": [printable(label) for label in labels],
        "positive": _RAMPS[0],
        "negative": _RAMPS[1],
        "target": visible(target),
        "contrast": visible(contrast),
    }
    parts = ",\n".join(f"{name}: {source(f'{name}.js').strip()}" for name in _SCRIPTS)
    call = (
        f"({source('long_tokens.js').strip()})({script_json(uid)},{script_json(data)},{{{parts}}});"
    )
    return PlainHTML(body, inline_script(call))


def _count(ranges: NDArray[np.int64]) -> int:
    return int((ranges[:, 1] - ranges[:, 0] + 1).sum())


def _facts(
    values: NDArray[np.float64], ranges: NDArray[np.int64], greyed: NDArray[np.bool_]
) -> dict[str, Any]:
    """The texts of each site: its folded pieces, a summary of these, and its largest tokens."""
    total, size = sums(values, ranges), sums(np.abs(values), ranges)
    all_sizes = np.abs(values).sum(axis=1)
    share = size.sum(axis=1) / np.where(all_sizes > 0, all_sizes, 1.0)
    largest = []
    for first, last in ranges.tolist():
        inside = values[:, first : last + 1]
        at = np.abs(inside).argmax(axis=1)
        largest.append(inside[np.arange(len(values)), at])
    columns = np.stack(largest, axis=1) if largest else np.zeros((len(values), 0))
    return {
        "sums": [[signed(value) for value in row] for row in total.tolist()],
        "sizes": [[magnitude(value) for value in row] for row in size.tolist()],
        "largest": [[signed(value) for value in row] for row in columns.tolist()],
        "share": [f"{100 * value:.1f} %" for value in share.tolist()],
        "total": [signed(value) for value in total.sum(axis=1).tolist()],
        "tops": [_tops(row, greyed) for row in values],
    }


def _tops(row: NDArray[np.float64], greyed: NDArray[np.bool_]) -> list[list[tuple[int, str]]]:
    """The positions of largest positive and of largest negative relevance, with their numbers."""
    sides = extremes(np.where(greyed, 0.0, row), _TOP)
    return [[(i, signed(float(row[i]))) for i in side] for side in sides]


def _parts(
    shown: list[str],
    tokens: Sequence[str],
    backs: list[str],
    greyed: NDArray[np.bool_],
    ranges: NDArray[np.int64],
    data: dict[str, Any],
) -> list[dict[str, Any]]:
    """The prompt in order: tokens to show, then the piece after them, and so on."""
    lines = [min(token.count("\n"), 3) for token in tokens]
    parts: list[dict[str, Any]] = []
    at = 0
    for index, (first, last) in enumerate([*ranges.tolist(), [len(tokens), len(tokens)]]):
        rows = [(i, shown[i], backs[i], bool(greyed[i]), lines[i]) for i in range(at, first)]
        fold = None
        if index < len(ranges):
            fold = {
                "message": "",
                "first": first,
                "last": last,
                "count": f"{last - first + 1:,} tokens",
                "total": data["sums"][0][index],
                "size": data["sizes"][0][index],
                "largest": data["largest"][0][index],
                "text": "".join(shown[i] + "\n" * lines[i] for i in range(first, last + 1)),
            }
        parts.append({"rows": rows, "fold": fold})
        at = last + 1
    return parts
