"""Where the parts of a chat lie in the text that a chat template makes of them, exactly.

Templates are programs: they strip, escape, move and leave out. So the parts are not searched for.
The chat is rendered a second time with every character of a part replaced by a private character
of its own, one for one. White space, quotes and tags stay, so that the template does the same with
them. The second text must be the first, once every private character is changed back; then each
private character shows where its original went. White space at a part's ends is told from the
template's own by rendering without it. Where a template does something that this cannot follow,
an error says so; no span is guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError

# The markers between which a model thinks; the template may treat them in its own way.
THINKING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
_TAG = re.compile(r"</?[^<>\s]{1,40}>|<\|[^<>]{1,40}\|>|\[/?[A-Z_]{1,40}\]")
_KEPT = frozenset("\"'\\{}<>&")  # templates that write JSON or HTML escape some of these
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class Span:
    """A part of a message, where the template has put it.

    Attributes:
        message: Index of the message.
        role: The message's role.
        kind: As ``Segment.kind``.
        label: The tool's name, for a tool call or result that has one.
        start, stop: Characters of the rendered text.
    """

    message: int
    role: str
    kind: str
    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Slot:
    """A place in a copy of the messages that a text is put into."""

    index: int


@dataclass(frozen=True)
class _Joined:
    """A text made of several."""

    parts: tuple[object, ...]


@dataclass
class _Part:
    """A part of a message: one text, or all texts of a tool call or of structured content."""

    message: int
    role: str
    kind: str
    label: str
    slots: list[int]
    value: Any = None  # arguments of a tool call or structured content

    @property
    def whole(self) -> str:
        return f"message {self.message + 1} (role {self.role!r})"


@dataclass
class _Chat:
    """The messages with a slot for each text, and the texts."""

    texts: list[str] = field(default_factory=list)
    parts: list[_Part] = field(default_factory=list)
    messages: list[Any] = field(default_factory=list)

    def slot(self, text: str) -> _Slot:
        self.texts.append(text)
        return _Slot(len(self.texts) - 1)

    def part(self, message: int, role: str, kind: str, text: str, label: str = "") -> _Slot:
        slot = self.slot(text)
        self.parts.append(_Part(message, role, kind, label, [slot.index]))
        return slot

    def structured(self, part: _Part, value: Any) -> Any:
        """A copy of a JSON value with a slot for each text in it, keys included."""
        if isinstance(value, str):
            slot = self.slot(value)
            part.slots.append(slot.index)
            return slot
        if isinstance(value, Mapping):
            return {self.structured(part, k): self.structured(part, v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.structured(part, v) for v in value]
        return value

    def filled(self, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The messages, with these texts in the slots."""
        return [_fill(message, texts) for message in self.messages]


def _fill(value: Any, texts: Sequence[str]) -> Any:
    if isinstance(value, _Slot):
        return texts[value.index]
    if isinstance(value, _Joined):
        return "".join(_fill(part, texts) for part in value.parts)
    if isinstance(value, dict):
        return {_fill(k, texts): _fill(v, texts) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill(v, texts) for v in value]
    return value


def thinking_parts(text: str, opened: bool = False) -> Iterator[tuple[str, str]]:
    """What an assistant wrote, as ("thinking" | "tag" | "assistant", text), in order.

    Args:
        text: The text.
        opened: Whether it begins inside of a thought, which the prompt has opened.
    """
    tags = next((t for t in THINKING_TAGS if t[0] in text or t[1] in text), None)
    if tags is None:
        if text:
            yield ("thinking" if opened else "assistant"), text
        return
    begin, end = tags
    # A thought that ends before one begins was opened before the text.
    inside = opened or -1 < text.find(end) < (text.find(begin) % (len(text) + 1))
    while text:
        piece, tag, text = text.partition(end if inside else begin)
        if piece:
            yield ("thinking" if inside else "assistant"), piece
        if tag:
            yield "tag", tag
            inside = not inside


