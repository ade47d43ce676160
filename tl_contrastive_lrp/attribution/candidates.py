"""The most likely next tokens, to choose a contrast from, also for prompts that need tiles.

A forward without tiles holds several [head, pos, pos] tensors at once, and logits for every
position. In tiles it holds what ``engine/tiled/prefill.py`` keeps, which is linear in the prompt.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.fused import AttentionKind, fused_blocks, is_worth, without_rules
from ..engine.memory import (
    Memory,
    MemoryPlan,
    fits_forward,
    forward_bytes,
    in_smaller_tiles,
    plan_memory,
    run_as_planned,
)
from ..engine.tiled.prefill import check_tileable, prefill
from ..engine.tiled.tiles import tile_bounds
from ..engine.tiled.user_hooks import observers_set_aside
from ..errors import TokenError
from ..hooks.user_hooks import user_hooks
from ..inputs.bridge import require_bridge
from ..inputs.devices import precise
from ..inputs.objective import one_position
from ..inputs.tokens import to_single_prompt, token_names
from ..rules.threads import one_at_a_time

if TYPE_CHECKING:
    import pandas as pd


@one_at_a_time
def logits_at(
    model: Any,
    tokens: Tensor,
    pos: int = -1,
    memory: Memory = "auto",
    tile: int | None = None,
    *,
    progress: bool = True,
    attention: AttentionKind = "auto",
) -> Float[Tensor, " vocab"]:
    """Compute the logits after one position, from one forward without gradients.

    Args:
        model: The bridge.
        tokens: Token ids, [1, pos].
        pos: The position; negative counts from the end.
        memory: As for ``attribute``; "auto" uses tiles where ``attribute`` would.
        tile: Positions per tile.
        progress: Show a progress bar in tiles.
        attention: As for ``attribute``.

    Raises:
        TokenError: the prompt has no such position.
        ValueError: an unknown ``memory`` or ``attention``, or a wrong ``tile``.
        ModelStateError: the model cannot run in tiles, and the plain engine would not fit or was
            not allowed.
    """
    at = one_position(pos, int(tokens.shape[1]))
    return logits_between(
        model, tokens, (at, at + 1), memory, tile, progress=progress, attention=attention
    )[0]


@one_at_a_time
def logits_between(
    model: Any,
    tokens: Tensor,
    ends: tuple[int, int],
    memory: Memory = "auto",
    tile: int | None = None,
    *,
    progress: bool = True,
    attention: AttentionKind = "auto",
) -> Float[Tensor, "read vocab"]:
    """Compute the logits at neighbouring positions, from one forward without gradients.

    Args:
        model: The bridge.
        tokens: Token ids, [1, pos].
        ends: The first position, from 0, and the one after the last.
        memory: As for ``attribute``; "auto" uses tiles where ``attribute`` would.
        tile: Positions per tile.
        progress: Show a progress bar in tiles.
        attention: As for ``attribute``.

    Raises:
        ValueError, ModelStateError: as ``logits_at``.
    """
    length = int(tokens.shape[1])
    fused = fused_blocks(model, attention, length)
    plan = plan_memory(model, length, memory, tile, fused=fused)
    # Finding out whether a user's hook works in tiles takes a forward without tiles, and nothing
    # more than that forward is needed here.
    if memory == "auto" and user_hooks(model) and fits_forward(model, length, fused=fused):
        plan = replace(plan, tile=None)
    # If tiles do not work, a forward without gradients is what has to fit.
    plan = replace(plan, plain_bytes=forward_bytes(model, length, fused=fused))

    def in_tiles(plan: MemoryPlan) -> Float[Tensor, "read vocab"]:
        assert plan.tile is not None
        return _logits_in_tiles(model, tokens, ends, plan.tile, progress, attention)

    def without_tiles(_: MemoryPlan) -> Float[Tensor, "read vocab"]:
        with torch.no_grad(), _fused(model, attention, length):
            logits: Tensor = model(tokens)[0, slice(*ends)]
            return logits.clone()  # a view would keep the logits of all positions

    return run_as_planned(plan, in_tiles, without_tiles)


def _fused(model: Any, attention: AttentionKind, length: int) -> AbstractContextManager[None]:
    blocks = without_rules(model, attention, length)
    return nullcontext() if blocks is None else blocks.active()


def _logits_in_tiles(
    model: Any,
    tokens: Tensor,
    ends: tuple[int, int],
    tile: int,
    progress: bool,
    attention: AttentionKind,
) -> Float[Tensor, "read vocab"]:
    ranges, length = (ends,), int(tokens.shape[1])

    def attempt(smaller: int) -> Float[Tensor, "read vocab"]:
        bounds = tile_bounds(length, smaller, ranges)
        with (
            torch.no_grad(),
            _fused(model, attention, length),
            tqdm(total=len(bounds), desc="Prompt", unit="tile", disable=not progress) as bar,
        ):
            return prefill(model, tokens, ranges, bounds, {}, bar.update).logits()[0]

    fusing = is_worth(attention, length)
    with observers_set_aside(model, tokens, backward=False, fusing=fusing):
        check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def candidate_table(model: Any, logits: Float[Tensor, " vocab"], k: int) -> pd.DataFrame:
    """The table of ``next_token_table``, from logits that have already been computed."""
    import pandas as pd

    exact = precise(logits.detach())
    top = exact.topk(min(k, exact.numel()))
    ids = top.indices.tolist()
    return pd.DataFrame(
        {
            "rank": range(len(ids)),
            "token": token_names(model, ids),
            "id": ids,
            "logit": top.values.cpu().numpy(),
            "probability": exact.softmax(-1)[top.indices].cpu().numpy(),
            "minus_top": (top.values - exact.max()).cpu().numpy(),
        }
    )


@one_at_a_time
def next_token_table(
    model: Any,
    prompt: str | Tensor,
    k: int = 10,
    pos: int = -1,
    *,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """List the ``k`` most likely next tokens, to choose a contrast from.

    Args:
        model: A ``TransformerBridge``.
        prompt: Text, or token ids [pos] or [1, pos].
        k: Number of tokens to list.
        pos: The position after which they come; negative counts from the end.
        memory: As for ``attribute``. A long prompt is run in tiles, without gradients.
        tile: Positions per tile.
        progress: Show a progress bar in tiles.
        attention: "auto", "fused" or "eager", as for ``attribute``. Fused attention gives the
            model's logits up to rounding.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        One row per token, most likely first, with columns rank (from 0), token, id, logit,
        probability, minus_top (logit − highest logit, in logits). A text in ``token`` names its
        token when it is given as a target or contrast.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``model`` is not a bridge, or ``prepend_bos`` not a bool.
        PromptError: the prompt is empty, a batch, too long, or has ids out of range; or a BOS token
            cannot be put before it.
        TokenError: the prompt has no such position, or ``k`` is not a whole number above 0.
        ValueError: an unknown ``memory`` or ``attention``, or a wrong ``tile``.
        ModelStateError: the model cannot run in tiles, and the plain engine would not fit or was
            not allowed.

    Example:
        >>> table = clrp.next_token_table(model, case.prompt, k=5)
        >>> list(table.columns)
        ['rank', 'token', 'id', 'logit', 'probability', 'minus_top']
        >>> bool(table["token"][0] == case.target)  # a failure: the wrong token comes first
        True
    """
    require_bridge(model)
    if not isinstance(k, Integral) or k < 1:
        raise TokenError(f"k={k!r} lists no candidates; use a whole number, 1 or more.")
    tokens = to_single_prompt(model, prompt, prepend_bos)
    logits = logits_at(model, tokens, pos, memory, tile, progress=progress, attention=attention)
    return candidate_table(model, logits, k)
