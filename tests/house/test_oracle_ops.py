"""Each operation of the oracle against automatic differentiation of its stop-gradient form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import rounding
from truth.autograd_forms import (
    draw,
    gradients,
    halved,
    off,
    plain_activation,
    stop_activation,
    stop_norm,
    stop_softcap,
)
from truth.oracle import ops

# Sums of at most 7 terms, some of sums; functions that are good to a few u.
CLOSE = rounding.apart(1.0, 45, torch.float64)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@pytest.mark.parametrize("centred", [True, False])
def test_norm(centred: bool) -> None:
    bias = draw(7, seed=1) if centred else None
    layer = ops.Norm(draw(7, seed=2), bias, "b", 1e-3, centred)
    x, g = draw(2, 3, 7, seed=3).requires_grad_(), draw(2, 3, 7, seed=4)
    plain = torch.nn.functional.layer_norm(x, (7,), layer.weight, bias, 1e-3)
    if not centred:
        plain = torch.nn.functional.rms_norm(x, (7,), layer.weight, 1e-3)
    assert off(ops.norm(x, layer), plain) < CLOSE
    for rule, y in (("gradient", plain), ("constant", stop_norm(x, layer))):
        assert off(ops.norm_back(g, x, layer, rule), gradients((y * g).sum(), [x])[0]) < 1e-13


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    x, g = (3.0 * draw(400, seed=1)).requires_grad_(), draw(400, seed=2)
    assert off(ops.activation(x, name), plain_activation(x, name)) < CLOSE
    for rule, f in (("gradient", plain_activation), ("identity", stop_activation)):
        (expected,) = gradients((f(x, name) * g).sum(), [x])
        assert off(ops.activation_back(g, x, name, rule), expected) < 1e-13


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_ratio_near_zero_and_far_out(name: str) -> None:
    """f(x)/x tends to f'(0) = 1/2 (ReLU: the step), to 1 on the right and to 0 on the left."""
    x = torch.tensor([0.0, 1e-10, -1e-10, 60.0, -60.0], dtype=torch.float64)
    expected = [0.0, 1.0, 0.0, 1.0, 0.0] if name == "relu" else [0.5, 0.5, 0.5, 1.0, 0.0]
    got = ops.activation_ratio(x, name)
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=0, atol=1e-10)


def test_softcap() -> None:
    u, g = (4.0 * draw(400, seed=1)).requires_grad_(), draw(400, seed=2)
    for rule, f in (("gradient", ops.softcap), ("identity", stop_softcap)):
        (expected,) = gradients((f(u, 2.5) * g).sum(), [u])
        assert off(ops.softcap_back(g, u, 2.5, rule), expected) < 1e-13
    near = torch.tensor([0.0, 1e-12, -1e-12], dtype=torch.float64)
    assert ops.softcap_back(torch.ones(3), near, 2.5, "identity").tolist() == [1.0, 1.0, 1.0]


def test_products() -> None:
    a, b = draw(2, 5, 3, 4, seed=1).requires_grad_(), draw(2, 6, 3, 4, seed=2).requires_grad_()
    c, d = draw(2, 5, 7, seed=3).requires_grad_(), draw(2, 5, 7, seed=4).requires_grad_()
    p = draw(2, 3, 5, 6, seed=5).requires_grad_()
    g_score, g_z, g_gate = draw(2, 3, 5, 6, seed=6), draw(2, 5, 3, 4, seed=7), draw(2, 5, 7, seed=8)
    score = 0.7 * (a.transpose(1, 2) @ b.permute(0, 2, 3, 1))
    z = (p @ b.transpose(1, 2)).transpose(1, 2)
    assert off(ops.query_key(a, b, 0.7), score) < CLOSE
    assert off(ops.pattern_value(p, b), z) < CLOSE
    for rule, shape in (("half", halved), ("gradient", lambda y: y)):
        pairs = [
            (ops.query_key_back(g_score, a, b, 0.7, rule), (shape(score) * g_score).sum(), [a, b]),
            (ops.pattern_value_back(g_z, p, b, rule), (shape(z) * g_z).sum(), [p, b]),
            (ops.gate_product_back(g_gate, c, d, rule), (shape(c * d) * g_gate).sum(), [c, d]),
        ]
        for got, scalar, inputs in pairs:
            wanted = torch.autograd.grad(scalar, inputs, retain_graph=True)
            for one, other in zip(got, wanted, strict=True):
                assert off(one, other) < CLOSE
    frozen = (p.detach() @ b.transpose(1, 2)).transpose(1, 2)
    to_pattern, to_value = ops.pattern_value_back(g_z, p, b, "value")
    assert off(to_value, gradients((frozen * g_z).sum(), [b])[0]) < CLOSE
    assert not to_pattern.any()


def softmax_jacobian(s: Tensor, temperature: float) -> Tensor:
    """diag(p) - p p^T for one row of scores, p = softmax(s / temperature), as a matrix."""
    weight = [torch.exp((x - s.max()) / temperature).item() for x in s]
    p = torch.tensor([w / sum(weight) for w in weight], dtype=torch.float64)
    return torch.diag(p) - torch.outer(p, p)


def test_softmax() -> None:
    s, g = 2.0 * draw(2, 3, 4, 5, seed=1), draw(2, 3, 4, 5, seed=2)
    s[..., 1, 3:] = torch.finfo(torch.float64).min  # hidden keys
    s[..., 2, :] = torch.finfo(torch.float64).min  # a row without a visible key
    s.requires_grad_()
    assert off(ops.softmax(s), torch.softmax(s, -1)) < CLOSE
    (expected,) = gradients((torch.softmax(s, -1) * g).sum(), [s])
    assert off(ops.softmax_back(g, s, "gradient"), expected) < CLOSE
    for rule, temperature in (("gradient", 1.0), ("hot", 2.0)):
        rows = zip(s.detach().flatten(0, 2), g.flatten(0, 2), strict=True)
        wanted = torch.stack([softmax_jacobian(row, temperature) @ at for row, at in rows])
        assert off(ops.softmax_back(g, s.detach(), rule).flatten(0, 2), wanted) < CLOSE
    assert not ops.softmax_back(g, s, "constant").any()


def test_rotation_and_heads() -> None:
    x = draw(2, 5, 3, 6, seed=1).requires_grad_()
    turn = ops.turn_of(torch.arange(5).expand(2, 5), 6, 50.0, torch.float64)
    g = draw(2, 5, 3, 6, seed=2)
    y = ops.rotary(x, turn)
    assert off(y.norm(dim=-1), x.norm(dim=-1)) < CLOSE
    assert off(y[:, 0], x[:, 0]) < 1e-15
    assert off(ops.rotary_back(g, turn), gradients((y * g).sum(), [x])[0]) < CLOSE
    wide, g = ops.repeat_heads(x, 2), draw(2, 5, 6, 6, seed=3)
    assert torch.equal(wide[:, :, 1], x[:, :, 0])
    assert off(ops.repeat_heads_back(g, 2), gradients((wide * g).sum(), [x])[0]) < CLOSE


def test_linear() -> None:
    layer = ops.Linear(draw(4, 6, seed=1), draw(4, seed=2), "b")
    x, g = draw(2, 5, 6, seed=3).requires_grad_(), draw(2, 5, 4, seed=4)
    y = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert off(ops.linear(x, layer), y) < CLOSE
    assert off(ops.linear_back(g, layer), gradients((y * g).sum(), [x])[0]) < CLOSE
