"""Prompts of ``attribute_each`` run as the rows of a batch, and each is what it is alone.

``attribute`` of one prompt is tested against oracles elsewhere.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.hooking import off
from support.long_zoo import float64_throughout
from support.low_precision import shrunk
from support.model_state import snapshot_of
from support.stretched import stretched
from support.tiling import assert_same
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import batched, fused, memory
from tl_contrastive_lrp.errors import ModelStateError, PromptError, TokenError
from tl_contrastive_lrp.hooks.user_hooks import as_own

RULES = tuple(clrp.RULE_SETS)
LENGTHS = (9, 17, 12, 16, 15)
# Windows, soft-caps, parallel and unbiased blocks, ALiBi, latent attention, experts, sinks, chunks.
NAMES = (
    *FAMILIES, "zoo:phi", "zoo:olmo", "zoo:gpt_neox", "zoo:gpt_neo", "zoo:bloom", "zoo:falcon",
    "zoo:opt", "zoo:cohere2", "zoo:mixtral", "zoo:gpt_oss", "zoo:deepseek_v3", "zoo:llama4_text",
)  # fmt: skip
ALIKE = (
    "str_tokens", "sites", "objective", "target", "contrast", "rules", "coverage", "model_name",
    "pos", "earlier_pos", "target_is_top", "memory", "attention", "prepended_bos", "positions",
)  # fmt: skip


def model_of(name: str, dtype: torch.dtype) -> Any:
    return zoo.boot(name[4:], dtype) if name.startswith("zoo:") else boot(name, dtype)


def prompts_of(*lengths: int) -> list[Tensor]:
    return [random_tokens(1, length, seed=length) for length in lengths]


def several(logits: Tensor) -> Tensor:
    """Of two positions, one of which counts from the end; not linear."""
    return logits[0, 2, 7] + logits[0, -2].square().mean()


def five(model: Any) -> list[Any]:
    return [
        clrp.logit_diff(model, 7, 11),
        clrp.logit_diff(model, 5, 6, pos=4),
        several,
        clrp.top_logit(),
        clrp.logit_minus_top_k(model, 9, 3, pos=-3),
    ]


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of every batch that has run."""
    seen: list[tuple[int, ...]] = []
    real = batched._run_batch

    def noted(model: Any, numbers: Any, prompts: Any, *rest: Any) -> Any:
        results = real(model, numbers, prompts, *rest)
        seen.append((len(prompts), max(tokens.shape[1] for tokens in prompts)))
        return results

    monkeypatch.setattr(batched, "_run_batch", noted)
    return seen


def assert_alike(found: clrp.Attribution, alone: clrp.Attribution) -> None:
    """All that is no rounded number."""
    for field in ALIKE:
        assert getattr(found, field) == getattr(alone, field), field
    assert torch.equal(found.token_ids, alone.token_ids)
    assert torch.equal(found.special, alone.special)


def assert_within(found: clrp.Attribution, alone: clrp.Attribution, bound: float) -> None:
    largest = float(alone.resid.abs().max())
    assert largest > 0
    for field in ("tokens", "resid", "heads", "neurons"):
        got, wanted = getattr(found, field), getattr(alone, field)
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert got.shape == wanted.shape
            assert float((got - wanted).abs().max()) <= bound * largest, field
    for field in ("delta", "target_logit", "contrast_logit"):
        got, wanted = getattr(found, field), getattr(alone, field)
        assert got == pytest.approx(wanted, abs=bound * max(1.0, largest))
    for row, other in zip(found.ledger.rows, alone.ledger.rows, strict=True):
        for part in ("total", "biases", "positions", "other"):
            wanted = getattr(other, part)
            assert getattr(row, part) == pytest.approx(wanted, abs=20 * bound * largest), part


