"""Relevance patching: what it refuses, when, and how it leaves the model."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp

A, B = 7, 12
CLEAN, CORRUPTED = random_tokens(2, 5, seed=1), random_tokens(2, 5, seed=2)
patch_z = clrp.patching.get_relevance_patch_attn_head_out_by_pos


class Ran(Exception):
    """The model was run."""


@pytest.fixture(scope="module")
def model() -> Any:
    return boot("qwen3", torch.float32)


@pytest.fixture(scope="module")
def cache(model: Any) -> Any:
    with torch.no_grad():
        return model.run_with_cache(CLEAN)[1]


@pytest.fixture(scope="module")
def objective(model: Any) -> clrp.Objective:
    return clrp.logit_diff(model, A, B)


@pytest.fixture
def idle(model: Any) -> Any:
    """The model may not even be run."""

    def fail(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        raise Ran

    with model.hooks(fwd_hooks=[("embed.hook_out", fail)]):
        yield


def refuse(error: type[Exception], message: str) -> Any:
    return pytest.raises(error, match=message)


@pytest.mark.usefixtures("idle")
class TestBeforeAnyWork:
    def test_prompts_of_other_lengths(self, model: Any, cache: Any, objective: Any) -> None:
        longer = random_tokens(2, 6)
        with refuse(ValueError, r"blocks\.0\.attn\.hook_z.*\[2, 5, 4, 8\].*\[2, 6, 4, …\].*same"):
            patch_z(model, longer, cache, objective)
        with refuse(ValueError, r"same number of tokens"):
            clrp.patching.get_relevance_patch_attn_head_pattern_all_pos(
                model, longer, cache, objective
            )

    def test_other_numbers_of_rows(self, model: Any, cache: Any, objective: Any) -> None:
        with refuse(ValueError, r"\[2, 5, 4, 8\].*\[3, 5, 4, …\].*one clean row"):
            patch_z(model, random_tokens(3, 5), cache, objective)

    def test_entries_missing(self, model: Any, objective: Any) -> None:
        partial = {"blocks.1.attn.hook_z": torch.zeros(2, 5, 4, 8)}
        with refuse(ValueError, r"no entry 'blocks\.0\.attn\.hook_z'\. .*run_with_cache"):
            patch_z(model, CORRUPTED, partial, objective)
        with refuse(ValueError, r"hook_resid_pre' and 5 more"):
            clrp.patching.get_relevance_patch_block_every(model, CORRUPTED, partial, objective)

    def test_a_cache_without_batch(self, model: Any, cache: Any, objective: Any) -> None:
        row = {name: value[0] for name, value in cache.items()}
        with refuse(ValueError, "remove_batch_dim"):
            patch_z(model, CORRUPTED, row, objective)

    def test_what_is_no_cache(self, model: Any, objective: Any) -> None:
        with refuse(TypeError, "run_with_cache"):
            patch_z(model, CORRUPTED, CLEAN, objective)
        with refuse(TypeError, "clean_cache is None"):
            patch_z(model, CORRUPTED, None, objective)
        words = {f"blocks.{i}.attn.hook_z": "z" for i in range(2)}
        with refuse(ValueError, "holds no activation"):
            patch_z(model, CORRUPTED, words, objective)

    def test_arguments(self, model: Any, cache: Any, objective: Any) -> None:
        with refuse(ValueError, "reduce='sum'.*'scalar', 'mean', 'none'"):
            patch_z(model, CORRUPTED, cache, objective, reduce="sum")
        with refuse(ValueError, "attnlrp"):
            patch_z(model, CORRUPTED, cache, objective, rules="lrp")
        with refuse(ValueError, "empty"):
            patch_z(model, CORRUPTED, cache, {})
        with refuse(TypeError, r"function of the logits.*logit_diff"):
            patch_z(model, CORRUPTED, cache, 3.0)
        with refuse(ValueError, "PatchingResult carries"):
            patch_z(model, CORRUPTED, cache, objective, None, True, baseline=True)
        with refuse(clrp.errors.PromptError, "floating|float"):
            patch_z(model, CORRUPTED.float(), cache, objective)

    def test_states(self, model: Any, cache: Any, objective: Any) -> None:
        with torch.no_grad(), refuse(clrp.errors.ModelStateError, "no_grad"):
            patch_z(model, CORRUPTED, cache, objective)
        with clrp.lrp(model), refuse(clrp.errors.ModelStateError, "already on"):
            patch_z(model, CORRUPTED, cache, objective)
        with refuse(TypeError, "TransformerBridge"):
            patch_z(torch.nn.Linear(2, 2), CORRUPTED, cache, objective)

    def test_pairs(self, model: Any, objective: Any) -> None:
        patch = clrp.patching.relevance_patch
        with refuse(ValueError, r"clean has shape \[2, 5\], corrupt \[2, 6\]"):
            patch(model, CLEAN, random_tokens(2, 6), objective)
        with refuse(ValueError, r"corrupt must be token ids \[batch, pos\], got \[5\]"):
            patch(model, CLEAN, CORRUPTED[0], objective)
        with refuse(ValueError, r"clean must be token ids.*got str"):
            patch(model, "a b", CORRUPTED, objective)


def test_an_objective_of_another_shape(model: Any, cache: Any, snapshot: Any) -> None:
    def per_example(logits: Tensor) -> Tensor:
        return logits[:, -1, A]

    before = snapshot(model)
    with refuse(ValueError, r"objective returned shape \[2\].*scalar; .*reduce="):
        patch_z(model, CORRUPTED, cache, per_example)
    with refuse(ValueError, r"objective 'a' returned shape \[2\]"):
        patch_z(model, CORRUPTED, cache, {"a": per_example})
    with refuse(ValueError, r"returned shape \[\].*\[2\], one value for each"):
        patch_z(model, CORRUPTED, cache, clrp.logit_diff(model, A, B), reduce="none")
    with refuse(ValueError, "returned a float"):
        patch_z(model, CORRUPTED, cache, lambda logits: float(logits.sum().detach()))
    with refuse(clrp.errors.ModelStateError, "differentiable"):
        patch_z(model, CORRUPTED, cache, lambda logits: logits.detach().sum())
    with refuse(ValueError, r"objective returned shape \[1\]"):
        clrp.patching.relevance_patch(model, CLEAN, CORRUPTED, per_example)
    assert snapshot(model) == before


def test_a_cache_of_another_model(model: Any, cache: Any, objective: Any, snapshot: Any) -> None:
    wider = {name: value for name, value in cache.items() if name.endswith("hook_z")}
    wider = {name: torch.cat([value, value], -1) for name, value in wider.items()}
    before = snapshot(model)
    with refuse(ValueError, r"\[2, 5, 4, 16\].*\[2, 5, 4, 8\].*this model"):
        patch_z(model, CORRUPTED, wider, objective)
    assert snapshot(model) == before


def test_cells_that_do_not_exist(model: Any, cache: Any, objective: Any) -> None:
    wrong = pd.DataFrame({"layer": [0], "head": [0], "pos": [0]})
    with refuse(ValueError, r"columns \['layer', 'head', 'pos'\].*\['layer', 'pos', 'head'\]"):
        patch_z(model, CORRUPTED, cache, objective, wrong)
    beyond = pd.DataFrame({"layer": [0, 2], "pos": [0, 0], "head": [0, 0]})
    with refuse(ValueError, r"index_df\['layer'\].*0\.\.1"):
        patch_z(model, CORRUPTED, cache, objective, beyond)


def test_a_value_held_constant_has_an_effect_of_its_own(
    model: Any, cache: Any, objective: Any
) -> None:
    """Nothing above it has; what is patched there goes on to the logits all the same."""
    name, kept = "blocks.1.attn.hook_pattern", list[Tensor]()

    def leaf(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept.append(tensor.detach().requires_grad_(True))
        return kept[0]

    logits = model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, leaf)])
    (g,) = torch.autograd.grad(objective(logits), kept)
    true = objective(logits).detach() + ((cache[name] - kept[0].detach()) * g).sum((0, 2, 3))
    with model.hooks(fwd_hooks=[(name, lambda x, hook: x.detach())]):  # noqa: ARG005
        found = clrp.patching.get_relevance_patch_attn_head_pattern_all_pos(
            model, CORRUPTED, cache, objective, rules="gradient"
        )
    torch.testing.assert_close(found[1].to(true), true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(
    model: Any, cache: Any, objective: Any, snapshot: Any, failing: bool
) -> None:
    parameter = next(iter(model.original_model.parameters()))
    parameter.grad = torch.ones_like(parameter)
    kept = {name: value.clone() for name, value in cache.items()}
    edge = EdgeAttributionConfig(granularity="edge")

    def metric(logits: Tensor) -> Tensor:
        if failing:
            raise Ran
        return objective(logits)

    try:
        before = snapshot(model)
        for call in (
            lambda: patch_z(model, CORRUPTED, cache, metric),
            lambda: clrp.patching.relevance_patch(model, CLEAN, CORRUPTED, metric, edge),
        ):
            if failing:
                with pytest.raises(Ran):
                    call()
            else:
                call()
            assert snapshot(model) == before
        assert all(torch.equal(cache[name], value) for name, value in kept.items())
    finally:
        parameter.grad = None
