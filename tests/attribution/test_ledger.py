"""The account of Δℓ: it balances, and under CP-LRP nothing is lost."""

from __future__ import annotations

import math

import pytest
import torch
from support.grids import grid
from support.hooking import reader
from torch import Tensor
from truth import zoo
from truth.families import ALL, FAMILIES, boot, random_tokens, saved, true_float64

import tl_contrastive_lrp as clrp

RULES = tuple(clrp.RULE_SETS)


@pytest.mark.parametrize(("name", "rules"), grid(ALL, RULES))
def test_the_ledger_balances(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules=rules)
    ledger = result.ledger
    n = model.cfg.n_layers
    assert [row.site for row in ledger.rows] == ["hook_embed", *result.sites]
    assert ledger.delta == result.delta
    above = [*(row.total for row in ledger.rows[1:]), ledger.delta]
    scale = max(abs(row.total) for row in ledger.rows) + abs(ledger.delta)
    for row, up in zip(ledger.rows, above, strict=True):
        assert abs(row.total + row.biases + row.positions + row.other - up) < 1e-6 * scale
        assert all(math.isfinite(v) for v in (row.total, row.biases, row.positions, row.other))
    totals = [result.tokens, *result.resid]
    for row, tensor in zip(ledger.rows, totals, strict=True):
        assert math.isclose(row.total, float(tensor.double().sum()), rel_tol=1e-5, abs_tol=1e-6)
    assert all(row.positions == 0.0 for row in ledger.rows[1:])
    assert (ledger.rows[0].positions != 0.0) == name.startswith("gpt2")
    if name in ("qwen3", "llama", "mistral", "gemma2", "gemma3"):
        assert all(row.biases == 0.0 for row in ledger.rows)
    else:
        biased = name.startswith(("gpt2", "qwen2")) or name.endswith("bias")
        assert any(row.biases != 0.0 for row in ledger.rows) == biased
    assert len(ledger.rows) == n + 2
    assert math.isclose(ledger.share_to_tokens, ledger.rows[0].total / ledger.delta, rel_tol=1e-9)
    assert len(ledger.to_frame()) == n + 2
    assert "Δℓ" in str(ledger)


@pytest.mark.parametrize(("name", "objective"), grid(ALL, ["diff", "top_k", "mean", "target"]))
def test_nothing_is_lost_under_cplrp(name: str, objective: str) -> None:
    """Every rule of CP-LRP conserves: all of Δℓ is at the input, in biases or in positions."""
    model = boot(name)
    chosen = {
        "diff": clrp.logit_diff(model, {7, 9}, 11),
        "top_k": clrp.logit_minus_top_k(model, 7, 3, pos=6),
        "mean": clrp.logit_minus_mean(model, 7),
        "target": clrp.target_logit(model, 7),
    }[objective]
    with true_float64(model):
        result = clrp.attribute(model, random_tokens(), chosen, rules="cplrp")
    scale = max(1.0, abs(result.delta))
    for row in result.ledger.rows:
        assert abs(row.other) < 1e-9 * scale, row
    parts = sum(row.biases + row.positions for row in result.ledger.rows)
    assert math.isclose(result.ledger.rows[0].total + parts, result.delta, rel_tol=1e-8)


def test_biases_of_experts_are_accounted_for() -> None:
    """Shared experts are given the tokens as one list, without an axis for the batch."""
    model, ids = zoo.boot("ernie4_5_moe", torch.float32), random_tokens()
    objective, kept, biases = clrp.logit_diff(model, 7, 11), dict[str, Tensor](), {}
    for name, point in model.hook_dict.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "hook_out" and path.startswith("blocks.1."):
            linear = getattr(model.get_submodule(path), "original_component", None)
            if isinstance(getattr(linear, "bias", None), Tensor) and point.name == name:
                biases[name] = linear.bias.detach()
    assert sum("shared_experts" in name for name in biases) == 3
    with clrp.lrp(model), model.hooks(fwd_hooks=[reader(kept, name) for name in biases]):
        objective(model(ids)).backward()
    wanted = sum(
        float((kept[name].grad.reshape(-1, len(bias)) * bias).sum())  # type: ignore[union-attr]
        for name, bias in biases.items()
    )
    found = clrp.attribute(model, ids, objective).ledger.rows[2].biases
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("folded", [False, True], ids=["no processing", "folded"])
@pytest.mark.parametrize(
    "name", [*FAMILIES, "qwen3-bias", "llama-bias", "gpt2-gelu", "gpt2-untied", "qwen2-tied"]
)
def test_nothing_is_lost_in_compatibility_mode(name: str, folded: bool) -> None:
    """The biases that folding moves are still accounted for."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=torch.float64)
    plain = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules="cplrp")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, rules="cplrp")
    assert math.isclose(result.delta, plain.delta, rel_tol=1e-5, abs_tol=1e-5)
    for row in result.ledger.rows:
        assert abs(row.other) < 1e-5 * max(1.0, abs(result.delta)), row


def test_heads_under_cplrp_hold_what_attention_writes() -> None:
    """Σ heads = relevance of the output projection's output, where it has no bias."""
    model, ids = boot("qwen3", torch.float64), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    result = clrp.attribute(model, ids, objective)
    _, r = clrp.run_with_relevance(model, ids, objective)
    for i in range(2):
        wanted = r[f"blocks.{i}.hook_attn_out"][0].sum(-1)
        torch.testing.assert_close(result.heads[i].sum(0), wanted, rtol=1e-6, atol=1e-9)
