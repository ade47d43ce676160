"""Relevance patching against activation patching where that is linear, and against the oracle."""

from __future__ import annotations

import inspect
from typing import Any

import pandas as pd
import pytest
import torch
from support.grids import diagonal, grid
from torch import Tensor
from transformer_lens import patching as tl
from transformer_lens.patching import PatchingResult
from truth.families import FAMILIES, boot, hf_model, random_tokens, true_float64
from truth.linear_model import frozen, linear_model
from truth.oracle import contrast_seed, propagate

import tl_contrastive_lrp as clrp

A, B = 7, 12
ALL_SWEEPS = tuple(
    name.removeprefix("get_act_patch_")
    for name in dir(tl)
    if name.startswith("get_act_patch_") and "direct_path" not in name
)
EVERY = tuple(name for name in ALL_SWEEPS if name.endswith("every"))
SINGLE = tuple(name for name in ALL_SWEEPS if name not in EVERY)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tl, "tqdm", lambda rows: rows)


@pytest.fixture(scope="module")
def linear() -> Any:
    return linear_model()


def measured(name: str, *args: Any, **kwargs: Any) -> Any:
    """TransformerLens' own sweep, patching one cell at a time."""
    with torch.no_grad():
        return getattr(tl, f"get_act_patch_{name}")(*args, **kwargs)


