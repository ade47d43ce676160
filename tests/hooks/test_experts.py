"""Experts and routers: rules inside code that only delegates, by hand and for whole families."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, GptOssConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from truth import zoo
from truth.op_oracle import RULES, OpOracle

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.hooks.by_operation.mode import OperationRules
from tl_contrastive_lrp.hooks.by_operation.patterns import clamp_bounds, clamp_ratio, is_sigmoid_of
from tl_contrastive_lrp.rules.rule_sets import RULE_SETS, RuleSet

F64 = torch.float64
TOKENS = zoo.random_tokens()
TARGET, CONTRAST = 7, 12


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (None, 0.7), (-0.2, None), (0.0, 2.0)])
def test_clamp_ratio_is_the_quotient(low: float | None, high: float | None) -> None:
    x = torch.tensor([-3.0, -1.5, -0.2, -1e-300, 1e-300, 0.7, 1.5, 2.5], dtype=F64)
    for value, ratio in zip(x.tolist(), clamp_ratio(low, high)(x).tolist(), strict=True):
        clamped = min(max(value, -math.inf if low is None else low), high or math.inf)
        assert ratio == pytest.approx(clamped / value, rel=1e-15, abs=0.0)
    assert clamp_ratio(low, high)(torch.zeros(1)) == 1.0


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "bounds"),
    [
        ("clamp", (), {"min": None, "max": 7.0}, (None, 7.0)),
        ("clamp", (-7.0, 7.0), {}, (-7.0, 7.0)),
        ("clip", (-1,), {"max": 0}, (-1, 0)),
        ("clamp_min", (0,), {}, (0, None)),
        ("clamp_max", (), {"max": 2.0}, (None, 2.0)),
        ("clamp", (1e-9,), {}, None),  # 0 does not stay 0
        ("clamp", (), {"max": -1.0}, None),
        ("clamp", (torch.zeros(()),), {}, None),  # a tensor, which may be computed
    ],
)
def test_bounds_of_a_clamp(name: str, args: Any, kwargs: Any, bounds: Any) -> None:
    assert clamp_bounds(name, (torch.ones(2), *args), kwargs) == bounds


def test_a_sigmoid_is_known_by_what_it_is_of() -> None:
    u, other = draw(3, 8).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    gate, up = u.chunk(2, dim=-1)
    narrow = gate.float()
    assert is_sigmoid_of(torch.sigmoid(gate), gate)
    assert is_sigmoid_of(torch.sigmoid(1.702 * gate), gate)
    assert is_sigmoid_of(torch.sigmoid(-gate / 3), 2.0 * gate)
    assert is_sigmoid_of(torch.sigmoid(narrow).to(F64), gate)
    assert is_sigmoid_of(torch.sigmoid(other), other)  # a leaf
    assert not is_sigmoid_of(torch.sigmoid(gate), up)  # the other half of one tensor
    assert not is_sigmoid_of(torch.sigmoid(other), gate)
    assert not is_sigmoid_of(torch.sigmoid(gate * up), gate)
    assert not is_sigmoid_of(torch.sigmoid(gate).pow(2), gate)
    assert not is_sigmoid_of(torch.tanh(gate), gate)
    assert not is_sigmoid_of(torch.sigmoid(gate[..., :1]), gate)  # one for many is a weight


# ---------------------------------------------------------------- functions of one module


class Written(nn.Module):
    """A module whose forward is the given function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


def ruled(function: Callable[..., Tensor], rules: str | RuleSet, *xs: Tensor) -> list[Tensor]:
    """What a gradient of draws leaves at each x when ``function`` runs under the rules inside."""
    rule_set = RULE_SETS[rules] if isinstance(rules, str) else rules
    xs = tuple(x.clone().requires_grad_() for x in xs)
    module = Written(function)
    with OperationRules(rule_set, attention=False).around(module):
        y = module(*xs)
    assert torch.equal(y, function(*xs))
    given = draw(*y.shape, seed=9)
    found = torch.autograd.grad((given * y).sum(), xs, allow_unused=True)
    return [torch.zeros_like(x) if f is None else f for x, f in zip(xs, found, strict=True)]


IDENTITY = [name for name, rule_set in RULE_SETS.items() if rule_set.activation == "identity"]


@pytest.mark.parametrize("alpha", [1.0, 1.702, -0.5])
@pytest.mark.parametrize("rules", IDENTITY)
@pytest.mark.parametrize("first", [True, False])
def test_swish_by_hand_is_an_activation(rules: str, alpha: float, first: bool) -> None:
    def swish(x: Tensor) -> Tensor:
        s = torch.sigmoid(x * alpha)
        return x * s if first else s * x

    x = draw(3, 5)
    (found,) = ruled(swish, rules, x)
    assert torch.allclose(found, draw(3, 5, seed=9) / (1 + (-alpha * x).exp()), rtol=1e-13)


