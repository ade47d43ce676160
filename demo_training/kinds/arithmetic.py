"""Small word problems with people who gain and lose things (as MATH, much smaller)."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from ..marked import Segment, Task, Turn, mark, strip
from ..words import NAMES, THINGS

_GAIN = ("buys", "finds", "gets", "wins")
_LOSE = ("loses", "sells", "drops", "gives away")
RESULTS = 41
"""Results lie in 0..40."""


_ANY_NUMBER, _ANY_NAME = 0, -1
"""Stand for as many options as the question has numbers (names) until the question is complete."""


def _equation(
    x: int,
    op: str,
    y: int,
    tag: str,
    by_x: tuple[str, ...],
    by_op: str,
    by_y: tuple[str, ...],
    first_options: int = 1,
) -> tuple[list[Segment], int]:
    """Segments of ' x op y = z.' and z; x is a guess unless it stands in the answer already."""
    z = {"+": x + y, "-": x - y, "*": x * y}[op]
    own = (f"{tag}x", f"{tag}op", f"{tag}y")
    return [
        Segment(" " + mark(own[0], x), by_x, first_options),
        Segment(" " + mark(own[1], op), (by_op,), 3),
        Segment(" " + mark(own[2], y), by_y, _ANY_NUMBER),
        Segment(" ="),
        Segment(" " + mark(f"{tag}z", z), (*own, *by_x, by_op, *by_y), RESULTS),
        Segment("."),
    ], z


def _change(rng: random.Random, x: int) -> tuple[str, str, int]:
    """A verb, its operation and an amount that keeps the result within 0..40."""
    op = rng.choice("+-")
    if (op == "+" and x > 30) or x < 2:
        op = "-" if x > 1 else "+"
    y = rng.randint(1, min(x, 15)) if op == "-" else rng.randint(1, min(15, 40 - x))
    return rng.choice(_GAIN if op == "+" else _LOSE), op, y


def _recall(name: str, by: str, value: int, by_value: tuple[str, ...], tag: str) -> list[Segment]:
    """Segments of ' NAME has value.'; what the story says first."""
    return [
        Segment(" " + mark(f"{tag}who", name), (by,), _ANY_NAME),
        Segment(" has"),
        Segment(" " + mark(f"{tag}has", value), (*by_value, f"{tag}who"), _ANY_NUMBER),
        Segment("."),
    ]


def _finish(answer: list[Segment], tag: str, z: int, family: str, user: str) -> Task:
    # the final number repeats the last result, so it is no guess of its own
    answer = [Segment("So"), *answer, Segment(" Answer:"), Segment(f" {z}", (f"{tag}z",))]
    plain = strip(user)[0]
    real = {
        _ANY_NUMBER: len(set(re.findall(r"\d+", plain))),
        _ANY_NAME: len(set(re.findall(r"\w+", plain)) & set(NAMES)),
    }
    done = tuple(replace(s, options=real.get(s.options, s.options)) for s in answer)
    return Task("arithmetic", family, (Turn(user, done),))


def _story(rng: random.Random, level: float) -> Task:
    """One person asked about, possibly another one as a distractor, one or two changes."""
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    start = rng.randint(2, 20)
    two = rng.random() < 0.5 * level
    crowd = rng.random() < 0.2 + 0.6 * level
    mine = [f"{mark('who', who)} has {mark('x', start)} {thing}."]
    verb, op, y = _change(rng, start)
    mine.append(f"{mark('who', who)} {mark('verb', verb)} {mark('y', y)}.")
    changes = 1
    recall = _recall(who, "asked", start, ("x", "who", "asked"), "r")
    first, z = _equation(start, op, y, "a", ("rhas",), "verb", ("y", "who", "asked"))
    steps, tag = recall + first, "a"
    if two:
        verb2, op2, y2 = _change(rng, z)
        mine.append(f"{mark('who', who)} {mark('verb2', verb2)} {mark('y2', y2)}.")
        second, z = _equation(z, op2, y2, "b", ("az",), "verb2", ("y2", "who", "asked"))
        steps += second
        tag, changes = "b", 2
    lines = list(mine)
    if crowd:
        theirs = [f"{other} has {rng.randint(2, 20)} {thing}."]
        if rng.random() < 0.7:
            theirs.append(f"{other} {rng.choice(_GAIN + _LOSE)} {rng.randint(1, 15)}.")
        # merge the two stories, each in its own order
        slots = sorted(rng.sample(range(len(mine) + len(theirs)), len(theirs)))
        lines = []
        queue = {True: theirs[::-1], False: mine[::-1]}
        for i in range(len(mine) + len(theirs)):
            lines.append(queue[i in slots].pop())
    question = f"How many {thing} does {mark('asked', who)} have now?"
    family = f"story{changes}" + ("_crowd" if crowd else "")
    return _finish(steps, tag, z, family, " ".join(lines) + " " + question)


def _compare(rng: random.Random, level: float) -> Task:
    """Two or three people: how many together, or how many more."""
    a, b, c = rng.sample(NAMES, 3)
    thing = rng.choice(THINGS)
    x, y = rng.randint(2, 20), rng.randint(2, 20)
    more = rng.random() < 0.5
    if more and y > x:
        x, y = y, x
    facts = [
        f"{mark('a', a)} has {mark('x', x)} {thing}.",
        f"{mark('b', b)} has {mark('y', y)} {thing}.",
    ]
    if rng.random() < level:
        facts.append(f"{c} has {rng.randint(2, 20)} {thing}.")
    rng.shuffle(facts)
    qa, qb = mark("qa", a), mark("qb", b)
    if more:
        question = f"How many {mark('verb', 'more')} {thing} does {qa} have than {qb}?"
    else:
        question = f"How many {thing} do {qa} and {qb} have {mark('verb', 'together')}?"
    steps = _recall(a, "qa", x, ("x", "a", "qa"), "r") + _recall(b, "qb", y, ("y", "b", "qb"), "s")
    step, z = _equation(x, "-" if more else "+", y, "a", ("rhas",), "verb", ("shas",))
    family = "more" if more else "together"
    return _finish(steps + step, "a", z, family, " ".join(facts) + " " + question)


def _boxes(rng: random.Random, level: float) -> Task:
    """A product, with a distracting number at higher levels."""
    who, other = rng.sample(NAMES, 2)
    thing = rng.choice(THINGS)
    x = rng.randint(2, 8)
    y = rng.randint(2, min(8, 40 // x))
    facts = [
        f"{who} has {mark('x', x)} boxes.",
        f"{mark('verb', 'Each')} box holds {mark('y', y)} {thing}.",
    ]
    if rng.random() < 0.6 * level:
        facts.insert(rng.randrange(3), f"{other} has {rng.randint(2, 20)} {thing}.")
    question = f"How many {thing} are in the {mark('asked', 'boxes')}?"
    step, z = _equation(x, "*", y, "a", ("x", "asked"), "verb", ("y", "asked"), _ANY_NUMBER)
    return _finish(step, "a", z, "boxes", " ".join(facts) + " " + question)


def make(rng: random.Random, level: float) -> Task:
    """One task; `level` in [0, 1] adds people, steps and distracting numbers."""
    maker = rng.choices((_story, _compare, _boxes), (5, 3, 2))[0]
    return maker(rng, level)
