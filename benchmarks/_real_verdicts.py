"""How often the verdict on a map is right, from what ``real_faithfulness.py`` has measured.

``result.check`` replaces the tokens that a map names strongest by zero embeddings, and calls the
map supported, weak or contradicted by ``captured``, the share of the effect that so many tokens can
have which lies at them, with the right sign. Here that figure is computed from the stored tables as
``check`` computes it (16 strongest, and up to 16 of the tokens drawn at random), and held against
one that the check does not see: the same share of what *a random token* in their place does. A map
is called right where that share is ``RIGHT`` or more, and otherwise wrong.

Maps: those of the five rule sets, where their 16 strongest tokens were replaced (on failures of
more than 48 tokens AttnLRP's alone were, others' by chance), and a random one of each prompt: 8
tokens drawn at random, with random signs.

The thresholds are chosen on one half of the failures, drawn at random, and judged on the other, by
a rule that was written before they were measured for it. An earlier measurement was known: on 76
cases of the same benchmarks, many of them the same, the lowest threshold that called few enough
wrong maps supported was 0.65, and nothing was held out. The rule:

- *supported* begins at the lowest value on a grid at which at most ``ALLOWED`` of AttnLRP's wrong
  maps of the first half are called supported, and at most as large a part of the wrong maps of all
  rule sets together;
- *contradicted* ends at the highest value on a grid up to 0 at which at most ``ALLOWED`` of the
  right maps are called contradicted, of AttnLRP's and of all as before. Not above 0: a verdict that
  says "the other way" must not be given where the tokens move Δℓ the way that the map says.

Random maps choose nothing: they are too easily told from maps.

Beside it stands what predicted effects tell alone, without replacing anything: ``captured`` of
effects that ``token_effects`` predicts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from _real_prompts import FAILURES, LONG
from torch import Tensor

from tl_contrastive_lrp import RULE_SETS
from tl_contrastive_lrp.attribution.check.statistics import captured
from tl_contrastive_lrp.attribution.check.verdict import verdict_of
from tl_contrastive_lrp.evaluation.faithfulness import auroc

K = N_RANDOM = 16
DRAWN = 8  # tokens of a random map: the other sampled ones stand for all that it does not name
MAP, RANDOM = "attnlrp", "random map"
SETS = tuple(RULE_SETS)
MAPS = (*SETS, RANDOM)
RIGHT = 1 / 3
ALLOWED = 0.05
STEP = 20  # of the grid, to 1
VERDICTS = ("supported", "weak", "contradicted")


def checked(found: Mapping[str, Any]) -> dict[str, float]:
    """``captured`` of a prompt's maps and of a random one, as checked and as it is.

    Args:
        found: What ``real_faithfulness.py`` stored of the prompt.

    Returns:
        By name, without those that cannot be computed.
    """
    measured, free = found["measured"], found["ordinary"]
    zero = dict(zip(measured["pos"], measured["zero"], strict=True))
    truth = dict(zip(measured["pos"], measured["random a"], strict=True))
    foreseen = found["predicted"]["2"]["effect"]
    sampled = [p for p, why in zip(measured["pos"], measured["why"], strict=True)
               if why != "strongest"]  # fmt: skip
    draw = random.Random(found["number"])
    named = draw.sample(sampled, min(DRAWN, len(sampled)))
    maps = {name: found["relevance"][name] for name in SETS}
    strongest = {
        name: sorted(free, key=lambda p, r=r: (-abs(r[p]), p))[:K] for name, r in maps.items()
    }
    maps[RANDOM] = {p: draw.choice([-1.0, 1.0]) for p in named}
    strongest[RANDOM] = named
    rows = {}
    for name, tokens in strongest.items():
        if not set(tokens) <= set(zero):
            continue
        rest = [p for p in sampled if p not in tokens]
        beside = draw.sample(rest, min(N_RANDOM, len(rest)))
        seen = {**{p: foreseen[p] for p in free}, **{p: zero[p] for p in (*tokens, *beside)}}
        r = torch.tensor([maps[name][p] for p in tokens], dtype=torch.float64)
        told = captured(r, _at(seen, tokens), _at(seen, free))
        ahead = dict(enumerate(foreseen))
        guess = captured(r, _at(ahead, tokens), _at(ahead, free))
        is_ = _weighted(r, _at(truth, tokens), _at(truth, rest), len(free))
        if told is not None and is_ is not None:
            rows |= {f"captured, {name}": told, f"truth, {name}": is_}
            rows |= {} if guess is None else {f"foreseen, {name}": guess}
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


# ---- the maps, and the thresholds


def maps(prompts: pd.DataFrame) -> pd.DataFrame:
    """A row for each map that was checked: group, prompt, kind, captured, truth, right, half,
    which is 1 or 2 for failures and 0 for templates. Maps of a rule set whose strongest tokens
    happened to be replaced on less than half of a group's prompts are left out of it."""
    half = halves(prompts)
    parts = []
    for kind in MAPS:
        part = prompts[["group", "prompt"]].assign(
            kind=kind,
            half=half,
            captured=prompts[f"captured, {kind}"],
            truth=prompts[f"truth, {kind}"],
            foreseen=prompts[f"foreseen, {kind}"],
        )
        part = part.dropna(subset=["captured", "truth"])
        many = part["group"].map(part["group"].value_counts() / prompts["group"].value_counts())
        parts.append(part[many >= 0.5])
    found = pd.concat(parts, ignore_index=True)
    return found.assign(right=found["truth"] >= RIGHT)


