"""What is measured on one prompt of real weights, for every rule set.

Everything is asked of the token that the model prefers of the two (``preferred``), so exchanging
target and contrast changes no measure: not those that are symmetric anyhow, and not those that ask
which token was first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from _faithfulness_runs import METHODS
from _real_effects import measured_effects
from torch import Tensor

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.evaluation.faithfulness.removal import prepare_removal
from tl_contrastive_lrp.evaluation.ranking import first_in_order
from tl_contrastive_lrp.inputs.tokens import drawable_ids, special_ids, special_mask

WHOLE = 48  # tokens up to which every ordinary token is replaced
SAMPLED, STRONGEST = 16, 16  # beyond: so many at random, and so many by |relevance|
FIRST_SET = "attnlrp"
WINDOWS = (1, 2)  # of predicted effects
LEAST_GAP = 0.5  # logits that a corrupted prompt must take from Δℓ, for circuits
SHARES = (0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0)  # of tokens removed, for the area
LIMIT = 8  # tokens to flip
EVERY = 5  # layers of which one is patched
QUIET: dict[str, Any] = {"progress": False}


def preferred(model: Any, ids: Tensor, one: int, other: int) -> tuple[int, int, bool]:
    """The token of the two that the model prefers, the other, and whether the first of them is its
    first choice of all tokens."""
    with torch.no_grad():
        logits = model(ids[None])[0, -1]
    if logits[other] > logits[one] or (logits[other] == logits[one] and other < one):
        one, other = other, one
    return one, other, int(logits.argmax()) == one


def relevance(
    model: Any, ids: Tensor, target: int, contrast: int, methods: Sequence[str]
) -> dict[str, Any]:
    """Results by rule set."""
    return {
        name: clrp.attribute(model, ids, target=target, contrast=contrast, rules=METHODS[name])
        for name in methods
    }


def shares(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of Δℓ, by rule set: what arrives at the tokens, at special and first tokens."""
    return {
        name: {
            "share": float(result.tokens.double().sum()) / result.delta,
            "sink_share": result.sink_share,
        }
        for name, result in results.items()
    }


def ordinary(model: Any, ids: Tensor) -> list[int]:
    """Positions of tokens that are not special and not the first."""
    special = special_mask(ids, special_ids(model))
    return [p for p in range(1, len(ids)) if not special[p]]


def positions(ids: Tensor, free: Sequence[int], scores: Tensor, seed: int) -> dict[int, str]:
    """Which tokens are replaced: all that are free, or a uniform sample, and the strongest."""
    if len(ids) <= WHOLE:
        return dict.fromkeys(free, "sampled")
    draw = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed)).tolist()
    found = {free[i]: "sampled" for i in draw[:SAMPLED]}
    for p in sorted(free, key=lambda p: (-abs(float(scores[p])), p))[:STRONGEST]:
        found[p] = "both" if found.get(p) == "sampled" else "strongest"
    return dict(sorted(found.items()))


def effects(
    model: Any, plain: Any, ids: Tensor, target: int, contrast: int, at: Mapping[int, str],
    seed: int, second: bool,
) -> dict[str, list[float | None]]:  # fmt: skip
    """Measured effects at these positions, in their order: zero embeddings, a random token, and
    where ``second`` another random one at the sampled positions."""
    pool, generator = drawable_ids(model), torch.Generator().manual_seed(seed)
    drawn = pool[torch.randint(len(pool), (2, len(ids)), generator=generator)].tolist()
    which: list[tuple[int, int | None]] = [(p, None) for p in at]
    which += [(p, drawn[0][p]) for p in at]
    twice = [p for p, why in at.items() if second and why != "strongest"]
    which += [(p, drawn[1][p]) for p in twice]
    found = measured_effects(plain, ids, target, contrast, which).tolist()
    n = len(at)
    again = dict(zip(twice, found[2 * n :], strict=True))
    return {"zero": found[:n], "random a": found[n : 2 * n], "random b": [again.get(p) for p in at]}


def predicted(
    model: Any, ids: Tensor, target: int, contrast: int, windows: Sequence[int] = WINDOWS
) -> dict[str, dict[str, Any]]:
    """Effects of zero embeddings as ``token_effects`` predicts them, of all tokens, and what that
    took, in forwards; by window."""
    asked = {"target": target, "contrast": contrast}
    found = {w: clrp.token_effects(model, ids, **asked, window=w, **QUIET) for w in windows}
    return {
        str(w): {"effect": one.effect.tolist(), "forwards": one.forwards}
        for w, one in found.items()
    }


def area(
    model: Any, ids: Tensor, target: int, contrast: int, scores: Mapping[str, Tensor]
) -> dict[str, float]:
    """The area between the curves of removed tokens, as ``faithfulness_curves`` has it, with zero
    embeddings and steps at ``SHARES``."""
    objective = clrp.logit_diff(model, target, contrast)
    setting = prepare_removal(model, ids, objective, **QUIET)
    at, n = setting.positions, len(ids)
    removed = torch.tensor(sorted({round(share * len(at)) for share in SHARES}))
    masks = []
    for one in scores.values():
        order = at[one.double()[at].argsort(descending=True, stable=True)]
        masks += [first_in_order(order, removed, n), first_in_order(order.flip(0), removed, n)]
    values = setting.values(torch.cat(masks)).view(len(scores), 2, -1)
    whole, none = float(values[0, 0, 0]), float(values[0, 0, -1])
    scale = max(abs(whole), abs(whole - none))
    between = torch.trapezoid(values[:, 1] - values[:, 0], removed.double() / len(at)) / scale
    return dict(zip(scores, between.tolist(), strict=True))


