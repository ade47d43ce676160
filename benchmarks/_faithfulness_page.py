"""The page and the picture that ``faithfulness.py`` writes, from its measurements alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from _faithfulness_figure import SAID, Curves, picture
from _faithfulness_messages import CHANCE, LATEST, RIVALS
from _faithfulness_rule import FIRST, Measure, candidates, chosen, counts
from _faithfulness_runs import RULES
from _real_page import Real, fields
from _real_page import measures as real_measures

from tl_contrastive_lrp import DEFAULT_RULES, RULE_SETS
from tl_contrastive_lrp.evaluation.faithfulness import bootstrap_interval

WORDS = Path(__file__).with_name("faithfulness_page.md")
OTHERS = ("random", "recency", "integrated_gradients", "occlusion")


@dataclass(frozen=True)
class Found:
    """Frames of ``_faithfulness_runs``, and numbers that say how much was measured."""

    planted: pd.DataFrame
    trained: pd.DataFrame
    deep: pd.DataFrame
    failures: pd.DataFrame
    solved: pd.DataFrame
    removal: Mapping[tuple[str, str], pd.DataFrame]
    curves: Mapping[tuple[str, str], Curves]
    circuits: Mapping[str, pd.DataFrame]
    sums: Mapping[str, pd.DataFrame]
    low: Mapping[str, pd.DataFrame]
    messages: Mapping[bool, tuple[pd.DataFrame, int]]
    counts: Mapping[str, int]


def cell(values: Sequence[float] | pd.Series, signed: bool = False) -> str:
    """Mean and 95 % interval."""
    array = np.asarray(values, dtype=float)
    low, high = bootstrap_interval(array)
    form = "+.3f" if signed else ".3f"
    return f"{array.mean():{form}} [{low:{form}}, {high:{form}}]"


def markdown(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_method(
    frame: pd.DataFrame, columns: Sequence[str], others: Sequence[str] = ()
) -> list[list[str]]:
    """A row a method: its name and a cell a column."""
    present = [m for m in (*RULES, *others) if m in set(frame["method"])]
    return [
        [SAID.get(m, m), *(cell(frame.loc[frame["method"] == m, c]) for c in columns)]
        for m in present
    ]


def planted_table(frame: pd.DataFrame) -> str:
    """AUROC by planted model and rule set: tokens / heads / edges."""
    rows = []
    for model, part in frame.groupby("model", sort=False):
        means = part.groupby(["method", "what"])["auroc"].mean()
        rows.append(
            [str(model)]
            + [
                " / ".join(f"{means[m, w]:.3f}" for w in ("tokens", "heads", "edges"))
                for m in RULES
            ]
        )
    return markdown(rows, ["planted model", *RULES])


def pooled_table(frame: pd.DataFrame) -> str:
    rows = []
    for what in ("tokens", "heads", "edges", "neurons"):
        part = frame[frame["what"] == what]
        for column, said in (("auroc", "AUROC"), ("precision", "average precision")):
            rows.append([f"{what}, {said}"])
            rows[-1] += [cell(part.loc[part["method"] == m, column]) for m in RULES]
    return markdown(rows, ["", *RULES])


def measures(found: Found) -> list[Measure]:
    """Of the models trained here."""
    tokens, edges = (found.planted.query(f"what == '{what}'") for what in ("tokens", "edges"))
    of, wired = Measure.of, ("model", "prompt")

    def circuits(said: str) -> Measure:
        frame = found.circuits[said]
        return of(f"{said} circuits, CMD", said, frame, "cmd", higher=False, tokens=False)

    def areas(said: str) -> list[Measure]:
        removal = {how: found.removal[said, how] for how in ("zero", "random")}
        return [of(f"{said}, area ({how})", said, frame, "area") for how, frame in removal.items()]

    rows = [
        of("planted tokens, AUROC", "planted", tokens, "auroc", keys=wired),
        of("planted edges, AUROC", "planted", edges, "auroc", tokens=False, keys=wired),
        circuits("planted"),
    ]
    for said, frame in (("trained", found.trained), ("deep", found.deep)):
        rows += [of(f"{said} tokens, AUROC", said, frame, "auroc"), circuits(said), *areas(said)]
    return [
        *rows,
        of("demo failures, decisive, AUROC", "demo", found.failures, "auroc"),
        of("demo solved, decisive, AUROC", "demo", found.solved, "auroc"),
        *areas("demo"),
        circuits("demo"),
    ]


def compared(rows: Sequence[Measure]) -> str:
    """The mean of ``FIRST`` and every other rule set's paired difference to it."""
    rest, lines = RULES[1:], []
    for one in rows:
        direction = "higher" if one.higher else "lower"
        mean_of = one.values[FIRST].mean()
        line = [f"{one.said} ({direction} is better)", f"{mean_of:.3f}"]
        for method in rest:
            text, sign = cell(one.gap(method, FIRST), signed=True), one.sign(method, FIRST)
            line.append(f"**{text}**" if sign > 0 else f"*{text}*" if sign < 0 else text)
        lines.append(line)
    return markdown(lines, ["", FIRST, *rest])


