"""Training batches: a seeded stream that can be taken up again at any batch."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from . import drill
from .marked import Task, strip
from .tasks import KINDS, make_task

PROMPT_WEIGHT = 0.3
"""Loss weight of a question's token; only a share of them is predicted at all, see `_rows`."""
PROMPT_SHARE = 0.12

_POOL = {"format": 240, "arithmetic": 200, "code": 240, "tool": 60}
"""Tasks of each kind in one pool of the stream."""

PHASES = {"twice": (600, 0, False), "drills": (120, 300, True), "tasks": (20, 40, True)}
"""By phase of the training: sequences said twice and lists of facts in one pool; tasks or none."""

_TWICE_FIRST, _TWICE_LAST = 24, 200
"""Longest sequence said twice, in words, at the beginning and at the end of the curriculum."""


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations and the places whose next token is predicted.

    ids: [batch, pos]. rows, columns: [n] indices of the predicting places. weights: [n].
    """

    ids: Tensor
    rows: Tensor
    columns: Tensor
    weights: Tensor


def encode(tokenizer: Tokenizer, task: Task, context: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation in the chat format, and which of them the model has to write.

    Turns that no longer fit into `context` are left out.
    """
    ids: list[int] = []
    written: list[bool] = []
    for turn in task.turns:
        user = strip(turn.user)[0]
        ask = tokenizer(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        reply = tokenizer(f"{turn.answer_text}<|im_end|>")["input_ids"]
        newline = tokenizer("\n")["input_ids"]
        if len(ids) + len(ask) + len(reply) > context:
            break
        ids += ask + reply + newline
        written += [False] * len(ask) + [True] * len(reply) + [False] * len(newline)
    return ids[:context], written[:context]


def _encode_drill(tokenizer: Tokenizer, pieces: drill.Pieces) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    written: list[bool] = []
    for text, write in pieces:
        piece = tokenizer(text)["input_ids"]
        ids += piece
        written += [write] * len(piece)
    return ids, written


def _pool(
    tokenizer: Tokenizer, seed: int, number: int, progress: float, context: int, phase: str
) -> list:
    """All conversations of one pool; harder and longer as `progress` goes from 0 to 1."""
    rng = random.Random(f"train/{seed}/{number}")
    twice, facts, tasks = PHASES[phase]
    drills = [
        drill.twice(rng, round(_TWICE_FIRST + progress * (_TWICE_LAST - _TWICE_FIRST)))
        for _ in range(twice)
    ]
    drills += [drill.facts(rng) for _ in range(facts)]
    made = []
    if tasks:
        level = min(1.0, 0.3 + progress)
        longest = 60 * (context * 0.9 / 60) ** min(1.0, progress)
        for kind in KINDS:
            for _ in range(_POOL[kind]):
                task = make_task(
                    kind,
                    rng,
                    level=rng.uniform(0.0, level),
                    max_length=round(longest),
                    turns=rng.randint(5, 12),
                    held_out=False,
                )
                made.append(encode(tokenizer, task, context))
    made += [_encode_drill(tokenizer, pieces) for pieces in drills]
    made = [one for one in made if 0 < len(one[0]) <= context]
    made.sort(key=lambda one: len(one[0]))
    return made


def _collate(part: list, rng: random.Random, pad: int) -> Batch:
    longest = max(len(ids) for ids, _ in part)
    ids = torch.full((len(part), longest), pad)
    rows, columns, weights = [], [], []
    for r, (one, written) in enumerate(part):
        ids[r, : len(one)] = torch.tensor(one)
        for c in range(len(one) - 1):
            if written[c + 1] or rng.random() < PROMPT_SHARE:
                rows.append(r)
                columns.append(c)
                weights.append(1.0 if written[c + 1] else PROMPT_WEIGHT)
    return Batch(ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(weights))


class Stream:
    """Batches of about `tokens_per_batch` tokens, all of similar length.

    The state is two numbers and the knobs with which the current pool was made, so that a
    stream restored from `state()` yields the same batches as one that was never stopped.
    """

    def __init__(
        self, tokenizer: Tokenizer, seed: int, tokens_per_batch: int, context: int
    ) -> None:
        self._tokenizer, self._seed = tokenizer, seed
        self._tokens, self._context = tokens_per_batch, context
        self._pool_number, self._next, self._progress = 0, 0, 0.0
        self._phase = "tasks"
        self._batches: list | None = None

    def state(self) -> dict[str, float | str]:
        return {
            "pool": self._pool_number,
            "next": self._next,
            "progress": self._progress,
            "phase": self._phase,
        }

    def restore(self, state: dict[str, float | str]) -> None:
        self._pool_number, self._next = int(state["pool"]), int(state["next"])
        self._progress, self._phase = float(state["progress"]), str(state["phase"])
        self._batches = None

    def _build(self) -> None:
        made = _pool(
            self._tokenizer,
            self._seed,
            self._pool_number,
            self._progress,
            self._context,
            self._phase,
        )
        parts, part = [], []
        for one in made:
            if part and (len(part) + 1) * len(one[0]) > self._tokens:
                parts.append(part)
                part = []
            part.append(one)
        parts.append(part)
        random.Random(f"order/{self._seed}/{self._pool_number}").shuffle(parts)
        self._batches = parts

    def batch(self, progress: float, phase: str = "tasks") -> Batch:
        """The next batch; the knobs are used when a new pool begins.

        progress: of the curriculum, in [0, 1]. phase: one of `PHASES`.
        """
        if self._batches is not None and self._next == len(self._batches):
            self._pool_number, self._next, self._batches = self._pool_number + 1, 0, None
        if self._batches is None:
            if self._next == 0:
                self._progress, self._phase = progress, phase
            self._build()
        assert self._batches is not None
        part = self._batches[self._next]
        rng = random.Random(f"rows/{self._seed}/{self._pool_number}/{self._next}")
        self._next += 1
        return _collate(part, rng, self._tokenizer.pad_token_id)
