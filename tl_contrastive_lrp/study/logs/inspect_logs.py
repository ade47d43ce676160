"""Logs of Inspect: ``.eval`` (a zip of JSON files) and ``.json``.

They are read as they are published, without the package ``inspect-ai``, which brings some ninety
dependencies for what is a zip file. In it, ``header.json`` describes the evaluation and
``samples/<id>_epoch_<n>.json`` holds one sample each: input, target, messages, output, scores,
usage and, for long texts, ``attachment://`` references into its own attachments. A ``.json`` log
holds the same under "eval" and "samples".

The completion is the last answer of a sample, and its prompt the messages before it. Where the
model event with that answer is recorded, messages and tools are those of the event, which are what
the model got; a scorer that asks a model leaves events too, with other answers. Newer logs keep the
messages of events once, under ``events_data``, and are compressed with Zstandard, which Python's
``zipfile`` reads only from 3.14 on; pyarrow decompresses it here.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...errors import FileFormatError
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


def read_inspect(path: Path, score: str | None) -> Iterator[Entry | Unusable]:
    """Read the samples of an Inspect log.

    Args:
        path: A ``.eval`` or ``.json`` file.
        score: Name of the scorer whose verdict counts; None for the only one.

    Yields:
        The completions, and what cannot be used.

    Raises:
        FileFormatError: The file as a whole cannot be read.
    """
    with path.open("rb") as raw:
        if zipfile.is_zipfile(raw):
            with zipfile.ZipFile(raw) as file:
                yield from _entries(path, *_zipped(path, _Zip(raw, file)), score)
            return
    yield from _entries(path, *_plain(path), score)


def _entries(
    path: Path, header: Mapping[str, Any], samples: Iterator[tuple[str, Any]], score: str | None
) -> Iterator[Entry | Unusable]:
    spec = header.get("eval")
    if not isinstance(spec, Mapping):
        raise FileFormatError(f"{path} is no log of Inspect: its header has no field 'eval'.")
    task = str(spec.get("task", "inspect"))
    seen: set[str] = set()
    for where, sample in samples:
        id = where
        try:
            if isinstance(sample, UnusableError):
                raise sample
            id = f"{sample.get('id', where)}"
            if sample.get("epoch", 1) != 1:
                id += f" epoch {sample['epoch']}"
            if id in seen:
                raise UnusableError("malformed", f"{where}: the id {id!r} occurs twice")
            seen.add(id)
            yield _entry(id, task, where, sample, spec, score)
        except UnusableError as error:
            yield Unusable(id, task, error.reason, str(error))


class _Zip(NamedTuple):
    """An open zip file, as bytes and as an archive."""

    raw: BinaryIO
    file: zipfile.ZipFile


def _zipped(path: Path, log: _Zip) -> tuple[Mapping[str, Any], Iterator[tuple[str, Any]]]:
    names = set(log.file.namelist())
    if "header.json" not in names:
        journal = "_journal/start.json" in names
        raise FileFormatError(
            f"{path} has no header.json: "
            + ("the evaluation was not finished." if journal else "it is no log of Inspect.")
        )

    try:
        header = _member(log, "header.json")
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{path}: header.json cannot be read ({error}).") from error
    if not isinstance(header, Mapping):
        raise FileFormatError(f"{path}: header.json is no object.")

    def samples() -> Iterator[tuple[str, Any]]:
        for name in sorted(n for n in names if re.fullmatch(r"samples/.+\.json", n)):
            where = f"{path.name}, {name}"
            try:
                yield where, _object(_member(log, name), where)
            except UnusableError as error:
                yield where, error
            except (ValueError, OSError, zipfile.BadZipFile) as error:
                yield where, UnusableError("malformed", f"{where}: it cannot be read ({error})")

    return header, samples()


_ZSTANDARD = 93  # the compression's number in a zip file


def _member(log: _Zip, name: str) -> Any:
    """The JSON value of a file in the zip.

    Raises:
        ValueError: It is damaged, or no JSON.
        zipfile.BadZipFile: It is damaged.
    """
    raw, info = log.raw, log.file.getinfo(name)
    if info.compress_type != _ZSTANDARD:
        return json.loads(log.file.read(name).decode("utf-8"))
    import pyarrow

    raw.seek(info.header_offset)
    # The local header ends with the lengths of the name and of an extra field after it.
    name_length, extra_length = struct.unpack("<HH", raw.read(30)[26:])
    raw.seek(name_length + extra_length, 1)
    packed = raw.read(info.compress_size)
    data = pyarrow.decompress(packed, info.file_size, codec="zstd", asbytes=True)
    if zlib.crc32(data) != info.CRC:
        raise zipfile.BadZipFile(f"its checksum is wrong: {name}")
    return json.loads(data.decode("utf-8"))


def _plain(path: Path) -> tuple[Mapping[str, Any], Iterator[tuple[str, Any]]]:
    try:
        log = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is no log of Inspect: no JSON ({error}).") from error
    if not isinstance(log, Mapping) or not isinstance(log.get("samples"), list):
        raise FileFormatError(f"{path} is no log of Inspect: it has no samples.")

    def samples() -> Iterator[tuple[str, Any]]:
        for number, sample in enumerate(log["samples"], 1):
            where = f"{path.name}, sample {number}"
            try:
                yield where, _object(sample, where)
            except UnusableError as error:
                yield where, error

    return log, samples()


def _object(sample: Any, where: str) -> Mapping[str, Any]:
    """A sample with its attachments put back where they belong."""
    if not isinstance(sample, Mapping):
        raise UnusableError("malformed", f"{where}: it is no object")
    attachments = sample.get("attachments") or {}

    def whole(value: Any) -> Any:
        if isinstance(value, str) and value.startswith("attachment://"):
            name = value.removeprefix("attachment://")
            if name not in attachments:
                raise UnusableError("malformed", f"{where}: its attachment {name!r} is missing")
            return attachments[name]
        if isinstance(value, Mapping):
            return {key: whole(inner) for key, inner in value.items()}
        return [whole(inner) for inner in value] if isinstance(value, list) else value

    kept = {name: sample.get(name) for name in _FIELDS if name in sample}
    resolved: dict[str, Any] = whole({**kept, "models": _model_events(sample)})
    return resolved


def _model_events(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Input, tools and output of the calls of models, with the messages put back."""
    events, data = sample.get("events"), sample.get("events_data")
    pool = data.get("messages") if isinstance(data, Mapping) else None
    found = []
    for event in events if isinstance(events, list) else ():
        if not isinstance(event, Mapping) or event.get("event") != "model":
            continue
        given = event.get("input")
        if not given and isinstance(pool, list):
            given = [m for start, end in event.get("input_refs") or () for m in pool[start:end]]
        found.append({"input": given, "tools": event.get("tools"), "output": event.get("output")})
    return found


