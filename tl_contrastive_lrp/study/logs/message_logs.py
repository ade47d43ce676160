"""Logs of chats: OpenAI-style message lists, and the traces of GAIA2 runs.

A message list is a line of a JSONL file or an element of a JSON list: an object with ``messages``,
whose last is the assistant's, and perhaps ``tools``, ``id``, ``model``, ``usage``, ``logprobs``,
``reference`` and a verdict under ``passed``, ``correct`` or ``score``. A trace has one model call
a line, see ``benchmarks/gaia2.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..benchmarks.gaia2 import GAIA2, call_of, is_only_verdict
from ..benchmarks.rows import Row, json_lines, json_list
from ..cases import Verdict
from .entry import (
    Entry,
    Unusable,
    UnusableError,
    count_of,
    one_verdict,
    plain_messages,
    token_texts,
    verdict_of,
    written_text,
)

# Where a message list's verdict may stand.
VERDICTS = ("passed", "correct", "score")


def read_messages(path: Path, score: str | None) -> Iterator[Entry | Unusable]:
    """Read a file of message lists.

    Args:
        path: A ``.jsonl`` or ``.json`` file.
        score: The field with the verdict; None for whichever of ``VERDICTS`` there is.

    Yields:
        The completions, and what cannot be used.
    """
    rows = json_lines(path) if path.suffix.lower() == ".jsonl" else json_list(path)
    seen: set[str] = set()
    for row in rows:
        if not isinstance(row, Row):
            yield Unusable(str(row).split(":")[0], path.stem, "malformed", str(row))
            continue
        id = str(row.values.get("id", row.number))
        try:
            if id in seen:
                raise UnusableError("malformed", f"{row.where}: the id {id!r} occurs twice")
            seen.add(id)
            yield _list_entry(id, path.stem, row, score)
        except UnusableError as error:
            yield Unusable(id, path.stem, error.reason, str(error))


def _list_entry(id: str, name: str, row: Row, score: str | None) -> Entry:
    values, where = row.values, row.where
    given = values.get("messages")
    messages = plain_messages(given, where)
    if messages[-1]["role"] != "assistant" or len(messages) < 2 or not isinstance(given, list):
        raise UnusableError(
            "malformed", f"{where}: the last of several messages must be the assistant's"
        )
    tools = values.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise UnusableError("malformed", f"{where}: field 'tools' must be a list of objects")
    names = VERDICTS if score is None else (score,)
    scores = {key: verdict_of(values[key]) for key in names if key in values}
    usage, reference = values.get("usage"), values.get("reference")
    return Entry(
        id=id,
        benchmark=str(values.get("benchmark", name)),
        where=where,
        completion=written_text(given[-1], where),
        verdict=one_verdict(scores, score, "verdict"),
        messages=messages[:-1],
        tools=tuple(tools) if tools else None,
        reference=reference if isinstance(reference, str) else None,
        row=values,
        model=str(values.get("model", "")),
        prompt_tokens=count_of(usage, "prompt_tokens", "input_tokens"),
        completion_tokens=count_of(usage, "completion_tokens", "output_tokens"),
        token_texts=token_texts(values.get("logprobs")),
    )


def read_trace(path: Path, score: str | None) -> Iterator[Entry | Unusable]:
    """Read the model calls of a GAIA2 run.

    Args:
        path: ``trace.jsonl``.
        score: Not used; a trace has one verdict.

    Yields:
        The completions, and what cannot be used.
    """
    del score
    rows = list(json_lines(path))
    for row in rows:
        if not isinstance(row, Row):
            yield Unusable(str(row).split(":")[0], "gaia2", "malformed", str(row))
    whole = [row for row in rows if isinstance(row, Row)]
    recorded = [row.values["passed"] for row in whole if "passed" in row.values]
    for row in whole:
        if is_only_verdict(row):
            continue
        id = f"call {row.values.get('seq', row.number)}"
        try:
            yield _call_entry(id, row, recorded[-1] if recorded else None)
        except UnusableError as error:
            yield Unusable(id, GAIA2.name, error.reason, str(error))
        except ValueError as error:
            yield Unusable(id, GAIA2.name, "malformed", str(error))


def _call_entry(id: str, row: Row, run: object) -> Entry:
    call = call_of(row)
    passed = run if call.passed is None else call.passed
    answer = {"content": call.content, "tool_calls": call.tool_calls}
    verdict = (
        Verdict.unchecked("the trace has no verdict") if passed is None else verdict_of(passed)
    )
    return Entry(
        id=id,
        benchmark=GAIA2.name,
        where=row.where,
        completion=written_text(answer, row.where),
        verdict=verdict,
        messages=plain_messages(call.messages, row.where),
        tools=call.tools,
        row=row.values,
        model=call.model,
        prompt_tokens=count_of(call.usage, "prompt_tokens", "input_tokens"),
        completion_tokens=count_of(call.usage, "completion_tokens", "output_tokens"),
    )
