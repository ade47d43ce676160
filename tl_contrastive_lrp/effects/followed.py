"""Whether a model's own code can be followed, tried against interventions before it is relied on.

The first call for a model, and every first one after its weights changed, runs nine tokens: each
replaced in a run of its own, and all of them by their replaced streams. By causality these must
agree at every position, and what the first block's later positions are predicted to hear must be
what they hear, since no query of theirs has changed yet. So a model that mixes tokens outside of
what is watched, or treats the rows of a batch differently, is refused instead of predicted wrongly.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from ..engine.prefilled import state_of
from ..errors import NotTileableError, UncoveredComponentError, is_out_of_memory
from ..inputs.tokens import vocab_size
from .later import LaterPositions
from .passes import Replaced, Streams, last_logits, run_streams
from .streams import AttentionWatch, Operands, by_head, refused, require_seen, watched

_TOKENS, _TILE = 9, 4
# Relative to the largest logit, and of the first block's sums to their largest.
_SLACK = {torch.float64: 1e-4, torch.float32: 1e-2}  # parts of a model may be float32
_LOW_SLACK = 0.2  # of types with fewer bits

# Whether each model works over a key-value cache, and the state in which that was found out.
_known: WeakKeyDictionary[Any, tuple[object, bool]] = WeakKeyDictionary()


def works_cached(model: Any, parts: dict[str, Any], tokens: Tensor) -> bool:
    """Whether a model's streams can be followed over a key-value cache, or only without one.

    Args:
        model: The bridge.
        parts: Its attention components by path.
        tokens: The prompt, [1, pos], whose first tokens are tried.

    Raises:
        UncoveredComponentError: they can be followed in neither way.
    """
    state = state_of(model)
    known = _known.get(model)
    if known is not None and known[0] == state:
        return known[1]
    repeats = -(-_TOKENS // tokens.shape[1])
    short = tokens.repeat(1, repeats)[:, :_TOKENS]
    others = (short[0].flip(0) + 1) % vocab_size(model)
    cached = True
    try:
        _try(model, parts, Replaced(short, others), _TILE)
    except (NotTileableError, UncoveredComponentError, RuntimeError, TypeError, ValueError,
            AttributeError, KeyError, IndexError) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        cached = False
        _try(model, parts, Replaced(short, others), None)
    _known[model] = state, cached
    return cached


def _try(model: Any, parts: dict[str, Any], replaced: Replaced, tile: int | None) -> None:
    """Compare replaced streams with interventions.

    Raises:
        UncoveredComponentError, NotTileableError: they disagree, or cannot be followed.
    """
    read = tuple(range(_TOKENS))
    truth, heard = _interventions(model, parts, replaced)
    streams = run_streams(model, parts, replaced, _TOKENS - 1, read, None, tile, False)
    found = torch.stack([streams.logits[p] for p in read])  # [position, row, vocab]
    offsets = torch.arange(_TOKENS)
    at, row = (x.flatten() for x in torch.meshgrid(offsets, offsets, indexing="ij"))
    at, row = at[row <= at], row[row <= at]
    _require_close(model, found[at, row], truth[at - row, at])
    _require_close(model, found[:, -1], truth[-1])
    if tile is not None:
        window = _TOKENS - 2  # so that token 0 alone ends before the last position
        streams = run_streams(model, parts, replaced, window, (), None, tile, False)
        _require_last(model, replaced, streams, window, truth[0, -1])
    first = next(iter(parts))
    g = _noise(heard[0].shape).to(heard)
    elsewhere = dict.fromkeys(parts, g[None, :0, :, :0][:0])
    later = LaterPositions(elsewhere | {first: g[None]}, 0, _TOKENS)
    run_streams(model, parts, replaced, 0, (), later.add, tile, False)
    changes = ((heard[:-1] - heard[-1]) * g).cpu().double().sum((1, 3))  # [token, pos]
    _require_close(model, later.effects[0], changes.triu(1).sum(1))


def _noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _interventions(
    model: Any, parts: dict[str, Any], replaced: Replaced
) -> tuple[Float[Tensor, "run pos vocab"], Float[Tensor, "run head pos d_v"]]:
    """Logits, and z of the first attention, with each token replaced and, last, with none."""
    first = next(iter(parts))
    watch = _FirstZ(first, _TOKENS + 1)
    assert replaced.by is not None
    tokens = replaced.tokens.repeat(_TOKENS + 1, 1)
    every = torch.arange(_TOKENS, device=tokens.device)
    tokens[every, every] = replaced.by.to(tokens)
    with watched(parts, {first: watch}), torch.no_grad():
        logits = model(tokens)
    require_seen({first: watch}, 1)
    return logits, watch.z


def _require_last(
    model: Any, replaced: Replaced, streams: Streams, window: int, truth: Tensor
) -> None:
    for _, logits in last_logits(model, replaced, streams, window, _TOKENS, False):
        _require_close(model, logits[0], truth)


def _require_close(model: Any, found: Tensor, truth: Tensor) -> None:
    slack = _SLACK.get(next(model.original_model.parameters()).dtype, _LOW_SLACK)
    apart = float((found - truth).abs().max())
    if not apart <= slack * float(truth.abs().max()):
        raise refused(
            "the model",
            f"on {_TOKENS} tokens of the prompt, what is predicted and what replacing each of them "
            f"does differ by {apart:.2g}.",
        )


class _FirstZ(AttentionWatch):
    """Keeps z of one attention."""

    z: Tensor

    def times_values(self, operands: Operands) -> Tensor:
        """Pattern times values, kept."""
        z = super().times_values(operands)
        self.z = by_head(z, self.rows)
        return z
