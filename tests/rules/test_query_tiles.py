"""Attention by query tiles against its definition, in float64 and with whole matrices.

Nothing here comes from the package but what is tested: scores, pattern and gradients are written
out with [query, key] matrices, and without a rule they are autograd's own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.small_tiles import small_query_tiles
from torch import Tensor
from truth import rounding

from tl_contrastive_lrp.rules.precision import WideGradient
from tl_contrastive_lrp.rules.query_tiles import Attention, Rows, Softcap, attend
from tl_contrastive_lrp.rules.visible import MaskMemory, VisibleKeys

QUERIES, KEYS, WIDTH, HEADS = 13, 13, 4, 4
EXACT = 1e-12
LOWEST = torch.finfo(torch.float64).min

POSITIONS = torch.arange(KEYS)
CAUSAL = POSITIONS[:, None] >= POSITIONS
WINDOW = CAUSAL & (POSITIONS[:, None] - POSITIONS < 4)
PADDED = CAUSAL & (POSITIONS >= 3)  # the first three positions see no key
BIAS = 0.1 * torch.arange(HEADS)[:, None, None] * -(POSITIONS[:, None] - POSITIONS).abs().double()


def added(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, LOWEST)


# name: what is added to the scores, and which keys are visible apart from it
KINDS: dict[str, tuple[tuple[Tensor, ...], Tensor | None]] = {
    "all": ((), None),
    "causal": ((added(CAUSAL),), None),
    "causal, filled": ((), CAUSAL),
    "window": ((added(WINDOW)[None, None],), None),
    "padding": ((added(PADDED)[None, None],), None),
    "bias": ((BIAS[None], added(CAUSAL)), None),
    "bias of keys": ((BIAS[None, :, -1:], added(WINDOW)), None),
    "bias, filled": ((BIAS[None],), WINDOW),
}


def given(kv_heads: int, dtype: torch.dtype = torch.float64, batch: int = 1) -> list[Tensor]:
    """q, k, v and a gradient at z."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(HEADS, QUERIES), (kv_heads, KEYS), (kv_heads, KEYS), (HEADS, QUERIES)]
    return [
        torch.randn(batch, *shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def truth(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, kind: str, scale: float, **how: Any
) -> dict[str, Tensor]:
    """z, the gradients, and all rows, by whole matrices; for one prompt."""
    terms, visible = KINDS[kind]
    groups = HEADS // k.shape[1]
    k_all, v_all = (x.repeat_interleave(groups, 1) for x in (k, v))
    products = scale * torch.einsum("bhqd,bhkd->bhqk", q, k_all)
    slope = torch.ones_like(products)
    scores = products
    cap = how.get("softcap")
    if cap is not None:
        scores = cap.cap * torch.tanh(products)
        slope = scores / products if cap.rule == "identity" else cap.cap / products.cosh() ** 2
    for term in terms:
        scores = scores + term
    if visible is not None:
        scores = scores.masked_fill(~visible, LOWEST)
    sinks = how.get("sinks")
    column = None if sinks is None else sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)

    def softmax(temperature: float) -> Tensor:
        logits = scores if column is None else torch.cat([scores, column], -1)
        return torch.softmax(logits / temperature, -1)[..., :KEYS]

    pattern = softmax(1.0)
    to_pattern = torch.einsum("bhqd,bhkd->bhqk", g, v_all)
    weights = softmax(how.get("temperature") or 1.0)
    to_scores = weights * (to_pattern - (weights * to_pattern).sum(-1, keepdim=True))
    to_products = to_scores * slope

    def by_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    return {
        "z": pattern @ v_all,
        "q": scale * to_products @ k_all,
        "k": by_key_head(scale * to_products.mT @ q),
        "v": by_key_head(pattern.mT @ g),
        "pattern": pattern,
        "to_pattern": to_pattern,
        "products": products,
        "to_products": to_products,
        "share": pattern * to_pattern,
    }


def visible_keys(kind: str) -> VisibleKeys:
    terms, visible = KINDS[kind]
    hidden = None if visible is None else (visible, LOWEST)
    return VisibleKeys(QUERIES, KEYS, MaskMemory(), terms, hidden)


ROWS = ("pattern", "to_pattern", "products", "to_products", "share")


def computed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, attention: Attention) -> dict[str, Tensor]:
    ends = [x.requires_grad_() for x in (q, k, v)]
    with small_query_tiles():
        z = attend(*ends, attention)
        grads = torch.autograd.grad(z, ends, g)
    return dict(zip(("z", "q", "k", "v"), (z.detach(), *grads), strict=True))


