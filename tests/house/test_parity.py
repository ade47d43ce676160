"""Relevance of whole models against the explicit propagation of ``tests/truth/oracle``.

Every family and variant, every rule set, every HookPoint the oracle knows; in float64 where the
test model is made to compute in it throughout, and in float32 against float64 truth.
"""

from __future__ import annotations

import pytest
import torch
from support.grids import diagonal
from truth.families import ALL, FAMILIES, boot, hf_model, left_padded, random_tokens, true_float64
from truth.oracle import RULE_SETS, contrast_seed, propagate
from truth.rounding import PROMISED, depth, through

import tl_contrastive_lrp as clrp

TARGET, CONTRAST = 7, 12
NAMES = tuple(RULE_SETS)


def _oracle(name: str, rules: str, tokens: torch.Tensor, mask: torch.Tensor | None = None):
    seed = contrast_seed(tokens, TARGET, CONTRAST, 48)
    return propagate(hf_model(name), tokens, seed, rules, attention_mask=mask)


def _largest_errors(relevance, truth) -> dict[str, float]:
    """|error| by HookPoint, relative to the largest relevance at that kind of HookPoint."""
    errors = {}
    for hook_name, wanted in truth.relevance.items():
        if hook_name not in relevance.cache_dict:
            continue
        scale = wanted.abs().max().clamp_min(1e-12)
        error = (relevance[hook_name].double() - wanted).abs().max() / scale
        errors[hook_name] = float(error)
    return errors


@pytest.mark.parametrize("rules", NAMES)
@pytest.mark.parametrize("name", ALL)
def test_float64(name: str, rules: str) -> None:
    model, tokens = boot(name), random_tokens()
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    with true_float64(model):
        logits, relevance = clrp.run_with_relevance(model, tokens, objective, rules=rules)
    truth = _oracle(name, rules, tokens)
    assert (logits - truth.logits).abs().max() < PROMISED[torch.float64]
    errors = _largest_errors(relevance, truth)
    missing = (set(truth.relevance) & set(model.hook_dict)) - set(errors)
    assert not missing, f"not compared: {sorted(missing)}"
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= PROMISED[torch.float64], (worst, errors[worst])


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, NAMES))
def test_float32(name: str, rules: str) -> None:
    model, tokens = boot(name, torch.float32), random_tokens()
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    _, relevance = clrp.run_with_relevance(model, tokens, objective, rules=rules)
    errors = _largest_errors(relevance, _oracle(name, rules, tokens))
    worst = max(errors, key=errors.__getitem__)
    # What is promised, or what a whole run's roundings can come to where that is more: on these
    # tiny models terms cancel (a softmax's gradient at the keys) that are larger than any sum.
    limit = max(PROMISED[torch.float32], through(depth(model, tokens.shape[1]), torch.float32))
    assert errors[worst] <= limit, (worst, errors[worst])


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padded_batch(name: str, rules: str) -> None:
    model = boot(name)
    tokens, mask = left_padded()
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    with true_float64(model):
        how = {"attention_mask": mask, "rules": rules}
        _, relevance = clrp.run_with_relevance(model, tokens, objective, **how)
    errors = _largest_errors(relevance, _oracle(name, rules, tokens, mask))
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= PROMISED[torch.float64], (worst, errors[worst])
