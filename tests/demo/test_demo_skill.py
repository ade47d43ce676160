"""The demo model has learnt every kind of its benchmark: it is far above a guess.

What a guess is worth is worked out here from the text of each question alone, generously: the
guesser knows the template and all but one choice. Right answers come from the solver. That the
model still fails is tested with its recorded failures, in test_demo.py.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from truth.demo_solver import solve

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # demo_training is not part of the wheel

from demo_training.marked import strip  # noqa: E402
from demo_training.tasks import KINDS, stream  # noqa: E402
from demo_training.tokenizer import chat_prompt  # noqa: E402
from demo_training.words import VARIABLES  # noqa: E402
from tl_contrastive_lrp import demo  # noqa: E402

TASKS = 80


def _log_values(user: str) -> list[int]:
    """How often each number stands, in the log, next to the field that is asked for."""
    *log, question = user.split("\n")
    field = question.rstrip(".").rsplit(" ", 1)[1]
    values = [line.rsplit(" ", 1)[1] for line in log if field in line.split()]
    return [values.count(v) for v in sorted(set(values))]


def guess(kind: str, user: str) -> float:
    """Probability that somebody who has to guess one choice guesses it right, at best."""
    if kind == "format":
        return 1 / 2  # the case of the words
    if kind == "arithmetic":
        numbers = len(re.findall(r"\d+", user))
        return 1 / (3 * math.comb(numbers, 2))  # two of the numbers and one of + - *
    if kind == "code":
        if "print(f" in user:
            return 1 / len(set(re.findall(r"\d+", user)))
        return 1 / len(set(re.findall(r"\w+", user)) & set(VARIABLES))
    counts = _log_values(user)
    return max(counts) / sum(counts)  # the commonest number of the asked field


def _right(model: object, prompt: str, answer: str) -> bool:
    """Does greedy decoding after `prompt` write `answer`?"""
    tokens = model.to_tokens(prompt + answer)
    start = model.to_tokens(prompt).shape[1]
    with torch.no_grad():
        written = model(tokens)[0, start - 1 : -1].argmax(-1)
    return torch.equal(written, tokens[0, start:])


@pytest.fixture(scope="module")
def model():
    return demo.load_demo_model()


def _held_out(kind: str) -> list[str]:
    knobs = {"held_out": True, "level": 1.0, "max_length": 700}
    tasks = itertools.islice(stream(kind, 2024, **knobs), TASKS)
    return [strip(task.turns[0].user)[0] for task in tasks]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_far_above_a_guess(model, kind):
    users = _held_out(kind)
    chances = [guess(kind, user) for user in users]
    hits = sum(_right(model, chat_prompt(user), solve(kind, user) + "<|im_end|>") for user in users)
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert hits > sum(chances) + 4 * spread, f"{hits} of {TASKS}, by guessing {sum(chances):.1f}"


@pytest.mark.slow
def test_the_number_in_a_log_is_looked_up(model):
    """Given the right call up to the number, the number itself is right more often than not."""
    hits, chances = 0, []
    for user in _held_out("tool"):
        before, number = re.fullmatch(r"(.*)( \d+)\"}", solve("tool", user)).groups()
        hits += _right(model, chat_prompt(user) + before, number)
        chances.append(guess("tool", user))
    spread = math.sqrt(sum(p * (1 - p) for p in chances))
    assert hits > sum(chances) + 4 * spread, f"{hits} of {TASKS}, by guessing {sum(chances):.1f}"
    assert hits >= TASKS / 2
