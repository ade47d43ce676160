"""The measurements behind ``faithfulness.py``: frames with a row a prompt and method."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np
import pandas as pd
import torch
from support.planted_scores import measured
from tqdm.auto import tqdm
from truth import planted

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.evaluation.faithfulness import auroc, average_precision

# What GIM's temperature does by itself.
WARM = replace(clrp.RULE_SETS["attnlrp"], name="warm", softmax="temperature", temperature=2.0)
METHODS = {**clrp.RULE_SETS, "attnlrp, T = 2": WARM}
RULES = tuple(METHODS)
GRID = np.linspace(0.0, 1.0, 21)


def asked(model: Any, case: Any) -> dict[str, Any]:
    """The token that the model prefers of the case's two, against the other.

    So exchanging target and contrast changes no measure, also of those that ask what happens to the
    target.
    """
    demo = isinstance(case, clrp.DemoCase)
    target = case.target_id if demo else case.target
    contrast = case.contrast_id if demo else case.contrast
    with torch.no_grad():
        logits = model(model.to_tokens(case.prompt) if demo else case.tokens)[0, -1]
    first, second = float(logits[target]), float(logits[contrast])
    if second > first or (second == first and contrast < target):
        target, contrast = contrast, target
    return {"target": target, "contrast": contrast}


def prompt_of(case: Any) -> Any:
    return case.prompt if isinstance(case, clrp.DemoCase) else case.tokens


def on_planted(seeds: Iterable[int], quiet: bool) -> pd.DataFrame:
    """model, prompt, method, what, auroc, precision."""
    rows = []
    for name, plan in tqdm(planted.PLANS.items(), desc="planted", disable=quiet):
        for seed in seeds:
            for rules in RULES:
                found = measured(planted.bridge(name), planted.case(plan, seed), METHODS[rules])
                rows += [(name, seed, rules, what, *two) for what, two in found.items()]
    return pd.DataFrame(rows, columns=["model", "prompt", "method", "what", "auroc", "precision"])


def known(task: Any, seeds: Iterable[int]) -> list[Any]:
    """The cases of a trained model that it answers right: what it does not know it cannot have
    found anywhere."""
    cases = [task.case(seed) for seed in seeds]
    with torch.no_grad():
        best = task.bridge()(torch.cat([case.tokens for case in cases]))[:, -1].argmax(-1)
    return [
        case for case, answer in zip(cases, best.tolist(), strict=True) if answer == case.target
    ]


def on_trained(model: Any, cases: Iterable[Any], quiet: bool) -> pd.DataFrame:
    """The same for the tokens of a trained model."""
    rows = []
    for number, case in enumerate(tqdm(list(cases), desc="trained", disable=quiet)):
        found = [(rules, measured(model, case, METHODS[rules])["tokens"]) for rules in RULES]
        rows += [("trained", number, rules, "tokens", *two) for rules, two in found]
    return pd.DataFrame(rows, columns=["model", "prompt", "method", "what", "auroc", "precision"])


def on_sums(model: Any, cases: Iterable[Any], quiet: bool) -> pd.DataFrame:
    """Which share of Δℓ arrives at the tokens, BOS included, by prompt and method."""
    rows = []
    for number, case in enumerate(tqdm(list(cases), desc="sums", disable=quiet)):
        question = asked(model, case)
        for rules in RULES:
            result = clrp.attribute(model, prompt_of(case), **question, rules=METHODS[rules])
            rows.append((number, rules, float(result.tokens.sum()) / result.delta))
    return pd.DataFrame(rows, columns=["prompt", "method", "share"])


def on_low_precision(models: Mapping[str, Any], cases: Iterable[Any], quiet: bool) -> pd.DataFrame:
    """By how much the tokens' relevance in low precision is off that of float32 on the same
    weights: largest difference over largest relevance, in percent; infinite if one is not finite.

    models: the same model in every dtype, by what to call it.
    """
    rows = []
    for dtype, model in models.items():
        for number, case in enumerate(tqdm(list(cases), desc=dtype, disable=quiet)):
            question = asked(model, case)
            for rules in RULES:
                how = {**question, "rules": METHODS[rules]}
                low = clrp.attribute(model, prompt_of(case), **how).tokens
                with clrp.in_float32(model):
                    high = clrp.attribute(model, prompt_of(case), **how).tokens
                off = float(100 * (low - high).abs().max() / high.abs().max())
                rows.append((dtype, number, rules, off if np.isfinite(off) else np.inf))
    return pd.DataFrame(rows, columns=["dtype", "prompt", "method", "off"])


def on_decisive(model: Any, cases: Iterable[clrp.DemoCase], quiet: bool) -> pd.DataFrame:
    """Decisive positions among the demo prompt's tokens; special and first tokens left out."""
    rows = []
    for number, case in enumerate(tqdm(list(cases), desc="decisive", disable=quiet)):
        question = asked(model, case)
        results = {
            name: clrp.attribute(model, case.prompt, **question, rules=METHODS[name])
            for name in RULES
        }
        one = results[RULES[0]]
        seen, n = ~one.greyed, len(one.str_tokens)
        scores = {name: result.tokens.abs() for name, result in results.items()}
        scores["random"] = torch.randn(n, generator=torch.Generator().manual_seed(number))
        scores["recency"] = torch.arange(n)
        truth = torch.zeros(n, dtype=torch.bool)
        truth[list(case.decisive_positions)] = True
        if not bool(truth[seen].any()):
            continue
        rows += [
            (case.kind, case.id, name, auroc(s[seen], truth[seen]),
             average_precision(s[seen], truth[seen]))
            for name, s in scores.items()
        ]  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "prompt", "method", "auroc", "precision"])


