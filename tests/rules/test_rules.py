"""Rules for norms and products, and the tap, against explicit matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from truth.drawn import DTYPES, F64, backward, draw

from tl_contrastive_lrp.engine.reading import tap
from tl_contrastive_lrp.rules import functions as rules

# ---------------------------------------------------------------- norms


def _norm_matrix(x: Tensor, weight: Tensor, eps: float, centred: bool) -> Tensor:
    """J[i, j] = ∂y_i/∂x_j of y = w ⊙ C(x)/s (+ b) with s held constant, entry by entry."""
    d = len(x)
    mean = float(x.sum()) / d if centred else 0.0
    s = math.sqrt(sum((float(v) - mean) ** 2 for v in x) / d + eps)
    matrix = torch.zeros(d, d, dtype=F64)
    for i in range(d):
        for j in range(d):
            centring = (1.0 if i == j else 0.0) - (1.0 / d if centred else 0.0)
            matrix[i, j] = float(weight[i]) * centring / s
    return matrix


def _run_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool) -> Tensor:
    """A norm as a model computes it, all statistics alive, with the rule on its output."""
    c = x - x.mean(-1, keepdim=True) if centred else x
    scale = (c.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    normalized = c / scale
    y = normalized * weight if bias is None else normalized * weight + bias
    out = rules.linear_norm(y, normalized, scale, weight)
    assert torch.equal(out, y)
    return out


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_norm_is_the_matrix_with_a_constant_denominator(centred: bool, bias: bool) -> None:
    eps, weight = 0.05, 1.0 + draw(7, seed=1)
    x = (3.0 * draw(2, 3, 7) + 1.5).requires_grad_(True)
    g = draw(2, 3, 7, seed=2)
    y = _run_norm(x, weight, draw(7, seed=3) if bias else None, eps, centred)
    (got,) = backward(y, g, x)
    for b in range(2):
        for p in range(3):
            matrix = _norm_matrix(x[b, p].detach(), weight, eps, centred)
            assert torch.allclose(got[b, p], matrix.T @ g[b, p], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_linear_norm_through_the_reciprocal_root(centred: bool) -> None:
    """TransformerLens computes ``normalized`` with rsqrt, apart from the scale that it reports."""
    x, g, weight = draw(4, 7).requires_grad_(True), draw(4, 7, seed=2), 1.0 + draw(7, seed=1)
    c = x - x.mean(-1, keepdim=True) if centred else x
    variance = c.pow(2).mean(-1, keepdim=True) + 1e-3
    normalized = c * torch.rsqrt(variance)
    out = rules.linear_norm(normalized * weight, normalized, variance.sqrt(), weight)
    (got,) = backward(out, g, x)
    for p in range(4):
        matrix = _norm_matrix(x[p].detach(), weight, 1e-3, centred)
        assert torch.allclose(got[p], matrix.T @ g[p], rtol=1e-12, atol=1e-14)


def test_linear_norm_ignores_the_outputs_own_graph() -> None:
    """The wrapped norm's ordinary backward must not run as well."""
    x = draw(4, 6).requires_grad_(True)
    scale = (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    y = torch.nn.functional.rms_norm(x, (6,), eps=1e-3)
    out = rules.linear_norm(y, x / scale, scale, torch.ones(6, dtype=F64))
    (got,) = backward(out, draw(4, 6, seed=1), x)
    assert torch.allclose(got, draw(4, 6, seed=1) / scale, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_norm_of_a_half_precision_output(dtype: torch.dtype) -> None:
    x = draw(3, 8).to(dtype).requires_grad_(True)
    wide = x.float()
    scale = (wide.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    normalized = wide / scale
    weight = 1.0 + draw(8, seed=1).float()
    y = (normalized * weight).to(dtype)
    out = rules.linear_norm(y, normalized, scale, weight)
    assert out.dtype == dtype
    assert torch.equal(out, y)
    g = draw(3, 8, seed=2).to(dtype)
    (got,) = backward(out, g, x)
    assert got.dtype == dtype
    expected = torch.stack(
        [_norm_matrix(x[p].detach().double(), weight.double(), 1e-3, False).T @ g[p].double()
         for p in range(3)]
    )  # fmt: skip
    assert (got.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


# ---------------------------------------------------------------- products


def test_uniform_halves_both_factors_of_a_matrix_product() -> None:
    a, b = draw(3, 4).requires_grad_(True), draw(4, 5, seed=1).requires_grad_(True)
    g = draw(3, 5, seed=2)
    product = a @ b
    out = rules.uniform(product)
    assert torch.equal(out, product)
    to_a, to_b = backward(out, g, a, b)
    for i in range(3):
        for k in range(4):
            wanted = sum(0.5 * g[i, j] * b[k, j] for j in range(5))
            assert math.isclose(to_a[i, k].item(), wanted.item(), rel_tol=1e-12)
    for k in range(4):
        for j in range(5):
            wanted = sum(0.5 * g[i, j] * a[i, k] for i in range(3))
            assert math.isclose(to_b[k, j].item(), wanted.item(), rel_tol=1e-12)
    # nothing created, nothing lost
    total = (to_a * a).sum() + (to_b * b).sum()
    assert math.isclose(total.item(), (g * product).sum().item(), rel_tol=1e-12)


def test_uniform_over_three_factors() -> None:
    a, b, c = (draw(6, seed=i).requires_grad_(True) for i in range(3))
    g = draw(6, seed=9)
    parts = backward(rules.uniform(a * b * c, 3), g, a, b, c)
    wanted = g * (a * b * c).detach() / 3
    for part, factor in zip(parts, (a, b, c), strict=True):
        assert torch.allclose(part * factor, wanted, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_gradient_keeps_dtype(dtype: torch.dtype) -> None:
    x = draw(5, dtype=dtype).requires_grad_(True)
    out = rules.scale_gradient(x, torch.full((5,), 0.25, dtype=F64))
    assert torch.equal(out, x)
    (got,) = backward(out, torch.ones(5, dtype=dtype), x)
    assert got.dtype == dtype
    assert torch.equal(got.double(), torch.full((5,), 0.25, dtype=F64))


# ---------------------------------------------------------------- constant, tap


def test_constant_stops_relevance() -> None:
    p, v = draw(3, 4).requires_grad_(True), draw(4, 2, seed=1).requires_grad_(True)
    held = rules.constant(p)
    assert torch.equal(held, p)
    g = draw(3, 2, seed=2)
    to_p, to_v = torch.autograd.grad(held @ v, [p, v], g, allow_unused=True)
    assert to_p is None
    assert torch.allclose(to_v, p.detach().T @ g, rtol=1e-12)


def test_tap_sees_the_gradient_and_changes_nothing() -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    x = draw(4).requires_grad_(True)
    tapped = tap(x, lambda a, g: seen.append((a, g)))
    assert torch.equal(tapped, x)
    (got,) = backward((tapped * 3.0).sum() + x.sum(), torch.ones((), dtype=F64), x)
    assert torch.equal(got, torch.full((4,), 4.0, dtype=F64))
    assert len(seen) == 1
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], torch.full((4,), 3.0, dtype=F64))  # the branch, not x's sum
    assert not seen[0][0].requires_grad
    assert not seen[0][1].requires_grad


def test_tap_is_silent_when_nothing_flows() -> None:
    seen: list[object] = []
    x = draw(4).requires_grad_(True)
    torch.autograd.grad((tap(x, lambda *a: seen.append(a)).detach() * x).sum(), x)
    assert seen == []
