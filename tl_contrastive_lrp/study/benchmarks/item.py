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

    Example:
        >>> item = clrp.study.Item(
        ...     "1", messages=({"role": "user", "content": "Name a river. Use no commas."},),
        ...     instructions=("Use no commas.",),
        ... )
        >>> item.messages[0]["content"].endswith(item.instructions[0])
        True
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
    """Items and their checker; ``open_benchmark`` opens those that this package knows.

    Attributes:
        name: Name of the benchmark.

    Example:
        Your own needs no base class:

        >>> class Rivers:
        ...     name = "rivers"
        ...     def items(self):
        ...         return [clrp.study.Item("1", prompt="A river:", reference="Nile")]
        ...     def check(self, item, completion):
        ...         return clrp.study.Verdict(item.reference in completion)
        ...     def can_pass(self, item, beginning):
        ...         return None
        ...     def decisive(self, item, completion, position):
        ...         return None
        >>> rivers = Rivers()
        >>> rivers.check(rivers.items()[0], " Rhine").failed
        True
    """

    name: str

    def items(self) -> Sequence[Item]:
        """The items, always in the same order.

        Returns:
            The items.

        Example:
            >>> from pathlib import Path
            >>> text = '{"question": "2 + 2?", "answer": "#### 4"}'
            >>> _ = Path("rows.jsonl").write_text(text)
            >>> [item] = clrp.study.open_benchmark("gsm8k", path="rows.jsonl").items()
            >>> item.reference
            '#### 4'
        """
        ...

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether a completion of an item is right.

        Args:
            item: One of the items.
            completion: What was written, without the prompt.

        Returns:
            The verdict; unchecked where a library, its data or a sandbox is missing.

        Example:
            >>> from pathlib import Path
            >>> text = '{"question": "2 + 2?", "answer": "#### 4"}'
            >>> _ = Path("rows.jsonl").write_text(text)
            >>> gsm8k = clrp.study.open_benchmark("gsm8k", path="rows.jsonl")
            >>> gsm8k.check(gsm8k.items()[0], "It is 5.").reason
            'the answer is 5, but should be 4'
        """
        ...

    def can_pass(self, item: Item, beginning: str) -> bool | None:
        """Whether an answer that begins so can still be right.

        Args:
            item: One of the items.
            beginning: The beginning of a completion.

        Returns:
            False where no continuation can pass any more, True where every one passes, None where
            neither can be told.

        Example:
            >>> from pathlib import Path
            >>> text = '{"question": "2 + 2?", "answer": "#### 4"}'
            >>> _ = Path("rows.jsonl").write_text(text)
            >>> gsm8k = clrp.study.open_benchmark("gsm8k", path="rows.jsonl")
            >>> [gsm8k.can_pass(gsm8k.items()[0], text) for text in ("It", "#### 5 ", "#### 4 ")]
            [None, False, True]
        """
        ...

    def decisive(self, item: Item, completion: str, position: int) -> Sequence[str] | None:
        """Passages of the prompt and answer so far that decide a position, if known.

        Args:
            item: One of the items.
            completion: What was written.
            position: Index of a character of the completion.

        Returns:
            The passages; None where they are not known, as in all published benchmarks.

        Example:
            >>> from pathlib import Path
            >>> text = '{"question": "2 + 2?", "answer": "#### 4"}'
            >>> _ = Path("rows.jsonl").write_text(text)
            >>> gsm8k = clrp.study.open_benchmark("gsm8k", path="rows.jsonl")
            >>> print(gsm8k.decisive(gsm8k.items()[0], "5", 0))
            None
        """
        ...
