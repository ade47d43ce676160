"""The walk over an autograd graph, against what each torch operation really does.

Whether an operation is linear is measured here, f(a·x + b·y) against a·f(x) + b·f(y), not taken
from the tables.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tl_contrastive_lrp.engine.reading import tap
from tl_contrastive_lrp.hooks.audit.walk import Walk, walk_graph
from tl_contrastive_lrp.rules import activations
from tl_contrastive_lrp.rules import functions as rules

SHAPE = (4, 6)
_G = torch.Generator().manual_seed(3)
CONSTANT = torch.randn(SHAPE, generator=_G, dtype=torch.float64)
SQUARE = torch.randn(6, 6, generator=_G, dtype=torch.float64)
FILTER = torch.randn(4, 4, 2, generator=_G, dtype=torch.float64)
MASKED = torch.full((4, 4), -1e9, dtype=torch.float64).triu(1)
MASK = CONSTANT > 0.2
ROWS = torch.tensor([3, 0, 1, 1])
INDEX = torch.randint(0, 4, SHAPE, generator=_G)


def _write_slice(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, 1:3] = x[:, 3:5]
    return out


def _write_into_constant(x: Tensor) -> Tensor:
    out = torch.zeros_like(CONSTANT)
    out[1:3] = x[:2]
    return out


def _add_to_slice(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, :2] += x[:, 2:4]
    return out


def _exp_slice(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, :2].exp_()
    return out


def _relu_slice(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, :2].relu_()
    return out


def _multiply_slice(x: Tensor) -> Tensor:
    out = x * 1.0
    out[:, :2] *= x[:, 2:4]
    return out


def _divide_constant_slice(x: Tensor) -> Tensor:
    out = torch.ones_like(CONSTANT)
    out[:, :2].div_(x[:, 2:4])
    return out


def _complex_rotation(x: Tensor) -> Tensor:
    turns = torch.polar(torch.ones(4, 3, dtype=torch.float64), CONSTANT[:, :3].contiguous())
    return torch.view_as_real(torch.view_as_complex(x.reshape(4, 3, 2)) * turns).flatten(1)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "add itself": lambda x: x + x.flip(0),
    "subtract": lambda x: x - x.mean(-1, keepdim=True),
    "constant factor": lambda x: x * CONSTANT,
    "number": lambda x: x * 3.0 / 7.0,
    "divide by constant": lambda x: x / (CONSTANT + 9),
    "matrix": lambda x: x @ SQUARE,
    "matrix from left": lambda x: SQUARE[:4, :4] @ x,
    "linear": lambda x: F.linear(x, SQUARE),
    "batched": lambda x: x[None].expand(3, 4, 6) @ SQUARE.expand(3, 6, 6),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, SQUARE),
    "convolution": lambda x: F.conv1d(x[None], FILTER)[0],
    "cumsum": lambda x: x.cumsum(0),
    "index": lambda x: x[ROWS],
    "index_add": lambda x: torch.zeros_like(x).index_add(0, ROWS, x),
    "gather": lambda x: x.gather(0, INDEX),
    "scatter": lambda x: torch.zeros_like(x).scatter_add(0, INDEX, x),
    "where": lambda x: torch.where(MASK, x, 2.0 * x),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.0),
    "cat": lambda x: torch.cat((x, x[:, :2]), -1),
    "stack": lambda x: torch.stack((x, -x)),
    "split": lambda x: x.split(2, -1)[1] - x.chunk(3, -1)[0],
    "pad": lambda x: F.pad(x, (1, 2)),
    "repeat": lambda x: x.repeat(2, 1).repeat_interleave(2, 0),
    "roll": lambda x: x.roll(1, 0).flip(1),
    "tril": lambda x: x.tril() + x.triu(2),
    "transpose": lambda x: x.mT.contiguous().view(24).unflatten(0, (2, 12)).permute(1, 0),
    "cast": lambda x: x.to(torch.complex128).real,
    "rotation": _complex_rotation,
    "unfold": lambda x: x.unfold(1, 3, 2),
    "unbind": lambda x: x.unbind(0)[2],
    "as_strided": lambda x: (x * 1.0).as_strided((3, 2), (6, 2)),
    "write a slice": _write_slice,
    "write into a constant": _write_into_constant,
    "add to a slice": _add_to_slice,
    "exp": torch.exp,
    "log": lambda x: torch.log(x.abs() + 1),
    "square": lambda x: x.pow(2),
    "times itself": lambda x: x * x,
    "product": lambda x: x @ x.mT,
    "batched product": lambda x: torch.bmm(x[None], x.mT[None]),
    "einsum of two": lambda x: torch.einsum("ij,kj->ik", x, x),
    "dot": lambda x: x[0].dot(x[1]),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "addcmul": lambda x: torch.addcmul(CONSTANT, x, x),
    "divide by itself": lambda x: x / x.sum(-1, keepdim=True),
    "one over": lambda x: 1.0 / x,
    "divide and round": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    "round": torch.round,
    "sqrt": lambda x: (x.abs() + 1).sqrt(),
    "norm": lambda x: x.norm(dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "std": lambda x: x.std(-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "abs": torch.abs,
    "sin": torch.sin,
    "erf": torch.erf,
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "prod": lambda x: x.prod(-1),
    "cumprod": lambda x: x.cumprod(-1),
    "solve": lambda x: torch.linalg.solve(x[:, :4] + 3 * SQUARE[:4, :4], CONSTANT[:, :1]),
    "fused attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
    "exp of a slice": _exp_slice,
    "relu of a slice": _relu_slice,
    "product in a slice": _multiply_slice,
    "quotient in a constant's slice": _divide_constant_slice,
    "unknown": lambda x: _Custom.apply(x),
}  # fmt: skip


class _Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]
        return g * ctx.saved_tensors[0].cosh()


def _walk(function: Callable[[Tensor], Tensor]) -> Walk:
    leaf = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaf.requires_grad_(True)
    return walk_graph(function(leaf * 1.0), [leaf])


@torch.no_grad()
def _is_linear(function: Callable[[Tensor], Tensor]) -> bool:
    generator = torch.Generator().manual_seed(7)
    x, y = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    together, apart = function(0.7 * x - 1.9 * y), 0.7 * function(x) - 1.9 * function(y)
    return bool((together - apart).abs().max() < 1e-9)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_clean_exactly_if_it_is_linear(name: str) -> None:
    function = OPERATIONS[name]
    walk = _walk(function)
    assert (not walk.findings) == _is_linear(function), walk.findings
    assert walk.leaves == 1


def half(x: Tensor) -> Tensor:
    return rules.uniform(x)


RATIO = activations.silu_ratio
COVERED: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: half(x @ SQUARE @ x.mT),
    "attention": lambda x: half(half(x @ x.mT * 0.3 + MASKED).softmax(-1) @ x) @ SQUARE,
    "through views": lambda x: half((x * x.flip(0)).reshape(2, 12).mT) @ FILTER[0, :2],
    "sum of two products": lambda x: half(x * x.flip(0) + x.roll(1) * x.roll(2)),
    "activation": lambda x: rules.identity(F.silu(x).detach(), x, RATIO),
    "activation beside its own graph": lambda x: rules.identity(F.silu(x), x, RATIO),
    "gate": lambda x: half(rules.identity(F.silu(x).detach(), x, RATIO) * (x @ SQUARE)),
    "gate in one": lambda x: half(rules.gated_product((F.silu(x) * x).detach(), x, x, RATIO)),
    "sigmoid of a weight": lambda x: half(torch.sigmoid(x @ SQUARE) * x),
    "normalised weights": lambda x: half(_router(x) * (x @ SQUARE)),
    "ordinary by decision": lambda x: rules.ordinary(F.softplus(x)),
    "softmax": lambda x: x.softmax(-1),
    "tap": lambda x: tap(x, lambda *_: None),
    "largest": lambda x: x.max(-1).values + x.amax(-1) + x.topk(2).values[:, 0],
}  # fmt: skip


def _router(x: Tensor) -> Tensor:
    best = (x @ SQUARE).softmax(-1).topk(2).values
    return rules.ordinary(best / best.sum(-1, keepdim=True))[:, :1]


@pytest.mark.parametrize("name", COVERED)
def test_what_has_its_rule_is_clean(name: str) -> None:
    walk = _walk(COVERED[name])
    assert walk.findings == ()
    assert walk.leaves == 1


WRONG: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "halving of nothing": (lambda x: half(x), "halving", "no product"),
    "halving behind a matrix": (lambda x: half((x * x) @ SQUARE), "halving Mul", "no product"),
    "halving of a residual": (lambda x: half(x * x + x), "halving", "no product"),
    "halving before a softmax": (lambda x: half((x * x).softmax(-1)), "halving Mul", "no product"),
    "halved twice": (lambda x: half(half(x * x)), "halving", "twice"),
    "other factor": (lambda x: rules.scale_gradient(x * x, 0.25), "halving", "other than a half"),
    "mark used up": (lambda x: rules.ordinary(F.softplus(F.softplus(x))), "Softplus", "rule"),
    "mark does not pass a matrix": (
        lambda x: rules.ordinary(F.softplus(x) @ SQUARE), "Softplus", "rule",
    ),
    "sigmoid alone": (torch.sigmoid, "Sigmoid", "identity rule"),
    "sigmoid before a matrix": (
        lambda x: half(x * (torch.sigmoid(x) @ SQUARE)), "Sigmoid", "identity rule",
    ),
    "gate without halving": (
        lambda x: rules.gated_product((F.silu(x) * x).detach(), x, x, RATIO),
        "GatedProduct", "half",
    ),
    "rounding keeps no relevance": (torch.floor, "Floor", "vanish"),
    "a second input": (
        lambda x: x + torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True), "AccumulateGrad",
        "absorb",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str) -> None:
    function, operations, why = WRONG[name]
    found = _walk(function).findings
    assert [f.operation for f in found] == operations.split()
    assert why in found[0].why


def test_detached_parts_are_constants() -> None:
    walk = _walk(lambda x: x * torch.exp(x).detach())
    assert walk.findings == ()
    assert "Exp" not in walk.counts


def test_what_never_reaches_the_leaves_has_no_input() -> None:
    leaf = torch.ones(SHAPE, requires_grad=True)
    assert walk_graph((leaf * 2).detach() + 1, [leaf]).leaves == 0
    assert walk_graph(leaf * 2, [leaf]).counts == {"Mul": 1, "AccumulateGrad": 1}
