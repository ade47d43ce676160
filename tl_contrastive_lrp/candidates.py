"""The likeliest next tokens, to choose a contrast from; also where a plain forward would not fit.

A plain forward needs several [head, pos, pos] tensors at once, and logits for every position. In
tiles it needs what ``tiles.prefill`` keeps, which is linear in the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import TokenError
from .memory import Memory, cannot, choose, in_smaller_tiles, instead
from .prompts import str_tokens, to_single_prompt
from .sites import require_bridge

if TYPE_CHECKING:
    import pandas as pd

# Float32 tensors of [head, pos, pos] that a forward without gradients holds at its peak. Measured
# on eight heads: 2.5 such tensors in all at 2,048 tokens, 2.3 at 4,096; more with soft-caps.
_PEAK = 4.0
_WIDTHS = 8.0  # [pos, d_model] tensors
_NEURONS = 3.0  # [pos, d_mlp] tensors


def forward_bytes(model: Any, length: int) -> int:
    """Estimate of what a plain forward without gradients takes beside the model, in bytes."""
    cfg = model.cfg
    width = int(cfg.d_model)
    neurons = int(getattr(cfg, "d_mlp", None) or 4 * width)
    by_position = _WIDTHS * width + _NEURONS * neurons + 2 * int(cfg.d_vocab)
    return int(4 * length * (_PEAK * int(cfg.n_heads) * length + by_position))


def logits_at(
    model: Any,
    tokens: Tensor,
    pos: int = -1,
    memory: Memory = "auto",
    tile: int | None = None,
    *,
    progress: bool = True,
) -> Float[Tensor, " vocab"]:
    """The logits after one position, from one forward without gradients.

    Args:
        model: The bridge.
        tokens: [1, pos].
        pos: The position, negative from the end.
        memory, tile: As for ``attribute``: in tiles where "auto" would explain in tiles.
        progress: Show a bar where tiles are used.

    Raises:
        TokenError: the position does not exist.
        ValueError: an unknown ``memory`` or a wrong ``tile``.
        ModelStateError: it cannot run in tiles, and plainly it does not fit or was not asked for.
    """
    length = int(tokens.shape[1])
    if not -length <= pos < length:
        raise TokenError(f"Position {pos} does not exist in a prompt of {length} tokens.")
    choice = choose(model, length, memory, tile)
    if choice.tile is not None:
        from .tile_cache import NotTileable

        try:
            return _in_tiles(model, tokens, pos % length, choice.tile, progress)
        except NotTileable as error:
            choice = replace(choice, plain_bytes=forward_bytes(model, length))
            if memory == "tiled":
                raise NotTileable(cannot(choice, error)) from error
            instead(choice, str(error))
    with torch.no_grad():
        logits: Tensor = model(tokens)[0, pos].clone()  # a view would keep those of all positions
    return logits


def _in_tiles(
    model: Any, tokens: Tensor, pos: int, tile: int, progress: bool
) -> Float[Tensor, " vocab"]:
    from tqdm.auto import tqdm

    from .tile_bounds import tiles_of
    from .tiles import check_tileable, prefill

    check_tileable(model, tokens)
    wanted = ((pos, pos + 1),)

    def attempt(smaller: int) -> Float[Tensor, " vocab"]:
        bounds = tiles_of(tokens.shape[1], smaller, wanted)
        with (
            torch.no_grad(),
            tqdm(total=len(bounds), desc="Prompt", unit="tile", disable=not progress) as bar,
        ):
            return prefill(model, tokens, wanted, bounds, {}, bar.update).logits()[0, 0]

    return in_smaller_tiles(attempt, tile)


def candidate_table(model: Any, logits: Float[Tensor, " vocab"], k: int) -> pd.DataFrame:
    """The ``k`` largest logits as ``next_token_table`` gives them."""
    import pandas as pd

    exact = logits.detach().double()
    top = exact.topk(min(k, exact.numel()))
    ids = top.indices.tolist()
    return pd.DataFrame(
        {
            "rank": range(len(ids)),
            "token": str_tokens(model, ids),
            "id": ids,
            "logit": top.values.cpu().numpy(),
            "probability": exact.softmax(-1)[top.indices].cpu().numpy(),
            "minus_top": (top.values - exact.max()).cpu().numpy(),
        }
    )


def next_token_table(
    model: Any,
    prompt: str | Tensor,
    k: int = 10,
    pos: int = -1,
    *,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """The ``k`` likeliest next tokens, to choose a contrast from.

    Args:
        model: A ``TransformerBridge``.
        prompt: Text, or token ids [pos] or [1, pos].
        k: How many.
        pos: The position after which they come, negative from the end.
        memory, tile: As for ``attribute``: a long prompt goes tile by tile, without gradients.
        progress: Show a bar where tiles are used.

    Returns:
        Columns rank (from 0), token, id, logit, probability, minus_top (logit − highest logit).

    Raises:
        PromptError: the prompt is empty or not one prompt.
        TokenError: the position does not exist, or ``k`` is below 1.
        ValueError: an unknown ``memory`` or a wrong ``tile``.
        ModelStateError: it cannot run in tiles, and plainly it does not fit or was not asked for.
    """
    require_bridge(model)
    if k < 1:
        raise TokenError(f"k={k} lists no candidates; use 1 or more.")
    tokens = to_single_prompt(model, prompt)
    logits = logits_at(model, tokens, pos, memory, tile, progress=progress)
    return candidate_table(model, logits, k)
