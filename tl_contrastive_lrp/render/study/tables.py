"""Tables of a study: raw values in, formatted cells out, so that a page and its data agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..text import printable

# How the values of a column are written. A share is {"count", "of", "share"}, an estimate
# {"estimate", "n"}, both with "low" and "high" where they have an interval.
KINDS = ("text", "count", "number", "percent", "share", "estimate")


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: The key of its values in the rows.
        title: Its heading.
        kind: One of ``KINDS``.
    """

    key: str
    title: str
    kind: str = "text"


@dataclass(frozen=True)
class StudyTable:
    """A table of raw values.

    Attributes:
        id: Its name in the report's JSON and its anchor on the page.
        title: What it shows.
        columns: Its columns.
        rows: Values by column; missing ones are shown as a dash. "published": True marks a row of
            the published study.
        note: A sentence below it.
    """

    id: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    note: str = ""


@dataclass(frozen=True)
class ShownCell:
    """A formatted cell.

    Attributes:
        text: What it shows.
        small: The interval, in small print.
        number: Whether it is a number.
    """

    text: str
    small: str = ""
    number: bool = True


def shown(table: StudyTable) -> list[list[ShownCell]]:
    """The cells of a table, formatted.

    Raises:
        ValueError: A column has a kind that is none of ``KINDS``.
    """
    return [
        [cell(row.get(column.key), column.kind) for column in table.columns] for row in table.rows
    ]


def cell(value: Any, kind: str) -> ShownCell:
    """One value, formatted.

    Args:
        value: The raw value; None for a dash.
        kind: One of ``KINDS``.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"the kind of a column is {kind!r}; use one of {', '.join(KINDS)}")
    if value is None:
        return ShownCell("\u2013", number=kind != "text")
    if kind == "text":
        return ShownCell(printable(str(value)), number=False)
    if kind == "count":
        return ShownCell(f"{value:,}")
    if kind == "number":
        return ShownCell(decimal(value))
    if kind == "percent":
        return ShownCell(_percent(value))
    if kind == "share":
        if not value["of"]:
            return ShownCell("\u2013")
        ends = _ends(value, _percent)
        return ShownCell(f"{value['count']}/{value['of']} ({_percent(value['share'])})", ends)
    if value["estimate"] is None:
        return ShownCell("\u2013")
    return ShownCell(decimal(value["estimate"]), _ends(value, decimal))


def _ends(value: Mapping[str, Any], how: Any) -> str:
    if value.get("low") is None or value.get("high") is None:
        return ""
    # The unit stands once, at the end.
    low = how(value["low"]).removesuffix(" %")
    return f"[{low}, {how(value['high'])}]"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "\u2212")


def decimal(value: float) -> str:
    """A number with two decimals; fewer where it is large, two digits where it is small."""
    size = abs(value)
    if size >= 1000:
        text = f"{value:,.0f}"
    elif size >= 100:
        text = f"{value:.1f}"
    else:
        text = f"{value:.2f}" if size >= 0.005 or value == 0 else f"{value:.2g}"
    return text.replace("-", "\u2212")
