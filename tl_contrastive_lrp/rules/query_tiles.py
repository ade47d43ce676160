"""Attention whose pattern never exists as a whole: a fused forward, a backward by query tiles.

With u = scale · q·kᵀ (or its soft-cap c·tanh u), p = softmax over the visible keys (and perhaps a
sink's logit, which takes its share and is dropped), and z = p·v, a gradient g at z becomes

    at p:    ĝ = g·vᵀ
    at s:    p ⊙ (ĝ − Σ p ĝ),  or pᵀ ⊙ (ĝ − Σ pᵀ ĝ) for a softmax at temperature T
    at q·kᵀ: that, times the derivative of the scores, which a rule may have changed (soft-caps)

The backward recomputes the rows of u and p, a tile of queries at a time from the last to the first,
from q, k and v, which is what fused attention's own backward does. All of these rows can be handed
to a ``RowSink``: edges of the attribution graph are sums of their products, and cost little beside
it. Rows are computed in float32 at least, on any device.

Grouped queries share their keys in every product, so keys and values are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import RuleNode, at_least_float32, handed_on
from .precision import LOW, WideGradient, plain
from .softcap import softcap_ratio
from .threads import Caller, acting_for, caller
from .visible import TileKeys, VisibleKeys

# Numbers of one [head, tile, key] tensor in the backward: several of them fit into a processor's
# last cache, and into a small part of a GPU's memory.
_NUMBERS, _NUMBERS_ON_CPU = 1 << 27, 1 << 21
_TILES = (16, 128)  # the smallest and the largest tile on a processor
_FORWARD_TILE = 256  # queries in one call of fused attention, where keys are hidden otherwise


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of one attention in the backward; buffers, valid only while a sink is called.

    Attributes:
        start, stop: The queries.
        first: Index of the first key; the others follow.
        q: The queries times the scale, [head, query, d_head].
        g: The gradient at z, [head, query, d_v].
        pattern: p, [head, query, key].
        to_pattern: ĝ, the gradient at the pattern.
        products: scale · q·kᵀ.
        to_products: The gradient there; None where the rules send none.
        share: p ⊙ ĝ; a sink may write into it.
    """

    start: int
    stop: int
    first: int
    q: Float[Tensor, "head query d_head"]
    g: Float[Tensor, "head query d_v"]
    pattern: Float[Tensor, "head query key"]
    to_pattern: Float[Tensor, "head query key"]
    products: Float[Tensor, "head query key"]
    to_products: Float[Tensor, "head query key"] | None
    share: Float[Tensor, "head query key"]


RowSink = Callable[[Rows], None]


@dataclass(frozen=True)
class Softcap:
    """Scores c·tanh(u), and whether their gradient is that, or the identity rule's c·tanh(u)/u."""

    cap: float
    rule: Literal["gradient", "identity"]


@dataclass(frozen=True, eq=False)
class Attention:
    """What an attention computes from q, k and v, and how relevance goes back through it.

    Attributes:
        keys: What is added to the scores, and which keys are hidden.
        scale: Factor on q·kᵀ.
        softcap: The soft-cap of the scores, if they have one.
        sinks: Logits by head that join every softmax and are dropped after it, [head].
        temperature: At which the softmax has its gradient; None for the ordinary one.
        rows: Called in the backward with all rows, from the last to the first.
    """

    keys: VisibleKeys
    scale: float = 1.0
    softcap: Softcap | None = None
    sinks: Float[Tensor, " head"] | None = None
    temperature: float | None = None
    rows: RowSink | None = None

    @property
    def is_square(self) -> bool:
        """Whether attention is causal, and the queries are those of all positions."""
        return self.keys.is_causal and self.keys.queries == self.keys.keys

    @property
    def is_torchs(self) -> bool:
        """Whether torch's fused attention computes it, forward and backward."""
        whole = self.keys.is_all or self.is_square
        return whole and not (self.softcap or self.rows or self.temperature) and self.sinks is None


Attend = Callable[[Tensor, Tensor, Tensor, Attention], Tensor]


def attend(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_v"],
    attention: Attention,
    known: Float[Tensor, "batch head query d_v"] | None = None,
) -> Float[Tensor, "batch head query d_v"]:
    """The pattern times the values, without the pattern.

    Args:
        q: Queries.
        k: Keys; each key head serves as many consecutive query heads as there are for each.
        v: Values.
        attention: What is computed.
        known: The result, if it is known, so that only its gradient is missing.
    """
    if known is None and attention.is_torchs and q.dtype not in LOW:
        return _fused(q, k, v, attention.scale, None, causal=attention.is_square)
    z: Tensor = _ByQueryTiles.apply(q, k, v, attention, known)  # type: ignore[no-untyped-call]
    return z


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor | None, *, causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=added, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