@pytest.mark.parametrize(("name", "rules"), diagonal(NAMES, RULES))
def test_float64(name: str, rules: str, shapes: list[Any]) -> None:
    model, prompts = model_of(name, torch.float64), prompts_of(*LENGTHS)
    has_neurons = name not in ("zoo:mixtral", "zoo:gpt_oss", "zoo:deepseek_v3", "zoo:llama4_text")
    how: dict[str, Any] = {"rules": rules, "neurons": has_neurons, "memory": "plain"}
    with float64_throughout(model):
        found = clrp.attribute_each(model, prompts, five(model), batch_size=5, **how)
        alone = [
            clrp.attribute(model, ids, one, **how)
            for ids, one in zip(prompts, five(model), strict=True)
        ]
    assert shapes == [(5, 17)]
    for got, wanted in zip(found, alone, strict=True):
        assert_alike(got, wanted)
        assert_within(got, wanted, PROMISED[torch.float64])


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_set(rules: str, shapes: list[Any]) -> None:
    model, prompts = boot("gemma3"), prompts_of(*LENGTHS)
    with float64_throughout(model):
        found = clrp.attribute_each(model, prompts, five(model), batch_size=5, rules=rules)
        for ids, one, got in zip(prompts, five(model), found, strict=True):
            assert_within(got, clrp.attribute(model, ids, one, rules=rules), 1e-10)
    assert shapes == [(5, 17)]


@pytest.mark.parametrize(("name", "rules"), diagonal(NAMES, RULES[1:]))
def test_float32(name: str, rules: str, shapes: list[Any]) -> None:
    model, prompts = model_of(name, torch.float32), prompts_of(*LENGTHS)
    found = clrp.attribute_each(model, prompts, five(model), batch_size=5, rules=rules)
    for ids, one, got in zip(prompts, five(model), found, strict=True):
        alone = clrp.attribute(model, ids, one, rules=rules)
        assert_alike(got, alone)
        assert_same(alone, got)
    assert shapes == [(5, 17)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, shapes: list[Any]) -> None:
    """Backwards are float32; forwards round, and other kernels may round in other places."""
    model, prompts = boot("qwen3", dtype), prompts_of(*LENGTHS)
    objectives = [clrp.logit_diff(model, 7, 11)] * 5
    found = clrp.attribute_each(model, prompts, objectives, batch_size=5)
    for ids, one, got in zip(prompts, objectives, found, strict=True):
        assert got.resid.dtype == torch.float32
        assert off(got.resid, clrp.attribute(model, ids, one).resid) < 16 * torch.finfo(dtype).eps
    assert shapes == [(5, 17)]


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_attention_is_fused_in_batches_too(kind: Any, shapes: list[Any]) -> None:
    model, prompts = boot("gemma3"), prompts_of(*LENGTHS)
    with float64_throughout(model):
        found = clrp.attribute_each(model, prompts, five(model), batch_size=5, attention=kind)
        for ids, one, got in zip(prompts, five(model), found, strict=True):
            assert got.attention == kind
            assert_within(got, clrp.attribute(model, ids, one, attention="eager"), 1e-10)
    assert shapes == [(5, 17)]


