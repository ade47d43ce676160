"""The objective that a result explains, rebuilt from its words and held against the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...effects.passes import logits_at
from ...effects.questions import Questions
from ...errors import ModelStateError, TokenError
from ...hooks.placement import own_hooks
from ...inputs.answers import AnswerDiff
from ...inputs.bridge import hook_points
from ...inputs.facts import PromptFacts
from ...inputs.objective import logit_diff
from .units import Explained

Objective = Callable[[Tensor], Tensor]

# How far rounding may take Δℓ from the result's, of the largest logit at the explained positions
# and for each of them: one run may fuse attention or go in tiles. Models in float64 compute parts
# in float32.
ROUNDING = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}


def objective_of(model: Any, result: Explained) -> Objective:
    """The difference of two tokens' logits that a result explains.

    Raises:
        TokenError: it explains something else, which its words do not give back.
    """
    if result.answer is None and len(result.positions) == 1 and result.contrast:
        for pos in (result.pos, result.pos - len(result.str_tokens)):
            try:
                rebuilt = logit_diff(model, result.target, result.contrast, pos)
            except TokenError:
                break
            if str(rebuilt) == result.objective:
                return rebuilt
    raise TokenError(
        f"The result's objective, {result.objective!r}, cannot be made again from its words alone: "
        "that is possible for the difference of two single tokens of this model. Give the one that "
        "was explained, result.check(model, objective=objective)."
    )


def prompt_of(model: Any, result: Explained, objective: Objective) -> PromptFacts:
    """The prompt that ``objective`` was explained on, from the result's token ids.

    A result of two answers counts what both begin with to its prompt; the objective adds that.

    Raises:
        PromptError: the ids are not this model's.
        TokenError: the prompt does not end with what the objective's answers begin with.
    """
    ids = result.token_ids
    shared = objective.shared if isinstance(objective, AnswerDiff) else ()
    if shared:
        if tuple(ids[-len(shared) :].tolist()) != shared:
            raise TokenError(
                "The result explains other answers than the objective: its prompt does not end "
                "with what both answers begin with. Give the answer_diff that was explained."
            )
        ids = ids[: -len(shared)]
    return PromptFacts.of(model, ids)


@dataclass(frozen=True)
class Look:
    """One forward of the prompt as it is.

    Attributes:
        delta: Δℓ; None for two answers, which take forwards of their own.
        scale: The largest |logit| at the positions that are read.
        saturation: As ``MapCheck.saturation``.
        forwards: Forwards of the prompt that this took.
    """

    delta: float | None
    scale: float
    saturation: float | None
    forwards: float


def look(model: Any, prompt: PromptFacts, objective: Objective, result: Explained) -> Look:
    """Run the prompt once, and read Δℓ and how one-sided attention is.

    Raises:
        TokenError: the objective reads other positions than the result explains.
        ModelStateError: the objective gives no differentiable number.
    """
    last = result.pos
    largest: list[float] = []

    def read_pattern(pattern: Tensor, hook: Any) -> None:  # noqa: ARG001
        if pattern.ndim == 4 and pattern.shape[0] == 1 and pattern.shape[2] > last:
            largest.extend(pattern[0, :, last].detach().float().amax(-1).tolist())

    tokens, questions = prompt.tokens, None
    if isinstance(objective, AnswerDiff):  # with what both answers begin with, which pos counts
        tokens = result.token_ids[None].to(tokens)
    read: tuple[int, ...] = (int(tokens.shape[1]) - 1,)
    if not isinstance(objective, AnswerDiff):
        questions = Questions.of(model, [objective], tokens)
        read = questions.read
        if read != result.positions:
            raise TokenError(
                f"The result explains the prediction at position {_listed(result.positions)}, and "
                f"the objective reads position {_listed(read)}. Give the objective that was "
                "explained."
            )
    names = [name for name in hook_points(model) if name.endswith(".hook_pattern")]
    with torch.no_grad(), own_hooks(model, [(name, read_pattern) for name in names]):
        logits = logits_at(model, tokens, read)
    return Look(
        None if questions is None else float(questions.values(logits)[0, 0]),
        float(logits.abs().max()),
        sum(largest) / len(largest) if largest else None,
        1.0 + (0 if questions is None else questions.forwards),
    )


def _listed(positions: tuple[int, ...]) -> str:
    return ", ".join(map(str, positions))


def require_same(
    model: Any, result: Explained, objective: Objective, delta: float, scale: float
) -> None:
    """Refuse a model or objective that gives another Δℓ than the result's.

    Args:
        model: The bridge.
        result: The result.
        objective: The objective.
        delta: Its value on the result's prompt.
        scale: The largest |logit| at the positions explained.

    Raises:
        ModelStateError: they differ by more than ``ROUNDING`` explains.
    """
    terms = len(result.positions)
    if isinstance(objective, AnswerDiff):
        terms = len(objective.target) + len(objective.contrast)
    dtype = next(iter(model.original_model.parameters())).dtype
    bound = ROUNDING.get(dtype, ROUNDING[torch.bfloat16]) * scale * terms
    if not abs(delta - result.delta) <= bound:
        raise ModelStateError(
            f"On the result's tokens, this model and objective give Δℓ = {delta:+.4f}, and the "
            f"result explains Δℓ = {result.delta:+.4f}; rounding explains at most {bound:.2g}. It "
            "was computed with another model, other weights, a hook, or another objective: give "
            "the model and the objective= that were explained."
        )
