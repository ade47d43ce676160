"""What every benchmark gives: items to ask, and a checker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..cases import Verdict


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark.
        messages: The chat to ask; None where ``prompt`` is plain text.
        prompt: Plain text to continue, where there is no chat.
        tools: Tools that the chat offers.
        reference: The right answer, as published.
        instructions: Phrases of the prompt that say what the answer must be like; each occurs in
            the prompt verbatim.
        row: The row as published, for the checker.
        source: The file it was read from, and the line.
    """

    id: str
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    reference: str | None = None
    instructions: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


class Benchmark(Protocol):
    """Items and their checker.

    Attributes:
        name: Name of the benchmark.
    """

    name: str

    def items(self) -> Sequence[Item]:
        """The items, always in the same order."""
        ...

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether a completion of an item is right."""
        ...

    def can_pass(self, item: Item, beginning: str) -> bool | None:
        """Whether an answer that begins so can still be right; None if that cannot be told."""
        ...

    def decisive(self, item: Item, completion: str, position: int) -> Sequence[str] | None:
        """Passages of the prompt and answer so far that decide a position, if known."""
        ...