def counted(rows: Sequence[Measure]) -> str:
    """Better and worse than AttnLRP in words, and how the named sets stand to each other."""
    said = []
    for method in RULES[1:]:
        better, worse = counts(rows, method, FIRST)
        said.append(f"`{method}` better on {better}, worse on {worse}")
    return f"Of these {len(rows)} measures: {'; '.join(said)}."


def why(found: Found, real: Real, rows: Sequence[Measure]) -> str:
    """What the rule found, in words."""
    sets = candidates(real_measures(real), rows, list(RULE_SETS), low(found))
    if not sets:
        return "No other set is a candidate."
    return f"Candidates: {', '.join(f'`{name}`' for name in sets)}."


def duel(rows: Sequence[Measure]) -> str:
    """Better / worse of every named set against every other."""
    named = list(RULE_SETS)
    lines = [
        [f"`{one}`"] + ["" if one == other else " / ".join(map(str, counts(rows, one, other)))
                        for other in named]
        for one in named
    ]  # fmt: skip
    return markdown(lines, ["better / worse than", *named])


def lost(found: Found) -> dict[str, float]:
    """Median |1 − share of Δℓ at the tokens| over all prompts of the three models."""
    frame = pd.concat(found.sums.values())
    return (1 - frame["share"]).abs().groupby(frame["method"]).median().to_dict()


def low(found: Found) -> dict[str, float]:
    """The largest median error over models and dtypes; NaN if anything was not finite."""
    worst = {}
    for method in RULES:
        parts = [
            part["off"] for frame in found.low.values()
            for _, part in frame[frame["method"] == method].groupby("dtype")
        ]  # fmt: skip
        finite = all(np.isfinite(part).all() for part in parts)
        worst[method] = max(float(part.median()) for part in parts) if finite else float("nan")
    return worst


def duties(found: Found) -> str:
    """What arrives at the tokens, and errors in low precision: median (quartiles or worst)."""
    lines = []
    for method in RULES:
        line = [method]
        for frame in found.sums.values():
            shares = frame.loc[frame["method"] == method, "share"]
            quarter, half, most = shares.quantile([0.25, 0.5, 0.75])
            line.append(f"{half:.2f} ({quarter:.2f} to {most:.2f})")
        for frame in found.low.values():
            for dtype in ("bfloat16", "float16"):
                off = frame.loc[(frame["method"] == method) & (frame["dtype"] == dtype), "off"]
                line.append(f"{off.median():.2f} ({off.max():.1f})")
        lines.append(line)
    errors = [f"{model}, {dtype}, %" for model in found.low for dtype in ("bfloat16", "float16")]
    return markdown(lines, ["", *(f"{model}, share" for model in found.sums), *errors])


def removal_tables(found: Found) -> str:
    parts = []
    for (what, replace), frame in found.removal.items():
        said = {"zero": "zero embeddings", "random": "random tokens"}[replace]
        n = frame["prompt"].nunique()
        columns = ["area", "comprehensiveness", "sufficiency"]
        parts.append(f"{what} model, {n} prompts, {said}:\n")
        parts.append(markdown(by_method(frame, columns, OTHERS), ["", *columns]) + "\n")
    return "\n".join(parts)


