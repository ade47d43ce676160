"""How many tokens have to be removed, most relevant first, until the prediction changes.

The measure of arXiv:2604.17761: tokens are removed in descending order of their scores, one more at
each step, until the target is no longer the model's first choice. The fewer, the better the ranking
found what the prediction rests on. Removed tokens' embeddings are set to zero, or they are replaced
by given tokens; special tokens and the first token are never removed.

The steps are computed in batches, the first ones first, since few tokens are usually enough. The
size of a batch depends on the prompt and the model alone, so that results do not depend on the
machine's free memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...attribution.result import Attribution
from ...inputs.devices import precise
from ...inputs.objective import target_logit
from ...rules.threads import one_at_a_time
from ..ranking import first_in_order
from .removal import Removal, prepare_removal

# Most wrong tokens flip at once, so few prompts come first and the others only where needed.
_FIRST_STEPS = 2
# Numbers in the largest tensor of a batch: 256 MiB in float32.
_NUMBERS = 1 << 26


@one_at_a_time
def tokens_to_flip(
    model: Any,
    prompt: str | Tensor,
    scores: Attribution | Tensor | Mapping[str, Attribution | Tensor],
    *,
    target: object,
    limit: int = 16,
    replace: str | Tensor = "zero",
    prepend_bos: bool | None = None,
) -> dict[str, int | None]:
    """Count the tokens to remove, most relevant first, until the target is no longer first.

    The measure "tokens to flip" of arXiv:2604.17761. Special tokens and the first token are never
    removed.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos]; what follows its last token is explained.
        scores: Relevance [pos], an ``Attribution``, or several of these by name. The highest score
            is removed first; of equal scores the earlier position.
        target: The token that the model preferred, as for ``target_logit``.
        limit: The most tokens removed.
        replace: What replaces removed tokens: "zero" embeddings, or token ids [pos], one for each
            position.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        By ranking, the number of tokens; 0 where the target is not first even without removing
        any, and None where it stays first with ``limit`` of them, or with all, removed.

    Raises:
        ValueError: Scores have another length or are not finite; ``limit`` is below 1; ``replace``
            is unknown; or no token can be removed.
        TypeError, TokenError, PromptError: As for ``attribute``.

    Example:
        >>> flips = clrp.faithfulness.tokens_to_flip(
        ...     model, case.prompt, {"relevance": result}, target=case.target
        ... )
        >>> flips["relevance"] > 0  # the wrong token is first with the whole prompt
        True
    """
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ValueError(f"limit={limit!r} must be a whole number, 1 or more.")
    if isinstance(replace, str) and replace != "zero":
        raise ValueError(f"replace={replace!r} is unknown; use 'zero', or token ids [pos].")
    objective = target_logit(model, target)
    setting = prepare_removal(
        model, prompt, objective, replace=replace, draws=1, progress=False,  # type: ignore[arg-type]
        prepend_bos=prepend_bos,
    )  # fmt: skip
    rankings = dict(scores) if isinstance(scores, Mapping) else {"scores": scores}
    checked = {name: setting.checked(name, one) for name, one in rankings.items()}
    target_ids = torch.tensor(objective.target)
    return {name: _flip(setting, one, target_ids, limit) for name, one in checked.items()}


def _flip(
    setting: Removal, scores: Float[Tensor, " pos"], target: Tensor, limit: int
) -> int | None:
    positions, n = setting.positions, setting.tokens.shape[1]
    order = positions[scores[positions].argsort(descending=True, stable=True)][:limit]
    counts, size = torch.arange(len(order) + 1), _batch_size(setting.model, n)
    few = counts[: _FIRST_STEPS + 1], counts[_FIRST_STEPS + 1 :]
    for steps in (batch for part in few if len(part) for batch in torch.split(part, size)):
        stays = _stays_first(setting, first_in_order(order, steps, n), target)
        if not bool(stays.all()):
            return int(steps[~stays][0])
    return None


def _batch_size(model: Any, n: int) -> int:
    """Prompts of n tokens per forward: their scores and pattern are the largest tensors."""
    cfg = model.cfg
    by_prompt = max(int(cfg.n_heads) * n * n, n * 4 * int(cfg.d_model), int(cfg.d_vocab))
    return max(1, min(16, _NUMBERS // by_prompt))


def _stays_first(
    setting: Removal, removed: Bool[Tensor, "run pos"], target: Tensor
) -> Bool[Tensor, " run"]:
    """Whether a target token is still first, of equals the one with the lowest id."""
    logits = setting.logits(removed, [0] * len(removed))
    return torch.isin(precise(logits[:, -1]).argmax(-1).cpu(), target)
