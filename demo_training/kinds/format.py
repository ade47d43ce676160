"""Format constraints: rewrite given words under several instructions (as IFEval does)."""

from __future__ import annotations

import random

from ..marked import Segment, Task, Turn, mark
from ..words import BULLETS, CLOSERS, COUNTS, JOINERS, NAMES, NOUNS


def _selection(rng: random.Random, n: int, level: float) -> tuple[str, list[int]]:
    """An instruction that picks some of n words, and the indices it picks."""
    kind = rng.choices(("all", "first", "last"), (2.0, 2.0, 1.0 * level))[0]
    if kind == "all" or n < 3:
        return f"Write {mark('n', 'all')} the words", list(range(n))
    k = rng.randint(2, n - 1)
    chosen = list(range(k)) if kind == "first" else list(range(n - k, n))
    return f"Write the {mark('side', kind)} {mark('n', COUNTS[k])} words", chosen


def make(rng: random.Random, level: float) -> Task:
    """One task; `level` in [0, 1] adds words, constraints and distracting instructions."""
    n = rng.randint(2, 3 + round(3 * level))
    nouns = rng.sample(NOUNS, n)
    given_upper, want_upper = rng.random() < 0.5, rng.random() < 0.5
    given = [w.upper() if given_upper else w for w in nouns]
    listed = ", ".join(mark(f"w{i}", w) for i, w in enumerate(given))
    intro = rng.choice(("Here are some words:", "Words:", "Look at these words:"))

    pick, chosen = _selection(rng, n, level)
    case = "upper" if want_upper else "lower"
    pick += rng.choice((" in {} case.", " using {} case.")).format(mark("case", case))

    lines = rng.random() < 0.6
    symbol = rng.choice(BULLETS if lines else JOINERS)
    if lines:
        shape = rng.choice(("Start every line with {}", "Use {} as the bullet")) + " ."
    else:
        shape = rng.choice(("Put {} between the words", "Join the words with {}")) + " ."
    instructions = [pick, shape.format(mark("symbol", symbol))]

    first, last, other = rng.sample(CLOSERS, 3)
    has_first, has_last = rng.random() < 0.4, rng.random() < 0.4
    if has_first:
        instructions.append(f"Begin with the word {mark('first', first)} .")
    if has_last:
        instructions.append(f"End with the word {mark('last', last)} .")
    if rng.random() < 0.7 * level:
        wrong = rng.choice(BULLETS if lines else JOINERS)
        instructions.append(
            rng.choice(
                (
                    f"Do not end with the word {other} .",
                    f"Do not begin with the word {other} .",
                    f"{rng.choice(NAMES)} likes {rng.choice(('upper', 'lower'))} case.",
                    f"{rng.choice(NAMES)} never uses {wrong} .",
                )
            )
        )
    rng.shuffle(instructions)
    user = f"{intro} {listed}. " + " ".join(instructions)

    words = [w.upper() if want_upper else w for w in nouns]
    answer: list[Segment] = []
    if lines:
        if has_first:
            answer += [Segment(first, ("first",), len(CLOSERS)), Segment("\n")]
        for place, i in enumerate(chosen):
            if place:
                answer.append(Segment("\n", ("n",), 2))
            answer.append(Segment(symbol, ("symbol",), len(BULLETS) if place == 0 else 1))
            decided = (f"w{i}", "case") + (("side", "n") if len(chosen) < n else ())
            answer.append(Segment(f" {words[i]}", decided, 2 * n if place == 0 else 1))
    else:
        opener = Segment(first, ("first",), len(CLOSERS)) if has_first else Segment("Result")
        answer += [opener, Segment(":")]
        for place, i in enumerate(chosen):
            if place:
                answer.append(
                    Segment(f" {symbol}", ("symbol", "n"), len(JOINERS) if place == 1 else 2)
                )
            decided = (f"w{i}", "case") + (("side", "n") if len(chosen) < n else ())
            answer.append(Segment(f" {words[i]}", decided, 2 * n if place == 0 else 1))
    if has_last:
        answer += [Segment("\n", ("n", "last"), 2), Segment(last, ("last",), len(CLOSERS))]
        turn = Turn(user, tuple(answer))
    else:
        turn = Turn(user, tuple(answer), ("n",), 2)
    return Task("format", "lines" if lines else "joined", (turn,))
