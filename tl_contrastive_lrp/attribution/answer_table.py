"""An answer token by token: what the model thought of each, so that a user finds the wrong one.

The answer is teacher-forced: one forward of the prompt with the whole answer gives the logits that
predict each of its tokens, as if the model had written the tokens before.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..engine.fused import AttentionKind
from ..engine.memory import Memory
from ..errors import TokenError
from ..inputs.answers import answer_ids
from ..inputs.bridge import require_bridge
from ..inputs.devices import precise
from ..inputs.tokens import (
    to_single_prompt,
    token_names,
    vocab_size,
)
from ..rules.threads import one_at_a_time
from .candidates import logits_between

if TYPE_CHECKING:
    import pandas as pd

_ROWS = 64  # positions whose logits are compared at once, in float64


@one_at_a_time
def answer_table(
    model: Any,
    prompt: str | Tensor,
    answer: str | Sequence[int | str] | Tensor,
    k: int = 1,
    *,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
) -> pd.DataFrame:
    """List the tokens of an answer with the model's view of each, to find where it went wrong.

    Each token is judged after the prompt and the answer's tokens before it. In an answer that the
    model wrote, look for wrong tokens whose runner-up is right; in the answer that it should have
    given, for positive ``delta``: there the model prefers another token. To explain a row, give
    ``attribute`` the two tokens and ``pos=row.pos - 1``.

    Args:
        model: A ``TransformerBridge``.
        prompt: What came before the answer: text, or token ids [pos] or [1, pos].
        answer: The answer: text, which is tokenised as a continuation of the prompt (nothing is
            put before it); a list of tokens, each an id or the text of a single token; or a tensor
            of ids [pos] or [1, pos].
        k: How many alternatives to list for each token, from the best.
        memory: As for ``attribute``. A long prompt is run in tiles, without gradients.
        tile: Positions per tile.
        progress: Show a progress bar in tiles.
        attention: "auto", "fused" or "eager", as for ``attribute``.
        prepend_bos: Whether the prompt's text begins with the BOS token, as for ``attribute``.

    Returns:
        One row per token of the answer, in order. Columns: pos (of the token in prompt and answer;
        the logits at pos − 1 predict it), token, id, logit, rank (from 0, the most likely),
        logprob (natural logarithm), probability; alternative and alternative_id (the best other
        token), delta (Δℓ = logit(alternative) − logit(token written), in logits: positive where
        the model prefers the alternative). With ``k`` above 1, alternatives has the names of the
        ``k`` best other tokens.

    Warns:
        SpecialTokenWarning: As ``attribute``.

    Raises:
        TypeError: ``model`` is not a bridge, or ``prepend_bos`` not a bool.
        PromptError: The prompt is empty or not usable, or both together are longer than the
            model's context.
        TokenError: The answer is empty or not usable; or ``k`` is not between 1 and the number of
            other tokens.
        ValueError, ModelStateError: As ``next_token_table``.

    Example:
        >>> table = clrp.answer_table(model, case.prompt, case.target)
        >>> table[["token", "rank", "alternative"]].columns.tolist()
        ['token', 'rank', 'alternative']
        >>> bool(table["rank"][0] == 0 and table["delta"][0] < 0)  # it wrote the target
        True
    """
    require_bridge(model)
    if isinstance(k, bool) or not isinstance(k, Integral) or not 1 <= k < vocab_size(model):
        raise TokenError(
            f"k={k!r} lists no alternatives; use a whole number between 1 and the "
            f"{vocab_size(model) - 1} other tokens."
        )
    before = to_single_prompt(model, prompt, prepend_bos)
    after = torch.tensor([answer_ids(model, answer)]).to(before)
    tokens = to_single_prompt(model, torch.cat([before, after], dim=1))
    start, stop = before.shape[1], tokens.shape[1]
    logits = logits_between(
        model, tokens, (start - 1, stop - 1), memory, tile, progress=progress, attention=attention
    )
    return _table(model, tokens[0, start:], logits, start, int(k))


def _table(
    model: Any,
    ids: Int[Tensor, " pos"],
    logits: Float[Tensor, "pos vocab"],
    start: int,
    k: int,
) -> pd.DataFrame:
    """The rows of ``answer_table``; the answer begins at ``start``."""
    import pandas as pd

    parts = [
        _judged(precise(rows.detach()), written.to(rows.device), k)
        for rows, written in zip(torch.split(logits, _ROWS), torch.split(ids, _ROWS), strict=True)
    ]
    logit, rank, logprob, best_ids, best = (
        torch.cat(column).cpu() for column in zip(*parts, strict=True)
    )
    names = token_names(model, best_ids.flatten().tolist())
    alternatives = [tuple(names[i : i + k]) for i in range(0, len(names), k)]
    columns: dict[str, Any] = {
        "pos": range(start, start + len(ids)),
        "token": token_names(model, ids.tolist()),
        "id": ids.tolist(),
        "logit": logit.numpy(),
        "rank": rank.numpy(),
        "logprob": logprob.numpy(),
        "probability": logprob.exp().numpy(),
        "alternative": [names[0] for names in alternatives],
        "alternative_id": best_ids[:, 0].numpy(),
        "delta": (best[:, 0] - logit).numpy(),
    }
    if k > 1:
        columns["alternatives"] = alternatives
    return pd.DataFrame(columns)


def _judged(
    rows: Float[Tensor, "pos vocab"], ids: Int[Tensor, " pos"], k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logit, rank and log-probability of each token; ids and logits of the k best others."""
    index = rearrange(ids, "pos -> pos 1")
    written = rows.gather(-1, index)
    rank = (rows > written).sum(-1)
    logit = rearrange(written, "pos 1 -> pos")
    best = rows.scatter(-1, index, -torch.inf).topk(k, dim=-1)
    return logit, rank, logit - rows.logsumexp(-1), best.indices, best.values
