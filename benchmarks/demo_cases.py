"""How often a position that decides the case is among the top k by |relevance|, per rule set.

The generator of the demo benchmark recorded for each held-out failure which prompt positions
decide the right answer. Special tokens and the first token are left out of every ranking. The
random ranking is exact: with d decisive ones among n tokens, 1 − C(n−d, k)/C(n, k).

    python benchmarks/demo_cases.py

Prints a table: kinds of task down, rankings across, the share of cases with a hit. Each case is
explained once under each rule set; the logs of the tool calls dominate.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable

import pandas as pd
import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.demo import KINDS

RULES = ("attnlrp", "cplrp", "relp", "gim", "gradient")


def random_hit(n: int, decisive: int, k: int) -> float:
    """Chance that a random ranking of n tokens has a decisive one among its first k."""
    return 1.0 - math.comb(n - decisive, k) / math.comb(n, k)


def hits(model: object, cases: Iterable[clrp.DemoCase], k: int) -> pd.DataFrame:
    """One row a case: kind, and for each ranking whether (or how likely) it hits."""
    rows = []
    for case in cases:
        row: dict[str, object] = {"kind": case.kind}
        for rules in RULES:
            result = clrp.attribute(
                model, case.prompt, target=case.target_id, contrast=case.contrast_id, rules=rules
            )
            size = result.tokens.abs().masked_fill(result.greyed, -1.0)
            top = set(size.topk(k).indices.tolist())
            row[rules] = float(bool(top & set(case.decisive_positions)))
        visible = ~result.greyed
        decisive = int(visible[list(case.decisive_positions)].sum())
        row["random"] = random_hit(int(visible.sum()), decisive, k)
        rows.append(row)
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--solved", action="store_true", help="the solved cases instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = clrp.load_demo_model()
    table = hits(model, clrp.load_demo_cases(failed=not options.solved), options.k)
    by_kind = table.groupby("kind").mean().loc[list(KINDS)]
    by_kind.insert(0, "cases", table.groupby("kind").size())
    by_kind.loc["all"] = [len(table), *table.drop(columns="kind").mean()]
    by_kind["cases"] = by_kind["cases"].astype(int)
    print(f"share of cases with a decisive position among the top {options.k}")
    print(by_kind.to_string(float_format=lambda share: f"{share:.2f}"))


if __name__ == "__main__":
    main()
