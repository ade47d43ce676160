"""Text that remembers which of its characters decide an answer.

A *marked* string holds pieces written ``«name:text»``. `strip` returns the plain text and the
character span of every named piece; a name may occur several times.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

_MARK = re.compile(r"«([^:»]+):([^»]*)»")

Span = tuple[str, int, int]
"""(name, first character, one past the last character)."""


def mark(name: str, text: object) -> str:
    """Write `text` so that `strip` reports its span under `name`."""
    return f"«{name}:{text}»"


def strip(marked: str) -> tuple[str, list[Span]]:
    """Split a marked string into its plain text and its spans."""
    plain, spans, last = "", [], 0
    for hit in _MARK.finditer(marked):
        plain += marked[last : hit.start()]
        spans.append((hit.group(1), len(plain), len(plain) + len(hit.group(2))))
        plain += hit.group(2)
        last = hit.end()
    return plain + marked[last:], spans


@dataclass(frozen=True)
class Segment:
    """A piece of the right answer.

    text: the piece, marked if later pieces depend on it.
    by: names of the marks (in the question or in earlier pieces) that decide it.
    options: how many values the piece could take for someone who knows only the template.
    """

    text: str
    by: tuple[str, ...] = ()
    options: int = 1


@dataclass(frozen=True)
class Turn:
    """One question (marked) and its right answer."""

    user: str
    answer: tuple[Segment, ...]
    # decides that the answer ends here and not with one more piece
    end_by: tuple[str, ...] = ()
    end_options: int = 1

    @property
    def answer_text(self) -> str:
        return strip("".join(s.text for s in self.answer))[0]


@dataclass(frozen=True)
class Task:
    """One conversation of the benchmark; held-out tasks have a single turn."""

    kind: str
    family: str
    turns: tuple[Turn, ...]
    split_key: str = field(default="")
    """The text whose hash puts the task into the training or the held-out part."""

    @property
    def chance(self) -> float:
        """Probability that a uniform guess at every free piece of the first answer is all right."""
        turn = self.turns[0]
        p = 1.0 / turn.end_options
        for segment in turn.answer:
            p /= segment.options
        return p

    @property
    def held_out(self) -> bool:
        """True for about one task in eight, by hash, so that the two parts cannot overlap."""
        key = self.split_key or strip(self.turns[0].user)[0]
        return hashlib.blake2b(key.encode(), digest_size=2).digest()[0] % 8 == 0
