"""The runs that explain the difference of two answers: the prompt, followed by each answer.

To predict an answer's token, the model reads the tokens before it, so the last token of an answer
is not read. A run is for one prompt with one objective, as any other; results of two runs are
combined by the rooms above, where everything after the prompt belongs to one answer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ..errors import ModelStateError
from .answers import AnswerDiff, require_room
from .facts import PromptFacts
from .segments import Segment
from .spans import SpanLogit
from .tokens import special_ids, special_mask, str_tokens

Side = Literal["target", "contrast"]
SIDES: tuple[Side, Side] = ("target", "contrast")


@dataclass(frozen=True, eq=False)
class AnswerRun:
    """The run of one answer.

    Attributes:
        side: Which answer it is.
        sign: Of the answer in Δℓ: 1 or -1.
        prompt: The prompt, and of the answer all tokens but the last.
        objective: The sum of the logits of the answer's tokens.
    """

    side: Side
    sign: int
    prompt: PromptFacts
    objective: SpanLogit


def extended(model: Any, prompt: PromptFacts, ids: tuple[int, ...]) -> PromptFacts:
    """A prompt with further tokens after it, whose own texts stay as they are.

    In a chat they are what the assistant writes next: one more segment, "answer".
    """
    if not ids:
        return prompt
    more = torch.tensor(ids, dtype=prompt.token_ids.dtype)
    token_ids = torch.cat([prompt.token_ids, more])
    length = len(prompt.token_ids)
    texts = str_tokens(model, token_ids.tolist())[length:]
    return replace(
        prompt,
        tokens=torch.cat([prompt.tokens, more[None].to(prompt.tokens)], dim=1),
        token_ids=token_ids,
        special=torch.cat([prompt.special, special_mask(more, special_ids(model))]),
        str_tokens=(*prompt.str_tokens, *texts),
        segments=with_answer(prompt.segments, "answer", texts),
    )


def with_answer(
    segments: tuple[Segment, ...], name: str, texts: tuple[str, ...]
) -> tuple[Segment, ...]:
    """The messages of a chat, and after them tokens that the assistant writes.

    Args:
        segments: The messages; () for any other prompt, which stays without.
        name: The name of the new segment. An "answer" continues what the assistant has written so
            far, where the chat ends with that.
        texts: What each token contributes to the text.
    """
    if not segments or not texts:
        return segments
    last = segments[-1]
    if last.kind == "assistant" and name == "answer":
        longer = replace(last, stop=last.stop + len(texts), text=last.text + "".join(texts))
        return (*segments[:-1], longer)
    start, stop = last.stop, last.stop + len(texts)
    return (*segments, Segment(name, "assistant", "assistant", start, stop, "".join(texts)))


def runs_of(
    model: Any, prompt: PromptFacts, answers: AnswerDiff
) -> tuple[PromptFacts, list[AnswerRun]]:
    """The prompt with what both answers begin with, and the run of each answer.

    Args:
        model: A ``TransformerBridge``.
        prompt: The prompt.
        answers: The two answers; an empty one has no run.

    Raises:
        PromptError: Prompt and answers do not fit into the model's context.
        ModelStateError: The model is not causal, and an answer has several tokens.
    """
    shared = extended(model, prompt, answers.shared)
    tails = {"target": answers.target, "contrast": answers.contrast}
    length = len(shared.token_ids)
    require_room(model, length, list(tails.values()))
    if answers.is_one_token_each:
        return shared, []
    if getattr(model.cfg, "attention_dir", "causal") != "causal":
        raise ModelStateError(
            "This model is not causal: positions of the prompt would see the answers' own tokens. "
            "Explain one token with clrp.logit_diff."
        )
    return shared, [
        AnswerRun(
            side, 1 if side == "target" else -1,
            extended(model, shared, tails[side][:-1]),
            SpanLogit(
                tails[side], length - 1, logprob=answers.logprob,
                text=answers.texts[SIDES.index(side)],
            ),
        )
        for side in SIDES
        if tails[side]
    ]  # fmt: skip


def labelled(side: Side, str_tokens: tuple[str, ...]) -> tuple[str, ...]:
    """An answer's tokens in a picture or graph that has both answers after the prompt."""
    return tuple(f"[{side}]{text}" for text in str_tokens)


def unlabelled(str_tokens: Sequence[str], first: int) -> tuple[tuple[str, ...], tuple[Side, ...]]:
    """Undo ``labelled`` for the tokens of both answers, which follow the prompt.

    Args:
        str_tokens: What each token contributes to the text, those of answers marked.
        first: The first position whose prediction is explained: of two answers, the prompt's last.

    Returns:
        The tokens without marks, and whose each token after ``first`` is; without answers, the
        tokens as they are and ().
    """
    own = str_tokens[first + 1 :]
    sides = tuple(side for text in own for side in SIDES if text.startswith(f"[{side}]"))
    if len(sides) != len(own) or list(sides) != sorted(sides, key=SIDES.index):
        return tuple(str_tokens), ()
    bare = [text[len(side) + 2 :] for text, side in zip(own, sides, strict=True)]
    return (*str_tokens[: first + 1], *bare), sides


def both_ways(ways: Iterable[str]) -> str:
    """How the runs were computed, which may differ where their lengths do."""
    return " and ".join(dict.fromkeys(ways))
