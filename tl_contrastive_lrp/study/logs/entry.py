"""What every log gives for one completion, before its tokens are rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import FileFormatError
from ..cases import Verdict


@dataclass(frozen=True)
class Entry:
    """One completion of a log.

    Attributes:
        id: Unique in the log.
        benchmark: The log's name for the task.
        where: File and place in it, in words.
        completion: The text that was written, as the log has it.
        verdict: What the log says of it.
        messages: The chat before it; None where the prompt is text.
        prompt: The prompt where it is text, chat template included.
        tools: The tools that the chat offered.
        reference: The right answer.
        row: The benchmark's row, or what the log has of it.
        model: The log's name for the model.
        package: Name and version of the tool that wrote the log.
        prompt_tokens: Number of tokens of the prompt, if recorded.
        completion_tokens: Number of tokens of the completion, if recorded; an end token may be
            counted or not.
        token_texts: Text of each token of the completion, if recorded.
        decoding: How the completion was made.
    """

    id: str
    benchmark: str
    where: str
    completion: str
    verdict: Verdict
    messages: tuple[Mapping[str, Any], ...] | None = None
    prompt: str | None = None
    tools: tuple[Mapping[str, Any], ...] | None = None
    reference: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    package: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    token_texts: tuple[str, ...] | None = None
    decoding: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Unusable:
    """An entry that cannot be used, and why.

    Attributes:
        id: Its id, or its place where it has none.
        benchmark: The log's name for the task.
        reason: One of ``REASONS`` of the cases.
        detail: What is wrong, and where.
    """

    id: str
    benchmark: str
    reason: str
    detail: str


class UnusableError(FileFormatError):
    """An entry of a log that cannot be used.

    Args:
        reason: One of ``REASONS`` of the cases.
        detail: What is wrong.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def verdict_of(value: Any, reason: str = "") -> Verdict:
    """The verdict that a score means.

    Args:
        value: True, 1, 1.0 and "C" pass; False, 0, 0.0, "I" and "N" fail, and so does "P", which
            stands for partly right. Anything else says neither.
        reason: What the log says besides, for a failure.

    Returns:
        The verdict.
    """
    if isinstance(value, str):
        letter = {"C": True, "I": False, "N": False, "P": False}.get(value.strip().upper())
        if letter is None:
            return Verdict.unchecked(f"the score {value!r} says neither right nor wrong")
        value = letter
    if isinstance(value, bool | int | float) and value in (0, 1):
        return Verdict(True) if value else Verdict(False, reason or "wrong according to the log")
    return Verdict.unchecked(f"the score {value!r} says neither right nor wrong")


def one_verdict(scores: Mapping[str, Verdict], score: str | None, what: str) -> Verdict:
    """The verdict of a named score, or of all where they agree.

    Args:
        scores: Verdicts by the name of the score.
        score: The name to take; None for the only one.
        what: What names them in this log: "scorer".

    Returns:
        The verdict; unchecked where there is none of that name, or several disagree.
    """
    if score is not None:
        if score in scores:
            return scores[score]
        known = ", ".join(map(repr, scores)) or "none"
        return Verdict.unchecked(f"the log has no {what} {score!r}; it has {known}")
    if not scores:
        return Verdict.unchecked(f"the log has no {what}")
    checked = [verdict for verdict in scores.values() if verdict.checked]
    if not checked:
        return next(iter(scores.values()))
    if len({verdict.passed for verdict in checked}) > 1:
        names = ", ".join(map(repr, scores))
        return Verdict.unchecked(f"several {what}s disagree; choose one with score=: {names}")
    return checked[0]


def plain_messages(messages: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Messages as chat templates take them: texts as contents, arguments of tools as objects.

    Args:
        messages: Messages as OpenAI, Inspect and others write them.
        where: Their place, for messages of errors.

    Returns:
        Dicts with role and content and, where there are any, tool_calls, name and tool_call_id.

    Raises:
        UnusableError: A message has no role, or holds something other than text.
    """
    import json

    if not isinstance(messages, list | tuple) or not messages:
        raise UnusableError("malformed", f"{where}: messages must be a list that is not empty")
    plain = []
    for number, message in enumerate(messages, 1):
        place = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UnusableError("malformed", f"{place} has no role")
        kept: dict[str, Any] = {"role": message["role"], "content": _text(message, place)}
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(function, str):  # Inspect: {"function": name, "arguments": {...}}
                function = {"name": function, "arguments": call.get("arguments")}
            if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
                raise UnusableError("malformed", f"{place} has a tool call without a function")
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError as error:
                    raise UnusableError(
                        "malformed", f"{place}: arguments of a tool call are no JSON ({error})"
                    ) from error
            calls.append(
                {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            )
        if calls:
            kept["tool_calls"] = calls
        if message["role"] == "tool":
            for name in ("name", "tool_call_id"):
                if isinstance(message.get(name), str):
                    kept[name] = message[name]
            if isinstance(message.get("function"), str):
                kept["name"] = message["function"]
        plain.append(kept)
    return tuple(plain)


def _text(message: Mapping[str, Any], place: str) -> str:
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type", "part") if isinstance(part, Mapping) else type(part).__name__
            raise UnusableError(
                "tokens unknown", f"{place} holds a {kind}; only texts can become tokens again"
            )
        texts.append(part["text"])
    return "".join(texts)


def written_text(message: Mapping[str, Any], where: str) -> str:
    """The text of an answer, where nothing of it was parsed away.

    Args:
        message: The assistant's message.
        where: Its place, for messages of errors.

    Returns:
        The text.

    Raises:
        UnusableError: Thoughts or tool calls were taken out of the text, or there is none.
    """
    if message.get("tool_calls"):
        raise UnusableError(
            "tokens unknown",
            f"{where}: the log has the answer's tool calls parsed, not the text that was written",
        )
    if message.get("reasoning_content") or message.get("reasoning"):
        raise UnusableError(
            "tokens unknown",
            f"{where}: the log has the thoughts apart from the answer, not the text that was "
            "written",
        )
    text = _text(message, where)
    if not text:
        raise UnusableError("malformed", f"{where}: the answer is empty")
    return text


def count_of(usage: Any, *names: str) -> int | None:
    """A recorded number of tokens.

    Args:
        usage: What the log calls usage.
        names: The names under which it may stand.

    Returns:
        The first that is a positive whole number; None if there is none.
    """
    for name in names:
        value = usage.get(name) if isinstance(usage, Mapping) else None
        if type(value) is int and value > 0:
            return value
    return None


def token_texts(logprobs: Any) -> tuple[str, ...] | None:
    """The texts of a completion's tokens from recorded log-probabilities.

    Args:
        logprobs: What OpenAI and Inspect call logprobs: ``{"content": [{"token": ...}, ...]}``.

    Returns:
        The texts; None if they are not recorded.
    """
    content = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(content, list) or not content:
        return None
    texts = [one.get("token") for one in content if isinstance(one, Mapping)]
    if len(texts) != len(content) or not all(isinstance(text, str) for text in texts):
        return None
    return tuple(str(text) for text in texts)
