"""Rules for activations, soft-caps and the softmax against limits and 400-digit arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import mpmath
import pytest
import torch
from torch import Tensor
from truth import rounding
from truth.drawn import DTYPES, F64, backward, draw

from tl_contrastive_lrp.rules import activations
from tl_contrastive_lrp.rules import functions as rules
from tl_contrastive_lrp.rules.softcap import softcap, softcap_ratio
from tl_contrastive_lrp.rules.softmax import softmax_temperature

# ---------------------------------------------------------------- activation ratios


@pytest.fixture(autouse=True)
def _digits() -> Iterator[None]:
    """Decimal digits of mpmath, which holds them for all files."""
    with mpmath.workdps(400):  # ½(1 + tanh a) cancels: 1e-262 at −20
        yield


def _silu(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def _gelu(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.ncdf(x)


def _gelu_tanh(x: mpmath.mpf) -> mpmath.mpf:
    a = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    return (1 + mpmath.tanh(a)) / 2


def _relu(x: mpmath.mpf) -> mpmath.mpf:
    return mpmath.mpf(1 if x > 0 else 0)


def _cap(v: mpmath.mpf) -> mpmath.mpf:
    return mpmath.mpf(1) if v == 0 else mpmath.tanh(v) / v


Exact = Callable[[mpmath.mpf], mpmath.mpf]
RATIOS: dict[str, tuple[rules.Ratio, Exact, Callable[[Tensor], Tensor]]] = {
    "silu": (activations.silu_ratio, _silu, torch.nn.functional.silu),
    "gelu": (activations.gelu_ratio, _gelu, torch.nn.functional.gelu),
    "gelu_tanh": (
        activations.gelu_tanh_ratio,
        _gelu_tanh,
        lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    ),
    "relu": (activations.relu_ratio, _relu, torch.relu),
    "softcap": (softcap_ratio, _cap, torch.tanh),
}
POINTS = [0.0, 1e-10, -1e-10, 1e-30, -1e-30, 9.99e-4, 1.001e-3, -1e-3, 0.1, -0.1, 0.7, -0.7, 1.3,
          -1.3, 3.0, -3.0, 5.0, -5.0, 8.0, -8.0, 20.0, -20.0, 88.0, -88.0, 1e4, -1e4]  # fmt: skip


@pytest.mark.parametrize("name", RATIOS)
def test_ratio_equals_exact_arithmetic(name: str) -> None:
    ratio, exact, _ = RATIOS[name]
    for value in POINTS:
        got = ratio(torch.tensor(value, dtype=F64)).item()
        expected = float(exact(mpmath.mpf(value)))
        # far out in a tail, rounding the exponent (up to 700) costs that many units
        assert math.isclose(got, expected, rel_tol=1e-12, abs_tol=1e-300), (value, got, expected)


@pytest.mark.parametrize("name", RATIOS)
def test_ratio_times_input_is_the_function(name: str) -> None:
    """The closed form belongs to the function that torch computes."""
    ratio, _, function = RATIOS[name]
    x = torch.linspace(-6.0, 6.0, 1201, dtype=F64)
    assert torch.allclose(ratio(x) * x, function(x), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_is_a_half_at_and_around_zero(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, 1e-10, -1e-10], dtype=F64).to(dtype)
    x.requires_grad_(True)
    y = RATIOS[name][2](x.detach())
    (got,) = backward(rules.identity(y, x, RATIOS[name][0]), torch.ones_like(y), x)
    assert got.dtype == dtype
    assert torch.allclose(got.double(), torch.full((4,), 0.5, dtype=F64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_at_the_largest_numbers_is_the_limit(name: str, dtype: torch.dtype) -> None:
    huge = torch.finfo(dtype).max
    x = torch.tensor([huge, -huge, math.inf, -math.inf], dtype=dtype).requires_grad_(True)
    y = torch.zeros(4, dtype=dtype)
    (got,) = backward(rules.identity(y, x, RATIOS[name][0]), torch.ones_like(y), x)
    limit = 0.0 if name == "softcap" else 1.0
    expected = torch.tensor([limit, 0.0, limit, 0.0], dtype=F64)
    atol = 2.0 / huge + torch.finfo(dtype).tiny + (2e-5 if dtype == torch.float16 else 0.0)
    assert torch.allclose(got.double(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_rule_in_every_precision(name: str, dtype: torch.dtype) -> None:
    ratio, exact, function = RATIOS[name]
    x = torch.linspace(-5, 5, 41, dtype=F64).to(dtype).requires_grad_(True)
    y, g = function(x), draw(41, seed=3).to(dtype)
    out = rules.identity(y, x, ratio)
    assert torch.equal(out, y)
    assert out.dtype == dtype
    (got,) = backward(out, g, x)
    expected = torch.tensor(
        [float(exact(mpmath.mpf(v.item()))) * u.item() for v, u in zip(x, g, strict=True)],
        dtype=F64,
    )
    # 32 units: the tails' condition number is up to x² = 25; and the subnormals' spacing
    info = torch.finfo(dtype)
    bound = 32 * info.eps * expected.abs() + info.smallest_normal * info.eps
    assert ((got.double() - expected).abs() <= bound).all()


def test_identity_rule_gives_all_relevance_to_its_input() -> None:
    for ratio, _, function in RATIOS.values():
        x = draw(50).requires_grad_(True)
        y = function(x)
        g = draw(50, seed=1)
        (got,) = backward(rules.identity(y, x, ratio), g, x)
        assert torch.allclose(got * x, g * y, rtol=1e-12, atol=1e-15)


# ---------------------------------------------------------------- soft-caps


@pytest.mark.parametrize("cap", [0.5, 2.5, 30.0, 50.0])
def test_softcap_equals_exact_arithmetic_also_saturated(cap: float) -> None:
    values = [0.0, 1e-10, -1e-10, 1e-3, 0.3, -2.0, 7.0, -40.0, 300.0, 1e6]
    x = torch.tensor(values, dtype=F64, requires_grad=True)
    y = cap * torch.tanh(x / cap)
    out = softcap(y, x, cap)
    assert torch.equal(out, y)
    (got,) = backward(out, torch.ones_like(y), x)
    for i, value in enumerate(values):
        v = mpmath.mpf(value) / mpmath.mpf(cap)
        assert math.isclose(got[i].item(), float(_cap(v)), rel_tol=1e-14)


def test_softcap_of_a_masked_score_sends_nothing_wrong() -> None:
    lowest = torch.finfo(torch.float32).min
    x = torch.tensor([lowest, 1.0], requires_grad=True)
    out = softcap(50.0 * torch.tanh(x / 50.0), x, 50.0)
    (got,) = backward(out, torch.tensor([0.0, 1.0]), x)
    assert got[0] == 0.0
    assert got.isfinite().all()


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_product_is_identity_then_product_rule(name: str, dtype: torch.dtype) -> None:
    ratio, exact, function = RATIOS[name]
    gate = (2.0 * draw(30)).to(dtype)
    gate[0] = 0.0
    gate.requires_grad_(True)
    up, g = draw(30, seed=1).to(dtype).requires_grad_(True), draw(30, seed=2).to(dtype)
    y = function(gate) * up
    out = rules.gated_product(y, gate, up, ratio)
    assert torch.equal(out, y)
    to_gate, to_up = backward(out, g, gate, up)
    assert to_gate.dtype == to_up.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    for i in range(30):
        r = float(exact(mpmath.mpf(gate[i].item())))
        wanted_gate = g[i].item() * r * up[i].item()
        wanted_up = g[i].item() * r * gate[i].item()
        assert math.isclose(to_gate[i].item(), wanted_gate, rel_tol=tolerance, abs_tol=tolerance)
        assert math.isclose(to_up[i].item(), wanted_up, rel_tol=tolerance, abs_tol=tolerance)


# ---------------------------------------------------------------- softmax


def _tempered_jacobian(scores: Tensor, temperature: float) -> Tensor:
    """J[i, j] = pᵀ_i (δ_ij − pᵀ_j) with pᵀ = softmax(scores/T): T times the true Jacobian."""
    weights = [mpmath.exp(mpmath.mpf(s.item()) / temperature) for s in scores]
    total = mpmath.fsum(weights)
    p = [w / total for w in weights]
    n = len(p)
    return torch.tensor(
        [[float(p[i] * ((1 if i == j else 0) - p[j])) for j in range(n)] for i in range(n)],
        dtype=F64,
    )


SCORES = {
    "flat": [0.3, -0.2, 0.1, 0.5],
    "spread": [4.0, -3.0, 0.0, 1.0],
    "nearly one-hot": [30.0, 0.0, -5.0, 2.0],
    "one-hot in float32": [90.0, 0.0, 10.0, -20.0],
    "one key": [1.0],
}


@pytest.mark.parametrize("temperature", [2.0, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_softmax_temperature_is_the_tempered_jacobian(
    kind: str, dtype: torch.dtype, temperature: float
) -> None:
    scores = torch.tensor(SCORES[kind], dtype=dtype, requires_grad=True)
    g = draw(len(scores), seed=4).to(dtype)
    pattern = scores.softmax(-1)
    out = softmax_temperature(pattern, temperature)
    assert torch.equal(out, pattern)
    (got,) = backward(out, g, scores)
    expected = _tempered_jacobian(scores.detach(), temperature) @ g.double()
    # Of the largest terms p_T·|g|: an exponential turns each rounding of a score (at most 8 in size
    # where p_T counts) into one of its own; 4 keys twice; root, quotient, product, difference.
    tolerance = rounding.apart(float(g.abs().max()), 8 + 2 * 4 + 4, dtype)
    assert (got.double() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float32).min], ids=["inf", "min"])
@pytest.mark.parametrize("temperature", [2.0, 3.0])
def test_softmax_temperature_with_masked_keys(hidden: float, temperature: float) -> None:
    n = 6
    free = draw(2, 3, n, n).float()
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    scores = free.masked_fill(~mask, hidden).requires_grad_(True)
    g = draw(2, 3, n, n, seed=1).float()
    out = softmax_temperature(scores.softmax(-1), temperature)
    (got,) = backward(out, g, scores)
    assert got.isfinite().all()
    assert (got[..., ~mask] == 0).all()
    for b in range(2):
        for h in range(3):
            for q in range(n):
                live = slice(0, q + 1)
                jacobian = _tempered_jacobian(free[b, h, q, live], temperature)
                expected = jacobian @ g[b, h, q, live].double()
                assert torch.allclose(got[b, h, q, live].double(), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_softmax_temperature_in_half_precision(dtype: torch.dtype) -> None:
    """As models do it: softmax in float32, the pattern cast down."""
    scores = (2 * draw(4, 8)).float().requires_grad_(True)
    pattern = scores.softmax(-1).to(dtype)
    g = draw(4, 8, seed=1).to(dtype)
    out = softmax_temperature(pattern, 2.0)
    assert torch.equal(out, pattern)
    (got,) = backward(out, g, scores)
    for q in range(4):
        expected = _tempered_jacobian(scores[q].detach(), 2.0) @ g[q].double()
        error = (got[q].double() - expected).abs().max()
        assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_softmax_temperature_one_is_the_ordinary_gradient() -> None:
    scores = draw(5, 7).requires_grad_(True)
    g = draw(5, 7, seed=1)
    (got,) = backward(softmax_temperature(scores.softmax(-1), 1.0), g, scores)
    (expected,) = backward(scores.softmax(-1), g, scores)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)
