"""Recall drills: many look-ups a sequence, for training only.

A task asks one or a few questions about many lines, which teaches looking up slowly. A drill states
some facts and then repeats them in another order; every repeated value is to be predicted.
"""

from __future__ import annotations

import random

from .words import APPS, FIELDS, NAMES, VARIABLES


def make(rng: random.Random) -> list[tuple[str, bool]]:
    """Pieces of text and whether the model has to write them."""
    # mostly few facts: among few, a look-up is learnt soonest
    n = round(2 * 8 ** (rng.random() ** 2))
    if rng.random() < 0.6:
        fields = rng.sample(FIELDS, rng.randint(1, 2))
        keys = rng.sample([f"{name} {fld}" for fld in fields for name in NAMES], n)
        starts = [f"{rng.choice(APPS)}: {key}" for key in keys]
        again, gap = [f" {key}" for key in keys], ""
    else:
        keys = rng.sample(VARIABLES, n)
        starts, again, gap = [f"{key} =" for key in keys], [f"\n{key} =" for key in keys], "\n"
    values = rng.sample(range(10, 100), n)
    stated = "\n".join(f"{start} {value}" for start, value in zip(starts, values, strict=True))
    order = list(range(n))
    rng.shuffle(order)
    pieces = [(f"<|im_start|>user\n{stated}{gap}<|im_end|>\n<|im_start|>assistant", False)]
    for i in order:
        pieces += [(again[i], False), (f" {values[i]}", True)]
    return pieces