def flips(model: Any, ids: Tensor, target: int, scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Tokens to flip; one more than ``LIMIT`` where so many were not enough."""
    found = clrp.faithfulness.tokens_to_flip(model, ids, scores, target=target, limit=LIMIT)
    return {name: float(LIMIT + 1 if n is None else n) for name, n in found.items()}


def correlation(x: Sequence[float], y: Sequence[float], kind: str) -> float:
    """NaN where one does not vary."""
    frame = pd.DataFrame({"x": x, "y": y}).astype(float).dropna()
    if len(frame) < 3 or frame["x"].nunique() < 2 or frame["y"].nunique() < 2:
        return math.nan
    if kind == "spearman":
        frame = frame.rank()
    return float(frame["x"].corr(frame["y"]))


def patches(
    model: Any, cache: Any, corrupted: Tensor, target: int, contrast: int
) -> tuple[dict[str, Tensor], float]:
    """Δℓ of the corrupted run minus its own, with one clean state patched in: the residual stream
    at a position [layer, pos], a head at all positions [layer, head], in one layer of ``EVERY``;
    and Δℓ of the corrupted run.

    The cells of a layer are the rows of a batch.
    """
    layers, n, heads = range(0, model.cfg.n_layers, EVERY), len(corrupted), model.cfg.n_heads

    def delta(rows: int, hooks: list[Any]) -> Tensor:
        with torch.no_grad():
            logits = model.run_with_hooks(corrupted.expand(rows, -1), fwd_hooks=hooks)[:, -1]
        return (logits[:, target] - logits[:, contrast]).double()

    def at_positions(x: Tensor, hook: Any) -> Tensor:
        x, rows = x.clone(), torch.arange(n)
        x[rows, rows] = cache[hook.name][0]
        return x

    def at_heads(x: Tensor, hook: Any) -> Tensor:
        x, rows = x.clone(), torch.arange(heads)
        x[rows, :, rows] = cache[hook.name][0].transpose(0, 1)
        return x

    base = float(delta(1, []))
    sweeps = {
        "residual stream": ("blocks.{}.hook_resid_pre", at_positions, n),
        "heads": ("blocks.{}.attn.hook_z", at_heads, heads),
    }
    found = {
        what: torch.stack([delta(rows, [(name.format(i), hook)]) for i in layers]) - base
        for what, (name, hook, rows) in sweeps.items()
    }
    return found, base


def patching(
    model: Any, clean: Tensor, corrupted: Tensor, target: int, contrast: int, methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Estimates of patching the clean states into the corrupted run, against measured ones."""
    objective = clrp.logit_diff(model, target, contrast)
    with torch.no_grad():
        cache = model.run_with_cache(clean[None])[1]
    measured, base = patches(model, cache, corrupted, target, contrast)
    layers, found = list(range(0, model.cfg.n_layers, EVERY)), {}
    for name in methods:
        args, how = (model, corrupted[None], cache, objective), {"rules": METHODS[name]}
        estimates = {
            "residual stream": clrp.patching.get_relevance_patch_resid_pre(*args, **how),
            "heads": clrp.patching.get_relevance_patch_attn_head_out_all_pos(*args, **how),
        }
        found[name] = {
            f"{kind} {what}": correlation(
                measured[what].flatten().tolist(), (one[layers] - base).flatten().tolist(), kind
            )
            for what, one in estimates.items()
            for kind in ("pearson", "spearman")
        }
    return found


def circuits(
    model: Any, clean: Tensor, corrupted: Tensor, target: int, contrast: int,
    methods: Sequence[str], seed: int,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """CPR and CMD by rule set, and of edges in random order; {} where the corrupted prompt takes
    less than ``LEAST_GAP`` logits from Δℓ, so that there is next to nothing to restore."""
    with torch.no_grad():
        logits = model(torch.stack([clean, corrupted]))[:, -1].double()
    own, other = (logits[:, target] - logits[:, contrast]).tolist()
    if own - other < LEAST_GAP:
        return {}
    question = {"target": target, "contrast": contrast}
    how: dict[str, Any] = {**question, "corrupted": corrupted[None], **QUIET}
    found = {}
    for name in methods:
        graph = clrp.attribution_graph(model, clean, **question, rules=METHODS[name])
        curve = clrp.circuit_curve(model, graph, **how)
        found[name] = {"cpr": curve.cpr, "cmd": curve.cmd}
    curve = clrp.circuit_curve(model, graph, by="random", seed=seed, **how)
    return found | {"random": {"cpr": curve.cpr, "cmd": curve.cmd}}
