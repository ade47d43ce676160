"""Fused attention gives what eager attention gives, and falls back where something needs the rest.

Eager attention is TransformerLens' own code, held against independent truth elsewhere. Every family
is compared in float32, to what the package promises there, and three of them under every rule set
in float64 throughout, so that nothing can hide in rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.small_tiles import small_query_tiles
from support.squares import Squares
from support.zoo_expected import COVERED
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from truth import zoo
from truth.families import boot, random_tokens, saved
from truth.float64 import true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import fused as fused_room
from tl_contrastive_lrp.hooks.user_hooks import as_own
from tl_contrastive_lrp.rules.deferred import DeferringMode
from tl_contrastive_lrp.rules.visible import MaskMemory

RULES = tuple(clrp.RULE_SETS)
# Attention that TransformerLens writes out with HookPoints, without soft-caps and sinks.
FUSED = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "olmo", "phi", "gpt_neox")


def both(model: Any, ids: Tensor, objective: Any, **how: Any) -> tuple[Any, Any]:
    """The result with eager and with fused attention."""
    return tuple(
        clrp.attribute(model, ids, objective, memory="plain", attention=kind, **how)
        for kind in ("eager", "fused")
    )  # type: ignore[return-value]


def assert_same(fused: Any, eager: Any, bound: float) -> None:
    """To a bound relative to the largest relevance, where most of the rounding comes from."""
    scale = max(float(eager.resid.abs().max()), 1e-3)
    for name in ("tokens", "resid", "heads"):
        x, y = getattr(fused, name), getattr(eager, name)
        assert float((x - y).abs().max()) <= bound * scale, name
    assert abs(fused.delta - eager.delta) <= bound * max(1.0, abs(eager.delta))


@pytest.mark.parametrize(("name", "rules"), diagonal(COVERED, RULES))
def test_every_family(name: str, rules: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens(11)
    eager, fused = both(model, ids, clrp.logit_diff(model, 7, 12), rules=rules)
    assert eager.attention == "eager"
    if name in FUSED:
        assert fused.attention == "fused"
    assert_same(fused, eager, PROMISED[torch.float32])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
def test_rule_sets(name: str, rules: str, small_tiles: None) -> None:  # noqa: ARG001
    model, ids = boot(name), random_tokens(1, 40)
    with true_float64(model):
        eager, fused = both(model, ids, clrp.logit_diff(model, 7, 11, pos=30), rules=rules)
    assert fused.attention == "fused"
    assert_same(fused, eager, PROMISED[torch.float64])


def test_neurons_ledger_and_several_objectives() -> None:
    model, ids = boot("gpt2"), random_tokens(1, 30)
    objectives = [clrp.logit_diff(model, 7, 11), clrp.target_logit(model, 5, pos=12)]
    with true_float64(model):
        eager, fused = (
            clrp.attribute_each(model, ids, objectives, neurons=True, attention=kind)
            for kind in ("eager", "fused")
        )
    for one, other in zip(fused, eager, strict=True):
        assert_same(one, other, PROMISED[torch.float64])
        assert torch.allclose(one.neurons, other.neurons, atol=1e-9)
        for row, expected in zip(one.ledger.rows, other.ledger.rows, strict=True):
            assert row.total == pytest.approx(expected.total, abs=1e-9)
            assert row.biases == pytest.approx(expected.biases, abs=1e-9)


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with small_query_tiles():
        yield


def test_the_pattern_is_never_computed(small_tiles: None) -> None:  # noqa: ARG001
    """No tensor of [query, key] is made on the way, not even a mask."""
    model, n = boot("qwen3", torch.float32), 61
    ids = random_tokens(1, n)
    objective = clrp.logit_diff(model, 7, 11)
    clrp.attribute(model, ids, objective, attention="fused")  # audits the model first
    with Squares(n) as squares:
        fused = clrp.attribute(model, ids, objective, attention="fused")
    assert fused.attention == "fused"
    assert squares.made == []
    with Squares(n) as squares:
        clrp.attribute(model, ids, objective, attention="eager")
    assert squares.made


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_a_hook_that_needs_the_pattern_is_honoured(point: str) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 20)
    objective = clrp.logit_diff(model, 7, 11)
    name = f"blocks.0.attn.{point}"

    def edit(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return x * 0.5

    seen = []
    with true_float64(model), model.hooks(fwd_hooks=[(name, edit)]):
        eager, fused = both(model, ids, objective)
    assert fused.attention == f"fused in {model.cfg.n_layers - 1} of {model.cfg.n_layers} blocks"
    assert_same(fused, eager, PROMISED[torch.float64])
    watch = [(name, lambda x, hook: seen.append(tuple(x.shape)))]  # noqa: ARG005
    with model.hooks(fwd_hooks=watch):
        clrp.attribute(model, ids, objective, attention="fused")
    assert seen == [(1, model.cfg.n_heads, 20, 20)]


def test_hooks_elsewhere_are_honoured_too() -> None:
    model, ids = boot("gemma3"), random_tokens(1, 20)
    edits = [
        ("blocks.0.attn.hook_z", lambda x, hook: x * 2.0),  # noqa: ARG005
        ("blocks.1.attn.hook_q", lambda x, hook: x + 1.0),  # noqa: ARG005
    ]
    with true_float64(model), model.hooks(fwd_hooks=edits):
        eager, fused = both(model, ids, clrp.logit_diff(model, 7, 11))
    assert "fused" in fused.attention
    assert_same(fused, eager, PROMISED[torch.float64])


@pytest.mark.parametrize("point", ["hook_z", "o.hook_in", "hook_q", "hook_k", "hook_v"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "mistral"])
def test_hooks_that_write_in_place_are_honoured(name: str, point: str) -> None:
    """As a head is usually ablated, ``z[:, :, head] = 0``; torch's own attention keeps its z."""
    model, ids = boot(name), random_tokens(1, 30)
    objective = clrp.logit_diff(model, 7, 11)

    def ablate(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        x[:, 3:9, ..., 1] = 0.0
        return x

    with true_float64(model), model.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", ablate)]):
        wanted = clrp.attribute(model, ids, objective, rules="attnlrp", attention="eager")
        found = clrp.attribute(model, ids, objective, rules="attnlrp", attention="fused")
    assert found.attention == "fused"
    assert_same(found, wanted, PROMISED[torch.float64])


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows(name: str, small_tiles: None) -> None:  # noqa: ARG001
    """More tokens than a sliding window holds."""
    model, ids = boot(name), random_tokens(1, 48)
    with true_float64(model):
        eager, fused = both(model, ids, clrp.logit_diff(model, 7, 11))
    assert fused.attention == "fused"
    assert_same(fused, eager, PROMISED[torch.float64])


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gemma2", "mpt"])
def test_soft_caps_and_position_biases(name: str, rules: str, small_tiles: None) -> None:  # noqa: ARG001
    model, ids = zoo.boot(name, torch.float64), zoo.random_tokens(21)
    with true_float64(model):
        eager, fused = both(model, ids, clrp.logit_diff(model, 7, 12), rules=rules)
    assert fused.attention == "fused"
    assert_same(fused, eager, PROMISED[torch.float64])


@pytest.mark.parametrize("rules", RULES)
def test_sinks(rules: str, small_tiles: None) -> None:  # noqa: ARG001
    """Torch multiplies the experts of this model in float32 at most."""
    model, ids = zoo.boot("gpt_oss", torch.float32), zoo.random_tokens(21)
    eager, fused = both(model, ids, clrp.logit_diff(model, 7, 12), rules=rules)
    assert fused.attention == "fused"
    assert_same(fused, eager, PROMISED[torch.float32])


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gemma3", "qwen3"])
def test_compatibility_mode(name: str, small_tiles: None) -> None:  # noqa: ARG001
    """It looks for rows without a key and for NaN, which deferred attention answers by masks."""
    ids = random_tokens(1, 31)
    model = TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=torch.float32)
    model.enable_compatibility_mode(disable_warnings=True)
    for rules in ("gim", "cplrp"):
        eager, fused = both(model, ids, clrp.logit_diff(model, 7, 11), rules=rules)
        assert fused.attention == "fused"
        assert_same(fused, eager, PROMISED[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """As close to float32 as eager attention is, and a few roundings of the type more."""
    ids = random_tokens(1, 30)
    truth = boot("qwen3", torch.float32)
    objective = clrp.logit_diff(truth, 7, 11)
    exact = clrp.attribute(truth, ids, objective, rules="attnlrp", attention="eager")
    eager, fused = both(boot("qwen3", dtype), ids, objective, rules="attnlrp")
    scale = float(exact.resid.abs().max())
    off = [float((x.resid - exact.resid).abs().max()) / scale for x in (eager, fused)]
    assert fused.attention == "fused"
    assert off[1] <= 3 * off[0] + 4 * torch.finfo(dtype).eps


def test_files_say_which_attention_ran(tmp_path: Any) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 20)
    for result in both(model, ids, clrp.logit_diff(model, 7, 11)):
        path = result.save(tmp_path / "a.safetensors")
        assert clrp.Attribution.load(path).attention == result.attention


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("point", ["blocks.1.attn.hook_q", "blocks.1.attn.hook_z"])
def test_an_exception_leaves_nothing_behind(point: str, error: type[BaseException]) -> None:
    """Also Ctrl-C inside an attention, after which torch calls no hooks of a module."""
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 20)

    def fail(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        raise error

    objective = clrp.logit_diff(model, 7, 11)
    with pytest.raises(error), model.hooks(fwd_hooks=[(point, fail)]):
        clrp.attribute(model, ids, objective, attention="fused")
    assert torch._C._len_torch_function_stack() == 0
    eager, fused = both(model, ids, objective)
    assert fused.attention == "fused"
    assert_same(fused, eager, 1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nor_does_one_where_rules_go_by_operation(error: type[BaseException]) -> None:
    model, ids = zoo.boot("deepseek_v2", torch.float32), zoo.random_tokens(8)

    def fail(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        raise error

    objective = clrp.logit_diff(model, 7, 12)
    expected = clrp.attribute(model, ids, objective)
    for name in ("blocks.0.attn.hook_attn_scores", "blocks.1.attn.hook_pattern"):
        with pytest.raises(error), model.hooks(fwd_hooks=[(name, fail)]):
            clrp.attribute(model, ids, objective)
        assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(clrp.attribute(model, ids, objective).tokens, expected.tokens)


def test_auto_takes_it_for_long_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = boot("qwen3", torch.float32)
    objective = clrp.logit_diff(model, 7, 11)
    monkeypatch.setattr(fused_room, "_WORTH_FROM", 30)
    short, long = (clrp.attribute(model, random_tokens(1, n), objective) for n in (29, 30))
    assert (short.attention, long.attention) == ("eager", "fused")
    for memory in ("plain", "tiled"):
        with pytest.raises(ValueError, match="use 'auto', 'fused' or 'eager'"):
            clrp.attribute(model, random_tokens(1), objective, memory=memory, attention="flash")  # type: ignore[arg-type]


def eager_and_deferred(written: Any) -> tuple[Tensor, Tensor, list[bool]]:
    """What a component's code gives, run as it is and with its scores deferred, with gradients."""
    results, fused = [], []
    for deferred in (False, True):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 7, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
        mode = DeferringMode(MaskMemory(), lambda: fused.append(True))
        with mode if deferred else nullcontext():
            z = written(q, k, v)
        results.append(torch.cat([z.flatten(), *(g.flatten() for g in grads(z, q, k, v))]))
    return results[0], results[1], fused


def grads(z: Tensor, *ends: Tensor) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 2, z.numel(), dtype=z.dtype).reshape(z.shape)
    return torch.autograd.grad((z * weights).sum(), ends)


CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
LOWEST = torch.finfo(torch.float64).min


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) * 0.5
    return torch.matmul(scores.masked_fill(~CAUSAL, LOWEST).softmax(-1), v)


def functional(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / 2.0
    scores = scores + torch.zeros(7, 7, dtype=torch.float64).masked_fill(~CAUSAL, LOWEST)
    pattern = torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float64).to(torch.float64)
    return torch.matmul(torch.nn.functional.dropout(pattern, 0.1, training=False), v)


def written_into(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    scores[..., 0] = 1.0
    scores = scores.masked_fill(~CAUSAL, LOWEST)
    return torch.matmul(torch.softmax(scores, dim=-1), v)


def with_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    sink = torch.cat([scores, scores.new_zeros(1, 2, 7, 1)], dim=-1)
    return torch.matmul(torch.softmax(sink, dim=-1)[..., :-1], v)


def differential(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    pattern = torch.softmax(scores, dim=-1)
    return torch.matmul(pattern - 0.3 * torch.softmax(-scores, dim=-1), v)


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)).masked_fill(~CAUSAL, LOWEST)
    return torch.matmul(torch.softmax(scores * 0.5, dim=-1), v)


def in_float32_and_more(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1))
    pattern = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(pattern * 1.5, v)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-2, -1)), dim=-2), v)


