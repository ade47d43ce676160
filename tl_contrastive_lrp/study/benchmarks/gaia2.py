"""GAIA2: scenarios for agents, and the model calls of runs that others made.

A scenario cannot be checked here: that takes its own environment. Two kinds of file are read:

- The published table (id, scenario_id, split, data): its items are the user's first messages, and
  no completion of them can be checked.
- ``trace.jsonl`` of a run, one model call a line (``request`` with messages and tools, and
  ``response`` or ``raw_response``): its items are the calls. A call's own completion has the
  verdict that the trace records: ``passed``, true or false, on the line itself, or on the last
  line that has it, which speaks for the whole run. Any other completion is unchecked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import FileFormatError
from ..cases import Verdict
from .item import Item
from .published import OnError, Published
from .rows import Row, Table


@dataclass(frozen=True)
class Call:
    """One model call of a trace.

    Attributes:
        messages: The chat that was asked.
        tools: The tools that it offered.
        model: The model's name in the request.
        content: The text of the answer; None where it has none.
        tool_calls: Calls of tools that a server parsed out of the answer; their text is lost.
        usage: The recorded numbers of tokens.
        passed: The verdict on this line, if there is one.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None
    model: str
    content: str | None
    tool_calls: tuple[Any, ...]
    usage: Mapping[str, Any]
    passed: bool | None


class GAIA2(Published):
    """GAIA2: scenarios as published, or the calls of a run's trace.

    Args:
        rows: Rows of the table, or lines of a trace.
        limit: The most items.
        on_error: What to do with malformed rows.
    """

    name = "gaia2"
    table = Table(
        "meta-agents-research-environments/gaia2",
        "CC-BY-4.0",
        ("id", "scenario_id", "split", "data"),
        subset="execution",
        split="validation",
    )

    def __init__(
        self,
        rows: Iterable[Row | FileFormatError],
        limit: int | None = None,
        on_error: OnError = "raise",
    ) -> None:
        rows = list(rows)
        recorded = [r.values["passed"] for r in rows if isinstance(r, Row) and "passed" in r.values]
        self._run = recorded[-1] if recorded and isinstance(recorded[-1], bool) else None
        calls = (r for r in rows if not (isinstance(r, Row) and is_only_verdict(r)))
        super().__init__(calls, limit, on_error)

    def _item(self, row: Row) -> Item:
        if "request" in row.values:
            call = call_of(row)
            return Item(
                id=f"call {row.values.get('seq', row.number)}",
                messages=call.messages,
                tools=call.tools,
                row=row.values,
                source=row.where,
            )
        text = first_message(row)
        return Item(
            id=row.text("scenario_id"),
            messages=({"role": "user", "content": text},),
            row=row.values,
            source=row.where,
        )

    def check(self, item: Item, completion: str) -> Verdict:
        """The run's own verdict on its own completion; unchecked for any other."""
        if "request" not in item.row:
            return Verdict.unchecked("a scenario of GAIA2 is checked by its own environment")
        call = call_of(Row(item.row, 0, item.source))
        if completion != call.content:
            return Verdict.unchecked("the trace has the verdict on another completion")
        passed = self._run if call.passed is None else call.passed
        if passed is None:
            return Verdict.unchecked("the trace has no verdict")
        return Verdict(True) if passed else Verdict(False, "the run failed")


def is_only_verdict(row: Row) -> bool:
    """Whether a line of a trace has a verdict and no call.

    Args:
        row: The line.

    Returns:
        True if it is no item.
    """
    return "passed" in row.values and not {"request", "scenario_id"} & set(row.values)


def call_of(row: Row) -> Call:
    """The model call on a line of a trace.

    Args:
        row: The line.

    Returns:
        The call.

    Raises:
        FileFormatError: Request or answer lack what makes them one.
    """
    request = row.values.get("request")
    if not isinstance(request, Mapping) or not _are_messages(request.get("messages")):
        raise row.wrong("request", "must have messages, each with a role")
    name = "response" if "response" in row.values else "raw_response"
    answer = row.values.get(name)
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise row.wrong(name, f"is no JSON ({error})") from error
    if not isinstance(answer, Mapping):
        raise row.wrong(name, "must be an object")
    usage = answer.get("usage") or {}
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        answer = choices[0].get("message") or {}
    content = answer.get("content")
    passed = row.values.get("passed")
    if (content is not None and not isinstance(content, str)) or not isinstance(usage, Mapping):
        raise row.wrong(name, "must have a text as content and an object as usage")
    if passed is not None and not isinstance(passed, bool):
        raise row.wrong("passed", f"is {passed!r}, but must be true or false")
    tools = request.get("tools")
    return Call(
        tuple(request["messages"]),
        tuple(tools) if tools else None,
        str(request.get("model", "")),
        content,
        tuple(answer.get("tool_calls") or ()),
        usage,
        passed,
    )


def first_message(row: Row) -> str:
    """The first message that the user sends in a scenario.

    Args:
        row: A row of the published table.

    Returns:
        The message.

    Raises:
        FileFormatError: ``data`` is no JSON, or has no such event.
    """
    try:
        data = json.loads(row.text("data"))
    except ValueError as error:
        if isinstance(error, FileFormatError):
            raise
        raise row.wrong("data", f"is no JSON ({error})") from error
    events = data.get("events") if isinstance(data, Mapping) else None
    for event in events if isinstance(events, list) else ():
        action = event.get("action") if isinstance(event, Mapping) else None
        if isinstance(action, Mapping) and action.get("function") == "send_message_to_agent":
            args = action.get("args")
            for arg in args if isinstance(args, list) else ():
                if isinstance(arg, Mapping) and arg.get("name") == "content":
                    return str(arg.get("value", ""))
    raise row.wrong("data", "has no event in which the user sends the agent a message")


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in value)
    )