def halves(prompts: pd.DataFrame) -> pd.Series:
    """1 or 2 for each failure, at random, half of each group; 0 for templates."""
    half = pd.Series(0, index=prompts.index)
    for group in (FAILURES, LONG):
        rows = prompts.index[prompts["group"] == group].tolist()
        random.Random(1).shuffle(rows)
        half[rows[: len(rows) // 2]] = 1
        half[rows[len(rows) // 2 :]] = 2
    return half


def thresholds(found: pd.DataFrame) -> tuple[float, float]:
    """Where supported begins and contradicted ends, by the rule at the head of this file.

    1 and -1 where no value of the grid will do.
    """
    of_sets = found[(found["half"] == 1) & (found["kind"] != RANDOM)]
    pools = (of_sets[of_sets["kind"] == MAP], of_sets)

    def few(called: Callable[[pd.Series], pd.Series], right: bool) -> bool:
        return all(
            not len(part) or called(part["captured"]).mean() <= ALLOWED
            for part in (pool[pool["right"] == right] for pool in pools)
        )

    rising = [step / STEP for step in range(STEP + 1)]
    supported = next((t for t in rising if few(lambda c, t=t: c >= t, right=False)), 1.0)
    contradicted = next((-t for t in rising if few(lambda c, t=t: c < -t, right=True)), -1.0)
    return supported, contradicted + 0.0  # no minus zero


# ---- in words


def table(prompts: pd.DataFrame) -> str:
    """How many maps got which verdict, and how many of these are right; of failures those that
    chose no threshold."""
    found = maps(prompts)
    found = found.assign(verdict=[verdict_of(value) for value in found["captured"]])
    lines = []
    groups = {
        "failures": found["group"] == FAILURES,
        "long failures": found["group"] == LONG,
        "templates": ~found["group"].isin([FAILURES, LONG]),
    }
    for what, chosen in groups.items():
        for kind in MAPS:
            part = found[chosen & (found["half"] != 1) & (found["kind"] == kind)]
            if not len(part):
                continue
            cells = [what, kind if kind == RANDOM else f"`{kind}`", share(part["right"])]
            cells += [share(part.loc[part["verdict"] == one, "right"]) for one in VERDICTS]
            wrong = part[~part["right"]]
            lines.append([*cells, share(wrong["verdict"] == "supported")])
    head = ["", "map", "right maps", *(f"right, of the {one}" for one in VERDICTS),
            "supported, of the wrong maps"]  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * 7, *lines))


def said(prompts: pd.DataFrame) -> str:
    """What the verdicts are worth on the failures that chose no threshold."""
    found = maps(prompts)
    found = found.assign(verdict=[verdict_of(value) for value in found["captured"]])
    supported, contradicted = thresholds(found)
    first, held = ((found[(found["half"] == half)]) for half in (1, 2))
    own = held[held["kind"] == MAP]
    wrong = {
        name: part.loc[~part["right"], "verdict"] == "supported"
        for name, part in (("own", own), ("random", held[held["kind"] == RANDOM]))
    }
    several = held[held["kind"] != RANDOM]
    pooled = several[~several["right"]]
    only_own = set(several["kind"]) <= {MAP}  # others' strongest tokens were not replaced
    of_all = "" if only_own else f", {resampled(pooled)} of the wrong maps of all rule sets"
    decided = own[own["verdict"] != "weak"]
    agree = (decided["verdict"] == "supported") == decided["right"]
    choosing = first[first["kind"] != RANDOM]
    n_wrong, n_right = ((~choosing["right"]).sum(), choosing["right"].sum())
    correlation = own[["captured", "truth"]].corr().iloc[0, 1]
    return (
        f"The first half, with {n_wrong} wrong and {n_right} right maps, chose {supported:g} and "
        f"{contradicted:g}. On the other half {share(wrong['own'])} of AttnLRP's wrong maps are "
        f"called supported{of_all}, and {share(wrong['random'])} of the wrong random ones; the aim "
        f"was {ALLOWED:.0%}. Where "
        f"AttnLRP's maps are not called weak ({len(decided)} of {len(own)}), the verdict is right "
        f"for {share(agree)}. The share that the check finds and the one that it does not see "
        f"correlate at {correlation:.2f}. Of a right and a wrong map of AttnLRP, the check gives "
        f"the right one the larger share in {told_apart(own, 'captured')} of all such pairs; "
        f"predicted effects alone, with nothing replaced, in {told_apart(own, 'foreseen')}."
    )


def told_apart(found: pd.DataFrame, column: str, resamples: int = 2000) -> str:
    """AUROC of a share, right against wrong maps, with an interval that resamples maps."""
    known = found.dropna(subset=[column])
    right = torch.tensor(known["right"].to_numpy(dtype=bool))
    values = torch.tensor(known[column].to_numpy(dtype=float))
    if right.all() or not right.any():
        return "–"
    draws = np.random.default_rng(0).integers(len(right), size=(resamples, len(right)))
    areas = [auroc(values[d], right[d]) for d in draws if 0 < right[d].sum() < len(d)]
    low, high = np.quantile(areas, [0.025, 0.975])
    return f"{auroc(values, right):.0%} [{low:.0%}, {high:.0%}]"


def resampled(maps_called: pd.DataFrame, resamples: int = 2000) -> str:
    """Supported among wrong maps, of several a prompt: the interval resamples prompts."""
    if not len(maps_called):
        return "–"
    hit = (maps_called["verdict"] == "supported").groupby(
        [maps_called["group"], maps_called["prompt"]]
    )
    hits, counts = hit.sum().to_numpy(), hit.count().to_numpy()
    draw = np.random.default_rng(0).integers(len(hits), size=(resamples, len(hits)))
    shares = hits[draw].sum(1) / counts[draw].sum(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return f"{hits.sum()} of {counts.sum()} [{low:.2f}, {high:.2f}]"


def share(which: pd.Series) -> str:
    """Count of true, of all, with Wilson's 95 % interval."""
    n = len(which)
    if not n:
        return "–"
    p, z = float(which.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return f"{int(which.sum())} of {n} [{max(0.0, low):.2f}, {min(1.0, high):.2f}]"