@pytest.mark.parametrize("base", ["gim", "gradient", "cplrp"])
def test_swish_by_hand_keeps_its_derivative_where_activations_do(base: str) -> None:
    x, g = draw(3, 5), draw(3, 5, seed=9)
    (found,) = ruled(
        lambda t: t * torch.sigmoid(2 * t), replace(RULE_SETS[base], activation="gradient"), x
    )
    s = 1 / (1 + (-2 * x).exp())
    assert torch.allclose(found, g * (s + 2 * x * s * (1 - s)), rtol=1e-13)


@pytest.mark.parametrize("rules", list(RULE_SETS))
@pytest.mark.parametrize("weight", ["sigmoid", "softplus"])
def test_a_gate_and_what_it_weighs(rules: str, weight: str) -> None:
    gate, x, g = draw(3, 1), draw(3, 5, seed=1), draw(3, 5, seed=9)
    function = {"sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}[weight]
    to_gate, to_x = ruled(lambda a, b: b * function(a), rules, gate, x)
    s = 1 / (1 + (-gate).exp())
    w = s if weight == "sigmoid" else (1 + gate.exp()).log()
    slope = s * (1 - s) if weight == "sigmoid" else s
    if rules == "cplrp":  # a constant weight: all goes to what it weighs
        assert torch.equal(to_gate, torch.zeros_like(gate))
        assert torch.allclose(to_x, g * w, rtol=1e-12)
        return
    half = 1.0 if rules == "gradient" else 0.5
    assert torch.allclose(to_x, half * g * w, rtol=1e-12)
    assert torch.allclose(to_gate, half * slope * (g * x).sum(-1, keepdim=True), rtol=1e-12)


def test_clamp_takes_the_identity_rule_unless_it_bounds_weights() -> None:
    x, g = 3 * draw(4, 5), draw(4, 5, seed=9)
    (found,) = ruled(lambda t: t.clamp(min=None, max=0.5), "attnlrp", x)
    assert torch.allclose(found, g * torch.where(x > 0.5, 0.5 / x, torch.ones_like(x)))
    (found,) = ruled(lambda t: t.clamp(min=None, max=0.5), "gim", x)
    assert torch.equal(found, g * (x <= 0.5))
    (found,) = ruled(lambda t: torch.sigmoid(t).clamp(min=0.5), "attnlrp", x)
    s = 1 / (1 + (-x).exp())
    assert torch.allclose(found, g * s * (1 - s) * (s >= 0.5), rtol=1e-12)


# ---------------------------------------------------------------- experts that clamp and gate


@pytest.fixture(params=["eager", "grouped_mm", "batched_mm"])
def experts(request: Any) -> Any:
    config = GptOssConfig(
        num_local_experts=3, hidden_size=4, intermediate_size=4, num_experts_per_tok=2,
        swiglu_limit=1.2, swiglu_alpha=1.702,
    )  # fmt: skip
    config._experts_implementation = request.param
    dtype = torch.float32 if request.param == "grouped_mm" else F64  # all that kernel takes
    module = GptOssExperts(config).to(dtype).requires_grad_(False)
    for seed, p in enumerate(module.parameters()):
        p.copy_(draw(*p.shape, seed=seed))
    return module.eval()


@pytest.mark.parametrize("rules", ["attnlrp", "relp", "cplrp"])
def test_gpt_oss_experts_by_hand(experts: Any, rules: str) -> None:
    """Token by token, expert by expert, neuron by neuron: no autograd."""
    n, k, d, f = 3, 2, 4, 4
    dtype = experts.down_proj.dtype
    h, g = 2 * draw(n, d, seed=20), draw(n, d, seed=9)
    r = draw(n, k, seed=21).softmax(-1)
    chosen = torch.tensor([[0, 2], [1, 0], [2, 1]])
    weights = [p.double() for p in experts.parameters()]
    to_h, to_r = torch.zeros(n, d, dtype=F64), torch.zeros(n, k, dtype=F64)
    clamped = 0
    for t in range(n):
        for slot in range(k):
            e = int(chosen[t, slot])
            into, bias, down, last = (w[e] for w in weights)
            out = last.clone()
            for i in range(f):
                a = float(h[t] @ into[:, 2 * i] + bias[2 * i])
                b = float(h[t] @ into[:, 2 * i + 1] + bias[2 * i + 1])
                gate, up = min(a, 1.2), max(-1.2, min(b, 1.2))
                clamped += (gate != a) + (up != b)
                sigma = 1 / (1 + math.exp(-1.702 * gate))
                glu = gate * sigma
                out += (up + 1) * glu * down[i]
                # Half for router weight x expert, unless the weight is a constant; and half for
                # (up + 1) x glu.
                arrives = float(r[t, slot] * (down[i] @ g[t])) * (1.0 if rules == "cplrp" else 0.5)
                to_gate = 0.5 * arrives * (up + 1) * sigma * (gate / a)
                to_up = 0.5 * arrives * glu * (up / b)
                to_h[t] += to_gate * into[:, 2 * i] + to_up * into[:, 2 * i + 1]
            to_r[t, slot] = 0.5 * float(out @ g[t])
    assert clamped > 3

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            weights = weights.detach() if rules == "cplrp" else weights  # as its router gives them
            return self.experts(x, chosen, weights)

    module, x, w = Routed(), h.to(dtype).requires_grad_(), r.to(dtype).requires_grad_()
    with OperationRules(RULE_SETS[rules], attention=False).around(module):
        y = module(x, w)
    found = torch.autograd.grad((g * y).sum(), (x, w), allow_unused=True)
    close = 1e-12 if dtype == F64 else 1e-5
    assert torch.allclose(found[0].double(), to_h, rtol=close, atol=close)
    if rules == "cplrp":
        assert found[1] is None
    else:
        assert torch.allclose(found[1].double(), to_r, rtol=close, atol=close)


# ---------------------------------------------------------------- routers


@pytest.mark.parametrize("rules", ["attnlrp", "relp", "gim", "cplrp"])
def test_a_router_that_normalises_sigmoids(rules: str) -> None:
    """w = c·s/Σs over the chosen: ordinary gradient by the quotient rule, or a constant."""
    config = DeepseekV3Config(
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, hidden_size=6,
        norm_topk_prob=True, routed_scaling_factor=1.5,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config).eval().requires_grad_(False)
    router.weight.copy_(draw(4, 6, seed=3))
    x = draw(3, 6).float().requires_grad_()
    with OperationRules(RULE_SETS[rules], attention=False).around(router):
        _, weights, chosen = router(x)
    assert torch.equal(weights, router(x)[1])
    if rules == "cplrp":
        assert not weights.requires_grad
        return
    g = draw(3, 2, seed=9)
    (found,) = torch.autograd.grad((g * weights).sum(), x)
    wanted = torch.zeros(3, 6, dtype=F64)
    for t in range(3):
        rows = router.weight.double()[chosen[t]]
        s = 1 / (1 + (-(rows @ x[t].detach().double())).exp())
        for i in range(2):
            for j in range(2):
                slope = 1.5 * ((i == j) * s.sum() - s[i]) / s.sum() ** 2 * s[j] * (1 - s[j])
                wanted[t] += g[t, i] * slope * rows[j]
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- whole families

FAMILIES = (
    "gpt_oss", "deepseek_v2", "deepseek_v2-groups", "deepseek_v3", "glm4_moe_lite", "youtu",
    "llama4_text", "glm_moe_dsa", "afmoe", "laguna", "minimax_m2", "ernie4_5_moe",
    "gemma4_text-moe", "qwen2_moe", "qwen2_moe-mixed", "qwen3_moe", "qwen3_moe-raw", "olmoe",
    "flex_olmo", "granitemoe", "jetmoe", "mixtral", "phimoe",
)  # fmt: skip


def seed_grad() -> Tensor:
    seed = torch.zeros(*TOKENS.shape, zoo.VOCAB, dtype=F64)
    seed[0, -1, TARGET], seed[0, -1, CONTRAST] = 1.0, -1.0
    return seed


@pytest.mark.parametrize("name", FAMILIES)
def test_family_against_the_oracle_of_operations(name: str) -> None:
    model = zoo.boot(name)
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    with torch.no_grad():
        plain = model(TOKENS)
    for rules in RULES:
        logits, relevance = clrp.run_with_relevance(model, TOKENS, objective, rules=rules)
        assert torch.equal(logits, plain)
        truth = OpOracle(zoo.hf_model(name), TOKENS, seed_grad(), rules)
        for site, wanted in truth.relevance.items():
            found = relevance[site].double()
            assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max(), (rules, site)
            node = (found - wanted).sum(-1).abs().max()
            assert node < 1e-5 * wanted.abs().sum(-1).max(), (rules, site)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("gemma4_text", "embed_tokens_per_layer"),
        ("deepseek_v4", "HyperConnection"),
        ("qwen3_next", "GatedDeltaNet"),
        ("qwen3_5_text", "GatedDeltaNet"),
        ("qwen3_5_moe_text", "GatedDeltaNet"),
    ],
)
def test_what_has_no_rule_is_refused_by_name(name: str, named: str) -> None:
    model = zoo.boot(name)
    with pytest.raises(UncoveredComponentError, match=named), clrp.lrp(model):
        pass
