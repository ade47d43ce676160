"""Pages of published studies, filled from their numbers, so that no figure is typed by hand.

A template is Markdown with marks in double braces: ``{{table NAME}}`` and
``{{table NAME: column, column}}`` for a table of a report's numbers;
``{{TABLE/column=value/column}}`` for one of its cells; and names that the page's own script gives.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tl_contrastive_lrp.render.study.tables import cell

RULES = {
    "attnlrp": "AttnLRP", "cplrp": "CP-LRP", "relp": "RelP", "gim": "GIM", "gradient": "gradient",
}  # fmt: skip


def filled(template: str, numbers: Mapping[str, Any], own: Mapping[str, str]) -> str:
    """A template with its marks replaced.

    Args:
        template: Markdown with marks.
        numbers: What ``report`` gives.
        own: Texts by name.

    Raises:
        KeyError: A mark names nothing.
        ValueError: A mark of a cell fits no row, or several.
    """

    def text(match: re.Match[str]) -> str:
        mark = match[1]
        if mark in own:
            return own[mark]
        if mark.startswith("table "):
            name, _, columns = mark.removeprefix("table ").partition(":")
            return table(numbers, name, [c.strip() for c in columns.split(",") if c.strip()])
        name, where, column = mark.split("/")
        return value(numbers, name, dict(pair.split("=", 1) for pair in where.split("&")), column)

    return re.sub(r"\{\{(.+?)\}\}", text, template)


def table(numbers: Mapping[str, Any], name: str, columns: Sequence[str] = ()) -> str:
    """A table of the numbers in Markdown.

    Args:
        numbers: What ``report`` gives.
        name: The table's name.
        columns: Keys of its columns; all by default.
    """
    data = numbers["tables"][name]
    by_key = {column["key"]: column for column in data["columns"]}
    chosen = [by_key[key] for key in columns or by_key]
    lines = [
        "| " + " | ".join(c["title"].replace("|", "\\|") for c in chosen) + " |",
        "| " + " | ".join("---" for _ in chosen) + " |",
    ]
    for row in data["rows"]:
        cells = [_written(row.get(column["key"]), column["kind"]) for column in chosen]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def value(numbers: Mapping[str, Any], name: str, row: Mapping[str, str], column: str) -> str:
    """One cell of a table.

    Args:
        numbers: What ``report`` gives.
        name: The table's name.
        row: What the row holds, by column.
        column: The column's key.

    Raises:
        ValueError: Not exactly one row fits.
    """
    data = numbers["tables"][name]
    [found] = [r for r in data["rows"] if all(str(r.get(k)) == v for k, v in row.items())]
    [kind] = [c["kind"] for c in data["columns"] if c["key"] == column]
    return _written(found.get(column), kind)


def _written(value: Any, kind: str) -> str:
    shown = cell(RULES.get(value, value) if kind == "text" else value, kind)
    return f"{shown.text} {shown.small}".strip().replace("|", "\\|")