def on_removal(
    model: Any, cases: Iterable[Any], replace: str, quiet: bool
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Area, comprehensiveness and sufficiency by prompt and method; mean curves on ``GRID``."""
    rows, curves = [], {}
    for number, case in enumerate(tqdm(list(cases), desc=f"removal, {replace}", disable=quiet)):
        prompt, question = prompt_of(case), asked(model, case)
        how = {**question, "progress": False, "replace": replace, "draws": 2}
        scores: dict[str, Any] = {
            name: clrp.attribute(model, prompt, **question, rules=METHODS[name]) for name in RULES
        }
        scores |= clrp.baseline_scores(model, prompt, seed=number, **how)
        del scores["gradient_x_input"]  # the rule set "gradient"
        found = clrp.faithfulness_curves(model, prompt, scores, steps=10, **how)
        for row, name in enumerate(found.names):
            rows.append(
                (number, name, found.area[name], found.comprehensiveness[name],
                 found.sufficiency[name])
            )  # fmt: skip
            for order, values in (("MoRF", found.morf), ("LeRF", found.lerf)):
                fallen = (values[row] - found.delta) / found.scale
                curves.setdefault((name, order), []).append(
                    np.interp(GRID, found.share.numpy(), fallen.numpy())
                )
    columns = ["prompt", "method", "area", "comprehensiveness", "sufficiency"]
    return pd.DataFrame(rows, columns=columns), {
        key: np.mean(each, axis=0) for key, each in curves.items()
    }


def on_circuits(
    model: Any, cases: Iterable[tuple[Any, torch.Tensor, torch.Tensor]], quiet: bool
) -> pd.DataFrame:
    """CPR and CMD by prompt and method, of (case, tokens, corrupted tokens)."""
    rows = []
    for number, (case, tokens, corrupted) in enumerate(tqdm(cases, desc="circuits", disable=quiet)):
        question = asked(model, case)
        how = {**question, "corrupted": corrupted, "progress": False}
        for rules in RULES:
            graph = clrp.attribution_graph(model, tokens, **question, rules=METHODS[rules])
            curve = clrp.circuit_curve(model, graph, **how)
            rows.append((number, rules, curve.cpr, curve.cmd))
        curve = clrp.circuit_curve(model, graph, by="random", seed=number, **how)
        rows.append((number, "random", curve.cpr, curve.cmd))
    return pd.DataFrame(rows, columns=["prompt", "method", "cpr", "cmd"])


def corrupted_demo(
    model: Any, cases: Iterable[clrp.DemoCase], least: float = 0.5, draws: int = 8
) -> list[tuple[clrp.DemoCase, torch.Tensor, torch.Tensor]]:
    """Demo prompts with their decisive tokens exchanged for those of others of their kind.

    Of ``draws`` exchanges the one that lowers Δℓ most; prompts whose Δℓ none lowers by ``least``
    logits are left out: what should decide does not decide there.
    """
    cases, found = list(cases), []
    pools = {
        kind: torch.cat(
            [model.to_tokens(c.prompt)[0, list(c.decisive_positions)]
             for c in clrp.load_demo_cases(kind, failed=None)]
        )
        for kind in {c.kind for c in cases}
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for case in cases:
        tokens = model.to_tokens(case.prompt)
        rows, at = tokens.repeat(draws, 1), list(case.decisive_positions)
        pool = pools[case.kind]
        rows[:, at] = pool[torch.randint(len(pool), (draws, len(at)), generator=generator)]
        with torch.no_grad():
            logits = model(torch.cat([tokens, rows]))[:, -1]
        question = asked(model, case)
        delta = logits[:, question["target"]] - logits[:, question["contrast"]]
        best = int(delta[1:].argmin())
        if delta[0] - delta[1 + best] >= least:
            found.append((case, tokens, rows[best : best + 1]))
    return found
