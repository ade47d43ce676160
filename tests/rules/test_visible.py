"""Which keys queries see: bounds, tiles, and masks that are made only when they are needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tl_contrastive_lrp.rules import visible as room
from tl_contrastive_lrp.rules.visible import LazyMask, MaskMemory, VisibleKeys

N = 11
LOWEST = torch.finfo(torch.float32).min
POSITIONS = torch.arange(N)
CAUSAL = POSITIONS[:, None] >= POSITIONS
VISIBLE = {
    "causal": CAUSAL,
    "window": CAUSAL & (POSITIONS[:, None] - POSITIONS < 3),
    "padding": CAUSAL & (POSITIONS >= 2),
    "chunks": CAUSAL & (POSITIONS[:, None] // 4 == POSITIONS // 4),
    "both ways": (POSITIONS[:, None] - POSITIONS).abs() < 3,
}


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_ROWS", 4)


def lazy(visible: Tensor, calls: list[tuple[int, int]] | None = None) -> LazyMask:
    def rows(start: int, stop: int) -> Tensor:
        if calls is not None:
            calls.append((start, stop))
        return visible[None, None, start:stop]

    return LazyMask((1, 1, *visible.shape), torch.float32, torch.device("cpu"), rows)


def actual(visible: Tensor) -> Tensor:
    """The mask as transformers makes it."""
    return torch.zeros(visible.shape).masked_fill(~visible, LOWEST)[None, None]


# Operations of models on their masks, and others.
OPERATIONS: dict[str, Callable[[Tensor], object]] = {
    "whole slice": lambda m: m[..., : m.shape[-1]],
    "part": lambda m: m[:, :, 2:5, :3],
    "last row": lambda m: m[..., -1:, :],
    "added": lambda m: torch.ones(1, 2, N, N) + m,
    "added to": lambda m: m + 1.0,
    "to": lambda m: m.to(torch.float64),
    "to its own": lambda m: m.to(dtype=torch.float32),
    "to its place": lambda m: m.to("cpu"),
    "to a number": lambda m: m.to(torch.float32, copy=True),
    "bool": lambda m: m == 0,
    "where": lambda m: torch.where(m < 0, 1.0, 2.0),
    "expand": lambda m: m.expand(2, 3, -1, -1),
    "clone": lambda m: m.clone(),
    "numbers": lambda m: m.tolist(),
    "sum": lambda m: torch.sum(m > LOWEST),
    "cat": lambda m: torch.cat([m, m], dim=-1),
    "in place": lambda m: torch.ones(1, 2, N, N).add_(m),
    "lowest": lambda m: m <= LOWEST,
    "another lowest": lambda m: m.masked_fill(m <= LOWEST, -torch.inf),
    "filled where it is low": lambda m: torch.ones(1, 1, N, N).masked_fill(m <= LOWEST, 2.0),
    "what is not low": lambda m: ~(m <= LOWEST),
    "softmax": lambda m: torch.softmax(m, -1),
    "shape": lambda m: (m.shape, m.ndim, m.dim(), m.size(-1), m.dtype, m.device, m.numel()),
    "kind": lambda m: (m.is_floating_point(), m.requires_grad, isinstance(m, Tensor)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("kind", VISIBLE)
def test_whatever_is_done_to_it_is_done_to_the_mask(operation: str, kind: str) -> None:
    ours, expected = (OPERATIONS[operation](f(VISIBLE[kind])) for f in (lazy, actual))
    if isinstance(ours, LazyMask):
        ours = ours.made()
    if isinstance(expected, Tensor):
        ours = ours + 0 if ours.dtype != torch.bool else ours & True  # type: ignore[operator]
        assert torch.equal(ours, expected)  # type: ignore[arg-type]
    else:
        assert ours == expected


@pytest.mark.parametrize("kind", VISIBLE)
@pytest.mark.parametrize("form", ["lazy", "added", "visible"])
def test_bounds_and_causality(form: str, kind: str) -> None:
    see = VISIBLE[kind]
    mask = {"lazy": lazy, "added": actual, "visible": lambda v: v}[form](see)
    memory = MaskMemory()
    bounds = memory.bounds(mask)
    for query in range(N):
        seen = torch.nonzero(see[query])[:, 0].tolist()
        if seen:
            assert (bounds.first[query], bounds.last[query]) == (seen[0], seen[-1])
        else:
            assert bounds.first[query] > bounds.last[query]
    assert memory.is_causal(mask) == (kind == "causal")


@pytest.mark.parametrize("kind", VISIBLE)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_tile_is_cut_out_of_the_mask(kind: str, hidden: bool) -> None:
    see = VISIBLE[kind]
    terms = () if hidden else (lazy(see),)
    keys = VisibleKeys(N, N, MaskMemory(), terms, (see, LOWEST) if hidden else None)
    for start in range(0, N, 3):
        stop = min(start + 3, N)
        tile = keys.tile(start, stop, torch.float32)
        cut = slice(tile.first, tile.stop)
        assert tile.added is not None
        expected = actual(see)[..., start:stop, cut]
        assert torch.equal(tile.added.expand(expected.shape), expected)
        if bool(see[start:stop].any(-1).all()):
            outside = see[start:stop].clone()
            outside[:, cut] = False
            assert not outside.any(), "a key that is seen was cut off"
        else:
            assert cut == slice(0, N), "a query without a key gets all of them"


def test_lazy_masks_are_asked_for_once() -> None:
    calls: list[tuple[int, int]] = []
    mask, memory = lazy(CAUSAL, calls), MaskMemory()
    for _ in range(3):
        memory.is_causal(mask)
        memory.bounds(mask)
    assert sorted(calls) == sorted([(0, 4), (4, 8), (8, 11)] * 2)
    calls.clear()
    for _ in range(3):
        mask + 1.0
    assert calls == [(0, N)]


def test_terms_add_up_and_stay_above_the_lowest_number() -> None:
    terms = (actual(CAUSAL), lazy(VISIBLE["window"]), torch.full((1, 1, 1, N), 0.5))
    tile = VisibleKeys(N, N, MaskMemory(), terms).tile(3, 6, torch.float32)
    assert tile.added is not None
    see = VISIBLE["window"][3:6, tile.first : tile.stop]
    assert torch.equal(tile.added[0, 0][see], torch.full((int(see.sum()),), 0.5))
    assert bool((tile.added[0, 0][~see] < -1e30).all())
    assert bool(torch.isfinite(tile.added).all())
