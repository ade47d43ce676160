"""Objectives as the metric of TransformerLens' activation and attribution patching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp

A, B = 5, 6  # "a" and "b" in the test tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return boot("qwen3", torch.float32)


def test_as_the_metric_of_activation_patching(model: Any) -> None:
    from transformer_lens import patching

    clean, corrupted = random_tokens(1, 6, seed=1), random_tokens(1, 6, seed=2)
    objective = clrp.logit_diff(model, A, B)
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        got = patching.get_act_patch_resid_pre(model, corrupted, cache, objective)
    assert got.shape == (2, 6)
    for layer in range(2):
        for pos in range(6):

            def patch(tensor: Tensor, hook: Any, pos: int = pos) -> Tensor:
                tensor = tensor.clone()
                tensor[:, pos] = cache[hook.name.replace("hook_in", "hook_resid_pre")][:, pos]
                return tensor

            with torch.no_grad():
                logits = model.run_with_hooks(
                    corrupted, fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)]
                )
            wanted = logits[0, -1, A] - logits[0, -1, B]
            assert abs(float(got[layer, pos]) - float(wanted)) < 1e-5


@pytest.mark.parametrize("rules", [None, "attnlrp", "cplrp"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_as_the_metric_of_attribution_patching(name: str, rules: str | None) -> None:
    """Inside the rules it scores (clean − corrupt) ⊙ modified gradient: relevance patching."""
    from transformer_lens.tools.analysis import attribution_patching as ap

    model = boot(name, torch.float32)
    clean, corrupted = random_tokens(1, 6, seed=1), random_tokens(1, 6, seed=2)
    objective = clrp.logit_diff(model, A, B)
    if rules is None:
        result = ap.attribution_patch(model, clean, corrupted, objective)
        rules = "gradient"
    else:
        with clrp.lrp(model, rules):
            result = ap.attribution_patch(model, clean, corrupted, objective)
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.hook_mlp_out"]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=names)
        _, base = model.run_with_cache(corrupted, names_filter=names)
    _, relevance = clrp.run_with_relevance(model, corrupted, objective, names, rules=rules)
    for p in range(6):
        for kind, layer, head, key in [
            ("embed", None, None, names[0]),
            ("attn_head_out", 0, 1, names[1]),
            ("mlp_out", 1, None, names[2]),
        ]:
            at = (0, p) if head is None else (0, p, head)
            gradient = relevance[key][at] / base[key][at]
            wanted = float(((cache[key][at] - base[key][at]) * gradient).sum())
            node = ap.Node(kind=kind, position=p, layer=layer, head=head)
            assert abs(result.node_scores[node] - wanted) < 2e-4 * max(1.0, abs(wanted)), node
    assert model.list_hooks() == {}
