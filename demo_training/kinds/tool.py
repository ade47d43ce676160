"""Tool calls over a long log of distractors (as GAIA2, much smaller)."""

from __future__ import annotations

import random

from ..marked import Segment, Task, Turn, mark, strip
from ..words import APPS, FIELDS, NAMES, NOUNS, TOOLS

TOKENS_PER_LINE = 6
"""About; used to turn a length in tokens into a number of lines."""


def _filler(rng: random.Random) -> str:
    """A line that says nothing about anybody's room, desk, ..."""
    a, b = rng.sample(NAMES, 2)
    noun = rng.choice(NOUNS)
    return rng.choice(
        (
            f"mail: {a} wrote to {b} about the {noun}",
            f"chat: {a} asked {b}",
            f"system: {noun} saved",
            f"calendar: {a} meets {b}",
            f"system: backup {rng.randint(10, 99)} done",
        )
    )


def make(
    rng: random.Random, level: float, length: int = 200, turns: int = 1, few: bool = True
) -> Task:
    """One task over a log of about `length` tokens.

    level: in [0, 1]; adds updates of the same fact and questions for the oldest entry.
    few: one to three fields (room, desk, ...) in the log instead of up to six, and fewer updates.
    turns: questions asked about the same log (more than one in training only).
    """
    n = max(3, length // TOKENS_PER_LINE)
    facts = max(2, min(round(n * rng.uniform(0.3, 0.8)), 90))
    keys = [(name, fld) for name in NAMES for fld in FIELDS[: 2 + round(4 * level)]]
    if rng.random() < 0.5:
        # few people, so that the same name and the same field recur with other partners
        some = rng.sample(NAMES, min(len(NAMES), max(3, facts // 3)))
        keys = [k for k in keys if k[0] in some]
    if few:
        kinds = rng.choice((1, 1, 2, 3)) if level > 0.3 else 1
        keys = [(name, fld) for fld in rng.sample(FIELDS, kinds) for name in NAMES]
        facts = min(facts, round((1 + 0.4 * level) * len(keys)))
    rng.shuffle(keys)
    keys = keys[: max(2, round(facts * rng.uniform(1.0 - 0.5 * level, 1.0)))]
    written = keys + [rng.choice(keys) for _ in range(facts - len(keys))]
    rng.shuffle(written)
    where = set(rng.sample(range(n), min(n, len(written))))
    entries: dict[tuple[str, str], list[tuple[int, int]]] = {}
    lines, k = [], 0
    for i in range(n):
        if i not in where:
            lines.append(_filler(rng))
            continue
        name, fld = written[k]
        k += 1
        before = [v for _, v in entries.get((name, fld), [])]
        value = rng.choice([v for v in range(10, 100) if v not in before])
        entries.setdefault((name, fld), []).append((i, value))
        tag = f"e{i}"
        lines.append(f"{rng.choice(APPS)}: {mark(tag, fld)} {mark(tag, name)} {mark(tag, value)}")
    log = "\n".join(lines)

    known = list(entries)
    asked = rng.sample(known, min(turns, len(known)))
    numbers = len({v for es in entries.values() for _, v in es})
    people = len({name for name, _ in known})
    made: list[Turn] = []
    for t, (name, fld) in enumerate(asked):
        age = "oldest" if rng.random() < 0.35 * level else "newest"
        i, value = entries[(name, fld)][0 if age == "oldest" else -1]
        verb = rng.choice(tuple(TOOLS))
        own = tuple(f"{x}{t}" for x in ("verb", "name", "field", "age"))
        question = (
            f"{mark(own[0], verb)} {mark(own[1], name)} "
            f"the {mark(own[3], age)} {mark(own[2], fld)}."
        )
        user = f"Log:\n{log}\n{question}" if t == 0 else question
        decided = (own[1], own[2], f"f{t}", f"n{t}", f"e{i}")
        if len(entries[(name, fld)]) > 1:
            decided += (own[3],)
        # field, name and value stand in the call as they do in the log
        answer = (
            Segment('{"tool": "'),
            Segment(TOOLS[verb], (own[0],), len(TOOLS)),
            Segment('", "args": "entry:'),
            Segment(" " + mark(f"f{t}", fld), (own[2],), len(FIELDS)),
            Segment(" " + mark(f"n{t}", name), (own[1],), people),
            Segment(f" {value}", decided, numbers),
            Segment('"}'),
        )
        made.append(Turn(user, answer))
    age0 = "oldest" if "oldest" in made[0].user.rsplit("\n", 1)[1] else "newest"
    return Task("tool", age0, tuple(made), split_key=strip(log)[0])
