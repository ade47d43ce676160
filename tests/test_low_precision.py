"""bfloat16 and float16 models: a float32 backward over their own forward, and no silent underflow.

Truth is float64: the explicit propagation of ``tests/oracle`` on the same rounded weights, or the
vector-Jacobian product of one operation on the same rounded input.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
import zoo
from families import FAMILIES, VOCAB, boot, make_hf, make_tokenizer, random_tokens, saved
from oracle import contrast_seed, propagate
from oracle_edges import EdgeTruth
from torch import Tensor
from torch.nn import functional as F

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import precision
from tl_contrastive_lrp.packed import chunk_size
from tl_contrastive_lrp.precision import WideGradient, first_gradient, in_float32, plain
from tl_contrastive_lrp.rules_softmax import softmax_temperature
from tl_contrastive_lrp.sites import find_sites
from tl_contrastive_lrp.tangents import BlockCall, block_tangents

LOW = (torch.bfloat16, torch.float16)
TOKENS = random_tokens()
LRP = ("attnlrp", "cplrp", "relp", "gim")


def off(found: Tensor, wanted: Tensor) -> float:
    """Largest error relative to the largest value of ``wanted``."""
    return float((found.double() - wanted.double()).abs().max() / wanted.abs().max())


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


# ---------------------------------------------------------------- one step back


def _rms_norm(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (scaled * torch.linspace(0.5, 2.0, 8, dtype=wide.dtype)).to(x.dtype)


def _rotate(x: Tensor) -> Tensor:
    cos, sin = (torch.linspace(a, 1 - a, 8).to(torch.bfloat16).to(x.dtype) for a in (0.0, 1.0))
    return x * cos + torch.cat((-x[..., 4:], x[..., :4]), -1) * sin


def _rotate_complex(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turn = torch.polar(torch.ones(4), torch.linspace(0.0, 3.0, 4))
    pairs = torch.view_as_complex(wide.unflatten(-1, (4, 2)))
    return torch.view_as_real(pairs * turn.to(pairs.dtype)).flatten(-2).to(x.dtype)


def _matrix(rows: int, columns: int, like: Tensor) -> Tensor:
    return drawn(rows, columns, dtype=torch.bfloat16, seed=rows).to(like.dtype)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: F.linear(x, _matrix(6, 8, x), _matrix(1, 6, x)[0]),
    "linear of one batch": lambda x: F.linear(x[:1], _matrix(6, 8, x)),
    "gpt2's linear": lambda x: torch.addmm(
        _matrix(1, 6, x)[0], x.reshape(-1, 8), _matrix(8, 6, x)
    ),
    "matmul": lambda x: x @ _matrix(8, 5, x),
    "query key": lambda x: x @ (x * 0.5).transpose(-1, -2),
    "einsum": lambda x: torch.einsum("bpd,de->bpe", x, _matrix(8, 5, x)),
    "product": lambda x: x * x.flip(-1),
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "soft-cap": lambda x: 3.0 * torch.tanh(x.to(torch.promote_types(x.dtype, torch.float32)) / 3),
    "softmax": lambda x: F.softmax(
        x, -1, dtype=torch.promote_types(x.dtype, torch.float32)
    ).to(x.dtype),
    "rms norm": _rms_norm,
    "rope": _rotate,
    "complex rope": _rotate_complex,
    "residual": lambda x: x + F.linear(x, _matrix(8, 8, x)),
    "many residuals": lambda x: functools.reduce(lambda y, _: y + x, range(30), x),
    "masked": lambda x: x.masked_fill(torch.arange(8) > 5, -1.0),
    "where": lambda x: torch.where(torch.arange(8) > 2, x, 0.5 * x),
    "row and column": lambda x: x[:, [0, 2, 2], 1:5].mean(1),
    "gather": lambda x: x.gather(-1, torch.zeros(2, 3, 4, dtype=torch.long)),
    "grouped heads": lambda x: x[:, None].expand(2, 4, 3, 8).reshape(8, 3, 8),
    "split": lambda x: torch.stack(x.split(4, -1)).sum(0),
    "sums": lambda x: x.sum(-1) + x.cumsum(1).mean(-1),
    "layer norm": lambda x: F.layer_norm(
        x.to(torch.promote_types(x.dtype, torch.float32)), (8,)
    ).to(x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("step", STEPS)
def test_a_step_back_rounds_nothing(step: str, dtype: torch.dtype) -> None:
    x = drawn(2, 3, 8, dtype=dtype).requires_grad_(True)
    y = STEPS[step](x)
    signal = drawn(*y.shape, dtype=torch.float32, seed=3) * 1e-9  # float16 has no such numbers
    (found,) = torch.autograd.grad(y, x, WideGradient(signal, y.dtype))
    exact = x.detach().double().requires_grad_(True)
    (wanted,) = torch.autograd.grad(STEPS[step](exact), exact, signal.double())
    assert found.dtype == dtype
    assert plain(found).dtype == torch.float32
    assert off(plain(found), wanted) < 2e-6


def test_ordinary_gradients_are_not_that_good() -> None:
    """What the test above would see without wide gradients: it can fail."""
    x = drawn(2, 3, 8, dtype=torch.bfloat16).requires_grad_(True)
    signal = drawn(2, 3, 8, dtype=torch.float32, seed=3)
    exact = x.detach().double().requires_grad_(True)
    (wanted,) = torch.autograd.grad(STEPS["many residuals"](exact), exact, signal.double())
    (found,) = torch.autograd.grad(STEPS["many residuals"](x), x, signal.bfloat16())
    assert off(found, wanted) > 2e-3


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_weights_are_widened_in_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_PART", 20)
    x = drawn(5, 8, dtype=dtype).requires_grad_(True)
    weight = drawn(31, 8, dtype=dtype, seed=1)
    signal = drawn(5, 31, dtype=torch.float32, seed=2)
    (found,) = torch.autograd.grad(F.linear(x, weight), x, WideGradient(signal, dtype))
    assert off(plain(found), signal.double() @ weight.double()) < 1e-6


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch without grouped products")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_experts_are_widened_one_at_a_time(dtype: torch.dtype) -> None:
    x = drawn(9, 16, dtype=dtype).requires_grad_(True)
    weights = drawn(3, 16, 24, dtype=dtype, seed=1)
    ends = torch.tensor([4, 4, 8], dtype=torch.int32)  # one expert without rows; one row of none
    y = torch._grouped_mm(x, weights, ends)
    signal = drawn(9, 24, dtype=torch.float32, seed=2)
    (found,) = torch.autograd.grad(y, x, WideGradient(signal, dtype))
    wanted = torch.zeros(9, 16, dtype=torch.float64)
    wanted[:4] = signal[:4].double() @ weights[0].double().T
    wanted[4:8] = signal[4:8].double() @ weights[2].double().T
    assert off(plain(found), wanted) < 1e-6


def test_a_wide_gradient_behaves_like_a_tensor() -> None:
    inside = drawn(2, 3, dtype=torch.float32)
    g = WideGradient(inside, torch.bfloat16)
    assert "WideGradient" in repr(g)
    assert g.dtype == torch.bfloat16
    assert g.tolist() == inside.tolist()
    assert (g.float().numpy() == inside.numpy()).all()
    assert float(g.sum()) == float(inside.sum())
    assert bool((g > 0).any()) == bool((inside > 0).any())
    copy = g.float()
    copy.mul_(2.0)
    copy[0] = 1.0
    assert torch.equal(plain(g), inside)
    assert plain(copy)[0].tolist() == [1.0] * 3
    assert torch.equal(plain(copy)[1], 2 * inside[1])
    stored = torch.zeros(2, 3, dtype=torch.bfloat16)
    stored.add_(g)  # written into an ordinary tensor: that tensor's type
    stored[0] = g[1]
    assert type(stored) is Tensor
    assert torch.equal(stored, torch.stack([inside[1], inside[1]]).bfloat16())


# ---------------------------------------------------------------- whole models


@functools.cache
def rounded(name: str, dtype: torch.dtype) -> Any:
    """The family in float64, with the weights its low model has."""
    model = make_hf(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype).double())
    return model


@functools.cache
def extremes(name: str, dtype: torch.dtype) -> tuple[int, int]:
    """The likeliest and the unlikeliest next token: a Δℓ that rounding does not drown."""
    with torch.no_grad():
        logits = rounded(name, dtype)(TOKENS).logits[0, -1]
    return int(logits.argmax()), int(logits.argmin())


@functools.cache
def truth(name: str, dtype: torch.dtype, rules: str) -> Any:
    seed = contrast_seed(TOKENS, *extremes(name, dtype), VOCAB)
    return propagate(rounded(name, dtype), TOKENS, seed, rules)


def found_and_wanted(name: str, dtype: torch.dtype, rules: str) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and heads: relevance of the low model, and truth."""
    target, contrast = extremes(name, dtype)
    result = clrp.attribute(
        boot(name, dtype), TOKENS, target=target, contrast=contrast, rules=rules
    )
    true = truth(name, dtype, rules).relevance
    heads = [true[f"blocks.{i}.attn.hook_z"].sum(-1)[0].T for i in range(len(result.heads))]
    return [
        (result.resid, torch.stack([true[site].sum(-1)[0] for site in result.sites])),
        (result.heads, torch.stack(heads)),
    ]


