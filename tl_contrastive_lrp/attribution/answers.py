"""``attribute`` of two answers: an attribution for each, and their difference.

Relevance is linear in the objective, so the relevance of the prompt under the difference of two
sums of logits is the difference of its relevance under each. Each answer's own tokens are in one of
the two runs only, and keep the relevance that they have there. Two runs of a prompt and a short
answer cost what two runs of the prompt cost. One token each takes one run, of the prompt alone,
with ``logit_diff`` itself as the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..inputs.answers import AnswerDiff
from ..inputs.facts import PromptFacts
from ..inputs.forced import SIDES, AnswerRun, Side, both_ways, extended, runs_of
from ..inputs.objective import logit_diff
from .answer_parts import AnswerRelevance, AnswerSide
from .ledger import Ledger
from .result import Attribution

# Explains one objective of one prompt; the side says which answer's run it is, None if neither.
RunOne = Callable[[PromptFacts, Callable[[Tensor], Tensor], Side | None], Attribution]

_POSITION_AXES = {"tokens": 0, "resid": 1, "heads": 2, "neurons": 1}


def attribute_answers(
    model: Any, prompt: PromptFacts, answers: AnswerDiff, run_one: RunOne
) -> Attribution:
    """Explain the difference of two answers.

    Args:
        model: A ``TransformerBridge``.
        prompt: The prompt.
        answers: What to explain.
        run_one: Explains one objective of one prompt.

    Raises:
        PromptError, ModelStateError: as ``forced.runs_of``; and what ``run_one`` raises.
    """
    shared, runs = runs_of(model, prompt, answers)
    results: list[tuple[AnswerRun, Attribution]] = []
    if not runs:
        objective = logit_diff(model, answers.target[0], answers.contrast[0])
        result = run_one(shared, objective, None)
    else:
        results = [(run, run_one(run.prompt, run.objective, run.side)) for run in runs]
        result = _difference(shared, answers, results)
    sides = {side: _unread(model, shared, answers, side, result) for side in SIDES}
    if runs:
        sides = {side: _filled(sides[side], side, shared, results) for side in SIDES}
    else:
        deltas = {"target": result.target_logit, "contrast": -(result.contrast_logit or 0.0)}
        sides = {side: replace(sides[side], delta=deltas[side]) for side in SIDES}
    return replace(
        result,
        answer=AnswerRelevance(
            target=sides["target"], contrast=sides["contrast"],
            shared=len(answers.shared), logprob=answers.logprob and bool(runs),
        ),
    )  # fmt: skip


def _difference(
    prompt: PromptFacts, answers: AnswerDiff, results: list[tuple[AnswerRun, Attribution]]
) -> Attribution:
    """The attribution of the prompt's own positions, from that of each answer's run."""
    length, any_result = len(prompt.token_ids), results[0][1]
    by_side = {run.side: one for run, one in results}
    target, contrast = by_side.get("target"), by_side.get("contrast")

    def added(name: str) -> Tensor:
        parts = [
            run.sign * getattr(one, name).narrow(_POSITION_AXES[name], 0, length)
            for run, one in results
        ]
        return torch.stack(parts).sum(0)

    sums: dict[str, Any] = {name: added(name) for name in ("tokens", "resid", "heads")}
    return replace(
        any_result,
        **sums,
        neurons=None if any_result.neurons is None else added("neurons"),
        token_ids=prompt.token_ids,
        special=prompt.special,
        str_tokens=prompt.str_tokens,
        segments=prompt.segments,
        delta=sum(run.sign * one.delta for run, one in results),
        target_logit=0.0 if target is None else target.delta,
        contrast_logit=None if contrast is None else contrast.delta,
        objective=str(answers),
        target=answers.texts[0],
        contrast=answers.texts[1],
        ledger=Ledger.combined([(run.sign, one.ledger) for run, one in results]),
        pos=length - 1,
        earlier_pos=(),
        target_is_top=target is not None and target.target_is_top,
        memory=both_ways(one.memory for _, one in results),
        attention=both_ways(one.attention for _, one in results),
    )


def _unread(
    model: Any, prompt: PromptFacts, answers: AnswerDiff, side: Side, result: Attribution
) -> AnswerSide:
    """An answer none of whose tokens has relevance."""
    ids = answers.target if side == "target" else answers.contrast
    length, n = len(prompt.token_ids), len(ids)
    whole = extended(model, prompt, ids)
    return AnswerSide(
        token_ids=whole.token_ids[length:],
        str_tokens=whole.str_tokens[length:],
        special=whole.special[length:],
        tokens=result.tokens.new_zeros(n),
        resid=result.resid.new_zeros(len(result.sites), n),
        heads=result.heads.new_zeros(*result.heads.shape[:2], n),
        delta=0.0,
    )


def _filled(
    empty: AnswerSide,
    side: Side,
    prompt: PromptFacts,
    results: list[tuple[AnswerRun, Attribution]],
) -> AnswerSide:
    """The answer with what its run left at its own tokens; the last is not read and has none."""
    length = len(prompt.token_ids)
    for run, one in results:
        if run.side == side:
            return replace(
                empty,
                tokens=pad(run.sign * one.tokens[length:], (0, 1)),
                resid=pad(run.sign * one.resid[:, length:], (0, 1)),
                heads=pad(run.sign * one.heads[..., length:], (0, 1)),
                delta=run.sign * one.delta,
            )
    return empty
