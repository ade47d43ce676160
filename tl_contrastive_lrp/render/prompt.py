"""The prompt of a report as rows: texts, numbers and style of each token; folds; rankings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .folds import Fold
from .ranking import extremes
from .scale import colours, span
from .text import magnitude, percent, signed, visible, visible_tokens, with_parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AROUND = 14  # characters on either side of a token shown in its context
_LINES = 3  # most line breaks after a token


def token_rows(
    words: list[str],
    ids: list[int],
    relevance: NDArray[np.float64],
    greyed: NDArray[np.bool_],
    delta: float,
    measured: Sequence[float | None] | None = None,
) -> list[dict[str, Any]]:
    """One row per token: texts, numbers, and its style on scales with and without greyed tokens."""
    effects = ["\u2013" if x is None else signed(x) for x in measured or [None] * len(words)]
    backs, whites = colours(relevance / span(relevance, greyed))
    backs_all, whites_all = colours(relevance / span(relevance, greyed & False))
    rows = []
    shown, alone = visible_tokens(words), with_parts(words)
    for i, (word, value) in enumerate(zip(words, relevance.tolist(), strict=True)):
        rows.append(
            {
                "pos": i,
                "id": ids[i],
                "show": shown[i],
                "name": visible(alone[i]),
                "newlines": word.count("\n"),
                "value": signed(value),
                "share": percent(value / delta if delta else None),
                "measured": effects[i],
                "greyed": bool(greyed[i]),
                "look": backs[i],
                "white": whites[i],
                "look_all": backs_all[i],
                "white_all": whites_all[i],
            }
        )
    return rows


def rankings(
    rows: list[dict[str, Any]],
    relevance: NDArray[np.float64],
    eligible: NDArray[np.bool_],
    *,
    in_context: bool = False,
) -> list[list[dict[str, Any]]]:
    """The ten most positive and the ten most negative of some tokens, with bar widths.

    Args:
        rows: The rows of :func:`token_rows`.
        relevance: Relevance in logits, ``[pos]``.
        eligible: Which tokens to rank, ``[pos]``.
        in_context: Whether to add the text before and after each, as ``before`` and ``after``.
    """
    sides = extremes(np.where(eligible, relevance, 0.0), 10)
    largest = max((abs(float(relevance[i])) for side in sides for i in side), default=1.0)
    ranked = [
        [{**rows[i], "bar": round(100 * abs(float(relevance[i])) / largest, 1)} for i in side]
        for side in sides
    ]
    if in_context:
        shown = [row["show"] for row in rows]
        for row in (row for side in ranked for row in side):
            at = row["pos"]
            before = "".join(shown[max(0, at - _AROUND) : at])
            after = "".join(shown[at + 1 : at + 1 + _AROUND])
            row["before"] = before[-_AROUND:]
            row["after"] = after[:_AROUND]
    return ranked


def parts(rows: Sequence[dict[str, Any]], folds: Sequence[Fold]) -> list[dict[str, Any]]:
    """The prompt in order: ``rows`` of tokens to show, then the ``fold`` after them, and so on."""
    alternating: list[dict[str, Any]] = []
    at = 0
    for index, fold in enumerate(folds):
        inside = rows[fold.first : fold.last + 1]
        alternating.append(
            {
                "rows": rows[at : fold.first],
                "fold": {
                    "index": index,
                    "message": visible(fold.message) if fold.message else "",
                    "first": fold.first,
                    "last": fold.last,
                    "count": f"{fold.count:,} token{'s' * (fold.count != 1)}",
                    "total": signed(fold.total),
                    "size": magnitude(fold.size),
                    "largest": signed(fold.largest),
                    "text": "".join(
                        row["show"] + "\n" * min(row["newlines"], _LINES) for row in inside
                    ),
                },
            }
        )
        at = fold.last + 1
    return [*alternating, {"rows": rows[at:], "fold": None}]


def account(folds: Sequence[Fold], relevance: NDArray[np.float64]) -> dict[str, str]:
    """The folded tokens in words: their number, the number of pieces, and their relevance."""
    folded = sum(fold.count for fold in folds)
    all_sizes = float(np.abs(relevance).sum())
    share = sum(fold.size for fold in folds) / all_sizes if all_sizes else 0.0
    return {
        "all": f"{len(relevance):,}",
        "shown": f"{len(relevance) - folded:,}",
        "folded": f"{folded:,}",
        "pieces": f"{len(folds):,} piece{'s' * (len(folds) != 1)}",
        "share": f"{100 * share:.1f} %",
        "total": signed(sum(fold.total for fold in folds)),
    }
