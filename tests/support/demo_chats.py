"""Chats with the demo model in which the message that an answer was copied from is known.

A log of the demo benchmark, held out, is handed to the model as the results of a tool, a few
entries a message; then it is asked for somebody's number. What it writes stands in one entry. That
this entry decides is not assumed but tried: with another number in it, one that the chat does not
hold, the model writes that number instead. Chats where it does not are left out.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from truth.demo_solver import solve

import tl_contrastive_lrp as clrp

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # demo_training is not part of the wheel

from demo_training.marked import strip  # noqa: E402
from demo_training.tasks import stream  # noqa: E402

ENTRIES = 4  # of the log, in one message


@dataclass(frozen=True)
class ChatCase:
    """A chat and what is known of it.

    prompt: as ``chat`` makes it. target: id of the number that the model writes. contrast: id of
    the right number where that is another, else of the runner-up. right: whether it is right.
    decisive: name of the message that holds the number. latest: name of the last tool result.
    rivals: how many messages hold a number of that person and field.
    """

    prompt: Any
    target: int
    contrast: int
    right: bool
    decisive: str
    latest: str
    rivals: int


def logs(seed: int, max_length: int) -> Iterator[str]:
    """Questions with their logs, of about so many tokens at most, from the held-out part."""
    for task in stream("tool", seed, held_out=True, level=1.0, max_length=max_length):
        yield strip(task.turns[0].user)[0]


def messages_of(entries: list[str], question: str) -> list[dict[str, str]]:
    """The log as tool results, and the question."""
    parts = [entries[i : i + ENTRIES] for i in range(0, len(entries), ENTRIES)]
    results = [{"role": "tool", "content": "\n".join(["Log:", *part])} for part in parts]
    return [*results, {"role": "user", "content": question}]


def theirs(entries: list[str], question: str) -> list[int]:
    """Which entries hold a number of the person and field that are asked for."""
    _, name, _, _, field = question.rstrip(".").split()
    return [i for i, row in enumerate(entries) if row.split()[1:3] == [field, name]]


def next_tokens(model: Any, prompt: Any, k: int = 1) -> list[int]:
    """The k likeliest next tokens, from the model's own logits."""
    ids = torch.as_tensor(prompt.tokens)[None]
    with torch.no_grad():
        found: list[int] = model(ids)[0, -1].topk(k).indices.tolist()
    return found


def case_of(model: Any, user: str) -> ChatCase | None:
    """The case of a log and its question; None where no entry is known to decide."""
    _, *entries, question = user.split("\n")
    before, right = re.fullmatch(r"(.*)( \d+)\"}", solve("tool", user)).groups()  # type: ignore[union-attr]

    def asked(rows: list[str]) -> Any:
        return clrp.chat(model, messages_of(rows, question), answer=before)

    prompt = asked(entries)
    target, second = next_tokens(model, prompt, 2)
    written = model.to_string(target)
    about = theirs(entries, question)
    holding = [i for i in about if entries[i].endswith(written)]
    if len(holding) != 1 or not written.strip().isdigit():
        return None
    (at,) = holding
    unused = next(n for n in range(10, 100) if str(n) not in str(prompt))
    changed = [*entries]
    changed[at] = entries[at].removesuffix(written) + f" {unused}"
    if model.to_string(next_tokens(model, asked(changed))[0]) != f" {unused}":
        return None
    results = [segment.name for segment in prompt.segments if segment.role == "tool"]
    return ChatCase(
        prompt=prompt,
        target=target,
        contrast=second if written == right else int(model.to_single_token(right)),
        right=written == right,
        decisive=results[at // ENTRIES],
        latest=results[-1],
        rivals=len({i // ENTRIES for i in about}),
    )


def chat_cases(
    model: Any, count: int, *, several: bool, seed: int = 0, max_length: int = 400
) -> tuple[list[ChatCase], int]:
    """So many chats of at least four tool results whose decisive message is known, and how many
    chats were tried for them.

    several: whether messages other than the decisive one hold a number of that person and field.
    """
    found: list[ChatCase] = []
    tried = 0
    for user in logs(seed, max_length):
        _, *entries, question = user.split("\n")
        about = theirs(entries, question)
        if len(entries) <= 3 * ENTRIES or (len({i // ENTRIES for i in about}) > 1) != several:
            continue
        tried += 1
        case = case_of(model, user)
        found += [] if case is None else [case]
        if len(found) == count:
            break
    return found, tried