def _chat_of(messages: Sequence[Mapping[str, Any]]) -> _Chat:
    """Put slots into the messages.

    Raises:
        PromptError: A message is malformed.
    """
    chat = _Chat()
    for index, message in enumerate(messages):
        role = message["role"]
        copy: dict[str, Any] = {}
        for key, value in message.items():
            if value is None:
                continue
            if key == "content":
                copy[key] = _content(chat, index, role, value, str(message.get("name") or ""))
            elif key in _THINKING_KEYS and role == "assistant" and isinstance(value, str):
                copy[key] = chat.part(index, role, "thinking", value)
            elif key == "tool_calls":
                copy[key] = [_tool_call(chat, index, role, call) for call in value]
            else:
                copy[key] = value
        chat.messages.append(copy)
    return chat


def _kind_of(role: str) -> str:
    return {
        "system": "system", "developer": "system", "assistant": "assistant", "model": "assistant",
        "tool": "tool result", "function": "tool result", "ipython": "tool result",
    }.get(role, "user")  # fmt: skip


def _content(chat: _Chat, index: int, role: str, value: Any, name: str) -> Any:
    kind = _kind_of(role)
    label = name if kind == "tool result" else ""
    if isinstance(value, str):
        if kind != "assistant":
            return chat.part(index, role, kind, value, label)
        pieces: list[object] = []
        for which, text in thinking_parts(value):
            pieces.append(text if which == "tag" else chat.part(index, role, which, text))
        return _Joined(tuple(pieces))
    if isinstance(value, list) and all(isinstance(v, Mapping) and "type" in v for v in value):
        if any(not isinstance(v.get("text"), str) for v in value):
            raise PromptError(
                f"Message {index + 1} (role {role!r}) holds something other than text. Give texts "
                "only: relevance is that of token embeddings."
            )
        return [{**v, "text": chat.part(index, role, kind, v["text"], label)} for v in value]
    part = _Part(index, role, kind, label, [], value)
    chat.parts.append(part)
    return chat.structured(part, value)


def _tool_call(chat: _Chat, index: int, role: str, call: Any) -> Any:
    called = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(called, Mapping) or not isinstance(called.get("name"), str):
        raise PromptError(
            f"A tool call of message {index + 1} has no name; write "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}.'
        )
    arguments = called.get("arguments", called.get("parameters"))
    part = _Part(index, role, "tool call", called["name"], [], arguments)
    chat.parts.append(part)
    copy = {
        key: chat.structured(part, value) if key in ("name", "arguments", "parameters") else value
        for key, value in called.items()
    }
    return {**call, "function": copy} if "function" in call else copy


def message_spans(messages: Sequence[Mapping[str, Any]], render: Render) -> tuple[str, list[Span]]:
    """Render a chat, and find its messages' parts in the text.

    Args:
        messages: The messages.
        render: Applies the chat template to messages. Called several times, with texts changed.

    Returns:
        The rendered text, and the parts in the order of the text, without overlap. Parts without
        text have no span, and neither have thoughts that the template leaves out.

    Raises:
        PromptError: The template leaves out, repeats, cuts or rewrites a message.
    """
    chat = _chat_of(messages)
    text = render([dict(message) for message in messages])
    places = _places(chat, text, render)
    found = []
    for part in chat.parts:
        spans = [
            span
            for slot in part.slots
            if (span := _slot_span(chat, part, slot, text, places, render)) is not None
        ]
        if spans:
            span = (min(start for start, _ in spans), max(stop for _, stop in spans))
            found.append((span, part))
        elif part.kind != "thinking" and any(chat.texts[slot].strip() for slot in part.slots):
            raise PromptError(
                f"The chat template leaves out the {part.kind} of {part.whole}, so it is not in "
                "the prompt. Leave it out of the messages, or put its text where the template "
                "keeps it."
            )
    found.sort(key=lambda pair: pair[0])
    spans_of = []
    for at, ((start, stop), part) in enumerate(found):
        low = found[at - 1][0][1] if at else 0
        high = found[at + 1][0][0] if at + 1 < len(found) else len(text)
        if stop > high:
            raise PromptError(
                f"The chat template mixes {part.whole} with {found[at + 1][1].whole}: they have no "
                "spans of their own."
            )
        if part.value is not None or part.kind == "tool call":
            start, stop = _json_around(text, part, start, stop, low, high)
        spans_of.append(Span(part.message, part.role, part.kind, part.label, start, stop))
    return text, spans_of


