"""Recall drills, for training only: sequences whose every predicted token stands further up.

A task asks one or a few questions about many lines. From that alone a model of this size does not
learn to look a value up: no head learns to attend to the token before, which a look-up needs first.
A sequence of random words said twice teaches both steps at once, within about 150 optimiser steps,
since every token of the second half rewards them. `facts` is then one step further.
"""

from __future__ import annotations

import random

from .words import APPS, FIELDS, NAMES, NOUNS, THINGS, VARIABLES

Pieces = list[tuple[str, bool]]
"""Pieces of text and whether the model has to write them."""

_WORDS = tuple(f" {w}" for group in (NAMES, NOUNS, THINGS, VARIABLES, FIELDS) for w in group)
_NUMBERS = tuple(f" {i}" for i in range(10, 100))


def twice(rng: random.Random, longest: int) -> Pieces:
    """6 to `longest` random words and numbers, and the same again.

    Now and then from few words only, so that one word before does not tell which one follows.
    """
    n = rng.randint(6, max(6, longest))
    pool = rng.sample(_WORDS + _NUMBERS, n // 2 + 2) if rng.random() < 0.3 else _WORDS + _NUMBERS
    said = [rng.choice(pool) for _ in range(n)]
    return [
        (f"<|im_start|>user\n{''.join(said)}<|im_end|>\n<|im_start|>assistant{said[0]}", False),
        ("".join(said[1:]), True),
    ]


def facts(rng: random.Random, most: int = 16) -> Pieces:
    """2 to `most` facts, and the same in another order; every value is to be written."""
    # mostly few facts: among few, a look-up is learnt soonest
    n = round(2 * (most / 2) ** (rng.random() ** 1.5))
    if rng.random() < 0.6:
        fields = rng.sample(FIELDS, rng.randint(1, 3))
        keys = rng.sample([f"{fld} {name}" for fld in fields for name in NAMES], n)
        starts = [f"{rng.choice(APPS)}: {key}" for key in keys]
        again, gap = [f" {key}" for key in keys], ""
    else:
        keys = rng.sample(VARIABLES, n)
        starts, again, gap = keys, [f"\n{key}" for key in keys], "\n"
    sign = "=" if gap else " "
    values = [f"{sign}{value}" for value in rng.sample(range(10, 100), n)]
    stated = "\n".join(f"{start}{value}" for start, value in zip(starts, values, strict=True))
    order = list(range(n))
    rng.shuffle(order)
    pieces = [(f"<|im_start|>user\n{stated}{gap}<|im_end|>\n<|im_start|>assistant", False)]
    for i in order:
        pieces += [(again[i], False), (values[i], True)]
    return pieces
