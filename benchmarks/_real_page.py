"""The part of docs/faithfulness.md about real weights, from ``real_faithfulness.json`` alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _real_verdicts as verdicts_of_maps
import numpy as np
import pandas as pd
from _faithfulness_rule import FIRST, REAL, Measure, adjusted, verdicts
from _faithfulness_runs import RULES
from _real_prompts import FAILURES, LONG

from tl_contrastive_lrp import RULE_SETS
from tl_contrastive_lrp.evaluation.faithfulness import bootstrap_interval

STORED = Path(__file__).with_name("real_faithfulness.json")
SECOND = Path(__file__).with_name("real_second_model.json")
NAMED = tuple(RULE_SETS)
PATCHING = ("residual stream", "heads")
PREDICTED = ("window 1", "window 2")


@dataclass(frozen=True)
class Real:
    """A row a prompt; a row a prompt and method; what it was measured with."""

    prompts: pd.DataFrame
    methods: pd.DataFrame
    about: Mapping[str, Any]

    @property
    def groups(self) -> list[str]:
        return list(dict.fromkeys(self.prompts["group"]))

    def of(self, group: str, method: str, column: str) -> pd.Series:
        frame = self.methods
        rows = (frame["group"] == group) & (frame["method"] == method)
        return frame.loc[rows, column].dropna().astype(float)


def load(path: Path = STORED) -> Real:
    """The stored measurements.

    Raises:
        FileNotFoundError: There are none.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no {path}: measure real weights first, with "
            "python benchmarks/faithfulness.py --real FOLDER --data DATA."
        )
    data = json.loads(path.read_text("utf-8"))
    return Real(pd.DataFrame(data["prompts"]), pd.DataFrame(data["methods"]), data["about"])


def measures(real: Real) -> list[Measure]:
    """Token attribution, which decides, and estimates of patching, which do not."""
    frame, found = real.methods, []
    for group in real.groups:
        part = frame[(frame["group"] == group) & frame["method"].isin(RULES)]
        for one in REAL:
            if one.name in part and part[one.name].notna().any():
                found.append(Measure.of(one.said, group, part, one.name, higher=one.higher))
        for what in PATCHING:
            name = f"patching spearman {what}"
            if name in part and part[name].notna().any():
                said = f"rank correlation with patching ({what})"
                found.append(Measure.of(said, group, part, name, tokens=False))
        if "cmd" in part and part["cmd"].notna().any():
            found.append(
                Measure.of("circuits, CMD", group, part, "cmd", higher=False, tokens=False)
            )
    return found


def number(value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.2f}"


def interval(values: Sequence[float] | np.ndarray | pd.Series, signed: bool = False) -> str:
    """Mean and 95 % interval."""
    array = np.asarray(values, dtype=float)
    if not len(array):
        return "–"
    low, high = bootstrap_interval(array)
    return f"{number(float(array.mean()), signed)} [{number(low, signed)}, {number(high, signed)}]"