def _places(chat: _Chat, text: str, render: Render) -> dict[tuple[int, int], int]:
    """Where the characters of the texts went: (slot, index) → index in the rendered text."""
    error = ""
    for n_edge in (None, 2):
        private: dict[str, tuple[int, int]] = {}
        texts = _private_texts(chat.texts, text, private, n_edge)
        try:
            changed = render(chat.filled(texts))
        except PromptError as refused:  # it looks at the letters of a message
            error = str(refused)
            continue
        originals = {code: chat.texts[slot][i] for code, (slot, i) in private.items()}
        back = "".join([originals.get(c, c) for c in changed])
        if back == text:
            places: dict[tuple[int, int], int] = {}
            for at, c in enumerate(changed):
                if c in private:
                    if private[c] in places:
                        where = next(p for p in chat.parts if private[c][0] in p.slots)
                        raise PromptError(f"The chat template repeats the text of {where.whole}.")
                    places[private[c]] = at
            return places
        at = next((i for i, (a, b) in enumerate(zip(back, text, strict=False)) if a != b), 0)
        error = f"near {text[max(at - 20, 0) : at + 20]!r}"
    raise PromptError(
        "The chat template rewrites the messages' letters, or writes something else depending on "
        f"them, so that their places in the prompt cannot be told ({error}). Render the chat "
        "yourself (tokenizer.apply_chat_template) and give its ids."
    )


def _private_texts(
    texts: Sequence[str], rendered: str, private: dict[str, tuple[int, int]], n_edge: int | None
) -> list[str]:
    """The texts with private characters; ``private`` is filled with what each stands for."""
    used = {c for c in rendered if c >= "\ue000"}
    codes = (chr(code) for block in _PRIVATE for code in block if chr(code) not in used)
    replaceable = [_replaceable(text) for text in texts]
    total, limit = sum(map(len, replaceable)), sum(map(len, _PRIVATE)) - len(used)
    if n_edge is None and total > limit:
        n_edge = max(1, limit // (2 * len(texts)))
    changed = []
    for slot, (text, indices) in enumerate(zip(texts, replaceable, strict=True)):
        letters = list(text)
        for i in indices if n_edge is None else sorted({*indices[:n_edge], *indices[-n_edge:]}):
            code = next(codes, None)
            if code is None:
                raise PromptError(f"The chat has too many messages ({len(texts)} texts).")
            private[code], letters[i] = (slot, i), code
        changed.append("".join(letters))
    return changed


def _replaceable(text: str) -> list[int]:
    """Characters that a template has no reason to look at."""
    tagged = {i for match in _TAG.finditer(text) for i in range(*match.span())}
    return [
        i
        for i, c in enumerate(text)
        if c.isprintable() and not c.isspace() and c not in _KEPT and i not in tagged
    ]


def _slot_span(
    chat: _Chat,
    part: _Part,
    slot: int,
    text: str,
    places: Mapping[tuple[int, int], int],
    render: Render,
) -> tuple[int, int] | None:
    """Where a slot's text is in the rendered text; None if it has no characters there."""
    own = chat.texts[slot]
    indices = _replaceable(own)
    if not own.strip():
        return None
    if not indices:
        return _span_by_stand_in(chat, part, slot, text, render)
    seen = [(i, places[slot, i]) for i in (indices[0], indices[-1]) if (slot, i) in places]
    if not seen:
        if any((slot, i) in places for i in indices):
            raise _cut(part)
        return None
    if len(seen) < 2:
        raise _cut(part)
    (first, start), (last, stop) = seen[0], seen[-1]
    core = own[first : last + 1]
    written = next((w for w in _forms(core) if text[start : start + len(w)] == w), None)
    if written is None or start + len(written) != stop + 1:
        raise _cut(part)
    before, after = own[:first], own[last + 1 :]
    start -= _kept(chat, part, slot, text, before, start, render, left=True)
    stop = stop + 1 + _kept(chat, part, slot, text, after, stop + 1, render, left=False)
    return start, stop


def _cut(part: _Part) -> PromptError:
    return PromptError(
        f"The chat template cuts or rewrites the {part.kind} of {part.whole}, so it has no exact "
        "span in the prompt. Render the chat yourself (tokenizer.apply_chat_template) and give its "
        "ids."
    )


def _forms(text: str) -> list[str]:
    """A text as templates write it: as it is, or inside a JSON string."""
    return [text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]]


