"""Forms of single operations, entry by entry beside their Jacobians; what has none is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from truth.autograd_forms import draw
from truth.op_forms import RULES, RuleMode, UnknownOperationError
from truth.op_oracle import whole_activations

F = torch.nn.functional


def pulled(
    f: Callable[..., Tensor], *inputs: Tensor, rules: str = "attnlrp", softcap: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(value, random output gradient, input gradients) of f under the mode; value is f's own."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    with RuleMode(RULES[rules], softcap):
        y = f(*leaves)
    torch.testing.assert_close(y.detach(), f(*inputs), rtol=1e-12, atol=1e-12)
    g = draw(*y.shape, seed=9)
    if not y.requires_grad:
        return y, g, tuple(torch.zeros_like(x) for x in inputs)
    grads = torch.autograd.grad(y, leaves, g, allow_unused=True)
    return y, g, tuple(
        torch.zeros_like(x) if d is None else d for d, x in zip(grads, leaves, strict=True)
    )  # fmt: skip


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_layer_norm() -> None:
    x, w, b = draw(5), draw(5, seed=1), draw(5, seed=2)
    _, g, (found,) = pulled(lambda t: F.layer_norm(t, (5,), w, b, 1e-3), x)
    scale = (((x - x.mean()) ** 2).mean() + 1e-3).sqrt()
    centre = torch.eye(5).double() - torch.ones(5, 5).double() / 5
    close(found, (torch.diag(w) @ centre / scale).T @ g)


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3),
        lambda x: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3),
        lambda x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-3) ** -0.5,
        lambda x: F.rms_norm(x, (5,), None, 1e-3),
    ],
)
def test_rms_norms(norm: Any) -> None:
    x = draw(5)
    _, g, (found,) = pulled(norm, x)
    close(found, torch.eye(5).double() @ g / (x.pow(2).mean() + 1e-3).sqrt())


def test_casts_of_float64_to_float32_are_not_made() -> None:
    x = draw(3, 5)
    with RuleMode(RULES["gradient"], False):
        assert torch.equal(x.float(), x)
        assert torch.equal(x.to(torch.float32), x)
        assert torch.equal(F.softmax(x, dim=-1, dtype=torch.float32), F.softmax(x, dim=-1))
        assert x.to(torch.bool).dtype == torch.bool
        assert torch.ones(2).float().dtype == torch.float32


def test_unit_lengths() -> None:
    x = draw(3, 5)
    for f in (lambda t: F.normalize(t, dim=-1), lambda t: t / t.norm(dim=-1, keepdim=True)):
        _, g, (found,) = pulled(f, x)
        close(found, g / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize(
    "f",
    [
        F.silu, F.gelu, F.relu, lambda x: F.gelu(x, approximate="tanh"),
        lambda x: x * torch.sigmoid(x), lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: torch.sigmoid(x * -0.3) * x, lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clone().clamp_(max=0.4), lambda x: torch.max(x, torch.tensor(-0.5).double()),
    ],
)  # fmt: skip
def test_activations(f: Any) -> None:
    x = draw(7)
    y, g, (found,) = pulled(f, x)
    close(found, torch.diag(y.detach() / x) @ g)
    _, g, (plain,) = pulled(f, x, rules="gim")
    jacobian = torch.autograd.functional.jacobian(f, x)
    close(plain, jacobian.T @ g)


@pytest.mark.parametrize("name", ["silu", "gelu", "relu2", "gelu_new", "gelu_fast", "quick_gelu",
                                  "gelu_pytorch_tanh", "mish", "leaky_relu"])  # fmt: skip
@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_activation_modules_are_one_operation(name: str, rules: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = ACT2FN[name]

    holder, x = Holder(), torch.cat([draw(6), torch.zeros(1).double()])
    mode = RuleMode(RULES[rules], softcap=False)
    leaf = x.clone().requires_grad_()
    with whole_activations(holder, mode), mode:
        y = holder.act(leaf)
    (found,) = torch.autograd.grad(y.sum(), leaf)
    slope = torch.autograd.functional.jacobian(ACT2FN[name], x).diagonal()
    ratio = torch.where(x == 0, slope, y.detach() / x)
    close(found, ratio if rules == "attnlrp" else slope)
    assert mode.seen == {"activation": 1}


def test_softcap() -> None:
    x = draw(6)
    y, g, (found,) = pulled(lambda t: torch.tanh(t / 2.5) * 2.5, x, softcap=True)
    close(found, torch.diag(y.detach() / x) @ g)


PRODUCTS = {
    "elementwise": (lambda a, b: a * b, (4, 3), (4, 3), "ij,ij->ij"),
    "broadcast": (lambda a, b: a * b[:, None], (4, 3), (4,), "ij,i->ij"),
    "matmul": (lambda a, b: a @ b, (4, 3), (3, 5), "ij,jk->ik"),
    "bmm": (torch.bmm, (2, 4, 3), (2, 3, 5), "bij,bjk->bik"),
    "einsum": (lambda a, b: torch.einsum("bij,bkj->bik", a, b), (2, 4, 3), (2, 5, 3),
               "bij,bkj->bik"),
    "baddbmm": (lambda a, b: torch.baddbmm(torch.ones(2, 4, 5).double(), a, b, alpha=0.5),
                (2, 4, 3), (2, 3, 5), "bij,bjk->bik"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PRODUCTS)
def test_products_share_half_each(kind: str) -> None:
    f, left, right, spec = PRODUCTS[kind]
    a, b = draw(*left), draw(*right, seed=1)
    _, g, (to_a, to_b) = pulled(f, a, b)
    inputs, out = spec.split("->")
    one, two = inputs.split(",")
    alpha = 0.5 if kind == "baddbmm" else 1.0
    close(to_a, 0.5 * alpha * torch.einsum(f"{out},{two}->{one}", g, b))
    close(to_b, 0.5 * alpha * torch.einsum(f"{out},{one}->{two}", g, a))
    _, g, (to_a, _) = pulled(f, a, b, rules="relp")
    share = 0.5 if kind in ("elementwise", "broadcast") else 1.0
    close(to_a, share * alpha * torch.einsum(f"{out},{two}->{one}", g, b))
    constant = b.clone()
    _, g, (to_a,) = pulled(lambda t: f(t, constant), a)
    close(to_a, alpha * torch.einsum(f"{out},{two}->{one}", g, b))


def test_softmax_and_sigmoid() -> None:
    s = draw(1, 1, 1, 5)
    p = s.flatten().softmax(0)
    jacobian = torch.diag(p) - torch.outer(p, p)
    for rules, wanted in (("attnlrp", jacobian), ("cplrp", 0 * jacobian), ("gradient", jacobian)):
        _, g, (found,) = pulled(lambda t: F.softmax(t, dim=-1, dtype=torch.float64), s, rules=rules)
        close(found.flatten(), wanted @ g.flatten())
    _, g, (found,) = pulled(lambda t: F.softmax(t, dim=-1), s, rules="gim")  # a router
    close(found.flatten(), jacobian @ g.flatten())
    _, g, (found,) = pulled(torch.sigmoid, s)
    close(found, g * s.sigmoid() * (1 - s.sigmoid()))
    _, g, (found,) = pulled(torch.sigmoid, s, rules="cplrp")
    close(found, 0 * g)


@pytest.mark.parametrize("masked", [False, True])
def test_gim_softens_the_softmax_of_a_matrix_product(masked: bool) -> None:
    """At temperature 2, in the gradient alone, wherever the scores are q @ k.T of computed q, k."""
    q, k, scale = draw(1, 1, 4), draw(1, 5, 4, seed=1), 0.7
    hidden = torch.tensor([0.0, 0.0, -1e9 if masked else 0.0, 0.0, 0.0]).double()

    def attention(a: Tensor, b: Tensor) -> Tensor:
        return F.softmax((a @ b.mT) * scale + hidden, dim=-1)

    _, g, (to_q, to_k) = pulled(attention, q, k, rules="gim")
    hot = ((q[0, 0] @ k[0].T * scale + hidden) / 2).softmax(0)
    signal = (torch.diag(hot) - torch.outer(hot, hot)) @ g[0, 0] * scale
    close(to_q[0, 0], 0.5 * signal @ k[0])
    close(to_k[0], 0.5 * torch.outer(signal, q[0, 0]))


def test_a_router_chosen_and_normalised() -> None:
    """softmax, top 2, over their sum: the softmax of the chosen two, and the rest constant."""
    s = torch.tensor([[0.3, 1.2, -0.5, 0.9]]).double()

    def router(t: Tensor) -> Tensor:
        chosen = F.softmax(t, dim=-1).topk(2, dim=-1).values
        return chosen / chosen.sum(-1, keepdim=True)

    _, g, (found,) = pulled(router, s)
    p = torch.tensor([1.2, 0.9]).double().softmax(0)
    wanted = (torch.diag(p) - torch.outer(p, p)) @ g[0]
    close(found[0], torch.stack([0 * wanted[0], wanted[0], 0 * wanted[0], wanted[1]]))


# fail closed


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (torch.exp, "exp"), (lambda x: x * x, "square"), (torch.tanh, "tanh"),
        (lambda x: x / (1 + x.abs()), "quotient"), (lambda x: torch.ones(4) / x, "constant over"),
        (torch.special.erf, "erf"), (lambda x: x.detach(), "detach"), (lambda x: x.data, "data"),
        (lambda x: torch.cumprod(x, 0), "cumprod"), (lambda x: torch.outer(x, x), "outer"),
        (lambda x: F.linear(x, x[None]), "computed weights"), (lambda x: 1 / x, "div"),
        (lambda x: x.max() * 2, "max"), (torch.sqrt, "sqrt"), (torch.norm, "norm"),
    ],
)  # fmt: skip
def test_what_has_no_rule_raises(f: Any, word: str) -> None:
    x = draw(4).abs().requires_grad_()

    def run() -> None:
        with RuleMode(RULES["attnlrp"], False):
            y = f(x)
        y.sum().backward()

    with pytest.raises(UnknownOperationError, match=word):
        run()
