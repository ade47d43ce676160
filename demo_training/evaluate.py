"""Ask a model the held-out tasks and find the first token where its answer leaves the right one."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .marked import Span, Task, strip
from .tasks import make_task
from .tokenizer import chat_prompt

END = "<|im_end|>"
USER_START = len("<|im_start|>user\n")


def held_out(
    kind: str, seed: int, count: int, max_length: int, level: float = 1.0
) -> Iterator[Task]:
    """`count` held-out tasks of one kind at difficulty `level`."""
    rng = random.Random(f"held-out/{kind}/{seed}")
    for _ in range(count):
        yield make_task(kind, rng, level=level, max_length=max_length)


@dataclass(frozen=True)
class Asked:
    """One held-out task and what the model would write, token by token.

    ids: [pos], prompt, right answer and end token. first: index in `ids` of the answer's first
    token. logits: [answer tokens, vocabulary], those that predict ids[first:], with the right
    answer's tokens before (greedy decoding sees the same until its first wrong token).
    offsets: [pos] character range of every token in `text`.
    """

    task: Task
    text: str
    ids: list[int]
    first: int
    logits: Tensor
    offsets: list[tuple[int, int]]

    @property
    def departure(self) -> int | None:
        """Index in `ids` of the first token greedy decoding gets wrong; None if it gets none."""
        wrong = self.logits.argmax(-1) != torch.tensor(self.ids[self.first :])
        return self.first + int(wrong.int().argmax()) if bool(wrong.any()) else None

    def decisive(self, index: int) -> tuple[list[int], int]:
        """Positions (all before `index`) that decide the right token there, and its options."""
        turn = self.task.turns[0]
        answer, answer_spans = strip("".join(s.text for s in turn.answer))
        start = len(self.text) - len(END) - len(answer)
        spans: list[Span] = [(n, a + USER_START, b + USER_START) for n, a, b in strip(turn.user)[1]]
        spans += [(n, a + start, b + start) for n, a, b in answer_spans]
        by, options = self._segment(self.offsets[index][1] - start)
        wanted = [(a, b) for n, a, b in spans if n in by]
        return [
            i
            for i in range(index)
            if any(self.offsets[i][0] < b and a < self.offsets[i][1] for a, b in wanted)
        ], options

    def _segment(self, end: int) -> tuple[tuple[str, ...], int]:
        """What decides the piece of the answer that holds its character `end` - 1."""
        turn, at = self.task.turns[0], 0
        for segment in turn.answer:
            at += len(strip(segment.text)[0])
            if end <= at:
                return segment.by, segment.options
        return turn.end_by, turn.end_options


@torch.no_grad()
def ask(model: PreTrainedModel, tokenizer: Tokenizer, tasks: Iterable[Task]) -> Iterator[Asked]:
    """Run every task that fits into the model's context."""
    for task in tasks:
        turn = task.turns[0]
        prompt = chat_prompt(strip(turn.user)[0])
        text = prompt + turn.answer_text + END
        coded = tokenizer(text, return_offsets_mapping=True)
        ids, first = coded["input_ids"], len(tokenizer(prompt)["input_ids"])
        if len(ids) > model.config.max_position_embeddings:
            continue
        logits = model(input_ids=torch.tensor([ids])).logits[0, first - 1 : -1].float()
        yield Asked(task, text, ids, first, logits, coded["offset_mapping"])


@torch.no_grad()
def write_greedily(
    model: PreTrainedModel, tokenizer: Tokenizer, ids: list[int], most: int = 48
) -> str:
    """Text the model writes after `ids` (end token excluded), at most `most` tokens."""
    now, end = list(ids), tokenizer.convert_tokens_to_ids(END)
    for _ in range(min(most, model.config.max_position_embeddings - len(ids))):
        token = int(model(input_ids=torch.tensor([now])).logits[0, -1].argmax())
        if token == end:
            break
        now.append(token)
    return tokenizer.decode(now[len(ids) :])
