"""The demo benchmark: generated tasks whose truth is planted, for the models of the demo family.

Each task has one right answer. For every token of it the file says which passages of the user's
message, and of the answer so far, decide it; so for whatever a model writes, the first wrong token
is known, the right one, and what should have decided. Locators, contrasts and labels are measured
against that. ``demo_training/benchmark.py`` writes the file and describes its fields.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

from ...demo.cases import KINDS
from ...errors import FileFormatError
from ..cases import Verdict
from .item import Item

_FIELDS = ("id", "kind", "family", "user", "answer", "instructions", "marks", "tokens", "pieces")
Spans = list[tuple[int, int]]


class DemoBenchmark:
    """The demo benchmark: 280 new held-out tasks, four kinds in turn, then those of the demo cases.

    Args:
        items: The items.

    Attributes:
        name: "demo".

    Raises:
        FileFormatError: There are none.
    """

    name = "demo"

    def __init__(self, items: Sequence[Item]) -> None:
        if not items:
            raise FileFormatError("The demo benchmark has no tasks left.")
        self._items = tuple(items)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        limit: int | None = None,
        kinds: Sequence[str] = KINDS,
    ) -> DemoBenchmark:
        """Read the benchmark from this package, or from a file that its script wrote.

        Args:
            path: The file; None for the package's.
            limit: The most items; None for all.
            kinds: Of which kinds.

        Returns:
            The benchmark.

        Raises:
            ValueError: ``limit`` is not positive, or a kind is unknown.
            FileFormatError: A line is not of this format; the message says which.
        """
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit is {limit!r}; give a positive whole number, or None for all.")
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(
                    f"unknown kind of demo task: {kind!r}. Use {', '.join(map(repr, KINDS))}."
                )
        source = files("tl_contrastive_lrp.demo").joinpath("data/tasks.jsonl")
        text = source.read_text("utf-8") if path is None else Path(path).read_text("utf-8")
        name = "demo tasks.jsonl" if path is None else str(path)
        # Not splitlines: JSON may hold U+2028 as it is, and no line ends there.
        found = [
            _item(line, f"{name}:{n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
        return cls([item for item in found if item.row["kind"] in kinds][:limit])

    def items(self) -> Sequence[Item]:
        """The items, always in the same order."""
        return self._items

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether a completion is the right answer, character by character."""
        if completion == item.reference:
            return Verdict(True)
        return Verdict(False, f"the answer is {completion!r}, but should be {item.reference!r}")

    def can_pass(self, item: Item, beginning: str) -> bool:
        """Whether an answer that begins so can still be right."""
        return (item.reference or "").startswith(beginning)

    def decisive(self, item: Item, completion: str, position: int) -> Sequence[str] | None:
        """The passages that decide what stands at a character of the right answer.

        Args:
            item: The item.
            completion: A completion that is right up to there.
            position: The character; the length of the answer for its end.

        Returns:
            Their texts, those of the message first; None where the completion is wrong before.
        """
        spans = self.decisive_spans(item, completion[:position])
        if spans is None:
            return None
        return [
            text[a:b]
            for text, some in zip((item.row["user"], completion), spans, strict=True)
            for a, b in some
        ]

    def decisive_spans(self, item: Item, beginning: str) -> tuple[Spans, Spans] | None:
        """Where the passages are that decide the next token of the answer.

        Args:
            item: The item.
            beginning: The answer so far.

        Returns:
            First characters and those past the last, in the user's message and in the beginning;
            None where the beginning is wrong already.
        """
        answer = item.reference or ""
        if not answer.startswith(beginning):
            return None
        tokens, pieces, marks = (item.row[name] for name in ("tokens", "pieces", "marks"))
        ends = list(accumulate(len(text) for text, _ in tokens))
        i = next((i for i, end in enumerate(ends) if len(beginning) < end), None)
        names, _ = pieces[-1 if i is None else tokens[i][1]]
        in_user, in_answer = (
            [(a, b) for name in names for a, b in marks[side].get(name, ())]
            for side in ("user", "answer")
        )
        so_far = [(a, b) for a, b in in_answer if a < len(beginning)]
        return sorted(set(in_user)), sorted(set(so_far))

    def first_wrong(self, item: Item, pieces: Sequence[str], ended: bool) -> int | None:
        """The index of the first wrong token of a completion; None where there is none.

        Args:
            item: The item.
            pieces: What each token contributes to the text.
            ended: Whether the last one is the token that ends the completion.

        Returns:
            The index.
        """
        answer, written = item.reference or "", ""
        for i, piece in enumerate(pieces):
            if ended and i == len(pieces) - 1:
                return None if written == answer else i
            written += piece
            if not answer.startswith(written):
                return i
        return None

    def right_text(self, item: Item, beginning: str) -> str | None:
        """What the right answer goes on with; "" where it ends, None where it is wrong already.

        Args:
            item: The item.
            beginning: The answer so far.

        Returns:
            The rest of the answer.
        """
        answer = item.reference or ""
        return answer[len(beginning) :] if answer.startswith(beginning) else None


def _item(line: str, where: str) -> Item:
    try:
        row: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise FileFormatError(f"{where}: not JSON: {error}") from error
    missing = [name for name in _FIELDS if not isinstance(row, dict) or name not in row]
    if missing:
        raise FileFormatError(
            f"{where}: not a task of the demo benchmark: no {', '.join(missing)}."
        )
    if "".join(text for text, _ in row["tokens"]) != row["answer"]:
        raise FileFormatError(f"{where}: the tokens do not spell the answer.")
    if any(phrase not in row["user"] for phrase in row["instructions"]):
        raise FileFormatError(f"{where}: an instruction is not in the message.")
    return Item(
        id=str(row["id"]),
        messages=({"role": "user", "content": row["user"]},),
        reference=row["answer"],
        instructions=tuple(row["instructions"]),
        row=row,
        source=where,
    )
