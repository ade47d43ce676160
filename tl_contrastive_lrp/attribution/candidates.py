"""The likeliest next tokens, to choose a contrast from; also where a plain forward would not fit.

A plain forward needs several [head, pos, pos] tensors at once, and logits for every position. In
tiles it needs what ``tiles.prefill`` keeps, which is linear in the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..engine.memory import (
    Memory,
    cannot,
    choose,
    fits_forward,
    forward_bytes,
    in_smaller_tiles,
    require_plain_fits,
)
from ..errors import NotTileableError, TokenError
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
    pos = one_position(pos, length)
    choice = choose(model, length, memory, tile)
    # Whether a user's hook works in tiles is seen in a plain forward: that is all that is wanted.
    plainly = memory == "auto" and fits_forward(model, length) and bool(user_hooks(model))
    if choice.tile is not None and not plainly:

        try:
            return _in_tiles(model, tokens, pos, choice.tile, progress)
        except NotTileableError as error:
            choice = replace(choice, plain_bytes=forward_bytes(model, length))
            if memory == "tiled":
                raise NotTileableError(cannot(choice, error)) from error
            require_plain_fits(choice, str(error))
    with torch.no_grad():
        logits: Tensor = model(tokens)[0, pos].clone()  # a view would keep those of all positions
    return logits


def _in_tiles(
    model: Any, tokens: Tensor, pos: int, tile: int, progress: bool
) -> Float[Tensor, " vocab"]:
    from tqdm.auto import tqdm

    from ..engine.tiled.bounds import tiles_of
    from ..engine.tiled.prefill import check_tileable, prefill
    from ..engine.tiled.user_hooks import without_lookers

    wanted = ((pos, pos + 1),)

    def attempt(smaller: int) -> Float[Tensor, " vocab"]:
        bounds = tiles_of(tokens.shape[1], smaller, wanted)
        with (
            torch.no_grad(),
            tqdm(total=len(bounds), desc="Prompt", unit="tile", disable=not progress) as bar,
        ):
            return prefill(model, tokens, wanted, bounds, {}, bar.update).logits()[0, 0]

    with without_lookers(model, tokens, backward=False):
        check_tileable(model, tokens)
        return in_smaller_tiles(attempt, tile)


def candidate_table(model: Any, logits: Float[Tensor, " vocab"], k: int) -> pd.DataFrame:
    """The ``k`` largest logits as ``next_token_table`` gives them."""
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
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """The ``k`` likeliest next tokens, to choose a contrast from.

    Args:
        model: A ``TransformerBridge``.
        prompt: Text, or token ids [pos] or [1, pos].
        k: How many.
        pos: The position after which they come, negative from the end.
        memory, tile: As for ``attribute``: a long prompt goes tile by tile, without gradients.
        progress: Show a bar where tiles are used.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        Columns rank (from 0), token, id, logit, probability, minus_top (logit − highest logit).
        Given as a target or contrast, what stands in ``token`` means that token.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``model`` is no bridge, or ``prepend_bos`` no bool.
        PromptError: the prompt is empty, not one prompt, too long, or has ids out of range; a BOS
            token that cannot be put before it.
        TokenError: the position does not exist, or ``k`` is no whole number above 0.
        ValueError: an unknown ``memory`` or a wrong ``tile``.
        ModelStateError: it cannot run in tiles, and plainly it does not fit or was not asked for.
    """
    require_bridge(model)
    if not isinstance(k, Integral) or k < 1:
        raise TokenError(f"k={k!r} lists no candidates; use a whole number, 1 or more.")
    tokens = to_single_prompt(model, prompt, prepend_bos)
    logits = logits_at(model, tokens, pos, memory, tile, progress=progress)
    return candidate_table(model, logits, k)
