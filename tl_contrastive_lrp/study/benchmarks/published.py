"""What benchmarks that are published as a table share: their items, read once and checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from ...errors import FileFormatError
from ..cases import Verdict
from .item import Item
from .rows import Row, Table, read_rows

OnError = Literal["raise", "skip"]


class Published:
    """A benchmark that is published as a table; each subclass is one.

    Args:
        rows: The rows, or the error of each line that is none.
        limit: The most items; None for all.
        on_error: "raise" to stop at a malformed row, "skip" to leave it out with a warning.

    Attributes:
        name: Name of the benchmark.
        table: Where it is published.
        malformed: What is wrong with each row that was left out.

    Raises:
        FileFormatError: A row is malformed and ``on_error`` is "raise", or no row is left.
        ValueError: ``limit`` or ``on_error`` is none of those.
    """

    name: ClassVar[str]
    table: ClassVar[Table]

    def __init__(
        self,
        rows: Iterable[Row | FileFormatError],
        limit: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error is {on_error!r}; use 'raise' or 'skip'.")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit is {limit!r}; give a positive whole number, or None for all.")
        items: dict[str, Item] = {}
        malformed: list[str] = []
        for row in rows:
            if limit is not None and len(items) == limit:
                break
            try:
                if isinstance(row, FileFormatError):
                    raise row
                item = self._item(row)
                if item.id in items:
                    raise FileFormatError(
                        f"{row.where}: the id {item.id!r} is that of {items[item.id].source} too."
                    )
            except FileFormatError as error:
                if on_error == "raise":
                    raise
                malformed.append(str(error))
                continue
            items[item.id] = item
        if malformed:
            warnings.warn(
                f"{len(malformed)} malformed rows of {self.name} are left out:\n"
                + "\n".join(malformed),
                UserWarning,
                stacklevel=4,
            )
        if not items:
            raise FileFormatError(f"There is no row of {self.name} that can be read.")
        self._items = tuple(items.values())
        self.malformed = tuple(malformed)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        split: str | None = None,
        revision: str | None = None,
        on_error: OnError = "raise",
        **options: Any,
    ) -> Published:
        """Read the benchmark from a file or from the hub; ``open_benchmark`` describes it.

        Args:
            path: The file; None for the hub.
            limit: The most items.
            split: Split on the hub.
            revision: Commit, branch or tag on the hub.
            on_error: What to do with malformed rows.
            options: What the benchmark's own class takes besides.

        Returns:
            The benchmark.
        """
        rows = read_rows(cls.table, cls.name, path, split, revision)
        return cls(rows, limit=limit, on_error=on_error, **options)

    def _item(self, row: Row) -> Item:
        """The item of a row."""
        raise NotImplementedError

    def items(self) -> Sequence[Item]:
        """The items, always in the same order."""
        return self._items

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether a completion of an item is right."""
        raise NotImplementedError

    def can_pass(self, item: Item, beginning: str) -> bool | None:  # noqa: ARG002
        """Whether an answer that begins so can still be right; None: that cannot be told."""
        return None

    def decisive(self, item: Item, completion: str, position: int) -> Sequence[str] | None:  # noqa: ARG002
        """Passages that decide a position; published benchmarks do not know them."""
        return None


def missing_extra(package: str, purpose: str) -> Verdict:
    """The verdict where a checker's library is not installed.

    Args:
        package: Name of the package on PyPI.
        purpose: What it is needed for.

    Returns:
        A verdict that is unchecked, with what to type.
    """
    return Verdict.unchecked(
        f"{purpose} needs the package {package}: pip install 'tl_contrastive_lrp[study]'"
    )
