"""How often the verdict on a map is right, from what ``real_faithfulness.py`` has measured.

``result.check`` replaces the tokens that a map names strongest by zero embeddings, and calls the
map supported, weak or contradicted by ``captured``, the share of the effect that so many tokens can
have which lies at them, with the right sign. Here that figure is computed from the stored tables as
``check`` computes it (16 strongest, and up to 16 of the tokens drawn at random), and held against
one that the check does not see: the same share of what *a random token* in their place does. A map
is called right where that share is ``RIGHT`` or more, and otherwise wrong.

Maps: AttnLRP's of every prompt, and a random one of each: 8 tokens drawn at random, with random
signs. The verdict's thresholds were chosen by hand before these figures were seen, so all prompts
judge them. Beside them stands the lowest threshold on a grid at which at most ``ALLOWED`` of
AttnLRP's wrong maps of failures are called supported.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from tl_contrastive_lrp.attribution.check.statistics import captured
from tl_contrastive_lrp.attribution.check.verdict import SUPPORTED, verdict_of

K = N_RANDOM = 16
DRAWN = 8  # tokens of a random map: the other sampled ones stand for all that it does not name
MAP = "attnlrp"
MAPS = ("map", "random map")
FAILURES = "failures"
RIGHT = 1 / 3
ALLOWED = 0.05
GRID = np.round(np.arange(0.0, 1.0, 0.05), 2)


def checked(found: Mapping[str, Any]) -> dict[str, float]:
    """``captured`` of a prompt's map and of a random one, as checked and as it is.

    Args:
        found: What ``real_faithfulness.py`` stored of the prompt.

    Returns:
        By name, without those that cannot be computed.
    """
    measured, free = found["measured"], found["ordinary"]
    zero = dict(zip(measured["pos"], measured["zero"], strict=True))
    truth = dict(zip(measured["pos"], measured["random a"], strict=True))
    score = {p: found["relevance"][MAP][p] for p in free}
    sampled = [p for p, why in zip(measured["pos"], measured["why"], strict=True)
               if why != "strongest"]  # fmt: skip
    strongest = sorted(free, key=lambda p: (-abs(score[p]), p))[:K]
    strongest = [p for p in strongest if p in zero]
    draw = random.Random(found["number"])
    named = draw.sample(sampled, min(DRAWN, len(sampled)))
    signs = {p: draw.choice([-1.0, 1.0]) for p in named}
    rows = {}
    for name, tokens, relevance in zip(MAPS, (strongest, named), (score, signs), strict=True):
        rest = [p for p in sampled if p not in tokens]
        beside = draw.sample(rest, min(N_RANDOM, len(rest)))
        seen = {**{p: found["predicted"][p] for p in free},
                **{p: zero[p] for p in (*tokens, *beside)}}  # fmt: skip
        r = torch.tensor([relevance[p] for p in tokens], dtype=torch.float64)
        told = captured(r, _at(seen, tokens), _at(seen, free))
        is_ = _weighted(r, _at(truth, tokens), _at(truth, rest), len(free))
        if told is not None and is_ is not None:
            rows |= {f"captured, {name}": told, f"truth, {name}": is_}
    return rows


def _weighted(r: Tensor, strongest: Tensor, rest: Tensor, ordinary: int) -> float | None:
    """``captured`` where of the other ordinary tokens a random sample alone is measured, each of
    which stands for several."""
    others = ordinary - len(strongest)
    weight = torch.ones(len(strongest) + len(rest), dtype=torch.float64)
    if len(rest):
        weight[len(strongest) :] = others / len(rest)
    size, order = torch.cat([strongest, rest]).abs().sort(descending=True)
    before = weight[order].cumsum(0) - weight[order]
    taken = (len(strongest) - before).clamp(min=0.0).minimum(weight[order])
    most = float((size * taken).sum())
    return float((-r.sign() * strongest).sum()) / most if most else None


def _at(values: Mapping[int, float], positions: Sequence[int]) -> Tensor:
    return torch.tensor([values[p] for p in positions], dtype=torch.float64)


# ---- the verdicts


def maps(prompts: pd.DataFrame) -> pd.DataFrame:
    """A row for each map that was checked: group, prompt, kind, captured, truth, right, verdict."""
    parts = []
    for kind in MAPS:
        part = prompts[["group", "prompt"]].assign(
            kind=kind, captured=prompts[f"captured, {kind}"], truth=prompts[f"truth, {kind}"]
        )
        parts.append(part.dropna(subset=["captured", "truth"]))
    found = pd.concat(parts, ignore_index=True)
    verdicts = [verdict_of(value) for value in found["captured"]]
    return found.assign(right=found["truth"] >= RIGHT, verdict=verdicts)


def of_failures(found: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of one kind of map."""
    return found[(found["kind"] == kind) & (found["group"] == FAILURES)]


def threshold(found: pd.DataFrame) -> float:
    """The lowest at which few enough of AttnLRP's wrong maps of failures are called supported.

    1 where there is none.
    """
    own = of_failures(found, MAPS[0])
    wrong = own.loc[~own["right"], "captured"].to_numpy()
    if not len(wrong):
        return 1.0
    return next((float(t) for t in GRID if (wrong >= t).mean() <= ALLOWED), 1.0)


def table(prompts: pd.DataFrame) -> str:
    """How many maps got which verdict, and how many of these are right."""
    found = maps(prompts)
    lines = []
    for what in ("failures", "templates"):
        chosen = (found["group"] == FAILURES) == (what == "failures")
        for kind, name in zip(MAPS, ("AttnLRP's map", "a random map"), strict=True):
            part = found[chosen & (found["kind"] == kind)]
            cells = [what, name, share(part["right"])]
            for verdict in ("supported", "weak", "contradicted"):
                cells.append(share(part.loc[part["verdict"] == verdict, "right"]))
            lines.append(cells)
    head = ["", "", "maps that are right", "of the supported", "of the weak", "of the contradicted"]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * 6, *lines))


def said(prompts: pd.DataFrame) -> str:
    """How many wrong maps of failures are called supported, and where none would be."""
    found = maps(prompts)
    own, other = (of_failures(found, kind) for kind in MAPS)
    called = {
        (name, right): share(part.loc[part["right"] == right, "verdict"] == "supported")
        for name, part in (("own", own), ("other", other)) for right in (True, False)
    }  # fmt: skip
    return (
        f"Of failures, {called['own', False]} of AttnLRP's wrong maps and "
        f"{called['other', False]} of the wrong random ones are called supported, and "
        f"{called['own', True]} of AttnLRP's right maps. The lowest threshold at which at most "
        f"{ALLOWED:.0%} of AttnLRP's wrong maps would be called supported is "
        f"{threshold(found):.2f}, in place of {SUPPORTED:.2f}; with so few wrong maps, single ones "
        f"decide it. Over AttnLRP's maps of failures, the share that the check finds and the one "
        f"that it does not see correlate at {own[['captured', 'truth']].corr().iloc[0, 1]:.2f}."
    )


def share(which: pd.Series) -> str:
    """Count of true, of all, with Wilson's 95 % interval."""
    n = len(which)
    if not n:
        return "–"
    p, z = float(which.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return f"{int(which.sum())} of {n} [{max(0.0, low):.2f}, {min(1.0, high):.2f}]"