def estimated(name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(clrp.patching, f"get_relevance_patch_{name}")(*args, **kwargs)


def clean_cache(model: Any, tokens: Tensor) -> Any:
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def per_example(logits: Tensor) -> Tensor:
    return logits[:, -1, A] - logits[:, -1, B]


def close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    got, wanted = got.double(), wanted.double()
    assert got.shape == wanted.shape
    return bool((got - wanted).abs().max() <= tolerance * wanted.abs().max())


def test_every_sweep_of_transformer_lens_has_one() -> None:
    assert len(ALL_SWEEPS) == 18
    names = {f"get_relevance_patch_{name}" for name in ALL_SWEEPS}
    assert {*names, "relevance_patch"} == set(clrp.patching.__all__)
    for name in names:
        fn = getattr(clrp.patching, name)
        assert fn.__name__ == name
        assert name.removeprefix("get_relevance_patch_") in fn.__doc__
        first = list(inspect.signature(fn).parameters)[:4]
        assert first == ["model", "corrupted_tokens", "clean_cache", "objective"]


@pytest.mark.parametrize("name", ALL_SWEEPS)
def test_equal_to_activation_patching_where_the_model_is_linear(linear: Any, name: str) -> None:
    """The clean activations come from the model as it is, so every cell differs from its own."""
    corrupted = random_tokens(2, 5, seed=2)
    objective = clrp.logit_diff(linear, A, B)
    cache = clean_cache(linear, random_tokens(2, 5, seed=1))
    with frozen(linear):
        with torch.no_grad():
            base = float(objective(linear(corrupted)))
        wanted = measured(name, linear, corrupted, cache, objective).double()
        got = {
            rules: estimated(name, linear, corrupted, cache, objective, rules=rules)
            for rules in ("relp", "gradient", "cplrp")
        }
    moved = float((wanted - base).abs().max())
    blind = "_q_" in name or "_k_" in name  # patterns are held: queries and keys move nothing
    assert blind == (moved < 1e-4), "the test patches nothing"
    if name in EVERY[:2]:
        got["cplrp"], head_parts = got["cplrp"][:4], wanted[:4]
        assert close(got.pop("cplrp"), head_parts, 1e-5)
    elif "pattern" in name:  # to this rule set a pattern is no cause
        assert (got.pop("cplrp") - base).abs().max() < 1e-9
    for rules, estimate in got.items():
        assert (estimate - wanted).abs().max() < 1e-5 * max(1.0, moved), rules


@pytest.mark.parametrize(("name", "rules"), grid(FAMILIES, ["attnlrp", "relp", "gim"]))
def test_equal_to_the_explicit_propagation(name: str, rules: str) -> None:
    """Δ · gradient from the oracle, for every sweep, on the families as they are."""
    model, hf = boot(name), hf_model(name)
    clean, corrupted = random_tokens(2, 6, seed=1), random_tokens(2, 6, seed=2)
    seed = contrast_seed(corrupted, A, B, 48)
    truth = propagate(hf, corrupted, seed, rules)
    other = propagate(hf, clean, seed, rules)
    base = (truth.logits[:, -1, A] - truth.logits[:, -1, B]).sum()
    layers = range(model.cfg.n_layers)

    def products(at: str) -> Tensor:
        return torch.stack(
            [
                ((other.activation[n] - truth.activation[n]) * truth.gradient[n]).sum(0)
                for n in (f"blocks.{i}.{at}" for i in layers)
            ]
        )

    heads = {"out": "hook_z", "q": "hook_q", "k": "hook_k", "v": "hook_v"}
    wanted = {at: products(f"hook_{at}").sum(-1) for at in ("resid_pre", "resid_mid")}
    wanted |= {at: products(f"hook_{at}").sum(-1) for at in ("attn_out", "mlp_out")}
    for part, hook in heads.items():
        wanted[f"attn_head_{part}_by_pos"] = products(f"attn.{hook}").sum(-1)
        wanted[f"attn_head_{part}_all_pos"] = products(f"attn.{hook}").sum((1, 3))
    pattern = products("attn.hook_pattern")
    wanted["attn_head_pattern_dest_src_pos"] = pattern
    wanted["attn_head_pattern_by_pos"] = pattern.sum(-1)
    wanted["attn_head_pattern_all_pos"] = pattern.sum((-1, -2))
    assert set(wanted) == set(SINGLE)
    with true_float64(model):
        cache = clean_cache(model, clean)
        objective = clrp.logit_diff(model, A, B)
        for sweep, change in wanted.items():
            got = estimated(sweep, model, corrupted, cache, objective, rules=rules)
            assert got.dtype == torch.float64
            assert close(got - base, change, 1e-9), sweep


@pytest.mark.parametrize(("name", "sweep"), diagonal(["qwen3", "gpt2"], ALL_SWEEPS))
def test_results_are_laid_out_as_those_of_transformer_lens(name: str, sweep: str) -> None:
    """Grouped queries (qwen3) and plain heads (gpt2): every field but the estimates."""
    model = boot(name, torch.float32)
    clean, corrupted = random_tokens(2, 2, seed=1), random_tokens(2, 2, seed=4)
    cache = clean_cache(model, clean)
    metrics = {"a": per_example, "b": lambda logits: -per_example(logits)}
    calls: list[tuple[Any, dict[str, Any]]] = [
        (clrp.logit_diff(model, A, B), {}),
        (per_example, {"reduce": "none", "baseline": True}),
        (metrics, {"reduce": "mean", "baseline": True}),
    ]
    for objective, how in calls:
        wanted = measured(sweep, model, corrupted, cache, objective, **how)
        got = estimated(sweep, model, corrupted, cache, objective, **how)
        if not how:
            assert isinstance(got, Tensor)
            assert (got.shape, got.dtype) == (wanted.shape, torch.float32)
            padded = wanted == 0
            assert torch.equal(got == 0, padded)
            continue
        assert isinstance(got, PatchingResult)
        assert got.values.shape == wanted.values.shape
        for field in ("axis_names", "metric_names", "reduced", "has_metric_axis"):
            assert getattr(got, field) == getattr(wanted, field), field
        assert got.patch_type_names == wanted.patch_type_names
        pd.testing.assert_frame_equal(got.index_df, wanted.index_df)
        assert close(got.baseline, wanted.baseline, 1e-4)
        assert len(got.to_dataframe()) == len(wanted.to_dataframe())


def test_examples_metrics_and_cells_fall_apart_rightly(linear: Any) -> None:
    """Per example, per metric, per chosen cell: still equal to TransformerLens' measurements."""
    corrupted = random_tokens(3, 4, seed=2)
    cache = clean_cache(linear, random_tokens(3, 4, seed=1))
    metrics = {"a": per_example, "b": lambda logits: logits[:, -1, 9] * 2.0}
    name = "attn_head_out_by_pos"
    with frozen(linear):
        args = (linear, corrupted, cache)
        wanted = measured(name, *args, metrics, reduce="none", baseline=True)
        got = estimated(name, *args, metrics, reduce="none", baseline=True)
        assert close(got.values, wanted.values, 1e-5)
        assert close(got.effect(), wanted.effect(), 1e-5)
        assert close(got["b"].values, wanted["b"].values, 1e-5)
        mean = estimated(name, *args, per_example, reduce="mean")
        assert close(mean, wanted["a"].mean(), 1e-5)
        cells = pd.DataFrame({"layer": [1, 0, 1], "pos": [3, 0, 2], "head": [2, 1, 0]})
        flat, frame = estimated(name, *args, per_example, cells, True, reduce="mean")
        assert frame is cells
        assert close(flat, mean[cells["layer"], cells["pos"], cells["head"]], 1e-12)
        typed = estimated(name, *args, per_example, cells, reduce="none")
        assert typed.values.shape == (3, 3)
        assert typed.axis_names == []


def test_one_clean_prompt_for_many_corrupted(linear: Any) -> None:
    corrupted = random_tokens(3, 4, seed=2)
    cache = clean_cache(linear, random_tokens(1, 4, seed=1))
    objective = clrp.logit_diff(linear, A, B)
    with frozen(linear):
        wanted = measured("resid_pre", linear, corrupted, cache, objective)
        assert close(estimated("resid_pre", linear, corrupted, cache, objective), wanted, 1e-5)


def test_half_precision_gives_float32() -> None:
    model = boot("qwen3", torch.bfloat16)
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    cache, objective = clean_cache(model, clean), clrp.logit_diff(model, A, B)
    got = estimated("mlp_out", model, corrupted, cache, objective)
    assert got.dtype == torch.float32
    assert got.isfinite().all()


def test_compatibility_mode() -> None:
    """Renamed HookPoints and folded weights: the same estimates of the stream's cells."""
    from support.hooking import fresh

    clean, corrupted = random_tokens(1, 5, seed=1), random_tokens(1, 5, seed=2)
    found = []
    for folded in (False, True):
        model = fresh("qwen2")
        if folded:
            model.enable_compatibility_mode()
        cache, objective = clean_cache(model, clean), clrp.logit_diff(model, A, B)
        found.append(estimated("attn_head_out_by_pos", model, corrupted, cache, objective))
    assert close(found[1], found[0], 1e-4)
