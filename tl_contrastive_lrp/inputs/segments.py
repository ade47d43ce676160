"""Segments: consecutive stretches of a prompt, such as messages, lines or words.

A division of a prompt is a tuple of segments that cover it in order, without a gap or an overlap,
so that sums over segments lose nothing. ``clrp.chat`` makes the division into messages;
``divide`` makes all others. What a caller leaves uncovered becomes segments of kind "rest".

A token belongs to the segment in which its first character that is not white space lies; a token
of white space alone, to the segment in which it begins. So `` Paris`` belongs to the word
``Paris``, and a token that straddles two messages to the first. The tokens of one character stay
together.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from typing_extensions import TypeAliasType

from ..errors import PromptError

# What ``by`` takes; ``Attribution.by`` says what each means.
How = TypeAliasType("How", "str | Mapping[str, tuple[int, int]] | Sequence[str]")

KINDS = (
    "system", "user", "assistant", "thinking", "tool call", "tool result", "template", "rest",
)  # fmt: skip
_TOOL_KINDS = ("tool call", "tool result")
_NAMED = ("message", "tool", "sentence", "line", "word")
_LONGEST_NAME = 60

_LINE_END = re.compile(r"\s*\n")
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]+")
_SENTENCE_END = re.compile(
    r"""[.!?…]+["'”’»)\]]*(?:\s+|$)   # a mark, what it closes, and the space behind it
    |[。！？]+["'”’」』）]*\s*         # marks that no space follows
    |\s*\n\s*\n\s*                    # an empty line""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt.

    Attributes:
        name: Its name in tables and pictures, such as "user 2".
        role: The role of the message that it belongs to, as in the messages; "" for none.
        kind: "system", "user", "assistant", "thinking", "tool call", "tool result", "template"
            (what the chat template writes around messages) or "rest"; the name of the division
            ("line", "word", ...) where a prompt without messages is divided.
        start: Position of its first token, from 0.
        stop: Position after its last token.
        text: Its characters in the prompt.

    Example:
        >>> clrp.Segment("user 1", "user", "user", 3, 8, "What is 2 + 2?").n_tokens
        5
    """

    name: str
    role: str
    kind: str
    start: int
    stop: int
    text: str

    @property
    def n_tokens(self) -> int:
        """Number of its tokens.

        Example:
            >>> clrp.Segment("system", "system", "system", 1, 4, "Be brief.").n_tokens
            3
        """
        return self.stop - self.start


def token_anchors(str_tokens: Sequence[str]) -> Int[np.ndarray, " pos"]:
    """Where each token counts as beginning, in characters of the joined text; never falling."""
    lengths = np.fromiter(map(len, str_tokens), dtype=np.int64, count=len(str_tokens))
    stripped = np.fromiter((len(t.lstrip()) for t in str_tokens), np.int64, len(str_tokens))
    starts = np.cumsum(lengths) - lengths
    anchors = np.where(stripped > 0, starts + lengths - stripped, starts)
    # A token without text continues a character that an earlier token began.
    owner = np.maximum.accumulate(np.where(lengths > 0, np.arange(len(lengths)), 0))
    continued: Int[np.ndarray, " pos"] = anchors[owner]
    return continued


def check_segments(segments: Sequence[Segment], length: int) -> None:
    """Check that segments cover a prompt in order, without gaps and overlaps.

    Raises:
        ValueError: They do not.
    """
    ends = [0, *(segment.stop for segment in segments)]
    if any(s.start != end or s.stop < s.start for s, end in zip(segments, ends, strict=False)):
        raise ValueError("Segments must follow each other in order, without gaps and overlaps.")
    if segments and ends[-1] != length:
        raise ValueError(f"The segments end at {ends[-1]}, the prompt has {length} tokens.")


def divide(
    how: How, str_tokens: Sequence[str], messages: Sequence[Segment] = ()
) -> tuple[Segment, ...]:
    """Divide a prompt.

    Args:
        how: "message", "tool", "sentence", "line", "word", token ranges by name, or texts to find.
        str_tokens: What each token contributes to the prompt's text.
        messages: The prompt's division into messages, if it has one.

    Returns:
        Segments that cover the prompt in order; each has at least one token, except messages whose
        characters all lie in a token of another one.

    Raises:
        ValueError: An unknown ``how``, a range outside the prompt, overlapping segments, or a text
            that is not in the prompt exactly once.
        PromptError: Messages or tools are asked for, and the prompt was not made by ``chat``.
    """
    if isinstance(how, str):
        return _named(how, str_tokens, messages)
    if isinstance(how, Mapping):
        chosen = [_ranged(name, span, str_tokens, messages) for name, span in how.items()]
    elif isinstance(how, Sequence) and all(isinstance(text, str) for text in how):
        chosen = _found(how, str_tokens, messages)
    else:
        raise ValueError(f"by={how!r}: {_choices()}.")
    if not chosen:
        raise ValueError("No segment was given: give at least one range or text.")
    return _filled(chosen, str_tokens, messages)


def _choices() -> str:
    words = ", ".join(f'"{name}"' for name in _NAMED)
    return f"use one of {words}, a dict {{name: (start, end)}}, or a list of texts to find"


def _named(how: str, str_tokens: Sequence[str], messages: Sequence[Segment]) -> tuple[Segment, ...]:
    if how not in _NAMED:
        raise ValueError(f"by={how!r}: {_choices()}.")
    if how in ("message", "tool"):
        if not messages:
            raise PromptError(
                f"The prompt has no messages, so it cannot be divided by {how!r}: make it with "
                'clrp.chat(model, messages), or use "sentence", "line", "word", a dict '
                "{name: (start, end)}, or a list of texts to find."
            )
        if how == "message":
            return tuple(messages)
        tools = [s for s in messages if s.kind in _TOOL_KINDS]
        if not tools:
            raise PromptError("The chat has no tool calls and no tool results.")
        return _filled(tools, str_tokens, messages)
    text = "".join(str_tokens)
    if how == "word":
        cuts = [match.start() for match in _WORD.finditer(text)][1:]
    elif how == "line":
        cuts = [match.end() for match in _LINE_END.finditer(text)]
    else:
        ends = (match.end() for match in _SENTENCE_END.finditer(text))
        cuts = [end for end in ends if not text[end : end + 1].islower()]
    starts = np.searchsorted(token_anchors(str_tokens), np.array(cuts, dtype=np.int64))
    edges = {0, len(str_tokens), *starts.tolist(), *(m.start for m in messages)}
    bounds = sorted(edges)
    return tuple(
        _between(start, stop, how, str_tokens, messages)
        for start, stop in itertools.pairwise(bounds)
    )


def _between(
    start: int, stop: int, how: str, str_tokens: Sequence[str], messages: Sequence[Segment]
) -> Segment:
    """The segment of these tokens, named by its text."""
    text = "".join(str_tokens[start:stop])
    name = " ".join(text.split()) or text
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 1]}…"
    around = _around(start, stop, messages)
    role, kind = ("", how) if around is None else (around.role, around.kind)
    return Segment(name, role, kind, start, stop, text)


def _around(start: int, stop: int, messages: Sequence[Segment]) -> Segment | None:
    """The message that holds all of these tokens, if one does."""
    inside = (m for m in messages if m.start <= start and stop <= m.stop)
    return next(inside, None)


def _ranged(
    name: str, span: object, str_tokens: Sequence[str], messages: Sequence[Segment]
) -> Segment:
    try:
        start, stop = (int(end) for end in span)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ValueError(
            f"The segment {name!r} is {span!r}; give (start, end), positions of tokens, the end "
            "not included."
        ) from None
    length = len(str_tokens)
    if not 0 <= start < stop <= length:
        raise ValueError(
            f"The segment {name!r} is ({start}, {stop}); it must satisfy 0 <= start < end <= "
            f"{length}, the number of tokens. The end is not included."
        )
    found = _between(start, stop, "range", str_tokens, messages)
    return Segment(str(name), found.role, found.kind, start, stop, found.text)


def _found(
    texts: Sequence[str], str_tokens: Sequence[str], messages: Sequence[Segment]
) -> list[Segment]:
    whole, anchors = "".join(str_tokens), token_anchors(str_tokens)
    segments = []
    for text in texts:
        first = whole.find(text) if text.strip() else -1
        if first < 0:
            raise ValueError(f"The prompt does not contain {text!r}.")
        if whole.find(text, first + 1) >= 0:
            raise ValueError(
                f"The prompt contains {text!r} more than once; give a longer text, or a range of "
                "tokens: {name: (start, end)}."
            )
        begin = first + len(text) - len(text.lstrip())
        start, stop = np.searchsorted(anchors, (begin, first + len(text))).tolist()
        if start == stop:
            holder = str_tokens[max(start - 1, 0)]
            raise ValueError(
                f"No token begins in {text!r}: it is a part of the token {holder!r}. Give a longer "
                "text."
            )
        around = _around(start, stop, messages)
        role, kind = ("", "text") if around is None else (around.role, around.kind)
        segments.append(Segment(text, role, kind, start, stop, "".join(str_tokens[start:stop])))
    return segments


def _filled(
    chosen: Sequence[Segment], str_tokens: Sequence[str], messages: Sequence[Segment]
) -> tuple[Segment, ...]:
    """The segments in order, with the rest between them."""
    ordered = sorted(chosen, key=lambda s: (s.start, s.stop))
    for one, following in itertools.pairwise(ordered):
        if following.start < one.stop:
            raise ValueError(
                f"The segments {one.name!r} (tokens {one.start} to {one.stop}) and "
                f"{following.name!r} ({following.start} to {following.stop}) overlap; a token "
                "would count twice."
            )
    segments: list[Segment] = []
    at = 0
    for segment in (*ordered, None):
        start = len(str_tokens) if segment is None else segment.start
        if start > at:
            around = _around(at, start, messages)
            template = around is not None and around.kind == "template"
            name = "template" if template else "rest"
            text = "".join(str_tokens[at:start])
            segments.append(Segment(name, "", name, at, start, text))
        if segment is not None:
            segments.append(segment)
            at = segment.stop
    return tuple(segments)
