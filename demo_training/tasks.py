"""The benchmark: four kinds of task, seeded, in two parts that cannot overlap."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

from .kinds import arithmetic, code, format, tool
from .marked import Task

KINDS = ("format", "arithmetic", "code", "tool")
_SHORT: dict[str, Callable[[random.Random, float], Task]] = {
    "format": format.make,
    "arithmetic": arithmetic.make,
    "code": code.make,
}


def make_task(
    kind: str,
    rng: random.Random,
    *,
    level: float = 1.0,
    max_length: int = 1100,
    turns: int = 1,
    few: bool = True,
    held_out: bool = True,
) -> Task:
    """Draw one task of a kind from one part of the benchmark.

    level: difficulty in [0, 1]. max_length: longest log in tokens, about (kind "tool").
    turns: questions per log; few: few
    fields in it (both kind "tool"). held_out: which part to draw from.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; the kinds are {', '.join(KINDS)}")
    while True:
        if kind == "tool":
            # log-uniform: mostly short logs, all lengths
            length = round(math.exp(rng.uniform(math.log(30), math.log(max(31, max_length)))))
            task = tool.make(rng, level, length, turns, few)
        else:
            task = _SHORT[kind](rng, level)
        if task.held_out == held_out:
            return task


def stream(kind: str, seed: int, **knobs: object) -> Iterator[Task]:
    """An endless, seeded stream of tasks of one kind (see `make_task` for the knobs)."""
    rng = random.Random(f"{kind}/{seed}")
    while True:
        yield make_task(kind, rng, **knobs)  # type: ignore[arg-type]