def test_each_prompt_decides_by_its_own_length_whether_attention_is_fused(
    shapes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = boot("qwen3"), prompts_of(*LENGTHS)
    monkeypatch.setattr(fused, "_WORTH_FROM", 16)
    found = clrp.attribute_each(model, prompts, five(model), batch_size=5)
    assert [result.attention for result in found] == ["eager", "fused", "eager", "fused", "eager"]
    assert sorted(shapes) == [(2, 17), (3, 15)]


# ---------------------------------------------------------------- which prompts run together


def test_batches_are_full_enough_and_fit() -> None:
    """By hand: of 40 and 29 tokens 11 of 80 are padding; with 24, 27 of 120; with 20, a third."""
    model = boot("qwen3")
    plan = memory.MemoryPlan(None, 100, 10**12)

    def batches(lengths: list[int], size: int | None = None, free: int = 10**12) -> list[list[int]]:
        plans = [memory.MemoryPlan(None, 10**6 * n, free) for n in lengths]
        return batched._batches(model, lengths, plans, batched.RunOptions(), size)

    assert batches([29, 40, 24]) == [[1, 0, 2]]
    assert batches([29, 40, 20]) == [[1, 0], [2]]
    assert batches([40, 40, 40, 40, 19]) == [[0, 1, 2, 3], [4]]  # half of its row
    assert batches([10, 40, 10, 11]) == [[1], [3, 0, 2]]
    assert batches([10, 40, 10, 11], size=2) == [[1, 3], [0, 2]]
    assert batches([10, 10, 10], size=1) == [[0], [1], [2]]
    # A row needs 10 MB and the gradient of its logits; 62 MB are free, and half may be used.
    assert batches([10] * 7, free=62 * 10**6) == [[0, 1, 2], [3, 4, 5], [6]]
    assert batches([10] * 300)[0] == list(range(107))  # 1 GiB on a CPU
    tiles = memory.MemoryPlan(16, 100, 10**12)
    mixed = batched._batches(model, [9, 9, 9], [plan, tiles, plan], batched.RunOptions(), None)
    assert mixed == [[0, 2], [1]]


def test_results_come_in_the_order_given(shapes: list[Any]) -> None:
    model = boot("gpt2")
    lengths = [12, 30, 9, 31, 12, 10]
    prompts = [random_tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    objectives = [clrp.logit_diff(model, 7, 11 + i) for i in range(6)]
    found = clrp.attribute_each(model, prompts, objectives)
    assert shapes == [(2, 31), (4, 12)]
    for ids, one, got in zip(prompts, objectives, found, strict=True):
        assert_same(clrp.attribute(model, ids, one), got)


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "4"])
def test_a_batch_size_that_is_none_is_refused(size: Any) -> None:
    model = boot("gpt2")
    with pytest.raises(ValueError, match=r"batch_size=.* must be a number of prompts"):
        clrp.attribute_each(model, prompts_of(9, 9), five(model)[:2], batch_size=size)


def test_prompts_in_tiles_run_one_at_a_time(shapes: list[Any]) -> None:
    model, prompts = boot("qwen3", torch.float32), prompts_of(15, 17)
    objectives = five(model)[:2]
    found = clrp.attribute_each(model, prompts, objectives, memory="tiled", tile=6, progress=False)
    assert [result.memory for result in found] == ["tiled (tile 6)"] * 2
    assert shapes == []


def test_a_batch_that_does_not_fit_is_halved(
    shapes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, sizes = boot("qwen3", torch.float32), prompts_of(*LENGTHS), []
    real = batched.forward

    def small(model: Any, tokens: Tensor, *rest: Any, **more: Any) -> Any:
        sizes.append(len(tokens))
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, tokens, *rest, **more)

    monkeypatch.setattr(batched, "forward", small)
    found = clrp.attribute_each(model, prompts, five(model), batch_size=5)
    assert sizes == [5, 2, 3, 2]  # of the three, one is alone
    assert shapes == [(2, 17), (2, 12)]
    for ids, one, got in zip(prompts, five(model), found, strict=True):
        assert_same(clrp.attribute(model, ids, one), got)


# ---------------------------------------------------------------- where rows are not independent


def assert_one_at_a_time(model: Any, prompts: list[Tensor], objectives: list[Any]) -> None:
    found = clrp.attribute_each(model, prompts, objectives, batch_size=5)
    for ids, one, got in zip(prompts, objectives, found, strict=True):
        alone = clrp.attribute(model, ids, one)
        assert torch.equal(got.resid, alone.resid)
        assert got.delta == alone.delta


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_runs_one_at_a_time(name: str, shapes: list[Any]) -> None:
    model = zoo.boot(name, torch.float32)
    assert_one_at_a_time(model, prompts_of(9, 12), five(model)[:2])
    assert shapes == []


