"""One step back through one operation in bfloat16 and float16: a float32 gradient rounds nothing.

Truth is the vector-Jacobian product of the operation in float64 on the same rounded input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.hooking import off
from support.low_precision import LOW
from torch import Tensor
from torch.nn import functional as F
from truth import rounding
from truth.drawn import draw

from tl_contrastive_lrp.rules import precision
from tl_contrastive_lrp.rules.precision import WideGradient, plain


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
    return draw(rows, columns, dtype=torch.bfloat16, seed=rows).to(like.dtype)


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
    x = draw(2, 3, 8, dtype=dtype).requires_grad_(True)
    y = STEPS[step](x)
    signal = draw(*y.shape, dtype=torch.float32, seed=3) * 1e-9  # float16 has no such numbers
    (found,) = torch.autograd.grad(y, x, WideGradient(signal, y.dtype))
    exact = x.detach().double().requires_grad_(True)
    (wanted,) = torch.autograd.grad(STEPS[step](exact), exact, signal.double())
    assert found.dtype == dtype
    assert plain(found).dtype == torch.float32
    jacobian = torch.autograd.functional.jacobian(STEPS[step], exact).flatten(0, y.ndim - 1)
    terms = (jacobian.abs() * signal.double().abs().view(-1, 1, 1, 1)).sum(0)
    # The longest sums: 31 in "many residuals", 24 positions and entries in "sums"; some functions.
    error = (plain(found).double() - wanted).abs().max()
    assert error <= rounding.apart(float(terms.max()), 40, torch.float32)


def test_ordinary_gradients_are_not_that_good() -> None:
    """What the test above would see without wide gradients: it can fail."""
    x = draw(2, 3, 8, dtype=torch.bfloat16).requires_grad_(True)
    signal = draw(2, 3, 8, dtype=torch.float32, seed=3)
    exact = x.detach().double().requires_grad_(True)
    (wanted,) = torch.autograd.grad(STEPS["many residuals"](exact), exact, signal.double())
    (found,) = torch.autograd.grad(STEPS["many residuals"](x), x, signal.bfloat16())
    assert off(found, wanted) > 2e-3


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_large_weights_are_widened_in_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_PART", 20)
    x = draw(5, 8, dtype=dtype).requires_grad_(True)
    weight = draw(31, 8, dtype=dtype, seed=1)
    signal = draw(5, 31, dtype=torch.float32, seed=2)
    (found,) = torch.autograd.grad(F.linear(x, weight), x, WideGradient(signal, dtype))
    terms = signal.double().abs() @ weight.double().abs()
    wanted = signal.double() @ weight.double()
    assert rounding.off_by_terms(plain(found), wanted, terms, len(weight) + 1) <= 1


@pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="torch without grouped products")
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_experts_are_widened_one_at_a_time(dtype: torch.dtype) -> None:
    x = draw(9, 16, dtype=dtype).requires_grad_(True)
    weights = draw(3, 16, 24, dtype=dtype, seed=1)
    ends = torch.tensor([4, 4, 8], dtype=torch.int32)  # one expert without rows; one row of none
    y = torch._grouped_mm(x, weights, ends)
    signal = draw(9, 24, dtype=torch.float32, seed=2)
    (found,) = torch.autograd.grad(y, x, WideGradient(signal, dtype))
    wanted, terms = torch.zeros(2, 9, 16, dtype=torch.float64)
    for rows, expert in ((slice(4), weights[0]), (slice(4, 8), weights[2])):
        wanted[rows] = signal[rows].double() @ expert.double().T
        terms[rows] = signal[rows].double().abs() @ expert.double().abs().T
    assert rounding.off_by_terms(plain(found), wanted, terms, 24 + 1) <= 1


def test_a_wide_gradient_behaves_like_a_tensor() -> None:
    inside = draw(2, 3, dtype=torch.float32)
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
