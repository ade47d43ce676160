"""The page and the picture that ``faithfulness.py`` writes, from its measurements alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from _faithfulness_runs import DEFAULT, GRID, RULES

from tl_contrastive_lrp.faithfulness import bootstrap_interval

WORDS = Path(__file__).with_name("faithfulness_page.md")
Curves = Mapping[tuple[str, str], np.ndarray]
OTHERS = ("random", "recency", "integrated_gradients", "occlusion")
SAID = {
    "integrated_gradients": "integrated gradients",
    "recency": "recency (later first)",
}


@dataclass(frozen=True)
class Found:
    """Frames of ``_faithfulness_runs``, and numbers that say how much was measured."""

    planted: pd.DataFrame
    trained: pd.DataFrame
    failures: pd.DataFrame
    solved: pd.DataFrame
    removal: Mapping[tuple[str, str], pd.DataFrame]
    curves: Mapping[tuple[str, str], Curves]
    circuits: Mapping[str, pd.DataFrame]
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


def measures(found: Found) -> list[tuple[str, pd.DataFrame, str, list[str], bool]]:
    """(said, frame, column, keys of a case, higher is better) of what decides."""
    return [
        ("planted tokens, AUROC", found.planted.query("what == 'tokens'"), "auroc",
         ["model", "prompt"], True),
        ("planted edges, AUROC", found.planted.query("what == 'edges'"), "auroc",
         ["model", "prompt"], True),
        ("planted circuits, CMD", found.circuits["planted"], "cmd", ["prompt"], False),
        ("trained tokens, AUROC", found.trained, "auroc", ["prompt"], True),
        ("trained circuits, CMD", found.circuits["trained"], "cmd", ["prompt"], False),
        ("trained, area (zero)", found.removal["trained", "zero"], "area", ["prompt"], True),
        ("trained, area (random)", found.removal["trained", "random"], "area", ["prompt"], True),
        ("demo failures, decisive, AUROC", found.failures, "auroc", ["prompt"], True),
        ("demo solved, decisive, AUROC", found.solved, "auroc", ["prompt"], True),
        ("demo failures, area (zero)", found.removal["demo", "zero"], "area", ["prompt"], True),
        ("demo failures, area (random)", found.removal["demo", "random"], "area", ["prompt"], True),
        ("demo failures, circuits, CMD", found.circuits["demo"], "cmd", ["prompt"], False),
    ]  # fmt: skip


def compared(found: Found) -> tuple[str, str]:
    """The default's mean and every other rule set's paired difference to it; the count of both."""
    rest = RULES[1:]
    rows, better, worse = [], dict.fromkeys(rest, 0), dict.fromkeys(rest, 0)
    for said, frame, column, keys, higher in measures(found):
        wide = frame.pivot(index=keys, columns="method", values=column)
        direction = "higher" if higher else "lower"
        row = [f"{said} ({direction} is better)", f"{wide[DEFAULT].mean():.3f}"]
        for method in rest:
            gap = (wide[method] - wide[DEFAULT]).to_numpy()
            low, high = bootstrap_interval(gap)
            text = cell(gap, signed=True)
            sure = low > 0 or high < 0
            good = sure and (low > 0) == higher
            better[method] += good
            worse[method] += sure and not good
            row.append(f"**{text}**" if good else f"*{text}*" if sure else text)
        rows.append(row)
    verdict = "; ".join(f"`{m}` better on {better[m]}, worse on {worse[m]}" for m in rest)
    return markdown(rows, ["", DEFAULT, *rest]), f"Of these {len(rows)} measures: {verdict}."


def picture(curves: Curves, title: str) -> str:
    """MoRF (solid) and LeRF (dashed) of some methods as SVG."""
    width, height, left, top = 620, 340, 60, 40
    shown = [m for m in ("attnlrp", "gim", "gradient", "integrated_gradients", "random")
             if (m, "MoRF") in curves]  # fmt: skip
    colours = ("#3366aa", "#cc6677", "#117733", "#997700", "#777777")
    all_y = np.concatenate([curves[m, o] for m in shown for o in ("MoRF", "LeRF")])
    low, high = float(min(all_y.min(), -1.0)), float(max(all_y.max(), 0.0))
    x: Callable[[float], float] = lambda share: left + share * (width - left - 190)  # noqa: E731
    y: Callable[[float], float] = lambda value: (  # noqa: E731
        top + (high - value) / (high - low) * (height - top - 50)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{title}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="20">{title}</text>',
        f'<text x="{left}" y="{height - 10}">share of tokens removed</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(
            f'<text x="{x(share):.1f}" y="{height - 30}" text-anchor="middle">{share:g}</text>'
        )
    for value in np.arange(np.ceil(low * 2) / 2, high + 1e-9, 0.5):
        parts.append(f'<line x1="{left}" x2="{x(1):.1f}" y1="{y(value):.1f}" y2="{y(value):.1f}" '
                     'stroke="#dddddd"/>')  # fmt: skip
        parts.append(
            f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    for number, (method, colour) in enumerate(zip(shown, colours, strict=False)):
        for order, dash in (("MoRF", ""), ("LeRF", ' stroke-dasharray="5 4"')):
            points = " ".join(
                f"{x(a):.1f},{y(b):.1f}" for a, b in zip(GRID, curves[method, order], strict=True)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" '
                         f'stroke-width="2"{dash}/>')  # fmt: skip
        parts.append(f'<text x="{x(1) + 12:.1f}" y="{top + 18 * number + 10}" fill="{colour}">'
                     f"{SAID.get(method, method)}</text>")  # fmt: skip
    note = top + 18 * len(shown) + 20
    parts.append(f'<text x="{x(1) + 12:.1f}" y="{note}">solid: MoRF</text>')
    parts.append(f'<text x="{x(1) + 12:.1f}" y="{note + 16}">dashed: LeRF</text></svg>')
    return "\n".join(parts) + "\n"


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


def mean(frame: pd.DataFrame, method: str, column: str) -> float:
    return float(frame.loc[frame["method"] == method, column].mean())


def written(found: Found, stem: str) -> tuple[str, str]:
    """The page (Markdown) and its figure (SVG)."""
    differences, verdict = compared(found)
    tokens = found.planted.query("what == 'tokens'")
    saturated = tokens.query("model == 'induction-saturated'")
    induction = tokens.query("model == 'induction'")
    page = WORDS.read_text(encoding="utf-8").format(
        stem=stem,
        prompts=found.counts["prompts"],
        most=found.counts["most"],
        short=found.counts["short"],
        gap=found.counts["gap"],
        default=DEFAULT,
        differences=differences,
        verdict=verdict,
        planted=planted_table(found.planted),
        pooled=pooled_table(found.planted),
        trained=markdown(by_method(found.trained, ["auroc", "precision"]),
                         ["", "AUROC", "average precision"]),
        trained_prompts=found.trained["prompt"].nunique(),
        decisive=decisive_tables(found),
        removal=removal_tables(found),
        circuits=circuit_tables(found),
        saturated=", ".join(f"{m} {mean(saturated, m, 'auroc'):.2f}" for m in RULES),
        keys=", ".join(f"{m} {mean(induction, m, 'auroc'):.2f}" for m in RULES),
        failed=f"{mean(found.failures, DEFAULT, 'auroc'):.2f}",
        solved=f"{mean(found.solved, DEFAULT, 'auroc'):.2f}",
        recency=f"{mean(found.failures, 'recency', 'auroc'):.2f}",
    )  # fmt: skip
    title = f"Change of Δℓ / scale, zero embeddings, {found.counts['short']} demo failures"
    return page, picture(found.curves["demo", "zero"], title)
