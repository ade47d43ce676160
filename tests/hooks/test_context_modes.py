"""Beside TransformerLens' own: flags that add HookPoints, gradient cache, compatibility mode."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.grids import diagonal, grid
from support.hooking import delta, forward, fresh, input_gradient, leaf, off, points_of
from support.long_zoo import float64_throughout
from torch import Tensor
from truth import rounding
from truth.families import FAMILIES, boot, random_tokens
from truth.rounding import FOLDING

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

RULES = tuple(clrp.RULE_SETS)


# ---------------------------------------------------------------- flags that add HookPoints


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("flag", ["use_attn_result", "use_hook_mlp_in"])
def test_harmless_flags_change_no_relevance(name: str, flag: str, rules: str) -> None:
    model, ids = fresh(name), random_tokens()
    with clrp.lrp(model, rules):
        wanted = input_gradient(model, ids, [])
    getattr(model, f"set_{flag}")(True)
    plain = model(ids)
    with clrp.lrp(model, rules):
        got = input_gradient(model, ids, [])
        assert torch.equal(model(ids), plain)
    assert off(got, wanted) < 1e-5


# ---------------------------------------------------------------- TransformerLens' own gradients


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp", "gradient"])
@pytest.mark.parametrize("name", FAMILIES)
def test_run_with_cache_backward_agrees_with_run_with_relevance(name: str, rules: str) -> None:
    """TransformerLens' own gradient cache inside the rules holds the same gradients.

    It calls .backward(), so it adds to parameters' .grad, which run_with_relevance never does.
    Left out: hook_scale and hook_normalized, where its backward hooks make TransformerLens leave
    its native norms (with a warning), and rotary tables, which take no relevance.
    """
    model, ids = fresh(name), random_tokens(2)
    wanted = [
        n
        for n in points_of(model)
        if not n.endswith(("hook_scale", "hook_normalized", "hook_cos", "hook_sin"))
        and not n.startswith("rotary")
        and not n.endswith("embed.hook_in")
    ]
    plain = model(ids, return_type="loss")
    _, relevance = clrp.run_with_relevance(
        model, ids, lambda logits: model.loss_fn(logits, ids), wanted, rules=rules
    )
    assert all(p.grad is None for p in model.original_model.parameters())
    with clrp.lrp(model, rules):
        loss, cache = model.run_with_cache(
            ids, names_filter=wanted, incl_bwd=True, return_type="loss"
        )
    assert torch.equal(loss, plain)
    largest = max(float(r.abs().max()) for r in relevance.values())
    silent = set()
    for key in wanted:
        gradient = cache[key + "_grad"] if key + "_grad" in cache.keys() else None  # noqa: SIM118
        if gradient is None:
            if rules == "cplrp" and key.endswith("hook_pattern"):
                continue  # cut off there: only a reader placed before the rule sees a gradient
            silent.add(key.rpartition(".")[2])
            assert float(relevance[key].abs().max()) == 0.0, key
            continue
        error = float((relevance[key] - cache[key] * gradient).abs().max())
        assert error < 1e-5 * largest, key
    # only under cplrp may TransformerLens see no gradient: queries and keys
    assert rules == "cplrp" or silent == set()
    assert len(wanted) > 20


# ---------------------------------------------------------------- compatibility mode

COMPATIBLE = (*FAMILIES, "qwen3-bias", "llama-bias", "gpt2-gelu", "gemma2-uncapped")
BIASED = ("qwen3-bias", "llama-bias")
LIST_TOO = tuple(n for n in COMPATIBLE if n != "gemma2")


def _compatible(name: str, dtype: torch.dtype, **how: bool) -> Any:
    model = fresh(name, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode(disable_warnings=True, **how)
    return model.eval()


def _token_relevance(model: Any, ids: Tensor, rules: str) -> dict[str, Tensor]:
    """What folding leaves comparable: sums over the stream, heads, neurons."""
    objective = clrp.logit_diff(model, 7, 11)
    _, r = clrp.run_with_relevance(model, ids, objective, rules=rules)
    out = {"embed": r["hook_embed"].sum(-1)}
    for i in range(model.cfg.n_layers):
        out[f"{i} resid_pre"] = r[f"blocks.{i}.hook_resid_pre"].sum(-1)
        out[f"{i} resid_mid"] = r[f"blocks.{i}.hook_resid_mid"].sum(-1)
        out[f"{i} pattern"] = r[f"blocks.{i}.attn.hook_pattern"]
        out[f"{i} post"] = r[f"blocks.{i}.mlp.hook_post"]
    out["resid_post"] = r[f"blocks.{i}.hook_resid_post"].sum(-1)
    return out


@pytest.mark.parametrize(
    ("name", "how", "rules"), grid(COMPATIBLE, ["no processing", "folded"], turns=RULES)
)
def test_compatibility_mode_has_the_same_relevance(name: str, rules: str, how: str) -> None:
    ids, exact = random_tokens(2), how == "no processing"
    plain = boot(name, torch.float64)
    model = _compatible(name, torch.float64, **({"no_processing": True} if exact else {}))
    # Softmaxes that round to float32 on the way would leave that rounding between two places where
    # GIM's rule is applied: TransformerLens adds an operation behind them in this mode.
    with float64_throughout(plain):
        wanted = _token_relevance(plain, ids, rules)
    with float64_throughout(model):
        got = _token_relevance(model, ids, rules)
    largest = max(float(value.abs().max()) for value in wanted.values())
    for key, value in wanted.items():
        if not exact and key.endswith("pattern") and name.startswith(("gpt2", "qwen2", *BIASED)):
            continue  # biases of values are folded into the output's: the same sum, other factors
        assert float((got[key] - value).abs().max()) <= (1e-12 if exact else FOLDING) * largest, key


@pytest.mark.parametrize(
    ("name", "rules", "how"),
    diagonal(COMPATIBLE, ["attnlrp", "cplrp", "gim"], ["no processing", "folded"]),
)
def test_compatibility_mode_forward_context_and_list(name: str, rules: str, how: str) -> None:
    """Bit-identical forward; lrp, lrp_hooks and run_with_relevance agree: no rule goes on twice."""
    kwargs = {"no_processing": True} if how == "no processing" else {}
    model, ids = _compatible(name, torch.float32, **kwargs), random_tokens(2)
    slack = rounding.through(rounding.depth(model, ids.shape[1]), torch.float32)
    plain = forward(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with clrp.lrp(model, rules):
            ruled = forward(model, ids)
            wanted = input_gradient(model, ids, [])
        if name in LIST_TOO:
            hooks = clrp.lrp_hooks(model, rules)
            with model.hooks(fwd_hooks=hooks):
                hooked = forward(model, ids)
            assert all(torch.equal(hooked[key], plain[key]) for key in plain)
            assert off(input_gradient(model, ids, hooks), wanted) < slack
        logits, r = clrp.run_with_relevance(model, ids, delta, "hook_embed", rules=rules)
    assert all(torch.equal(ruled[key], plain[key]) for key in plain)
    assert torch.equal(logits, plain["logits"])
    embedded: dict[str, Tensor] = {}
    with model.hooks(fwd_hooks=[leaf(embedded)]):
        model(ids)
    assert off(r["hook_embed"], (wanted * embedded["leaf"]).detach()) < slack
    assert model.list_hooks() == {}


@pytest.mark.parametrize("name", COMPATIBLE)
def test_compatibility_mode_calls_every_rule_once(name: str) -> None:
    model = _compatible(name, torch.float32)
    calls: list[str] = []

    def counting(point: str, fn: Any) -> Any:
        def hook_fn(tensor: Tensor, hook: Any) -> Any:
            calls.append(point)
            return fn(tensor, hook=hook)

        return hook_fn

    hooks = [(point, counting(f"{i} {point}", fn))
             for i, (point, fn) in enumerate(clrp.lrp_hooks(model))]  # fmt: skip
    model.run_with_hooks(random_tokens(), fwd_hooks=hooks)
    assert len(calls) == len(hooks)
    assert len(set(calls)) == len(hooks)


def test_compatibility_mode_refuses_rules_inside_rules() -> None:
    model = _compatible("qwen3", torch.float32)
    with clrp.lrp(model), pytest.raises(ModelStateError, match="already on"), clrp.lrp(model):
        pass


@pytest.mark.parametrize("point", ["mlp.gate.hook_out", "mlp.in.hook_out", "mlp.hook_pre"])
@pytest.mark.parametrize("order", ["user inside", "user outside"])
@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_compatibility_mode_edits(point: str, order: str, rules: str) -> None:
    """The MLP that TransformerLens computes itself: an edit is followed, or refused."""
    ids, name = random_tokens(), f"blocks.0.{point}"
    plain, model = boot("qwen3", torch.float64), _compatible("qwen3", torch.float64)

    def edit(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.where(torch.arange(9)[None, :, None] == 4, -0.5 * tensor, tensor)

    with clrp.lrp(plain, rules):
        wanted = input_gradient(plain, ids, [(name, edit)])
    if order == "user outside":
        with model.hooks(fwd_hooks=[(name, edit)]), clrp.lrp(model, rules):
            got = input_gradient(model, ids, [])
        assert off(got, wanted) < FOLDING
    elif rules == "gim":  # no rule has read anything here: nothing to refuse
        with clrp.lrp(model, rules):
            assert off(input_gradient(model, ids, [(name, edit)]), wanted) < FOLDING
    else:
        with clrp.lrp(model, rules), pytest.raises(ModelStateError, match="changed the value"):
            input_gradient(model, ids, [(name, edit)])
