"""Tables of a report, as rows of cells that are ready for the template."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .scale import as_array, colours
from .text import percent, printable, signed, visible, with_parts


@dataclass(frozen=True)
class Cell:
    """A table cell.

    Attributes:
        text: What it shows.
        number: Whether it is a number.
        token: Whether it is a token.
        bar: Width of its bar in percent, or ``None`` for no bar.
        positive: Whether the bar is that of a positive number.
    """

    text: str
    number: bool = False
    token: bool = False
    bar: float | None = None
    positive: bool = True


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: Names of the columns.
        numeric: Whether each column holds numbers.
        rows: The cells, row by row.
    """

    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]


def general(rows: Sequence[Mapping[str, Any]]) -> Table | None:
    """A table whose columns are the keys of the rows, in order of first appearance.

    Integers and floats become right-aligned numbers, ``probability`` and ``share`` percentages
    (``share`` with a bar), ``token`` a visible token, ``None`` a dash, and all else its text. A
    full bar is 100 %, or the largest share if that is more.
    """
    if not rows:
        return None
    shares = [abs(float(row["share"])) for row in rows if row.get("share") is not None]
    full = max([1.0, *(share for share in shares if np.isfinite(share))])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(column, row.get(column), full) for column in columns] for row in rows]
    numeric = [any(row[c].number for row in cells) for c in range(len(columns))]
    return Table([str(column) for column in columns], numeric, cells)


def _cell(column: str, value: Any, full: float) -> Cell:
    """A cell; ``full`` is the share of a full bar."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()  # a 0-d tensor or numpy number
    if value is None:
        return Cell("\u2013")
    if column == "token":
        return Cell(visible(str(value)), token=True)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return Cell(printable(str(value)))
    if isinstance(value, numbers.Integral):
        return Cell(str(value), number=True)
    number = float(value)
    if column == "probability":
        return Cell(f"{100 * number:.2f} %", number=True)
    if column == "share":
        width = 100 * abs(number) / full if np.isfinite(number) else 0.0
        return Cell(percent(number), number=True, bar=round(width, 1), positive=number >= 0)
    return Cell(signed(number), number=True)


@dataclass(frozen=True)
class Heads:
    """Relevance of heads, summed over positions.

    Attributes:
        rows: One row of cells per layer.
        count: Number of heads per layer.
        largest: The largest magnitude, in words.
        numbers: Whether there is room for a number in each cell.
    """

    rows: list[list[dict[str, Any]]]
    count: int
    largest: str
    numbers: bool


def heads(values: Any, tokens: Sequence[str]) -> Heads | None:
    """Cells for the relevance of heads, summed over positions.

    Args:
        values: Relevance in logits, ``[layer, head, pos]``, or ``None``.
        tokens: The tokens, ``[pos]``; a cell's title names its head's strongest one.

    Raises:
        ValueError: ``values`` has another number of positions, or is not finite.
    """
    if values is None:
        return None
    array = as_array(values, 3, "heads")
    if array.shape[2] != len(tokens) or 0 in array.shape:
        raise ValueError(f"heads has shape {array.shape}, but there are {len(tokens)} tokens")
    sums = array.sum(axis=-1)
    largest = float(np.abs(sums).max()) or 1.0
    backs, whites = colours(sums.ravel() / largest)
    alone = with_parts(tokens)
    strongest = np.abs(array).argmax(axis=-1)
    rows = []
    for layer in range(sums.shape[0]):
        row = []
        for head in range(sums.shape[1]):
            flat = layer * sums.shape[1] + head
            at = int(strongest[layer, head])
            row.append(
                {
                    "value": signed(float(sums[layer, head])),
                    "short": f"{sums[layer, head]:+.2f}".replace("-", "\u2212"),
                    "look": backs[flat],
                    "white": whites[flat],
                    "at": at,
                    "token": visible(alone[at]),
                    "there": signed(float(array[layer, head, at])),
                }
            )
        rows.append(row)
    return Heads(rows, sums.shape[1], signed(largest)[1:], sums.shape[1] <= 16)