@pytest.mark.parametrize("check", ["logits", "relevance"])
def test_either_check_finds_that_positions_see_later_ones(
    check: str, shapes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that is taken for causal, with one of the two checks alone."""
    model = zoo.boot("bert", torch.float32)
    monkeypatch.setattr(batched, "_may_be_rows", lambda _: True)
    if check == "relevance":
        monkeypatch.setattr(batched, "_require_same_logits", lambda *_: None)
    else:
        monkeypatch.setattr(batched.RelevanceSums, "take_rows", lambda *_: pytest.fail("too late"))
    assert_one_at_a_time(model, prompts_of(9, 12, 12), five(model)[:3])
    assert shapes == []


def test_attention_over_keys_chosen_among_later_ones_too(shapes: list[Any]) -> None:
    """An indexer chooses keys, without regard to the mask: padding takes the place of others."""
    model = zoo.boot("glm_moe_dsa", torch.float32)
    assert_one_at_a_time(model, prompts_of(9, 17), five(model)[:2])
    assert shapes == []


def test_rows_that_affect_each_other_are_found(shapes: list[Any]) -> None:
    """A model that gives only the first tokens that ask a place, as experts of limited capacity."""
    model = boot("llama", torch.float32)

    def limited(module: Any, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        places = torch.arange(output.shape[:2].numel()).reshape(output.shape[:2]) < 25
        return output * places[..., None]

    handle = model.blocks[0].mlp.register_forward_hook(as_own(limited))
    try:
        assert_within_one_at_a_time(model, (12, 12))
        assert shapes == [(2, 12)]  # 24 tokens have their places
        shapes.clear()
        assert_one_at_a_time(model, prompts_of(15, 12), five(model)[:2])
        assert shapes == []
    finally:
        handle.remove()


def test_angles_that_depend_on_the_length_of_the_batch(shapes: list[Any]) -> None:
    """Rotations stretched beyond 10 tokens: a prompt of 9 turns otherwise if padded to 17."""
    model = stretched(10)
    assert_within_one_at_a_time(model, (12, 17))
    assert shapes == [(2, 17)]
    shapes.clear()
    assert_one_at_a_time(model, prompts_of(9, 17), five(model)[:2])
    assert shapes == []


def assert_within_one_at_a_time(model: Any, lengths: tuple[int, ...]) -> None:
    objectives = five(model)[: len(lengths)]
    found = clrp.attribute_each(model, prompts_of(*lengths), objectives)
    for ids, one, got in zip(prompts_of(*lengths), objectives, found, strict=True):
        assert_same(clrp.attribute(model, ids, one), got)


def test_a_model_that_takes_no_batches(shapes: list[Any]) -> None:
    model = boot("llama", torch.float32)

    def single(module: Any, args: Any) -> None:  # noqa: ARG001
        if len(args[0]) != 1:
            raise IndexError("one row at a time")

    handle = model.blocks[1].mlp.register_forward_pre_hook(as_own(single))
    try:
        assert_one_at_a_time(model, prompts_of(12, 12), five(model)[:2])
        assert shapes == []
    finally:
        handle.remove()


def test_hooks_see_one_prompt_at_a_time(shapes: list[Any]) -> None:
    model, seen = boot("qwen3", torch.float32), []

    def look(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(tuple(tensor.shape[:2]))

    with model.hooks(fwd_hooks=[("blocks.1.hook_out", look)]):
        clrp.attribute_each(model, prompts_of(9, 12), five(model)[:2])
    assert seen == [(1, 9), (1, 12)]
    assert shapes == []


# ---------------------------------------------------------------- errors and warnings


def no_number(logits: Tensor) -> Tensor:
    return logits[0, -1]


def constant(logits: Tensor) -> Tensor:
    return logits.detach().sum() + torch.nn.Parameter(torch.ones(()))


def broken(logits: Tensor) -> Tensor:  # noqa: ARG001
    raise KeyError("of the user's own")


def clipped(logits: Tensor) -> Tensor:
    return logits.clamp(min=1e9).sum()


def wrong(model: Any) -> Iterator[tuple[Any, type[Exception], str]]:
    yield clrp.logit_diff(model, 7, 11, pos=13), TokenError, "Position 13 does not exist"
    yield no_number, ModelStateError, "one differentiable number"
    yield constant, ModelStateError, "does not depend on the logits"
    yield clipped, ModelStateError, "gradient is 0"
    yield broken, KeyError, "of the user's own"


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("which", range(5))
def test_the_objective_at_fault_is_named(which: int, size: int) -> None:
    """Its prompt has 12 tokens, and the longest of the batch 17: padding is not there for it."""
    model = boot("qwen3", torch.float32)
    clrp.attribute(model, random_tokens(), clrp.logit_diff(model, 7, 11))
    objective, kind, text = next(itertools.islice(wrong(model), which, None))
    objectives, before = five(model), snapshot_of(model)
    objectives[2] = objective
    with pytest.raises(kind, match=rf"objectives\[2\]: .*{text}"):
        clrp.attribute_each(model, prompts_of(*LENGTHS), objectives, batch_size=size)
    assert snapshot_of(model) == before
    found = clrp.attribute_each(model, prompts_of(*LENGTHS), five(model), batch_size=size)
    assert len(found) == 5


def test_the_prompt_at_fault_is_named() -> None:
    model = boot("qwen3", torch.float32)
    prompts: list[Any] = [*prompts_of(9, 12), "", *prompts_of(9, 9)]
    with pytest.raises(PromptError, match=r"^prompts\[2\]: The prompt is empty"):
        clrp.attribute_each(model, prompts, five(model))


def test_what_is_wrong_with_the_model_is_no_prompts_fault() -> None:
    model = boot("qwen3", torch.float32)
    with torch.no_grad(), pytest.raises(ModelStateError, match=r"^Relevance needs gradients"):
        clrp.attribute_each(model, prompts_of(9, 12), five(model)[:2])


def test_numbers_that_overflow_stay_in_their_row() -> None:
    model, prompts = boot("qwen3", torch.float32), prompts_of(17, 12)
    one = clrp.logit_diff(model, 7, 11)
    found = clrp.attribute_each(model, prompts, [one, lambda logits: one(logits) * math.inf])
    assert_same(clrp.attribute(model, prompts[0], one), found[0])
    assert not found[1].resid.isfinite().all()


def test_an_objective_is_given_its_own_row_alone() -> None:
    model, seen = boot("qwen3", torch.float32), []

    def looking(logits: Tensor) -> Tensor:
        seen.append(tuple(logits.shape))
        return logits[:, -1, 7].sum()

    clrp.attribute_each(model, prompts_of(15, 17), [looking, looking])
    assert {shape[:2] for shape in seen} == {(1, 15), (1, 17)}


@pytest.mark.parametrize("way", ["one at a time", "batch", "batch that fails"])
def test_underflow_is_said_of_each_prompt(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often in a batch as one at a time, and not of a batch that is not used."""
    if way == "batch that fails":
        monkeypatch.setattr(batched.RelevanceSums, "take_rows", lambda *_: None)
    model, prompts = shrunk("llama", 1e-6, torch.float16), prompts_of(12, 12)
    objectives = [clrp.logit_diff(model, 7, 12), clrp.logit_diff(model, 9, 5)]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        clrp.attribute_each(model, prompts, objectives, batch_size=1 + way.startswith("batch"))
    assert sum("too small for float16" in str(warning.message) for warning in said) == 2


def test_underflow_in_one_row_is_not_hidden_by_another() -> None:
    sums = clrp.engine.RelevanceSums()
    sums.add("here", "pos d_model -> pos")
    g = torch.ones(2, 3, 4)
    x = torch.ones(2, 3, 4, dtype=torch.float16)
    x[1] = 1e-7
    sums.readings[0].sink(x, g)
    with pytest.warns(UserWarning, match="at here are too small") as said:
        sums.warn_of_underflow()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sums.warn_of_underflow()  # nothing is left to say