_FIELDS = ("id", "epoch", "input", "target", "messages", "output", "scores", "metadata", "error")


def _entry(
    id: str,
    task: str,
    where: str,
    sample: Mapping[str, Any],
    spec: Mapping[str, Any],
    score: str | None,
) -> Entry:
    if sample.get("error"):
        raise UnusableError("malformed", f"{where}: the sample ended with an error")
    output = sample.get("output")
    choices = output.get("choices") if isinstance(output, Mapping) else None
    if not isinstance(output, Mapping) or not isinstance(choices, list) or not choices:
        raise UnusableError("malformed", f"{where}: field 'output' has no choices")
    choice = choices[0]
    message = choice.get("message") if isinstance(choice, Mapping) else None
    if not isinstance(message, Mapping):
        raise UnusableError("malformed", f"{where}: field 'output' has no message")
    parts = message.get("content")
    if isinstance(parts, list) and any(
        isinstance(part, Mapping) and part.get("type") == "reasoning" for part in parts
    ):
        raise UnusableError(
            "tokens unknown",
            f"{where}: the log has the thoughts apart from the answer, not the text that was "
            "written",
        )
    completion = written_text(message, where)
    before, tools = _before(sample, message, where)
    if tools is None and any(m.get("tool_calls") or m["role"] == "tool" for m in before):
        raise UnusableError(
            "tokens unknown", f"{where}: tools were called, and the log does not say which it had"
        )
    scores = {
        str(name): verdict_of(
            value.get("value") if isinstance(value, Mapping) else value,
            _first_line(value.get("explanation")) if isinstance(value, Mapping) else "",
        )
        for name, value in (sample.get("scores") or {}).items()
    }
    usage = output.get("usage")
    versions = spec.get("packages")
    version = versions.get("inspect_ai", "") if isinstance(versions, Mapping) else ""
    target = sample.get("target")
    verdict: Verdict = one_verdict(scores, score, "scorer")
    return Entry(
        id=id,
        benchmark=task,
        where=where,
        completion=completion,
        verdict=verdict,
        messages=before,
        tools=tools,
        reference=target if isinstance(target, str) else None,
        row={
            "input": sample.get("input"),
            "target": target,
            "metadata": sample.get("metadata") or {},
        },
        model=str(spec.get("model", "")),
        package=f"inspect_ai {version}".strip(),
        # What a provider reads from its cache is no part of input_tokens.
        prompt_tokens=None if count_of(usage, "input_tokens_cache_read", "input_tokens_cache_write")
        else count_of(usage, "input_tokens"),
        completion_tokens=count_of(usage, "output_tokens"),
        token_texts=token_texts(choice.get("logprobs")),
        decoding=spec["model_generate_config"]
        if isinstance(spec.get("model_generate_config"), Mapping)
        else {},
    )  # fmt: skip


def _before(
    sample: Mapping[str, Any], answer: Mapping[str, Any], where: str
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...] | None]:
    """The messages that the model got before its last answer, and the tools, if recorded."""
    for event in reversed(sample["models"]):
        if _same_answer(event["output"], answer) and event["input"]:
            tools = [
                {
                    "type": "function",
                    "function": {
                        key: tool[key]
                        for key in ("name", "description", "parameters")
                        if key in tool
                    },
                }
                for tool in event["tools"] or ()
                if isinstance(tool, Mapping)
            ]
            return plain_messages(event["input"], where), tuple(tools)
    messages = plain_messages(sample.get("messages"), where)
    last = messages[-1]
    if (
        last["role"] != "assistant"
        or last["content"] != plain_messages([answer], where)[0]["content"]
    ):
        raise UnusableError(
            "tokens unknown",
            f"{where}: the last message is not the answer in 'output', so the log does not say "
            "what the model got",
        )
    if len(messages) == 1:
        raise UnusableError("malformed", f"{where}: there is no message before the answer")
    return messages[:-1], None


def _same_answer(output: Any, answer: Mapping[str, Any]) -> bool:
    """Whether a model's output is this answer: its id where both have one, and its content."""
    choices = output.get("choices") if isinstance(output, Mapping) else None
    message = choices[0].get("message") if isinstance(choices, list) and choices else None
    if not isinstance(message, Mapping) or message.get("content") != answer.get("content"):
        return False
    return None in (message.get("id"), answer.get("id")) or message["id"] == answer["id"]


def _first_line(text: Any) -> str:
    lines = text.strip().splitlines() if isinstance(text, str) else []
    return lines[0][:200] if lines else ""
