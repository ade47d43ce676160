"""Where passages of a prompt lie among its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..benchmarks.item import Item


def character_spans(texts: Sequence[str], spans: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """The tokens that have a character in one of the spans.

    Args:
        texts: What each token contributes to the text.
        spans: First character and the one past the last, of each.

    Returns:
        Their indices, rising.
    """
    ends = np.array(list(accumulate(map(len, texts))), dtype=np.int64)
    starts = ends - np.array([len(t) for t in texts], dtype=np.int64)
    hit = np.zeros(len(ends), dtype=bool)
    for first, stop in spans:
        hit |= (starts < stop) & (first < ends)
    return tuple(np.flatnonzero(hit).tolist())


def instruction_tokens(
    prompt: str, texts: Sequence[str], item: Item
) -> Mapping[str, tuple[tuple[int, int], ...]]:
    """The prompt's two named stretches: its instructions, and the rest of the user's last message.

    A token that shares a character with an instruction is the instruction's. Each phrase is a range
    of its own, also beside another one.

    Args:
        prompt: The whole prompt.
        texts: What each of its tokens contributes.
        item: The item, with its instructions.

    Returns:
        "instruction" and "query", each as token ranges with their ends excluded; {} where the
        tokens do not spell the prompt, so that characters have no exact place among them.
    """
    if "".join(texts) != prompt:
        return {}
    asked = prompt if item.messages is None else _question(item.messages)
    start = prompt.rfind(asked)
    if not asked or start < 0:
        return {}
    spans = []
    for phrase in item.instructions:
        at = prompt.find(phrase, start, start + len(asked))
        if phrase and at >= 0:
            spans.append((at, at + len(phrase)))
    phrases = sorted({_ranges(character_spans(texts, [span])) for span in spans} - {()})
    told = set(character_spans(texts, spans))
    rest = sorted(set(character_spans(texts, [(start, start + len(asked))])) - told)
    both = {"instruction": tuple(one for ranges in phrases for one in ranges)}
    both["query"] = _ranges(rest)
    return {name: ranges for name, ranges in both.items() if ranges}


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said last; the beginning of an answer, or a tool's result, may follow it."""
    said = [str(m.get("content") or "") for m in messages if m.get("role") == "user"]
    return said[-1] if said else ""


def _ranges(positions: Sequence[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for p in positions:
        if ranges and ranges[-1][1] == p:
            ranges[-1] = (ranges[-1][0], p + 1)
        else:
            ranges.append((p, p + 1))
    return tuple(ranges)
