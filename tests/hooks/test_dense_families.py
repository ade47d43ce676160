"""Activations and odd corners of dense families, each against arithmetic done another way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from transformers import activations as hf
from truth import zoo

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.hooks.by_operation.mode import OperationRules
from tl_contrastive_lrp.rules import activations
from tl_contrastive_lrp.rules.activations import ACTIVATIONS, PARAMETRIC, ratio_of
from tl_contrastive_lrp.rules.rule_sets import RULE_SETS

F64 = torch.float64
TOKENS = zoo.random_tokens()
TARGET, CONTRAST = 7, 12


@pytest.fixture(autouse=True)
def _digits() -> Iterator[None]:
    """Decimal digits of mpmath, which holds them for all files."""
    with mpmath.workdps(60):
        yield


# ---------------------------------------------------------------- ratios

ALPHA_P, ALPHA_N, BETA = 0.7, -0.4, 0.5


def _xielu() -> Any:
    module = hf.XIELUActivation().double()
    with torch.no_grad():
        module.alpha_p.fill_(ALPHA_P)
        module.alpha_n.fill_(ALPHA_N)
        module.beta.fill_(BETA)
    return module


def _softplus(x: float) -> mpmath.mpf:
    return mpmath.log1p(mpmath.exp(mpmath.mpf(x)))


def _xielu_exactly(x: mpmath.mpf) -> mpmath.mpf:
    """arXiv:2411.13010, equation 12, with αₙ = β + softplus as its section 4 has it."""
    if x > 0:
        return _softplus(ALPHA_P) * x * x + BETA * x
    return (BETA + _softplus(ALPHA_N)) * (mpmath.expm1(x) - x) + BETA * x


def _mish_exactly(x: mpmath.mpf) -> mpmath.mpf:
    return x * mpmath.tanh(mpmath.log1p(mpmath.exp(x)))


Exact = Callable[[mpmath.mpf], mpmath.mpf]
FUNCTIONS: dict[str, tuple[Callable[[], Any], Exact, float]] = {
    # module, the function, its slope at 0 (the ratio's limit there)
    "ReLUSquaredActivation": (hf.ReLUSquaredActivation, lambda x: max(x, 0) ** 2, 0.0),
    "QuickGELUActivation": (
        hf.QuickGELUActivation,
        lambda x: x / (1 + mpmath.exp(-mpmath.mpf("1.702") * x)),
        0.5,
    ),
    "MishActivation": (hf.MishActivation, _mish_exactly, 0.6),
    "XIELUActivation": (_xielu, _xielu_exactly, BETA),
}
POINTS = [1e-30, -1e-30, 1e-10, -1e-10, 1e-3, -1e-3, 0.3, -0.3, 1.0, -1.0, 4.0, -4.0, 30.0,
          -30.0, 600.0, -600.0]  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ratio_equals_exact_arithmetic(name: str) -> None:
    make, exact, slope = FUNCTIONS[name]
    ratio = ratio_of(make())
    assert ratio is not None
    for value in POINTS:
        got = ratio(torch.tensor(value, dtype=F64)).item()
        wanted = float(exact(mpmath.mpf(value)) / mpmath.mpf(value))
        # 1.702 · 600 in the exponent costs its rounding; tails below that are 0
        assert math.isclose(got, wanted, rel_tol=1e-12, abs_tol=1e-15), (value, got, wanted)
    assert ratio(torch.zeros((), dtype=F64)).item() == pytest.approx(slope, abs=1e-15)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_is_finite_everywhere_a_number_is(name: str, dtype: torch.dtype) -> None:
    ratio = ratio_of(FUNCTIONS[name][0]())
    assert ratio is not None
    top = min(float(torch.finfo(dtype).max), 1e18)  # beyond, xIELU and ReLU² overflow themselves
    x = torch.tensor([0.0, -0.0, 1e-7, -1e-7, 60.0, -60.0, top, -top], dtype=dtype).float()
    got = ratio(x)
    assert bool(torch.isfinite(got).all()), got
    assert not bool((x * got).isnan().any())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_ratio_times_input_is_the_module(name: str) -> None:
    module = FUNCTIONS[name][0]()
    x = torch.linspace(-8.0, 8.0, 1601, dtype=F64)
    ratio = ratio_of(module)
    assert ratio is not None
    # xIELU itself takes values in (-1e-6, 0] for -1e-6 in its exponential
    atol = 2e-6 if name == "XIELUActivation" else 1e-11
    assert torch.allclose(ratio(x) * x, module(x).detach(), rtol=1e-9, atol=atol)


def test_every_parametric_row_is_tested_here() -> None:
    assert set(PARAMETRIC) <= set(FUNCTIONS)
    assert ACTIVATIONS["relu_squared"] is activations.relu_squared_ratio


def test_xielu_reads_the_parameters_of_its_module() -> None:
    module, x = _xielu(), torch.tensor([2.0, -2.0], dtype=F64)
    ratio = PARAMETRIC["XIELUActivation"](module)
    before = ratio(x)
    with torch.no_grad():
        module.alpha_p.add_(1.0)
    after = ratio(x)
    assert after[0] > before[0]
    assert after[1] == before[1]
    assert not after.requires_grad


# ---------------------------------------------------------------- operations inside


class _SubNorm(nn.Module):
    """Wo·n(relu(a)² ⊙ b), n(m) = w ⊙ m/√(mean m² + eps): an MLP with a norm inside."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(6, generator=generator, dtype=F64))
        self.out = nn.Parameter(torch.randn(4, 6, generator=generator, dtype=F64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        m = torch.nn.functional.relu(a) * b
        m = m * torch.rsqrt(m.pow(2).mean(-1, keepdim=True) + 1e-3)
        return torch.nn.functional.linear(self.weight * m, self.out)


@pytest.mark.parametrize("trainable", [True, False])
def test_a_sub_norm_after_a_gate_by_hand(trainable: bool) -> None:
    module = _SubNorm().requires_grad_(trainable)
    a = torch.tensor([[1.0, -2.0, 0.5, 3.0, -0.1, 0.7]], dtype=F64, requires_grad=True)
    b = torch.tensor([[0.3, 1.0, -1.5, 0.2, 2.0, -0.6]], dtype=F64, requires_grad=True)
    plain = module(a, b)
    with OperationRules(RULE_SETS["attnlrp"], attention=False).around(module):
        y = module(a, b)
    assert torch.equal(y, plain)
    g = torch.tensor([[1.0, -1.0, 0.5, 2.0]], dtype=F64)
    found = torch.autograd.grad(y, (a, b), g)
    with torch.no_grad():
        m = a.relu() * b
        scale = (m.pow(2).mean() + 1e-3).sqrt()
        g_m = (g @ module.out) * module.weight / scale  # the denominator is a constant
        assert torch.allclose(found[0], 0.5 * g_m * b * (a > 0), atol=1e-14)  # ReLU(a)/a
        assert torch.allclose(found[1], 0.5 * g_m * a.relu(), atol=1e-14)


class _Masked(nn.Module):
    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, scores: Tensor) -> Tensor:
        return torch.max(scores, torch.tensor(self.floor, dtype=scores.dtype))


@pytest.mark.parametrize("floor", [torch.finfo(F64).min, -1e9, 0.0])
def test_a_maximum_is_a_mask_only_with_the_lowest_number_there_is(floor: float) -> None:
    scores = torch.tensor([[1.0, -3.0]], dtype=F64, requires_grad=True)
    module = _Masked(floor)
    with OperationRules(RULE_SETS["attnlrp"], attention=True).around(module):
        out = module(scores)
    marked = "_Ordinary" in type(out.grad_fn).__name__
    assert marked == (floor == torch.finfo(F64).min)
    assert torch.equal(out, module(scores))


# ---------------------------------------------------------------- parameters that may be trained


@pytest.mark.parametrize("name", ["bitnet", "youtu", "xglm", "olmo-clipped", "roberta"])
@pytest.mark.parametrize("rule_set", ["attnlrp", "relp"])
def test_parameters_that_require_gradients_are_no_factors(name: str, rule_set: str) -> None:
    """Inside ``lrp`` they may: a weight times what it weighs is then still linear."""
    model = zoo.boot(name)
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    _, cache = clrp.run_with_relevance(model, TOKENS, objective, ["embed.hook_out"], rules=rule_set)
    wanted = cache["embed.hook_out"]
    kept: dict[str, Tensor] = {}

    def start(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept["x"] = tensor.detach().requires_grad_(True)
        return kept["x"]

    assert any(p.requires_grad for p in model.original_model.parameters())
    with model.hooks(fwd_hooks=[("embed.hook_out", start)]), clrp.lrp(model, rule_set):
        value = objective(model(TOKENS))
    (g,) = torch.autograd.grad(value, kept["x"])
    assert torch.allclose(kept["x"].detach() * g, wanted, atol=1e-6 * float(wanted.abs().max()))


# ---------------------------------------------------------------- the first GPT, and native models


def test_blocks_that_return_lists_have_their_last_site() -> None:
    """No norm and no bias follow: what arrives at the last site is all of Δℓ."""
    model = zoo.boot("openai_gpt")
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    result = clrp.attribute(model, TOKENS, objective)
    assert float(result.resid[-1].sum()) == pytest.approx(float(result.delta), rel=1e-5)
    graph = clrp.attribution_graph(model, TOKENS, objective)
    last = graph.matrix(graph.sites[-2], graph.sites[-1])
    assert torch.allclose(last.sum(0), graph.relevance[-2], atol=1e-5)
    far = clrp.attribution_graph(model, TOKENS, objective, layers=[0], progress=False)
    assert torch.allclose(far.matrix(*far.sites).sum(0), graph.relevance[0], atol=1e-5)
    assert model.list_hooks() == {}


def test_a_mask_called_bias_is_no_bias() -> None:
    """The first GPT's attention keeps its causal mask under that name."""
    model = zoo.boot("openai_gpt")
    assert model.blocks[0].attn.original_component.bias.dim() > 1
    ledger = clrp.attribute(model, TOKENS, clrp.logit_diff(model, TARGET, CONTRAST)).ledger
    assert all(math.isfinite(row.biases) for row in ledger.rows)


NATIVE: dict[str, dict[str, Any]] = {
    "relu": {"act_fn": "relu"},
    "gelu": {"act_fn": "gelu_new"},
    "solu": {"act_fn": "solu_ln"},
    "gated": {
        "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True,
        "positional_embedding_type": "rotary",
    },
    "attention only": {"attn_only": True},
    "no norm": {"normalization_type": None, "act_fn": "relu"},
}  # fmt: skip


@pytest.mark.parametrize("name", NATIVE)
def test_native_models_keep_the_logit_difference(name: str) -> None:
    """Without biases and with constant patterns every rule conserves: the input holds all of Δℓ."""
    from transformer_lens.model_bridge import TransformerBridge

    size = {"n_layers": 2, "d_model": 24, "n_heads": 3, "d_head": 8, "d_mlp": 40, "n_ctx": 32}
    settings = {**size, "d_vocab": zoo.VOCAB, "seed": 0, "act_fn": "relu", **NATIVE[name]}
    model = TransformerBridge.boot_native(settings).eval()
    with torch.no_grad():
        for key, parameter in model.original_model.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    leaves = [n for n in ("embed.hook_out", "pos_embed.hook_out") if n in model.hook_dict]
    plain = model(TOKENS)
    logits, cache = clrp.run_with_relevance(model, TOKENS, objective, leaves, rules="cplrp")
    assert torch.equal(logits, plain)
    total = sum(float(cache[name].double().sum()) for name in leaves)
    assert total == pytest.approx(float(objective(plain).detach()), rel=1e-4, abs=1e-6)
    clrp.attribution_graph(model, TOKENS, objective)


def test_soft_caps_of_native_models_are_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    size = {"n_layers": 1, "d_model": 24, "n_heads": 3, "d_head": 8, "d_mlp": 40, "n_ctx": 32}
    model = TransformerBridge.boot_native(
        {**size, "d_vocab": zoo.VOCAB, "act_fn": "relu", "attn_scores_soft_cap": 2.0}
    ).eval()
    with pytest.raises(UncoveredComponentError, match="Tanh"):
        clrp.coverage(model)


def test_clamped_attention_is_clamped_in_its_row() -> None:
    """Else the zoo's row of it would test nothing."""
    model, seen = zoo.boot("olmo-clipped"), []

    def look(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(float(tensor.abs().max()))

    names = [f"blocks.0.attn.{x}.hook_out" for x in "qkv"]
    with torch.no_grad():
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, look) for name in names])
    clip = model.original_model.config.clip_qkv
    assert len(seen) == 3
    assert min(seen) > clip
    x = torch.tensor([-4.0, 1.0, 4.0], dtype=F64, requires_grad=True)
    module = nn.Module()
    module.forward = lambda x: x.clamp(min=-clip, max=clip)  # type: ignore[method-assign]
    with OperationRules(RULE_SETS["attnlrp"], attention=True).around(module):
        y = module(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(g * x.detach(), x.detach().clamp(-clip, clip))


@pytest.mark.parametrize("centred", [False, True])
def test_a_norm_function_without_weight_on_batches_of_heads(centred: bool) -> None:
    """[batch, pos, head, d_head], all different: the gradient is C(g)/s for each row alone."""

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            function = nn.functional.layer_norm if centred else nn.functional.rms_norm
            return function(x, (x.shape[-1],), eps=1e-3)

    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in "xg")
    module, x = Bare(), x.requires_grad_()
    with OperationRules(RULE_SETS["attnlrp"], attention=False).around(module):
        y = module(x)
    (found,) = torch.autograd.grad(y, x, g)
    c = x.detach() - x.detach().mean(-1, keepdim=True) if centred else x.detach()
    s = (c.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    wanted = (g - g.mean(-1, keepdim=True) if centred else g) / s
    assert torch.equal(y, Bare()(x))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