def circuit_tables(found: Found) -> str:
    parts = []
    for what, frame in found.circuits.items():
        parts.append(f"{what}, {frame['prompt'].nunique()} prompts:\n")
        parts.append(markdown(by_method(frame, ["cpr", "cmd"], OTHERS), ["", "CPR", "CMD"]) + "\n")
    return "\n".join(parts)


def decisive_tables(found: Found) -> str:
    parts = []
    for said, frame in (("failures", found.failures), ("solved cases", found.solved)):
        rows = by_method(frame, ["auroc", "precision"], OTHERS)
        parts.append(f"{frame['prompt'].nunique()} {said}:\n")
        parts.append(markdown(rows, ["", "AUROC", "average precision"]) + "\n")
        means = frame.groupby(["kind", "method"])["auroc"].mean().unstack()
        kinds = [[str(k), *(f"{means.loc[k, m]:.3f}" for m in (*RULES, "recency"))]
                 for k in means.index]  # fmt: skip
        parts.append(markdown(kinds, ["AUROC by kind", *RULES, "recency"]) + "\n")
    return "\n".join(parts)


def message_table(messages: Mapping[bool, tuple[pd.DataFrame, int]]) -> str:
    """How often the decisive message ranks first: a row a method, a column a kind of chat."""
    head, columns = [""], []
    for several, (frame, tried) in messages.items():
        chats = frame.drop_duplicates("prompt")
        head.append(
            f"{'several messages' if several else 'one message'} ({len(chats)} chats of {tried}, "
            f"{chats['right'].sum()} answered right)"
        )
        columns.append({method: cell(part["hit"]) for method, part in frame.groupby("method")})
    order = [*RULES, CHANCE, RIVALS, LATEST]
    return markdown([[name, *(column[name] for column in columns)] for name in order], head)


def mean(frame: pd.DataFrame, method: str, column: str) -> float:
    return float(frame.loc[frame["method"] == method, column].mean())


def written(found: Found, real: Real, second: Real, stem: str) -> tuple[str, str]:
    """The page (Markdown) and its figure (SVG)."""
    rows = measures(found)
    tokens = found.planted.query("what == 'tokens'")
    saturated = tokens.query("model == 'induction-saturated'")
    induction = tokens.query("model == 'induction'")
    best = chosen(real_measures(real), rows, list(RULE_SETS), low(found))
    head = ["", "AUROC", "average precision"]
    page = WORDS.read_text(encoding="utf-8").format(
        stem=stem,
        prompts=found.counts["prompts"],
        most=found.counts["most"],
        short=found.counts["short"],
        gap=found.counts["gap"],
        chosen=best,
        why=why(found, real, rows),
        **fields(real, second),
        differences=compared(rows),
        verdict=counted(rows),
        duel=duel(rows),
        duties=duties(found),
        lost=", ".join(f"{m} {lost(found)[m]:.2f}" for m in RULES),
        planted=planted_table(found.planted),
        pooled=pooled_table(found.planted),
        trained=markdown(by_method(found.trained, ["auroc", "precision"]), head),
        trained_prompts=found.trained["prompt"].nunique(),
        deep=markdown(by_method(found.deep, ["auroc", "precision"]), head),
        deep_prompts=found.deep["prompt"].nunique(),
        decisive=decisive_tables(found),
        messages=message_table(found.messages),
        removal=removal_tables(found),
        circuits=circuit_tables(found),
        saturated=", ".join(f"{m} {mean(saturated, m, 'auroc'):.2f}" for m in RULES),
        keys=", ".join(f"{m} {mean(induction, m, 'auroc'):.2f}" for m in RULES),
        failed=f"{mean(found.failures, DEFAULT_RULES, 'auroc'):.2f}",
        solved=f"{mean(found.solved, DEFAULT_RULES, 'auroc'):.2f}",
        recency=f"{mean(found.failures, 'recency', 'auroc'):.2f}",
    )
    title = f"Change of Δℓ / scale, zero embeddings, {found.counts['short']} demo failures"
    return page, picture(found.curves["demo", "zero"], title)