def _kept(
    chat: _Chat,
    part: _Part,
    slot: int,
    text: str,
    edge: str,
    at: int,
    render: Render,
    *,
    left: bool,
) -> int:
    """How many characters next to ``at`` are the part's own edge, which was not replaced."""
    own = chat.texts[slot]
    solid = edge.lstrip() if left else edge.rstrip()
    space = edge[: len(edge) - len(solid)] if left else edge[len(solid) :]
    n_space = 0  # characters of the space that the template keeps
    if space:
        texts = list(chat.texts)
        texts[slot] = own[len(space) :] if left else own[: len(own) - len(space)]
        n_space = len(text) - len(render(chat.filled(texts)))
    # The longest first: an escaped sign ends with the sign itself.
    for sign, blank in reversed(list(zip(_forms(solid), _forms(space), strict=True))):
        if not 0 <= n_space <= len(blank):
            continue
        kept = blank[len(blank) - n_space :] + sign if left else sign + blank[:n_space]
        there = text[at - len(kept) : at] if left else text[at : at + len(kept)]
        if there == kept:
            return len(kept)
    raise _cut(part)


def _span_by_stand_in(
    chat: _Chat, part: _Part, slot: int, text: str, render: Render
) -> tuple[int, int] | None:
    """Find a text without replaceable characters by putting one in its whole place."""
    stand_in = next(chr(c) for c in _PRIVATE[2] if chr(c) not in text)
    texts = list(chat.texts)
    texts[slot] = stand_in
    changed = render(chat.filled(texts))
    if stand_in not in changed:
        return None
    before, _, after = changed.partition(stand_in)
    start, stop = len(before), len(text) - len(after)
    own = text[start:stop]
    accepted = {w for t in (chat.texts[slot], chat.texts[slot].strip()) for w in _forms(t)}
    if stand_in in after or own not in accepted or before + own + after != text:
        raise _cut(part)
    return (start, stop) if own else None


def _json_around(
    text: str, part: _Part, start: int, stop: int, low: int, high: int
) -> tuple[int, int]:
    """The whole tool call or structured content around the texts that were found of it.

    Raises:
        PromptError: Its last value is not found.
    """
    begin = start if part.kind == "tool call" else low
    found = ((text.find(w, begin, high), w) for w in _written(part.value))
    at, written = next((pair for pair in found if pair[0] >= 0), (-1, ""))
    if at < 0 and (last := _last_value(part.value)) is not None:  # written value by value
        ends = []
        for form in {*_written(last), json.dumps(last)}:
            reach = len(form) if isinstance(last, Mapping | list | tuple) else 0
            if (end := text.find(form, max(start, stop - reach), high)) >= 0:
                ends.append((end, form))
        if not ends:
            raise _cut(part)
        at, written = min(ends)
    if at >= 0:
        start, stop = min(start, at), max(stop, at + len(written))
    decoder = json.JSONDecoder()
    for match in reversed(list(re.finditer(r"\{", text[low : start + 1]))):
        at = low + match.start()
        try:
            _, end = decoder.raw_decode(text, at)
        except ValueError:
            continue
        if stop <= end <= high:
            return at, end
    return start, stop


def _written(value: Any) -> Iterator[str]:
    """A JSON value in the ways in which templates write it."""
    if value is None:
        return
    if isinstance(value, str):
        yield from _forms(value)
        return
    for ascii_only in (False, True):
        yield json.dumps(value, ensure_ascii=ascii_only)
        yield json.dumps(value, ensure_ascii=ascii_only, separators=(",", ":"))
        for indent in (2, 4):
            yield json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    yield str(value)


def _last_value(value: Any) -> Any:
    """The last value in a structure; None if it is a text, whose characters were followed."""
    if not isinstance(value, Mapping | list | tuple) or not value:
        return None
    last = list(value.values() if isinstance(value, Mapping) else value)[-1]
    return None if isinstance(last, str) else last
