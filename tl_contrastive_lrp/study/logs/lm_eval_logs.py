"""Logs of lm-evaluation-harness: ``samples_<task>_<time>.jsonl``, written by ``--log_samples``.

Each line has a document and what was made of it: ``doc_id``, ``doc``, ``target``, ``arguments``
(the prompt and how to generate), ``resps`` (what the model wrote), ``filter`` and the metrics. The
prompt is text, with the chat template in it if there was one, or a JSON list of messages where the
model was behind a chat API. A document that went through several filters has a line for each; they
become one completion whose scores are called "filter/metric".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..benchmarks.rows import Row, json_lines
from ..cases import Verdict
from .entry import Entry, Unusable, UnusableError, one_verdict, plain_messages, verdict_of


def read_lm_eval(path: Path, score: str | None) -> Iterator[Entry | Unusable]:
    """Read the samples of lm-evaluation-harness.

    Args:
        path: The file.
        score: "filter/metric", a filter or a metric alone, whose verdict counts; None for the only
            one.

    Yields:
        The completions, and what cannot be used.
    """
    name = re.match(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT.*)?$", path.stem)
    task = name[1] if name else path.stem
    found: dict[str, Entry] = {}
    scores: dict[str, dict[str, Verdict]] = {}
    failed: list[Unusable] = []
    for row in json_lines(path):
        if not isinstance(row, Row):
            failed.append(Unusable(str(row).split(":")[0], task, "malformed", str(row)))
            continue
        id = str(row.values.get("doc_id", row.where))
        try:
            entry = _entry(id, task, row)
            known = found.setdefault(id, entry)
            if (known.completion, known.prompt, known.messages) != (
                entry.completion, entry.prompt, entry.messages,
            ):  # fmt: skip
                raise UnusableError(
                    "malformed", f"{row.where}: doc_id {id} is another sample at {known.where}"
                )
            scores.setdefault(id, {}).update(_scores(row))
        except UnusableError as error:
            failed.append(Unusable(id, task, error.reason, str(error)))
    broken = {one.id for one in failed}
    for id, entry in found.items():
        if id not in broken:
            yield Entry(**{**vars(entry), "verdict": _chosen(scores[id], score)})
    yield from failed


def _entry(id: str, task: str, row: Row) -> Entry:
    values, where = row.values, row.where
    if "doc_id" not in values or not isinstance(values.get("doc"), Mapping):
        raise UnusableError("malformed", f"{where}: field 'doc_id' or 'doc' is missing")
    prompt, settings = _request(values.get("arguments"), where)
    if not isinstance(settings, Mapping):
        raise UnusableError(
            "malformed", f"{where}: a likelihood was asked for, so nothing was written"
        )
    messages = None
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]  # a chat API's request, as one JSON text
        try:
            messages = plain_messages(json.loads(prompt), where)
        except ValueError as error:
            if isinstance(error, UnusableError):
                raise
            raise UnusableError("malformed", f"{where}: arguments hold no messages") from error
    elif not isinstance(prompt, str) or not prompt:
        raise UnusableError("malformed", f"{where}: field 'arguments' has no prompt")
    target = values.get("target")
    return Entry(
        id=id,
        benchmark=task,
        where=where,
        completion=_response(values.get("resps"), where),
        verdict=Verdict.unchecked("not read yet"),
        messages=messages,
        prompt=None if messages else prompt,
        reference=target if isinstance(target, str) else None,
        row=values["doc"],
        package="lm-evaluation-harness",
        decoding=settings,
    )


def _request(arguments: Any, where: str) -> tuple[Any, Any]:
    """The prompt and the settings of the only request."""
    requests = list(arguments.values()) if isinstance(arguments, Mapping) else arguments
    if not isinstance(requests, list) or len(requests) != 1:
        raise UnusableError("malformed", f"{where}: field 'arguments' has not one request")
    request = requests[0]
    if isinstance(request, Mapping):
        return request.get("arg_0"), request.get("arg_1")
    if isinstance(request, list) and len(request) == 2:
        return request[0], request[1]
    raise UnusableError("malformed", f"{where}: field 'arguments' has no prompt and settings")


def _response(resps: Any, where: str) -> str:
    while isinstance(resps, list) and len(resps) == 1:
        resps = resps[0]
    if isinstance(resps, list):
        raise UnusableError("malformed", f"{where}: field 'resps' has {len(resps)} completions")
    if not isinstance(resps, str) or not resps:
        raise UnusableError("malformed", f"{where}: field 'resps' has no text")
    return resps


def _scores(row: Row) -> dict[str, Verdict]:
    """Verdicts by "filter/metric"; metrics that are neither 0 nor 1 say nothing."""
    metrics, name = row.values.get("metrics"), row.values.get("filter", "none")
    found = {
        f"{name}/{metric}": verdict_of(row.values[metric])
        for metric in (metrics if isinstance(metrics, list) else ())
        if metric in row.values
    }
    return {key: verdict for key, verdict in found.items() if verdict.checked}


def _chosen(scores: Mapping[str, Verdict], score: str | None) -> Verdict:
    if score is None or score in scores:
        return one_verdict(scores, score, "score")
    matching = {key: v for key, v in scores.items() if score in key.split("/", 1)}
    return one_verdict(matching or scores, None if matching else score, "score")
