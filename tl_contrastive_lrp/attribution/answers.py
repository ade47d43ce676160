"""``attribute`` of two answers: the prompt, and what each answer's own tokens keep.

Relevance is linear in the objective, so the relevance of the prompt under the difference of two
sums of logits is the difference of its relevance under each. Each answer's own tokens take part in
its own sum only. So one forward of the prompt, a short one of each answer after it and one backward
of the difference give it all (``engine/forked.py``). Where a model cannot run so, and in tiles,
there is a run for each answer, and the results are subtracted. One token each takes one run, of
the prompt alone, with ``logit_diff`` itself as the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Joined:
    """An attribution of the difference, over more than the prompt.

    Attributes:
        whole: Its positions are the prompt's, then those read of each answer, in the runs' order.
        deltas: What each answer's sum is, without its sign.
        target_is_top: Whether greedy decoding writes the target.
    """

    whole: Attribution
    deltas: dict[Side, float]
    target_is_top: bool


# Explains all answers at once; None where they have to run one by one.
RunBoth = Callable[[PromptFacts, list[AnswerRun]], Joined | None]

_POSITION_AXES = {"tokens": 0, "resid": 1, "heads": 2, "neurons": 1, "token_ids": 0, "special": 0}


def attribute_answers(
    model: Any, prompt: PromptFacts, answers: AnswerDiff, run_one: RunOne, run_both: RunBoth
) -> Attribution:
    """Explain the difference of two answers.

    Args:
        model: A ``TransformerBridge``.
        prompt: The prompt.
        answers: What to explain.
        run_one: Explains one objective of one prompt.
        run_both: Explains both answers at once, if that is possible.

    Raises:
        PromptError, ModelStateError: as ``forced.runs_of``; and what the runs raise.
    """
    shared, runs = runs_of(model, prompt, answers)
    if runs:
        joined = run_both(shared, runs)
        if joined is None:
            joined = _joined(
                shared, [(run, run_one(run.prompt, run.objective, run.side)) for run in runs]
            )
        result = _difference(shared, answers, joined)
        sides = _sides(model, shared, answers, runs, joined)
    else:
        objective = logit_diff(model, answers.target[0], answers.contrast[0])
        result = run_one(shared, objective, None)
        deltas = {"target": result.target_logit, "contrast": -(result.contrast_logit or 0.0)}
        sides = {
            side: replace(_unread(model, shared, answers, side, result), delta=deltas[side])
            for side in SIDES
        }
    return replace(
        result,
        answer=AnswerRelevance(
            target=sides["target"], contrast=sides["contrast"],
            shared=len(answers.shared), logprob=answers.logprob and bool(runs),
        ),
    )  # fmt: skip


def read_after(model: Any, prompt: PromptFacts, runs: list[AnswerRun]) -> PromptFacts:
    """The prompt with what is read of each answer after it, one after the other."""
    length = len(prompt.token_ids)
    for run in runs:
        prompt = extended(model, prompt, tuple(run.prompt.token_ids[length:].tolist()))
    return prompt


def _joined(prompt: PromptFacts, results: list[tuple[AnswerRun, Attribution]]) -> Joined:
    """The difference of the runs of each answer, their own positions one after the other."""
    length, any_result = len(prompt.token_ids), results[0][1]

    def placed(name: str, *, signed: bool = True) -> Tensor:
        axis = _POSITION_AXES[name]
        parts = [(run.sign if signed else 1) * getattr(one, name) for run, one in results]
        common = [part.narrow(axis, 0, length) for part in parts]
        own = [part.narrow(axis, length, part.shape[axis] - length) for part in parts]
        return torch.cat([torch.stack(common).sum(0) if signed else common[0], *own], dim=axis)

    sums: dict[str, Any] = {name: placed(name) for name in ("tokens", "resid", "heads")}
    whole = replace(
        any_result,
        **sums,
        neurons=None if any_result.neurons is None else placed("neurons"),
        token_ids=placed("token_ids", signed=False),
        special=placed("special", signed=False),
        str_tokens=(
            *prompt.str_tokens, *(text for _, one in results for text in one.str_tokens[length:]),
        ),
        segments=(),
        delta=sum(run.sign * one.delta for run, one in results),
        ledger=Ledger.combined([(run.sign, one.ledger) for run, one in results]),
        memory=both_ways(one.memory for _, one in results),
        attention=both_ways(one.attention for _, one in results),
    )  # fmt: skip
    tops = [one.target_is_top for run, one in results if run.side == "target"]
    return Joined(whole, {run.side: one.delta for run, one in results}, any(tops))


def _difference(prompt: PromptFacts, answers: AnswerDiff, joined: Joined) -> Attribution:
    """The attribution of the prompt's own positions."""
    length, whole = len(prompt.token_ids), joined.whole

    def own(name: str) -> Tensor:
        values: Tensor = getattr(whole, name)
        return values.narrow(_POSITION_AXES[name], 0, length).clone()

    sums: dict[str, Any] = {name: own(name) for name in ("tokens", "resid", "heads")}
    return replace(
        whole,
        **sums,
        neurons=None if whole.neurons is None else own("neurons"),
        token_ids=prompt.token_ids,
        special=prompt.special,
        str_tokens=prompt.str_tokens,
        segments=prompt.segments,
        target_logit=joined.deltas.get("target", 0.0),
        contrast_logit=joined.deltas.get("contrast"),
        objective=str(answers),
        target=answers.texts[0],
        contrast=answers.texts[1],
        pos=length - 1,
        earlier_pos=(),
        target_is_top=joined.target_is_top,
    )


def _sides(
    model: Any, prompt: PromptFacts, answers: AnswerDiff, runs: list[AnswerRun], joined: Joined
) -> dict[Side, AnswerSide]:
    """Both answers with the relevance of their own tokens; the last is not read and has none."""
    start, whole = len(prompt.token_ids), joined.whole
    sides: dict[Side, AnswerSide] = {
        side: _unread(model, prompt, answers, side, whole) for side in SIDES
    }
    for run in runs:
        n = len(run.prompt.token_ids) - len(prompt.token_ids)
        sides[run.side] = replace(
            sides[run.side],
            tokens=pad(whole.tokens[start : start + n], (0, 1)),
            resid=pad(whole.resid[:, start : start + n], (0, 1)),
            heads=pad(whole.heads[..., start : start + n], (0, 1)),
            delta=run.sign * joined.deltas[run.side],
        )
        start += n
    return sides


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
