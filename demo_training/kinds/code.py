"""Code completion with several variables in scope (as HumanEval, much smaller)."""

from __future__ import annotations

import random

from ..marked import Segment, Task, Turn, mark
from ..words import CLASSES, FUNCTIONS, VARIABLES

_OPS = {"plus": "+", "minus": "-", "times": "*"}
_PLACES = ("first", "second", "third", "last")
_ASK = ("Complete the code.", "Write the last line.", "Finish this function.")


def _noise(rng: random.Random, names: list[str]) -> str:
    """A line of a body that changes nothing the answer depends on."""
    a, b = rng.choice(names), rng.choice(names)
    return rng.choice(
        (f"    print({a})", f"    assert {a} != {b}", f"    {a} = {a} {rng.choice('+-*')} {b}")
    )


def _function(rng: random.Random, level: float) -> Task:
    """`return` what a comment asks for: one parameter, a product of two, or one by its place."""
    n = rng.randint(2, 3 + round(2 * level))
    names = rng.sample(VARIABLES, n)
    head = (
        f"def {rng.choice(FUNCTIONS)}({', '.join(mark(f'p{i}', v) for i, v in enumerate(names))}):"
    )
    body = [_noise(rng, names) for _ in range(rng.randint(0, round(3 * level)))]
    family = rng.choices(("named", "pair", "place"), (2.0, 2.0, 2.0 * level))[0]
    if family == "named":
        i = rng.randrange(n)
        goal = f"    # return the {mark('want', names[i])}"
        answer = [Segment(" " + names[i], ("want", f"p{i}"), n)]
    elif family == "pair":
        i, j = rng.sample(range(n), 2)
        word = rng.choice(tuple(_OPS))
        goal = f"    # return {mark('want', names[i])} {mark('op', word)} {mark('want2', names[j])}"
        answer = [
            Segment(" " + names[i], ("want", f"p{i}"), n),
            Segment(" " + _OPS[word], ("op",), 3),
            Segment(" " + names[j], ("want2", f"p{j}"), n),
        ]
    else:
        place = rng.choice([p for p in _PLACES if p != "third" or n > 2])
        i = n - 1 if place == "last" else _PLACES.index(place)
        goal = f"    # return the {mark('want', place)} parameter"
        answer = [Segment(" " + names[i], ("want", f"p{i}"), n)]
    body.insert(rng.randint(0, len(body)), goal)
    user = rng.choice(_ASK) + "\n" + "\n".join([head, *body, "    return"])
    return Task("code", family, (Turn(user, (Segment("return"), *answer)),))


def _getter(rng: random.Random, level: float) -> Task:
    """The attribute that a method's name asks for."""
    n = rng.randint(2, 3 + round(2 * level))
    names = rng.sample(VARIABLES, n)
    order = list(range(n))
    rng.shuffle(order)
    i = rng.randrange(n)
    head = f"class {rng.choice(CLASSES)}:\n    def __init__(self, {', '.join(names)}):"
    sets = [
        f"        self.{mark('attr' if k == i else 'other', names[k])} = {names[k]}" for k in order
    ]
    method = f"    def get_{mark('want', names[i])}(self):"
    user = rng.choice(_ASK[:2]) + "\n" + "\n".join([head, *sets, method])
    answer = (Segment("return self."), Segment(names[i], ("want", "attr"), n))
    return Task("code", "getter", (Turn(user, answer),))


def _state(rng: random.Random, level: float) -> Task:
    """What a program prints after assignments, copies and reassignments."""
    n = rng.randint(2, 3 + round(2 * level))
    names = rng.sample(VARIABLES, n)
    # per variable: its value and the marks of the assignments it came from
    values: dict[str, tuple[int, tuple[str, ...]]] = {}
    lines: list[str] = []
    plan = names + [rng.choice(names) for _ in range(rng.randint(0, 1 + round(3 * level)))]
    for k, v in enumerate(plan):
        # a copy or a number must change the value, so that each assignment matters
        old = values[v][0] if v in values else None
        known = [u for u in values if u != v and values[u][0] != old]
        if known and k >= 2 and rng.random() < 0.35 * level:
            u = rng.choice(known)
            lines.append(f"{mark(f's{k}', v)}={mark(f's{k}', u)}")
            values[v] = (values[u][0], values[u][1] + (f"s{k}",))
        else:
            number = rng.choice([x for x in range(10, 100) if x != old])
            lines.append(f"{mark(f's{k}', v)}={mark(f's{k}', number)}")
            values[v] = (number, (f"s{k}",))
    wanted = rng.choice(names)
    value, by = values[wanted]
    lines.append('print(f"{' + mark("want", wanted) + '=}")')
    user = rng.choice(("What does this print?", "Run this code.")) + "\n" + "\n".join(lines)
    answer = (
        Segment(mark("name", wanted), ("want",), n),
        # one token, so that in the program, too, a value stands right after its variable
        Segment(f"={value}", ("want", "name", *by), len(plan)),
    )
    copies = len(by) - 1
    return Task("code", f"state{copies}", (Turn(user, answer),))


def make(rng: random.Random, level: float) -> Task:
    """One task; `level` in [0, 1] adds variables, distracting lines and indirection."""
    maker = rng.choices((_function, _getter, _state), (4, 2, 3))[0]
    return maker(rng, level)
