"""The page's part about real weights, from made-up figures whose tables are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _faithfulness_page as pages
import _faithfulness_rule as rule
import _real_page as page
import _real_verdicts as maps
import real_faithfulness as real
from _faithfulness_messages import CHANCE, LATEST, RIVALS
from _faithfulness_runs import GRID, RULES

PROMPTS = 16
FINE = dict.fromkeys(RULES, 1.0)


def figures(folder: Path, **better: float) -> page.Real:
    """Every set is AttnLRP on every measure, but those named, which are so much higher."""
    prompts: list[dict[str, Any]] = []
    methods: list[dict[str, Any]] = []
    for group in real.GROUPS:
        for number in range(PROMPTS):
            prompts.append({
                "group": group, "prompt": number, "tokens": 15 + number, "delta": 1.0 + number,
                "right": number % 4 != 0, "first": True, "sampled": 10, "ordinary": 12,
                "mean_effect": 0.5, "pearson_zero_random": 0.75, "spearman_zero_random": 0.5,
                "captured, map": number / PROMPTS, "truth, map": 0.3 + number % 4 / 10,
                "captured, random map": 0.125, "truth, random map": 0.0 if number else None,
                "pearson_random_random": 0.25 if number % 3 == 0 else None,
                "spearman_random_random": 0.25 if number % 3 == 0 else None,
            })  # fmt: skip
            for name in (*RULES, page.PREDICTED):
                high = 0.125 + number / 100 + better.get(name, 0.0)
                row = {"group": group, "prompt": number, "method": name} | {
                    f"{kind}_{way}": high
                    for kind in ("pearson", "spearman") for way in ("zero", "random")
                }  # fmt: skip
                if name != page.PREDICTED:
                    row |= {"share": 0.5, "sink_share": 0.25, "off_share": 0.5, "wrong_sign": 0.0}
                    row |= {"area": high, "flips": 4.0 if number else None}
                    if group in real.TEMPLATES[:2]:
                        row |= {f"patching {kind} {what}": 0.5 for what in page.PATCHING
                                for kind in ("pearson", "spearman")}  # fmt: skip
                methods.append(row)
    data = {
        "about": {"model": "a model", "cases": 40, "processor_minutes": {"a": 3.0, "b": 4.0}},
        "prompts": real.table(prompts), "methods": real.table(methods),
    }  # fmt: skip
    path = folder / "real.json"
    path.write_text(json.dumps(data), "utf-8")
    return page.load(path)


def test_measures(tmp_path: Path) -> None:
    found = page.measures(figures(tmp_path))
    tokens = [one for one in found if one.tokens]
    assert len(tokens) == len(real.GROUPS) * len(rule.REAL)
    assert [(one.group, one.tokens) for one in found if "patching" in one.said] == [
        (group, False) for group in real.TEMPLATES[:2] for _ in page.PATCHING
    ]
    assert len(tokens[0].values) == PROMPTS


def test_the_rule_on_stored_figures(tmp_path: Path) -> None:
    """Three measures in four groups are higher for one set: 16 of 16 prompts, p = 3e-5 · 24."""
    found = page.measures(figures(tmp_path, gim=0.5))
    assert rule.candidates(found, [], page.NAMED, FINE) == ["gim"]
    assert rule.chosen(found, [], page.NAMED, FINE) == "gim"
    assert rule.chosen(page.measures(figures(tmp_path)), [], page.NAMED, FINE) == "attnlrp"
    assert rule.chosen(page.measures(figures(tmp_path, gim=-0.5)), [], page.NAMED, FINE) == (
        "attnlrp"
    )
    warm = page.measures(figures(tmp_path, **{"attnlrp, T = 2": 0.5}))
    assert rule.chosen(warm, [], page.NAMED, FINE) == "attnlrp", "no named set"


def test_what_the_page_says(tmp_path: Path) -> None:
    fields = page.fields(figures(tmp_path, gim=0.5, relp=-0.5))
    assert "`gim` better on 12 (in 4 groups), worse on 0" in fields["real_verdict"]
    assert "`relp` better on 0, worse on 12" in fields["real_verdict"]
    assert "**+0.50 [+0.50, +0.50], +0.50; 16:0, p 0.00073**" in fields["real_differences"]
    assert "*-0.50 [-0.50, -0.50], -0.50; 0:16, p 0.00073*" in fields["real_differences"]
    assert "area (zero) (higher is better; 16 prompts) | 0.20, 0.20 |" in fields["real_differences"]
    assert "tokens to flip (lower is better; 15 prompts)" in fields["real_differences"]
    assert (
        "| failures | 16 | 15 to 30, median 22 | – | 100% | 8.50 | 0.50 |"
        in (fields["real_prompts"])
    )
    assert "| agreement | 16 | 15 to 30, median 22 | 12 of 16 |" in fields["real_prompts"]
    assert "0.75 [0.75, 0.75], 0.75 / 0.50 [0.50, 0.50], 0.50" in fields["real_effects"]
    assert "0.50 (0.50 to 0.50) | 0.50 | 0.00 [0.00, 0.00] | 0.25 |" in fields["real_shares"]
    assert "4.00 [4.00, 4.00], 4 (15) | 0% |" in fields["real_removal"]
    assert "agreement, heads (16 prompts)" in fields["real_patching"]
    assert "facts" not in fields["real_patching"]
    assert "by removed tokens, it holds" in fields["real_before"]
    assert (
        "GIM conserves more than AttnLRP.* On real failures no difference"
        in (fields["real_before"])
    )
    assert fields["real_minutes"] == "7"


def test_tables_are_tables(tmp_path: Path) -> None:
    """Every row has as many cells as its head."""
    for name, text in page.fields(figures(tmp_path)).items():
        for block in text.split("\n\n"):
            lines = [line for line in block.splitlines() if line.startswith("|")]
            assert len({line.count("|") for line in lines}) <= 1, name


def small_models(**better: float) -> pages.Found:
    """Figures of the models trained here: all sets alike, but those named."""
    kinds = ("tokens", "heads", "edges", "neurons")

    def frame(methods: Sequence[str], columns: Sequence[str], **fixed: Any) -> pd.DataFrame:
        return pd.DataFrame([
            {"prompt": number, "method": name, **fixed}
            | dict.fromkeys(columns, 0.5 + number / 100 + better.get(name, 0.0))
            for number in range(4) for name in methods
        ])  # fmt: skip

    ranked = partial(frame, columns=("auroc", "precision"))
    all_methods = (*RULES, *pages.OTHERS)
    three = ("planted", "trained", "deep", "demo")
    chat = frame((*RULES, CHANCE, RIVALS, LATEST), ("hit",), right=True)
    low = pd.concat([frame(RULES, (), dtype=dtype, off=1.0) for dtype in ("bfloat16", "float16")])
    models = ("induction", "induction-saturated")
    return pages.Found(
        planted=pd.concat([ranked(RULES, model=m, what=w) for m in models for w in kinds]),
        trained=ranked(RULES), deep=ranked(RULES),
        failures=ranked(all_methods, kind="tool"), solved=ranked(all_methods, kind="tool"),
        removal={
            (who, how): frame(all_methods, ("area", "comprehensiveness", "sufficiency"))
            for who in three[1:] for how in ("zero", "random")
        },
        curves={("demo", "zero"): {("attnlrp", o): GRID for o in ("MoRF", "LeRF")}},
        circuits={who: frame((*RULES, "random"), ("cpr", "cmd")) for who in three},
        sums={who: frame(RULES, (), share=0.5) for who in three[1:]},
        low={"deep": low, "demo": low},
        messages={False: (chat, 5), True: (chat, 5)},
        counts=dict.fromkeys(("prompts", "most", "short", "gap"), 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("real_gim", "trained_gim", "says"),
    [(0.5, 0.0, "gim"), (0.5, -0.25, "attnlrp"), (0.0, 0.25, "attnlrp"), (0.0, 0.0, "attnlrp")],
)
def test_the_page_applies_the_rule(
    tmp_path: Path, real_gim: float, trained_gim: float, says: str
) -> None:
    """Better on real weights, and not worse on the models trained here."""
    stored = figures(tmp_path, gim=real_gim)
    text, picture = pages.written(small_models(gim=trained_gim), stored, "page")
    assert f"the rule says **`{says}`**" in text
    assert ("No other set is a candidate." in text) == (says == "attnlrp")
    assert text.count("| failures | AttnLRP's map | ") == 1
    assert "nan" not in text
    assert "{" not in text
    assert picture.startswith("<svg")


def test_without_figures(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--real FOLDER"):
        page.load(tmp_path / "real.json")


def test_verdicts_are_judged_on_failures() -> None:
    """Neither templates nor random maps count for the threshold. Wrong: a truth below 1/3."""
    failures = pd.DataFrame({
        "group": "failures", "prompt": range(40),
        # wrong: one of twenty may be called supported, not two; then 20 right ones
        "captured, map": [0.1] * 18 + [-0.1, 0.6] + [0.3] * 8 + [0.7] * 12,
        "truth, map": [0.2] * 20 + [0.5] * 20,
        "captured, random map": 0.9, "truth, random map": 0.0,
    })  # fmt: skip
    templates = failures.assign(group="facts", **{"captured, map": 0.95, "truth, map": 0.0})
    prompts = pd.concat([failures, templates], ignore_index=True)
    assert maps.threshold(maps.maps(prompts)) == 0.15
    said = maps.said(prompts)
    assert "supported is 0.15, in place of 0.50" in said
    assert "1 of 20 [0.01, 0.24] of AttnLRP's wrong maps and 40 of 40" in said
    assert "12 of 20 [0.39, 0.78] of AttnLRP's right maps" in said
    rows = maps.table(prompts).splitlines()[2:]
    cells = [cell.strip() for cell in rows[0].split("|")]
    assert cells[1:3] == ["failures", "AttnLRP's map"]
    assert [cell.split(" [")[0] for cell in cells[3:7]] == [
        "20 of 40", "12 of 13", "8 of 26", "0 of 1",
    ]  # fmt: skip
    assert rows[2].startswith("| templates | AttnLRP's map | 0 of 40")
    nothing = maps.maps(failures.assign(**{"captured, map": 1.0}))
    assert maps.threshold(nothing) == 1.0


def test_a_map_is_checked_on_stored_tables_as_by_hand() -> None:
    """Six ordinary tokens, all measured: the figure is that of ``result.check``, and its truth the
    same of random tokens."""
    zero = [-2.0, 1.0, 0.5, -0.25, 0.0, 4.0]
    drawn = [-1.0, 3.0, 0.0, 0.0, 1.0, -1.0]
    found = {
        "number": 1, "ordinary": [1, 2, 3, 4, 5, 6],
        "relevance": {"attnlrp": [9.0, 5.0, -4.0, 3.0, 2.0, 1.0, -0.5]},
        "predicted": [0.0] * 7,
        "measured": {
            "pos": [1, 2, 3, 4, 5, 6], "why": ["sampled"] * 6, "zero": zero, "random a": drawn,
            "random b": [None] * 6,
        },
    }  # fmt: skip
    rows = maps.checked(found)
    # −sign · effect: 2 + 1 − 0.5 + 0.25 − 0 + 4 of all |effects|
    assert rows["captured, map"] == pytest.approx((2 + 1 - 0.5 + 0.25 + 4) / 7.75)
    assert rows["truth, map"] == pytest.approx((1 + 3 - 0 - 0 - 1 - 1) / 6)


def test_few_measured_tokens_stand_for_the_others() -> None:
    """Two strongest of ten, and two of the other eight measured: each stands for four."""
    r, strongest = torch.tensor([1.0, -1.0]), torch.tensor([-3.0, 1.0])
    rest = torch.tensor([2.0, 0.5])
    # the two largest of ten: 3, and one of the four 2s
    assert maps._weighted(r, strongest, rest, 10) == pytest.approx((3 + 1) / (3 + 2))