def markdown(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(rows: Sequence[Measure]) -> str:
    """A table a group: AttnLRP's mean and median, and every other named set beside it."""
    others = [name for name in NAMED if name != FIRST]
    counted = [one for one in rows if one.tokens]
    p = {name: adjusted(counted, name) for name in others}
    signs = {name: verdicts(counted, name) for name in others}
    parts = []
    for group in dict.fromkeys(one.group for one in counted):
        lines = []
        for place, one in enumerate(counted):
            if one.group != group:
                continue
            own = one.values[FIRST].dropna()
            direction = "higher" if one.higher else "lower"
            line = [f"{one.said} ({direction} is better; {len(own)} prompts)"]
            line += [f"{number(own.mean())}, {number(own.median())}"]
            for name in others:
                gap, (better, worse) = one.gap(name, FIRST), one.wins(name, FIRST)
                text = (
                    f"{interval(gap, signed=True)}, {number(float(np.median(gap)), True)}; "
                    f"{better}:{worse}, p {p[name][place]:.2g}"
                    if len(gap) else "–"
                )  # fmt: skip
                sign = signs[name][place]
                line.append(f"**{text}**" if sign > 0 else f"*{text}*" if sign < 0 else text)
            lines.append(line)
        head = [group, f"{FIRST}: mean, median", *others]
        parts.append(markdown(lines, head))
    return "\n\n".join(parts)


def counted(rows: Sequence[Measure]) -> str:
    """Better and worse than AttnLRP on real weights, in words."""
    tokens = [one for one in rows if one.tokens]
    said = []
    for name in NAMED:
        if name == FIRST:
            continue
        signs = verdicts(tokens, name)
        groups = {one.group for one, sign in zip(tokens, signs, strict=True) if sign > 0}
        better, worse = signs.count(1), signs.count(-1)
        where = f" (in {len(groups)} group{'s' * (len(groups) != 1)})" if groups else ""
        said.append(f"`{name}` better on {better}{where}, worse on {worse}")
    return f"Of these {len(tokens)} measures: {'; '.join(said)}."


def prompts_table(real: Real) -> str:
    lines = []
    for group in real.groups:
        part = real.prompts[real.prompts["group"] == group]
        tokens, right = part["tokens"], part["right"].astype(float)
        right_text = "–" if group in (FAILURES, LONG) else f"{int(right.sum())} of {len(right)}"
        lines.append([
            group, str(len(part)),
            f"{tokens.min()} to {tokens.max()}, median {tokens.median():.0f}",
            right_text, f"{part['first'].astype(float).mean():.0%}",
            number(float(part["delta"].abs().median())),
            number(float(part["mean_effect"].mean())),
        ])  # fmt: skip
    head = ["", "prompts", "tokens", "right", "preferred token is first of all", "median Δℓ",
            "mean size of an effect (zero)"]  # fmt: skip
    return markdown(lines, head)


def effects_table(real: Real) -> str:
    """Correlations with measured effects by group: mean (median), Pearson / Spearman."""

    def pair(values: Callable[[str], pd.Series]) -> str:
        said = []
        for kind in ("pearson", "spearman"):
            found = values(kind)
            said.append(f"{interval(found)}, {number(found.median())}" if len(found) else "–")
        return " / ".join(said)

    parts = []
    for group in real.groups:
        own = real.prompts[real.prompts["group"] == group]
        lines = []
        for name in (*RULES, *PREDICTED):
            if not len(real.of(group, name, "pearson_zero")):
                continue
            lines.append([f"`{name}`"])
            if name in PREDICTED:
                forwards = real.of(group, name, "forwards").mean()
                lines[-1] = [f"`token_effects`, {name}, {forwards:.1f} forwards and a backward"]
            for way in ("zero", "random"):
                lines[-1].append(
                    pair(lambda kind, name=name, way=way: real.of(group, name, f"{kind}_{way}"))
                )
        for said, column, at in (
            ("*for comparison: zeroed with random*", "zero_random", (1, 2)),
            ("*for comparison: one random token with another*", "random_random", (2,)),
        ):
            line = [said, "", ""]
            for place in at:
                line[place] = pair(
                    lambda kind, column=column: own[f"{kind}_{column}"].dropna().astype(float)
                )
            lines.append(line)
        head = [group, "zero embeddings: Pearson / Spearman", "a random token: Pearson / Spearman"]
        parts.append(markdown(lines, head))
    return "\n\n".join(parts)


def share_table(real: Real) -> str:
    """Median (quartiles) of the share, wrong signs, and the median share at sinks."""
    lines = []
    for group in real.groups:
        for name in RULES:
            share = real.of(group, name, "share")
            if not len(share):
                continue
            low, half, high = share.quantile([0.25, 0.5, 0.75])
            sinks = real.of(group, name, "sink_share").median()
            lines.append([
                group, f"`{name}`", str(len(share)),
                f"{number(half)} ({number(low)} to {number(high)})",
                number(float((1 - share).abs().median())), interval(share < 0), number(sinks),
            ])  # fmt: skip
    head = ["", "", "prompts", "share: median (quartiles)", "median distance from 1",
            "wrong sign, of all", "of it at special and first tokens, median"]  # fmt: skip
    return markdown(lines, head)


def removal_table(real: Real) -> str:
    """Area and tokens to flip."""
    lines = []
    for group in real.groups:
        for name in RULES:
            area, flips = real.of(group, name, "area"), real.of(group, name, "flips")
            if not len(area):
                continue
            line = [group, f"`{name}`", f"{interval(area)}, {number(area.median())} ({len(area)})"]
            if len(flips):
                stays = float((flips > 8).mean())
                line += [f"{interval(flips)}, {flips.median():.0f} ({len(flips)})", f"{stays:.0%}"]
            lines.append(line + ["–"] * (5 - len(line)))
    head = ["", "", "area: mean, median (prompts)", "tokens to flip: mean, median (prompts)",
            "not flipped by 8"]  # fmt: skip
    return markdown(lines, head)


def patching_table(real: Real) -> str:
    lines = []
    for group in real.groups:
        for what in PATCHING:
            names = [f"patching {kind} {what}" for kind in ("pearson", "spearman")]
            if names[0] not in real.methods or not len(real.of(group, FIRST, names[0])):
                continue
            lines.append([f"{group}, {what} ({len(real.of(group, FIRST, names[0]))} prompts)"])
            lines[-1] += [
                " / ".join(interval(real.of(group, rules, name)) for name in names)
                for rules in RULES
            ]
    return markdown(lines, ["Pearson / Spearman", *RULES])


def circuits_table(real: Real) -> str:
    """CPR and CMD by group."""
    lines = []
    for group in real.groups:
        n = len(real.of(group, FIRST, "cmd")) if "cmd" in real.methods else 0
        for said, name in (("CPR", "cpr"), ("CMD", "cmd")) if n else ():
            lines.append([f"{group}, {said} ({n} prompts)"])
            lines[-1] += [interval(real.of(group, rules, name)) for rules in (*RULES, "random")]
    return markdown(lines, ["", *RULES, "random order"])


def before(real: Real, rows: Sequence[Measure]) -> str:
    """What this page said when it knew small models alone, and whether it holds here."""

    tokens = [one for one in rows if one.tokens]
    held = {1: "it holds", 0: "no difference is found", -1: "the opposite holds"}
    signs = {
        one.said: held[sign]
        for one, sign in zip(tokens, verdicts(tokens, "gim"), strict=True)
        if one.group == FAILURES
    }
    said = {one.name: signs.get(one.said, "nothing was measured") for one in REAL}
    off = {n: real.of(FAILURES, n, "off_share").median() for n in ("gim", FIRST)}
    wrong = {n: (real.of(FAILURES, n, "share") < 0).mean() for n in ("gim", FIRST)}
    area = {n: real.of(FAILURES, n, "area").mean() for n in ("gim", FIRST)}
    effect = {n: real.of(FAILURES, n, "spearman_zero").mean() for n in ("gim", FIRST)}
    lines = [
        f"- *GIM conserves more than AttnLRP.* On real failures {said['off_share']}: median "
        f"|1 − share| is {number(off['gim'])} under GIM and {number(off[FIRST])} under AttnLRP, "
        f"and the share has the wrong sign in {wrong['gim']:.0%} and {wrong[FIRST]:.0%} of them.",
        f"- *GIM ranks tokens better.* On real failures, by removed tokens, {said['area']} (mean "
        f"area {number(area['gim'])} and {number(area[FIRST])}); by effects of single tokens, "
        f"{said['spearman_zero']} (mean rank correlation {number(effect['gim'])} and "
        f"{number(effect[FIRST])}).",
        "- *Comprehensiveness and sufficiency* depend on which of the two tokens is called the "
        "target. The failures measured then happened to prefer it; now all measures are asked of "
        "the token that the model prefers, whichever it is called.",
    ]
    return "\n".join(lines)


def versions(real: Real) -> str:
    names = ("torch", "transformers", "transformer_lens", "tl_contrastive_lrp", "python")
    return ", ".join(f"{name} {real.about[name]}" for name in names if name in real.about)


def fields(real: Real, second: Real) -> dict[str, str]:
    """What the template of the page asks for; second: templates measured on another model."""
    rows = measures(real)
    minutes = real.about.get("processor_minutes", {})
    return {
        "real_model": str(real.about.get("model", "")),
        "real_versions": versions(real),
        "real_minutes": f"{sum(minutes.values()):.0f}",
        "real_cases": str(real.about.get("cases", 0)),
        "real_measured": str(int(real.prompts["group"].isin([FAILURES, LONG]).sum())),
        "real_prompts": prompts_table(real),
        "real_differences": compared(rows),
        "real_verdict": counted(rows),
        "real_effects": effects_table(real),
        "second_model": str(second.about.get("model", "")),
        "second_effects": effects_table(second),
        "second_shares": share_table(second),
        "real_shares": share_table(real),
        "real_removal": removal_table(real),
        "real_patching": patching_table(real),
        "real_circuits": circuits_table(real),
        "real_before": before(real, rows),
        "real_maps": verdicts_of_maps.table(real.prompts),
        "real_maps_said": verdicts_of_maps.said(real.prompts),
    }
