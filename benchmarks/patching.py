"""Relevance patching against activation patching: time for the same sweep, and agreement.

Time: ``get_act_patch_*`` (one forward for each cell, without gradients, as TransformerLens has it)
and ``get_relevance_patch_*`` (one forward and backward) in turns on the same random model, tokens
and cache; the ratio of the medians is printed. The clean run is outside both.

Agreement: prompts of the demo model, once as they are (clean) and once with the two candidate
answers exchanged wherever they stand (corrupted), those first where that moves Δℓ most. Means over
the prompts of what ``clrp.compare`` finds for each rule set.

    python benchmarks/patching.py
    python benchmarks/patching.py --only agreement --prompts 8

Prints both tables. What is measured dominates: a forward for each cell of each sweep.
"""

from __future__ import annotations

import argparse
import math

import pandas as pd
import torch
from _models import random_bridge
from relevance import measure
from transformer_lens import patching

import tl_contrastive_lrp as clrp

TIMED = ("attn_head_out_by_pos", "attn_head_all_pos_every", "block_every")
COMPARED = (
    "resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_v_all_pos",
    "attn_head_k_all_pos", "attn_head_q_all_pos", "attn_head_pattern_all_pos",
)  # fmt: skip
FIGURES = ("pearson", "spearman", "slope", "overlap", "same_sign")


def act_patch(name: str, *args: object) -> torch.Tensor:
    with torch.no_grad():
        return getattr(patching, f"get_act_patch_{name}")(*args)


def relevance_patch(name: str, *args: object, **how: object) -> torch.Tensor:
    return getattr(clrp.patching, f"get_relevance_patch_{name}")(*args, **how)


def clean_cache(model, tokens):
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def times(layers: int, d_model: int, heads: int, pos: int, repeats: int) -> None:
    model = random_bridge(layers, d_model, heads, pos)
    clean, corrupted = torch.randint(4, model.cfg.d_vocab, (2, 1, pos))
    cache, objective = clean_cache(model, clean), clrp.logit_diff(model, 7, 12)
    args = (model, corrupted, cache, objective)
    print(f"{layers} layers, {heads} heads, d_model {d_model}, {pos} tokens, one thread, "
          f"median of {repeats}; seconds")  # fmt: skip
    print(f"{'sweep':>24} {'cells':>6} {'patching':>9} {'relevance':>10} {'ratio':>7}")
    for name in TIMED:
        cells = relevance_patch(name, *args).numel()
        t = measure(
            {
                "act": lambda: act_patch(name, *args),
                "relevance": lambda: relevance_patch(name, *args),
            },
            repeats,
        )
        print(f"{name:>24} {cells:>6} {t['act']:>9.2f} {t['relevance']:>10.3f} "
              f"{t['act'] / t['relevance']:>7.0f}")  # fmt: skip


def exchanged(tokens: torch.Tensor, one: int, other: int) -> torch.Tensor:
    """The prompt with two tokens in each other's places."""
    swapped = tokens.masked_fill(tokens == one, other)
    return swapped.masked_fill(tokens == other, one)


def pairs(model, most_tokens: int):
    """(how far Δℓ moves, clean, corrupted, objective), largest first."""
    found = []
    for case in clrp.load_demo_cases(failed=None):
        clean = model.to_tokens(case.prompt)
        corrupted = exchanged(clean, case.target_id, case.contrast_id)
        if clean.shape[1] > most_tokens or torch.equal(clean, corrupted):
            continue
        objective = clrp.logit_diff(model, case.target_id, case.contrast_id)
        with torch.no_grad():
            moved = abs(float(objective(model(clean)) - objective(model(corrupted))))
        found.append((moved, clean, corrupted, objective))
    return sorted(found, key=lambda pair: -pair[0])


def agreement(prompts: int, most_tokens: int) -> None:
    model = clrp.load_demo_model()
    chosen = pairs(model, most_tokens)[:prompts]
    print(f"\n{len(chosen)} prompts of the demo model; Δℓ moves by "
          f"{chosen[-1][0]:.1f} to {chosen[0][0]:.1f}; means")  # fmt: skip
    rows = []
    for _, clean, corrupted, objective in chosen:
        cache = clean_cache(model, clean)
        with torch.no_grad():
            base = objective(model(corrupted))
        for name in COMPARED:
            args = (model, corrupted, cache, objective)
            measured = act_patch(name, *args)
            for rules in clrp.RULE_SETS:
                estimated = relevance_patch(name, *args, rules=rules)
                found = clrp.compare(measured, estimated, baseline=base, n_resamples=1).overall
                rows.append({"sweep": name, "rules": rules}
                            | {figure: getattr(found, figure) for figure in FIGURES})  # fmt: skip
    table = pd.DataFrame(rows).groupby(["sweep", "rules"], sort=False).mean()
    for name in COMPARED:
        print(f"\n{name:>26}" + "".join(f"{figure:>10}" for figure in FIGURES))
        for rules, row in table.loc[name].iterrows():
            figures = (" " * 9 + "–" if math.isnan(v) else f"{v:>10.3f}" for v in row)
            print(f"{rules:>26}" + "".join(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("times", "agreement"))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--pos", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--most-tokens", type=int, default=50)
    options = parser.parse_args()
    torch.set_num_threads(1)
    patching.tqdm = lambda rows: rows
    if options.only != "agreement":
        times(options.layers, options.d_model, options.heads, options.pos, options.repeats)
    if options.only != "times":
        agreement(options.prompts, options.most_tokens)


if __name__ == "__main__":
    main()
