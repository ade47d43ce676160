"""How far relevance of the demo model in bfloat16 and float16 is from float32 on the same weights.

    python benchmarks/precision.py [cases a kind]

Largest |error| over largest |value|, in percent: of the input tokens' relevance, of all hidden
states', of all heads', and of all edges. Median and worst case, and how many cases stay within 2 %
in all of them. The float32 run uses the rounded weights (`in_float32`), so what is compared is
arithmetic alone; the column Δℓ is the error of the model's own logit difference, which no backward
can repair. Prints a table for each precision. Every case's graph, in two precisions and for
each rule set, dominates.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.demo import KINDS
from tl_contrastive_lrp.rules.precision import in_float32

RULES = ("attnlrp", "cplrp", "relp", "gim", "gradient")
LONGEST = 300  # tokens: graphs of longer prompts take their time


def off(found: Tensor, wanted: Tensor) -> float:
    return 100 * float((found - wanted).abs().max() / wanted.abs().max())


def errors(model: object, case: object, rules: str) -> dict[str, float]:
    def explained() -> tuple[object, object]:
        ends = {"target": case.target_id, "contrast": case.contrast_id, "rules": rules}
        graph = clrp.attribution_graph(model, case.prompt, progress=False, **ends)
        return clrp.attribute(model, case.prompt, **ends), graph

    low, low_graph = explained()
    with in_float32(model):
        high, high_graph = explained()
    low_edges, high_edges = (
        torch.stack([graph.matrix(*step) for step in pairwise(graph.sites)])
        for graph in (low_graph, high_graph)
    )
    return {
        "Δℓ": 100 * abs(low.delta - high.delta) / abs(high.delta),
        "input": off(low.tokens, high.tokens),
        "hidden": off(low.resid, high.resid),
        "heads": off(low.heads, high.heads),
        "edges": off(low_edges, high_edges),
    }


def main() -> None:
    torch.set_num_threads(1)
    each = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for dtype in (torch.bfloat16, torch.float16):
        model = clrp.load_demo_model(dtype=dtype)
        cases = [
            case
            for kind in KINDS
            for case in [
                c
                for c in clrp.load_demo_cases(kind)
                if model.to_tokens(c.prompt).shape[1] <= LONGEST
            ][:each]
        ]
        print(f"{dtype}, {len(cases)} cases; median (worst), %")
        for rules in RULES:
            rows = [errors(model, case, rules) for case in cases]
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            good = sum(max(row.values()) <= 2 for row in ({**r, "Δℓ": 0} for r in rows))
            cells = [f"{name} {median(v):.2f} ({max(v):.2f})" for name, v in columns.items()]
            cells.append(f"within 2 %: {good}")
            print(f"  {rules:9s}", "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