@pytest.mark.parametrize(
    ("written", "is_fused"),
    [
        (functional, True), (standard, False), (written_into, False), (with_a_sink, False),
        (differential, False), (scaled_after_the_mask, False), (over_queries, False),
        (in_float32_and_more, False),
    ],
)  # fmt: skip
def test_whatever_a_component_writes_its_numbers_stay(written: Any, is_fused: bool) -> None:
    """What cannot be fused is computed as written; nothing is ever approximated."""
    eager, deferred, fused = eager_and_deferred(written)
    assert bool(fused) == is_fused
    assert torch.allclose(deferred, eager, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- logits that are read


def unembedded_rows(model: Any, run: Any) -> list[int]:
    """For how many positions each call of the unembedding computed logits."""
    rows: list[int] = []

    def look(module: Any, args: Any, output: Tensor) -> None:  # noqa: ARG001
        rows.append(output.shape[1])

    handle = model.unembed.original_component.register_forward_hook(as_own(look))
    try:
        run()
    finally:
        handle.remove()
    return rows


def test_only_the_logits_that_are_read_are_computed() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 30)
    last, middle = clrp.logit_diff(model, 7, 11), clrp.target_logit(model, 5, pos=12)

    def anything(logits: Tensor) -> Tensor:
        return logits[0, 3:7, 5].sum()

    clrp.attribute(model, ids, last)  # audits the model first

    def rows(objectives: list[Any], kind: str) -> list[int]:
        return unembedded_rows(
            model,
            lambda: clrp.attribute_each(model, ids, objectives, attention=kind),  # type: ignore[arg-type]
        )

    assert rows([last], "fused") == [1]
    assert rows([last, middle, last], "fused") == [2]
    assert rows([last, anything], "fused") == [30]
    assert rows([last], "eager") == [30]
    edit = [("unembed.hook_out", lambda x, hook: x * 2.0)]  # noqa: ARG005
    with true_float64(model), model.hooks(fwd_hooks=edit):
        assert 30 in rows([last], "fused")
        eager, fused = both(model, ids, last)
    assert_same(fused, eager, PROMISED[torch.float64])


def test_auto_takes_it_for_the_logits_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary makes most of a short forward."""
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    objective = clrp.logit_diff(model, 7, 11)
    left_out = 29 * model.cfg.d_vocab * model.cfg.d_model
    kinds = []
    for needed in (left_out // model.cfg.n_layers, left_out // model.cfg.n_layers + 1):
        monkeypatch.setattr(fused_room, "_WORTH_LOGITS", needed)
        kinds.append(clrp.attribute(model, ids, objective).attention)
    assert kinds == ["fused", "eager"]


@pytest.mark.parametrize("name", ["logit_minus_mean", "logit_minus_top_k", "target_logit"])
def test_every_objective_of_one_position(name: str) -> None:
    model, ids = boot("qwen3"), random_tokens(1, 30)
    more = {"k": 5} if name == "logit_minus_top_k" else {}
    objective = getattr(clrp, name)(model, 7, pos=17, **more)
    with true_float64(model):
        eager, fused = both(model, ids, objective)
    assert fused.pos == eager.pos == 17
    assert (fused.target, fused.target_is_top) == (eager.target, eager.target_is_top)
    assert_same(fused, eager, PROMISED[torch.float64])