class _ByQueryTiles(torch.autograd.Function):
    audit = RuleNode((0, 1, 2), "product")

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attention: Attention, known: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attention, ctx.caller = attention, caller()
        keys, scale = attention.keys, attention.scale
        if known is not None:
            return handed_on(known)
        if attention.softcap is not None or attention.sinks is not None:
            return torch.cat(
                [_rows_of_z(q, k, v, attention, *tile) for tile in _tiles(q, k)][::-1], dim=-2
            )
        if keys.is_all or attention.is_square:
            return _fused(q, k, v, scale, None, causal=not keys.is_all)
        parts = []
        for start in range(0, keys.queries, _FORWARD_TILE):
            stop = min(start + _FORWARD_TILE, keys.queries)
            seen = keys.tile(start, stop, q.dtype)
            own = slice(seen.first, seen.stop)
            parts.append(_fused(q[:, :, start:stop], k[:, :, own], v[:, :, own], scale, seen.added))
        return torch.cat(parts, dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        needed = ctx.needs_input_grad
        sent = _Backward(q, k, v, ctx.attention, ctx.caller, needed[0] or needed[1], needed[2])
        found = sent.run(at_least_float32(plain(g)))
        wide = isinstance(g, WideGradient)
        return (
            *(
                None if x is None or not need else WideGradient(x, g.dtype) if wide else x.to(y)
                for x, y, need in zip(found, (q, k, v), needed, strict=False)
            ),
            None,
            None,
        )


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[int, int]]:
    """The bounds of the tiles, from the last to the first."""
    batch, heads, queries, _ = q.shape
    least, most = _TILES
    numbers = _NUMBERS_ON_CPU
    if q.device.type != "cpu":
        most, numbers = queries, _NUMBERS
    room = numbers // (batch * heads * k.shape[-2])
    size = max(least, min(most, room // least * least))
    for stop in range(queries, 0, -size):
        yield max(stop - size, 0), stop


def _by_key_head(x: Tensor, kv_heads: int) -> Tensor:
    """Queries (or gradients at them) by the key head that they share."""
    return rearrange(
        at_least_float32(x), "batch (kv group) query d -> (batch kv) (group query) d", kv=kv_heads
    )


def _scores(
    products: Tensor, attention: Attention, seen: TileKeys, shape: tuple[int, ...], spare: Tensor
) -> Tensor:
    """The scores, with what is added and hidden, in the memory of ``spare``."""
    if attention.softcap is None:
        spare.copy_(products)
    else:
        torch.tanh(products, out=spare)
        spare.mul_(attention.softcap.cap)
    if seen.added is not None:
        spare.view(shape).add_(seen.added)
    elif attention.keys.is_causal:  # all before the tile is visible; within it, a triangle
        n = shape[-2]
        later = torch.ones(n, n, dtype=torch.bool, device=spare.device).triu_(1)
        spare.view(shape)[..., -n:].masked_fill_(later, -torch.inf)
    return spare


def _softmax(scores: Tensor, sinks: Tensor | None, shape: tuple[int, ...]) -> tuple[Tensor, Any]:
    """The pattern, in place, and the sinks' share, [..., query, 1], or 0.0."""
    if sinks is None:
        return torch.softmax(scores, -1, out=scores), 0.0
    by_head = scores.view(shape)
    logits = sinks.to(scores).view(-1, 1, 1)
    most = torch.maximum(by_head.amax(-1, keepdim=True), logits)
    by_head.sub_(most).exp_()
    share = (logits - most).exp_()
    total = by_head.sum(-1, keepdim=True).add_(share)
    by_head.div_(total)
    return scores, share.div_(total).view(*scores.shape[:-1], 1)


def last_row(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_v"],
    attention: Attention,
) -> Float[Tensor, "batch head 1 d_v"]:
    """The result of ``attend`` at the last query alone, without a gradient."""
    with torch.no_grad():
        return _rows_of_z(q, k, v, attention, q.shape[-2] - 1, q.shape[-2])


def _rows_of_z(
    q: Tensor, k: Tensor, v: Tensor, attention: Attention, start: int, stop: int
) -> Tensor:
    """The output z of a tile of queries, where torch's fused attention has no form for it."""
    batch, heads, _, _ = q.shape
    kv_heads = k.shape[1]
    seen = _seen(attention, start, stop, torch.promote_types(q.dtype, torch.float32))
    tile = _by_key_head(q[:, :, start:stop], kv_heads) * attention.scale
    keys, values = (at_least_float32(x[:, :, seen.first : seen.stop]).flatten(0, 1) for x in (k, v))
    products = tile @ keys.mT
    shape = (batch, heads, stop - start, seen.stop - seen.first)
    scores = _scores(products, attention, seen, shape, torch.empty_like(products))
    pattern, _ = _softmax(scores, attention.sinks, shape)
    return rearrange(
        pattern @ values,
        "(batch kv) (group query) d -> batch (kv group) query d",
        batch=batch,
        query=stop - start,
    ).to(q.dtype)


def _seen(attention: Attention, start: int, stop: int, dtype: torch.dtype) -> TileKeys:
    """The keys that a tile sees; in causal attention, only those up to its end."""
    keys = attention.keys
    if not keys.is_causal:
        return keys.tile(start, stop, dtype)
    return TileKeys(0, keys.keys - keys.queries + stop, None)


@dataclass(eq=False)
class _Backward:
    """The backward of one attention.

    Attributes:
        q, k, v: As they were in the forward.
        attention: What was computed.
        caller: The thread that ran the forward.
        to_products: Whether queries or keys take a gradient.
        to_values: Whether values do.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    attention: Attention
    caller: Caller
    to_products: bool
    to_values: bool

    def run(
        self, g: Float[Tensor, "batch head query d_v"]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients at q, k and v."""
        q, k, v, attention = self.q, self.k, self.v, self.attention
        batch, heads, _, _ = q.shape
        kv_heads = k.shape[1]
        keys, values = (at_least_float32(x).flatten(0, 1) for x in (k, v))
        dq = torch.empty(q.shape, dtype=keys.dtype, device=q.device) if self.to_products else None
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        tiles = list(_tiles(q, k))
        size = max(stop - start for start, stop in tiles)
        # What goes back only to the values needs the pattern alone.
        beyond = dq is not None or attention.rows is not None
        with_share = beyond and (attention.rows is not None or attention.temperature is None)
        buffers = [
            keys.new_empty(batch * heads * size * k.shape[-2])
            for _ in range(2 + beyond + with_share + (dq is not None))
        ]
        for start, stop in tiles:
            seen = _seen(attention, start, stop, keys.dtype)
            own = slice(seen.first, seen.stop)
            shape = (batch, heads, stop - start, seen.stop - seen.first)
            q_t = _by_key_head(q[:, :, start:stop], kv_heads) * attention.scale
            g_t = _by_key_head(g[:, :, start:stop], kv_heads)
            k_t, v_t = keys[:, own], values[:, own]
            spare = iter(
                buffer[: q_t.shape[0] * q_t.shape[1] * shape[-1]].view(*q_t.shape[:2], shape[-1])
                for buffer in buffers
            )
            products = torch.bmm(q_t, k_t.mT, out=next(spare))
            scores = _scores(products, attention, seen, shape, next(spare))
            pattern, sink = _softmax(scores, attention.sinks, shape)
            if self.to_values:
                dv[:, own].baddbmm_(pattern.mT, g_t)
            if not beyond:
                continue
            to_pattern = torch.bmm(g_t, v_t.mT, out=next(spare))
            share = torch.mul(pattern, to_pattern, out=next(spare)) if with_share else None
            to_products = None
            if dq is not None:
                to_products = self._through_softmax(pattern, to_pattern, share, sink, next(spare))
                if attention.softcap is not None:
                    to_products.mul_(_slope(products, attention.softcap))
                dq[:, :, start:stop] = rearrange(
                    torch.bmm(to_products, k_t),
                    "(batch kv) (group query) d -> batch (kv group) query d",
                    batch=batch,
                    query=stop - start,
                ).mul_(attention.scale)
                dk[:, own].baddbmm_(to_products.mT, q_t)
            if attention.rows is not None and share is not None:
                by_head = (batch * heads, stop - start, -1)
                rows = Rows(
                    start=start,
                    stop=stop,
                    first=seen.first,
                    q=q_t.view(by_head),
                    g=g_t.view(by_head),
                    pattern=pattern.view(by_head),
                    to_pattern=to_pattern.view(by_head),
                    products=products.view(by_head),
                    to_products=None if to_products is None else to_products.view(by_head),
                    share=share.view(by_head),
                )
                acting_for(self.caller, attention.rows, rows)
        return dq, dk.view(k.shape), dv.view(v.shape)

    def _through_softmax(
        self, pattern: Tensor, to_pattern: Tensor, share: Tensor | None, sink: Any, out: Tensor
    ) -> Tensor:
        """The gradient at the scores, in the memory of ``out``; ``share`` is pattern ⊙ ĝ."""
        temperature = self.attention.temperature
        if temperature is None:
            assert share is not None
            return torch.addcmul(share, pattern, share.sum(-1, keepdim=True), value=-1.0, out=out)
        tempered = torch.pow(pattern, 1.0 / temperature, out=out)
        total = tempered.sum(-1, keepdim=True)
        if self.attention.sinks is not None:
            total += sink ** (1.0 / temperature)
        tempered.div_(total.clamp_min_(torch.finfo(total.dtype).tiny))
        mean = torch.linalg.vecdot(tempered, to_pattern).unsqueeze(-1)
        return tempered.mul_(to_pattern - mean)


def _slope(products: Tensor, softcap: Softcap) -> Tensor:
    """The derivative of soft-capped scores by the products, as the rules have it."""
    if softcap.rule == "identity":
        return softcap_ratio(products).mul_(softcap.cap)
    tanh = torch.tanh(products)
    return (1.0 - tanh * tanh).mul_(softcap.cap)