# 2 %, but where the rounding of the forward itself leaves more in models so far from linear
# (`test_in_float32_leaves_no_rounding`: it is the forward).
FORWARD = {
    ("mistral", "cplrp"): 0.025,
    ("mistral", "relp"): 0.03,
    ("gemma2", "gim"): 0.025,
}


@pytest.mark.parametrize("rules", LRP)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_relevance_is_near_float64_on_the_same_weights(
    dtype: torch.dtype, name: str, rules: str
) -> None:
    limit = FORWARD.get((name, rules), 0.02)
    limit /= 4 if dtype == torch.float16 else 1  # three bits more: an eighth, and some luck
    for found, wanted in found_and_wanted(name, dtype, rules):
        assert found.dtype == torch.float32
        assert off(found, wanted) <= limit


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_is_untouched(name: str, dtype: torch.dtype) -> None:
    model = boot(name, dtype)
    with torch.no_grad():
        before = model(TOKENS)
    logits, relevance = clrp.run_with_relevance(
        model, TOKENS, clrp.logit_diff(model, *extremes(name, dtype))
    )
    assert logits.dtype == dtype
    assert type(logits) is Tensor
    assert torch.equal(logits, before)
    for tensor in relevance.values():
        assert type(tensor) is Tensor
        assert tensor.dtype == torch.float32


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """GPT-2 of 24 layers: in bfloat16, and in float64 with the same weights."""
    from transformer_lens.model_bridge import TransformerBridge

    directory = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=24, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, initializer_range=0.06, attn_implementation="eager",
    )  # fmt: skip
    hf = transformers.AutoModelForCausalLM.from_config(config).bfloat16().eval()
    hf.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    model = TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=torch.bfloat16)
    return model, hf.double()


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
def test_depth_does_not_pile_up_rounding(deep: tuple[Any, Any], rules: str) -> None:
    """A bfloat16 backward would round the stream's gradient twice a block."""
    model, hf = deep
    with torch.no_grad():
        logits = hf(TOKENS).logits[0, -1]
    ends = int(logits.argmax()), int(logits.argmin())
    true = propagate(hf, TOKENS, contrast_seed(TOKENS, *ends, VOCAB), rules).relevance
    objective = clrp.logit_diff(model, *ends)
    result = clrp.attribute(model, TOKENS, objective, rules=rules)
    assert off(result.resid[0], true["blocks.0.hook_resid_pre"].sum(-1)[0]) < 0.005
    third = clrp.attribute(model, TOKENS, lambda logits: objective(logits) / 3, rules=rules)
    assert off(third.resid, result.resid / 3) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_edges_are_near_float64_on_the_same_weights(name: str) -> None:
    dtype = torch.bfloat16
    ends = extremes(name, dtype)
    true = EdgeTruth(rounded(name, dtype), TOKENS, contrast_seed(TOKENS, *ends, VOCAB), "attnlrp")
    graph = clrp.attribution_graph(
        boot(name, dtype), TOKENS, target=ends[0], contrast=ends[1], progress=False
    )
    between = []  # different positions, for which a transition's diagonal is no measure
    for source, target in zip(graph.sites, graph.sites[1:], strict=False):
        found, wanted = graph.matrix(source, target), true.matrix(source, target)
        assert found.dtype == torch.float32
        assert off(found, wanted) < 0.02
        between.append(off(found - found.diag().diag(), wanted - wanted.diag().diag()))
    assert max(between) < 0.06


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-tied"])
def test_tangents_round_nothing(name: str) -> None:
    """ṽ, written out: the values' weights times the norm at a constant denominator."""
    model, call = boot(name, torch.bfloat16), BlockCall()
    _, cache = model.run_with_cache(TOKENS, names_filter="blocks.0.hook_in")
    with call.recorded(model.blocks[0]), torch.no_grad():
        model(TOKENS)
    found, _ = block_tangents(model, 0, call, find_sites(model), clrp.RULE_SETS["attnlrp"])
    h = cache["blocks.0.hook_in"][0].double()
    block = rounded(name, torch.bfloat16).model.layers[0]
    denominator = (h.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = (h / denominator * block.input_layernorm.weight) @ block.self_attn.v_proj.weight.T
    assert off(found.flatten(1), wanted.detach()) < 1e-6


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_packed_signals_are_wide_too(name: str) -> None:
    """Transitions over both blocks; their column sums are the relevance of the one backward."""
    model, ends = boot(name, torch.bfloat16), extremes(name, torch.bfloat16)
    assert chunk_size(model, 9, torch.device("cpu")) == 1
    graph = clrp.attribution_graph(
        model, TOKENS, target=ends[0], contrast=ends[1], layers=[0], progress=False
    )
    columns = graph.matrix(*graph.sites).sum(0)
    assert off(columns, graph.relevance[0]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_precision_models_keep_plain_gradients(dtype: torch.dtype) -> None:
    assert first_gradient(boot("llama", dtype), torch.ones((), dtype=dtype)) is None


def test_own_backward_hooks_get_usable_gradients() -> None:
    model, seen = boot("llama", torch.bfloat16), {}

    def keep(gradient: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["numpy"] = gradient.detach().float().numpy()
        seen["sum"] = float(gradient.abs().sum())

    objective = clrp.logit_diff(model, 7, 12)
    with model.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", keep)]):
        clrp.run_with_relevance(model, TOKENS, objective, "blocks.0.hook_resid_pre")
    assert seen["numpy"].dtype.name == "float32"
    assert seen["sum"] == pytest.approx(abs(seen["numpy"]).sum(), rel=1e-5)
    assert seen["sum"] > 0


# ---------------------------------------------------------------- underflow


@pytest.mark.parametrize("rules", LRP)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_backward_is_linear(dtype: torch.dtype, name: str, rules: str) -> None:
    """A billionth of an objective has a billionth of its relevance: no rounding, no underflow."""
    model = boot(name, dtype)
    whole = clrp.logit_diff(model, *extremes(name, dtype))
    sites = ["blocks.0.hook_resid_pre", "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"]
    _, wanted = clrp.run_with_relevance(model, TOKENS, whole, sites, rules=rules)
    _, found = clrp.run_with_relevance(
        model, TOKENS, lambda logits: 1e-9 * whole(logits), sites, rules=rules
    )
    for site in sites:
        assert off(found[site] * 1e9, wanted[site]) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "bloom", "bert"])
def test_the_backward_is_linear_elsewhere(name: str) -> None:
    """Experts, sinks, complex RoPE, ALiBi, an encoder."""
    model, tokens = zoo.boot(name, torch.bfloat16), zoo.random_tokens()
    objective = clrp.logit_diff(model, 7, 12)
    wanted = clrp.attribute(model, tokens, objective)
    found = clrp.attribute(model, tokens, lambda logits: 1e-9 * objective(logits))
    assert off(found.resid * 1e9, wanted.resid) < 1e-5
    assert off(found.heads * 1e9, wanted.heads) < 1e-5


@pytest.mark.parametrize("keys", [64, 1000])
def test_temperature_in_float16_counts_weights_that_the_pattern_lost(keys: int) -> None:
    """A fifth of these weights is 0 in the float16 pattern, but not their square roots."""
    scores = (4 * drawn(20, keys, dtype=torch.float32)).half().requires_grad_(True)
    pattern = F.softmax(scores, -1, dtype=torch.float32).half()
    signal = drawn(20, keys, dtype=torch.float32, seed=1)
    y = softmax_temperature(pattern, 2.0)
    assert torch.equal(y, pattern)
    (found,) = torch.autograd.grad(y, scores, WideGradient(signal, y.dtype))
    hot = torch.softmax(scores.detach().double() / 2, -1)
    wanted = hot * (signal.double() - (hot * signal.double()).sum(-1, keepdim=True))
    assert off(plain(found), wanted) < 1e-5


def _shrunk(name: str, factor: float, dtype: torch.dtype) -> Any:
    """A model whose embeddings are so small that its residual stream is subnormal in float16."""
    from transformer_lens.model_bridge import TransformerBridge

    model: Any = TransformerBridge.boot_transformers(str(saved(name)), device="cpu", dtype=dtype)
    with torch.no_grad():
        model.embed.weight.mul_(factor)
        for key, parameter in model.original_model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight")) or ".o." in key:
                parameter.mul_(factor)
            if "mlp" in key and ".out." in key:
                parameter.mul_(factor)
    return model


@pytest.mark.parametrize("explain", ["attribute", "attribution_graph"])
def test_underflow_in_the_forward_is_said(explain: str) -> None:
    model = _shrunk("llama", 1e-6, torch.float16)
    with pytest.warns(UserWarning, match="too small for float16.*in_float32"):
        getattr(clrp, explain)(model, TOKENS, target=7, contrast=12)


def test_that_warning_is_deserved() -> None:
    model, high = (_shrunk("llama", 1e-6, dtype) for dtype in (torch.float16, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = clrp.attribute(model, TOKENS, target=7, contrast=12)
    wanted = clrp.attribute(high, TOKENS, target=7, contrast=12)
    assert off(found.resid[:-1], wanted.resid[:-1]) > 0.01


@pytest.mark.parametrize("rules", ["attnlrp", "gradient"])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_warning_on_ordinary_models(name: str, rules: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clrp.attribute(
            boot(name, torch.float16), TOKENS, target=7, contrast=12, rules=rules, neurons=True
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_taken_inside_lrp_are_watched(name: str) -> None:
    """There they are torch's own, in the model's type."""
    model = boot(name, torch.float16)
    objective = clrp.logit_diff(model, *extremes(name, torch.float16))
    with warnings.catch_warnings(), clrp.lrp(model):
        warnings.simplefilter("error")
        value = objective(model(TOKENS))
        torch.autograd.grad(value, [model.embed.weight])
    with clrp.lrp(model):
        value = 1e-7 * objective(model(TOKENS))
        with pytest.warns(UserWarning, match="underflow in this float16 model.*multiply"):
            torch.autograd.grad(value, [model.embed.weight])
        value = 1e-12 * objective(model(TOKENS))  # every gradient is 0
        with pytest.warns(UserWarning, match="underflow in this float16 model"):
            torch.autograd.grad(value, [model.embed.weight])


# ---------------------------------------------------------------- the way out


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_in_float32_leaves_no_rounding(name: str, dtype: torch.dtype) -> None:
    model = boot(name, dtype)
    before = [(p, p.data_ptr(), p.dtype) for p in model.original_model.parameters()]
    target, contrast = extremes(name, dtype)
    with in_float32(model):
        result = clrp.attribute(model, TOKENS, target=target, contrast=contrast)
        assert all(p.dtype == torch.float32 for p in model.original_model.parameters())
    true = truth(name, dtype, "attnlrp").relevance
    wanted = torch.stack([true[site].sum(-1)[0] for site in result.sites])
    # Gemma's factor on the embeddings is a buffer, and stays the rounded number it is.
    rounded_constant = torch.finfo(dtype).eps / 2 if name.startswith("gemma") else 0.0
    assert off(result.resid, wanted) < 1e-5 + rounded_constant
    after = [(p, p.data_ptr(), p.dtype) for p in model.original_model.parameters()]
    assert all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, after, strict=True))


def test_in_float32_puts_the_weights_back_after_an_exception() -> None:
    model = boot("qwen3", torch.bfloat16)
    with torch.no_grad():
        before = model(TOKENS)
    with pytest.raises(clrp.errors.TokenError), in_float32(model):
        clrp.attribute(model, TOKENS, target=7, contrast=7)
    with torch.no_grad():
        assert torch.equal(model(TOKENS), before)


def test_in_float32_refuses_what_it_cannot_widen() -> None:
    with pytest.raises(TypeError, match="TransformerBridge"), in_float32(object()):
        pass
    model = _shrunk("llama", 1.0, torch.bfloat16)
    model.original_model.to("meta")
    with pytest.raises(clrp.errors.ModelStateError, match="offloaded"), in_float32(model):
        pass


@pytest.mark.parametrize("folded", [False, True], ids=["no processing", "folded"])
def test_in_float32_reaches_processed_weights(folded: bool) -> None:
    model = _shrunk("llama", 1.0, torch.bfloat16)
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    with in_float32(model):
        result = clrp.attribute(model, TOKENS, target=7, contrast=12)
    assert off(result.resid, clrp.attribute(model, TOKENS, target=7, contrast=12).resid) < 0.05
    assert result.ledger.delta != 0


def test_mixed_rule_sets_run_in_low_precision() -> None:
    mixed = dataclasses.replace(clrp.RULE_SETS["gim"], name="mixed", norm="gradient")
    model = boot("gemma3", torch.float16)
    result = clrp.attribute(model, TOKENS, target=7, contrast=12, rules=mixed)
    assert torch.isfinite(result.resid).all()
