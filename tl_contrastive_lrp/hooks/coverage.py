"""Coverage: which component got which rule, as ``lrp`` yields it and results carry it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CoverageRow:
    """One operation: where it is, what it is, which rule it got and how that was attached."""

    component: str
    class_name: str
    operation: str
    rule: str
    attached: str


@dataclass(frozen=True)
class Coverage:
    """The rules on a model; operations not listed are linear and keep the ordinary gradient.

    Attributes:
        rules: Name of the rule set.
        rows: One per operation, in the model's order, followed by the operations of the user's own
            hook functions, which are added once these have run.

    Example:
        >>> print(clrp.coverage(model))
        rules: attnlrp; all else is linear
        component ... rule ...
        blocks.0-3.ln1 ...
    """

    rules: str
    rows: tuple[CoverageRow, ...]

    def add(self, rows: Iterable[CoverageRow]) -> None:
        """Add rows for operations of the user's hook functions; equal rows are added once.

        Args:
            rows: The new rows.

        Example:
            >>> report = clrp.coverage(model)
            >>> before = len(report.rows)
            >>> report.add(report.rows[:1])
            >>> len(report.rows) == before
            True
        """
        object.__setattr__(self, "rows", tuple(dict.fromkeys((*self.rows, *rows))))

    def to_frame(self) -> pd.DataFrame:
        """The rows as a DataFrame: component, class_name, operation, rule, attached.

        Example:
            >>> sorted(set(clrp.coverage(model, "attnlrp").to_frame()["rule"]))
            ['LN', 'gradient', 'half', 'identity']
        """
        import pandas as pd

        return pd.DataFrame([vars(row) for row in self.rows])

    def summary(self) -> tuple[CoverageRow, ...]:
        """The rows, with equal rows of different blocks merged into one (``blocks.0-27.ln1``).

        Example:
            >>> report = clrp.coverage(model)
            >>> len(report.summary()) < len(report.rows)
            True
        """
        blocks: dict[CoverageRow, list[int]] = {}
        for row in self.rows:
            layer = re.match(r"blocks\.(\d+)\.", row.component)
            # How a rule is attached may name the block too: "at blocks.3.mlp.out.hook_in".
            general = [re.sub(r"blocks\.\d+\.", "blocks.{}.", text) for text in vars(row).values()]
            blocks.setdefault(CoverageRow(*general), []).append(int(layer[1]) if layer else -1)
        return tuple(
            CoverageRow(*(text.replace("{}", ranges(layers)) for text in vars(row).values()))
            for row, layers in blocks.items()
        )

    def __str__(self) -> str:
        rows = [("component", "class", "operation", "rule", "attached")]
        rows += [tuple(vars(row).values()) for row in self.summary()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([f"rules: {self.rules}; all else is linear", *lines])


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as text, with consecutive ones joined: [0, 1, 2, 5] gives "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def coverage_from(data: dict[str, Any]) -> Coverage:
    """The coverage whose ``dataclasses.asdict`` is ``data``."""
    return Coverage(data["rules"], tuple(CoverageRow(**row) for row in data["rows"]))
