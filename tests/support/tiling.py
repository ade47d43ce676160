"""A run in tiles beside the plain one, and what must be the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp

TILED: dict[str, Any] = {"memory": "tiled", "tile": 7, "progress": False}
PLAIN: dict[str, Any] = {"memory": "plain"}
FIELDS = ("tokens", "resid", "heads", "neurons")
LIMIT = PROMISED[torch.float32]


def both(
    model: Any, ids: Tensor, objective: Any, tile: int = 7, **more: Any
) -> tuple[clrp.Attribution, clrp.Attribution]:
    plain = clrp.attribute(model, ids, objective, **PLAIN, **more)
    return plain, clrp.attribute(model, ids, objective, **{**TILED, "tile": tile}, **more)


def assert_same(plain: clrp.Attribution, tiled: clrp.Attribution) -> None:
    largest = float(plain.resid.abs().max())
    assert largest > 0
    for name in FIELDS:
        wanted, got = getattr(plain, name), getattr(tiled, name)
        assert (wanted is None) == (got is None)
        if wanted is not None:
            assert got.shape == wanted.shape
            assert float((got - wanted).abs().max()) <= LIMIT * largest, name
    for one, other in zip(plain.ledger.rows, tiled.ledger.rows, strict=True):
        assert one.site == other.site
        for part in ("total", "biases", "positions", "other"):
            # totals are sums of as many terms as there are tokens
            assert abs(getattr(one, part) - getattr(other, part)) <= 10 * LIMIT * largest, part
    # Δℓ is a difference of logits, which are what is rounded.
    logits = max(1.0, abs(plain.target_logit), abs(plain.contrast_logit or 0.0))
    assert abs(plain.delta - tiled.delta) <= LIMIT * logits
    same = ("pos", "target", "contrast", "objective", "target_is_top", "sites", "rules")
    assert all(getattr(plain, name) == getattr(tiled, name) for name in same)
    assert plain.token_ids.tolist() == tiled.token_ids.tolist()
    assert plain.coverage == tiled.coverage
