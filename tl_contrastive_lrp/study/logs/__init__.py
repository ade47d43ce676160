"""Logs that people already have: completions with their verdicts, and token ids rebuilt.

``inspect_logs``, ``lm_eval_logs`` and ``message_logs`` read one format each; ``rebuild`` finds the
token ids or refuses them.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import FileFormatError
from ...inputs.bridge import require_bridge
from ...inputs.tokens import model_name
from ..benchmarks import Benchmark, Item
from ..cases import Dropped, Provenance, Verdict
from .entry import Entry, Unusable, UnusableError
from .inspect_logs import read_inspect
from .lm_eval_logs import read_lm_eval
from .message_logs import read_messages, read_trace
from .rebuild import rebuilt

__all__ = ["KINDS", "LoggedCompletion", "completions_from_log"]

_READERS: Mapping[str, Callable[[Path, str | None], Iterator[Entry | Unusable]]] = {
    "inspect": read_inspect,
    "lm-eval": read_lm_eval,
    "messages": read_messages,
    "trace": read_trace,
}
# Kinds of log.
KINDS = tuple(_READERS)


@dataclass(frozen=True)
class LoggedCompletion:
    """A completion from a log, with its token ids.

    Attributes:
        item: What was asked.
        prompt: The whole text before the completion, chat template included.
        prompt_ids: Its token ids.
        completion: What the model wrote.
        completion_ids: Its token ids.
        verdict: What the log says of it.
        proved: Whether the log records the number or the texts of the completion's tokens, so that
            the ids are known to be those that were written. Otherwise they are those that the
            tokenizer makes of the text.
        benchmark: The log's name for the task, or the name of the benchmark that was given.
        provenance: The model and the tool, as the log names them; the given model's name where it
            names none.

    Example:
        >>> import json
        >>> from pathlib import Path
        >>> chat = [{"role": "user", "content": case.user},
        ...         {"role": "assistant", "content": case.model_answer}]
        >>> line = json.dumps({"id": "1", "messages": chat, "passed": False})
        >>> _ = Path("log.jsonl").write_text(line)
        >>> [one] = clrp.study.completions_from_log(model, "log.jsonl")
        >>> one.completion == case.model_answer, one.verdict.failed, one.proved
        (True, True, False)
    """

    item: Item
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: str
    completion_ids: tuple[int, ...]
    verdict: Verdict
    proved: bool = False
    benchmark: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))


def completions_from_log(
    model: Any,
    path: str | os.PathLike[str],
    kind: str | None = None,
    *,
    score: str | None = None,
    benchmark: Benchmark | None = None,
    enable_thinking: bool | None = None,
    prepend_bos: bool | None = None,
) -> list[LoggedCompletion | Dropped]:
    """Read the completions of a log and rebuild their token ids.

    Ids are exact or refused: ``rebuild`` lists the conditions. A refused entry is a ``Dropped``
    with the reason "tokens unknown", one that cannot be read has the reason "malformed".

    Args:
        model: A ``TransformerBridge`` of the model that wrote the completions.
        path: An Inspect log (``.eval`` or ``.json``), samples of lm-evaluation-harness
            (``.jsonl``), OpenAI-style message lists (``.jsonl`` or ``.json``), or ``trace.jsonl``
            of a GAIA2 run.
        kind: One of "inspect", "lm-eval", "messages" and "trace"; None to tell it from the file.
        score: Which verdict counts where the log has several: a scorer of Inspect, a filter or
            metric of lm-evaluation-harness, a field of message lists.
        benchmark: The benchmark whose questions were asked. Each completion then has the item with
            the same question, with its reference and checker; otherwise what the log has of it.
        enable_thinking: Whether the chat template asked the model to think; None for its default.
        prepend_bos: Whether a prompt that is logged as text begins with the BOS token.

    Returns:
        For each entry of the log, in its order, the completion or why it is dropped; lines that
        cannot be read may stand at the end. Where an item was asked several times, as in epochs,
        its later completions have ids that end in (2), (3) and so on.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file as a whole is no log of that kind, or holds no completion.
        ValueError: The kind is unknown, or cannot be told.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("log.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
        >>> clrp.study.completions_from_log(model, "log.jsonl")[0].reason
        'malformed'
    """
    require_bridge(model)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if kind is not None and kind not in _READERS:
        raise ValueError(f"unknown kind of log: {kind!r}. Use one of {', '.join(KINDS)}, or None.")
    entries = list(_READERS[kind or _kind_of(path)](path, score))
    if not entries:
        raise FileFormatError(f"{path} holds no completion.")
    known = _by_question(benchmark)
    found: list[LoggedCompletion | Dropped] = []
    for entry in entries:
        name = entry.benchmark if benchmark is None else benchmark.name
        if isinstance(entry, Unusable):
            found.append(Dropped(f"{name}/{entry.id}", name, entry.reason, entry.detail))
            continue
        try:
            prompt, prompt_ids, ids, proved = rebuilt(model, entry, enable_thinking, prepend_bos)
            item = _item(entry, benchmark, known, prompt)
        except UnusableError as error:
            found.append(Dropped(f"{name}/{entry.id}", name, error.reason, str(error)))
            continue
        provenance = Provenance(
            model=entry.model or model_name(model),
            decoding=entry.decoding,
            package=entry.package,
            source=entry.where,
        )
        found.append(
            LoggedCompletion(
                item, prompt, prompt_ids, entry.completion, ids, entry.verdict, proved, name,
                provenance,
            )
        )  # fmt: skip
    return _with_own_ids(found)


def _with_own_ids(
    found: Sequence[LoggedCompletion | Dropped],
) -> list[LoggedCompletion | Dropped]:
    """The same with ids that differ: "3", "3 (2)", "3 (3)" where one item was asked three times."""
    own: list[LoggedCompletion | Dropped] = []
    seen = set[str]()
    for one in found:
        id, n = one.id if isinstance(one, Dropped) else f"{one.benchmark}/{one.item.id}", 1
        name = id
        while name in seen:
            n += 1
            name = f"{id} ({n})"
        seen.add(name)
        if n > 1 and isinstance(one, Dropped):
            one = replace(one, id=name)
        elif n > 1 and not isinstance(one, Dropped):
            one = replace(one, item=replace(one.item, id=f"{one.item.id} ({n})"))
        own.append(one)
    return own


def _kind_of(path: Path) -> str:
    """The kind of a log, from its first object."""
    if zipfile.is_zipfile(path):
        return "inspect"
    try:
        if path.suffix.lower() == ".jsonl":
            with path.open("rb") as file:
                first = json.loads(next(line for line in file if line.strip()))
        else:
            first = json.loads(path.read_bytes())
            first = first[0] if isinstance(first, list) and first else first
    except (ValueError, StopIteration):
        first = None
    fields = set(first) if isinstance(first, Mapping) else set()
    for kind, needed in (
        ("inspect", {"eval", "samples"}),
        ("lm-eval", {"doc_id", "resps"}),
        ("trace", {"request"}),
        ("messages", {"messages"}),
    ):
        if needed <= fields:
            return kind
    raise ValueError(
        f"It cannot be told what log {path} is; give kind=, one of {', '.join(KINDS)}."
    )


_QUESTIONS = ("prompt", "question", "problem", "input")


def _by_question(benchmark: Benchmark | None) -> dict[str, Item]:
    """A benchmark's items by the text of their questions."""
    if benchmark is None:
        return {}
    items: dict[str, Item] = {}
    for item in benchmark.items():
        asked = _questions({"messages": list(item.messages or ())})
        for text in (*_questions(item.row), *asked):
            items.setdefault(text, item)
    return items


def _questions(row: Mapping[str, Any]) -> list[str]:
    """The texts of a row that may be its question."""
    texts = [row[name] for name in _QUESTIONS if isinstance(row.get(name), str)]
    for message in row["messages"] if isinstance(row.get("messages"), list) else ():
        if message.get("role") == "user" and isinstance(message.get("content"), str):
            texts.append(message["content"])
    return texts


def _item(
    entry: Entry, benchmark: Benchmark | None, known: Mapping[str, Item], prompt: str
) -> Item:
    if benchmark is None:
        return Item(
            id=entry.id,
            messages=entry.messages,
            prompt=entry.prompt,
            tools=entry.tools,
            reference=entry.reference,
            row=entry.row,
            source=entry.where,
        )
    asked = [*_questions(entry.row), *(str(m["content"]) for m in entry.messages or ())]
    for text in asked:
        if text in known:
            item = known[text]
            return replace(
                item,
                messages=entry.messages,
                prompt=entry.prompt,
                tools=entry.tools,
                instructions=tuple(phrase for phrase in item.instructions if phrase in prompt),
                source=entry.where,
            )
    raise UnusableError(
        "malformed", f"{entry.where}: {benchmark.name} has no item with this question"
    )