def close(x: Tensor, expected: Tensor, bound: float) -> bool:
    return float((x - expected).abs().max()) <= bound * float(expected.abs().max())


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "capped": {"softcap": Softcap(3.0, "gradient")},
    "capped, identity": {"softcap": Softcap(3.0, "identity"), "temperature": 1.5},
    "sinks": {"sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64)},
    "sinks, temperature": {
        "sinks": torch.linspace(-1, 2, HEADS, dtype=torch.float64),
        "temperature": 2.0,
    },
}


@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_definition(how: str, kind: str, kv_heads: int) -> None:
    q, k, v, g = given(kv_heads)
    expected = truth(q, k, v, g, kind, 0.4, **HOW[how])
    actual = computed(q, k, v, g, Attention(visible_keys(kind), 0.4, **HOW[how]))
    for name, value in actual.items():
        assert close(value, expected[name], EXACT), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", HOW)
def test_rows(how: str, kind: str) -> None:
    """All rows come once, from the last to the first, with the keys that they see."""
    q, k, v, g = given(2)
    expected = truth(q, k, v, g, kind, 0.4, **HOW[how])
    seen = {name: torch.zeros(HEADS, QUERIES, KEYS, dtype=torch.float64) for name in ROWS}
    covered = torch.zeros(QUERIES, KEYS, dtype=torch.bool)
    starts = []

    def sink(rows: Rows) -> None:
        starts.append(rows.start)
        at = slice(rows.start, rows.stop), slice(rows.first, rows.first + rows.pattern.shape[-1])
        assert not covered[at].any()
        covered[at] = True
        for name in ROWS:
            seen[name][:, at[0], at[1]] = getattr(rows, name)
        assert close(rows.q, 0.4 * q[0, :, at[0]], EXACT)
        assert torch.equal(rows.g, g[0, :, at[0]])

    attention = Attention(visible_keys(kind), 0.4, rows=sink, **HOW[how])
    computed(q, k, v, g, attention)
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == 0
    for name in ROWS:
        cut = expected[name][0] * covered
        assert close(seen[name] * covered, cut, EXACT), name
    assert close(expected["pattern"][0] * covered, expected["pattern"][0], EXACT), "a key is missed"


def test_a_window_costs_its_own_width() -> None:
    q, k, v, g = given(2)
    widths = []
    attention = Attention(
        visible_keys("window"), rows=lambda rows: widths.append(rows.pattern.shape[-1])
    )
    computed(q, k, v, g, attention)
    assert max(widths) == 5 + 4 - 1  # the tile's queries, and the keys before its first one


def test_constant_queries_and_keys_send_nothing() -> None:
    q, k, v, g = given(2)
    rows: list[Rows] = []
    v.requires_grad_()
    with small_query_tiles():
        z = attend(q, k, v, Attention(visible_keys("causal"), 0.4, rows=rows.append))
        (to_v,) = torch.autograd.grad(z, [v], g)
    assert close(to_v, truth(q, k, v.detach(), g, "causal", 0.4)["v"], EXACT)
    assert all(x.to_products is None for x in rows)


@pytest.mark.parametrize("how", ["plain", "temperature"])
def test_rows_of_a_batch_are_independent(how: str) -> None:
    q, k, v, g = given(2, batch=3)
    attention = Attention(visible_keys("window"), 0.4, **HOW[how])
    whole = computed(q, k, v, g, attention)
    for row in range(3):
        one = computed(*(x.detach()[row : row + 1].clone() for x in (q, k, v, g)), attention)
        for name, value in one.items():
            assert close(whole[name][row : row + 1], value, EXACT), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["plain", "temperature"])
def test_a_low_precision_has_a_float32_backward(dtype: torch.dtype, how: str) -> None:
    """Exact for the rounded q, k and v, but for the rounding of float32 in sums of n terms."""
    q, k, v, g = given(2, dtype)
    expected = truth(*(x.double() for x in (q, k, v, g)), "causal", 0.4, **HOW[how])
    ends = [x.requires_grad_() for x in (q, k, v)]
    with small_query_tiles():
        z = attend(*ends, Attention(visible_keys("causal"), 0.4, **HOW[how]))
        grads = torch.autograd.grad(z, ends, WideGradient(g.float(), dtype))
    bound = rounding.through(4 * KEYS, torch.float32)
    for name, grad in zip(("q", "k", "v"), grads, strict=True):
        assert isinstance(grad, WideGradient)
        assert close(grad._value.double(), expected[name], bound), name
