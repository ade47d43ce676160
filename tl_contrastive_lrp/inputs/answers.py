"""Two continuations of one prompt, and the difference of what the model gives them.

    Δℓ = Σ logit(token of the target) − Σ logit(token of the contrast),

each token at the position before it, after the prompt and the tokens of its own answer before it
(teacher-forced). The answers may have different lengths. What both begin with belongs to the
prompt: the predictions of those tokens are the same in both and cancel. Where one answer is the
beginning of the other, what remains of the longer one is all there is to explain.

An ``AnswerDiff`` reads the logits of two texts, so it is no function of one tensor of logits.
``clrp.attribute``, ``clrp.attribution_graph`` and what takes several objectives in their place
take it; ``forced.py`` prepares the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import PromptError, TokenError, a_kind
from .bridge import require_bridge
from .token_text import written_id
from .tokens import (
    continuation_ids,
    single_prompt,
    str_tokens,
    to_token_ids,
    token_names,
    vocab_size,
)


@dataclass(frozen=True)
class AnswerDiff:
    """The difference of two continuations of a prompt, as ``answer_diff`` makes it.

    Positive relevance supports the target, negative the contrast.

    Attributes:
        target: Token ids of the answer the model preferred, from where the two answers differ.
        contrast: Those of the answer it should have preferred. One of the two is empty where one
            answer is the beginning of the other.
        shared: Token ids with which both answers begin; they count as the end of the prompt.
        logprob: Whether log-probabilities are added up instead of logits.
        texts: What ``target`` and ``contrast`` read as, for labels.

    Raises:
        TokenError: Both answers are the same, or begin with the same token.

    Example:
        >>> answers = clrp.AnswerDiff(target=(3, 7), contrast=(5,))
        >>> print(answers)
        answer id:3, id:7 − answer id:5 (sums of logits; positive relevance supports the former)
    """

    target: tuple[int, ...]
    contrast: tuple[int, ...]
    shared: tuple[int, ...] = ()
    logprob: bool = False
    texts: tuple[str, str] = ("", "")

    def __post_init__(self) -> None:
        if not self.target and not self.contrast:
            raise TokenError(
                "Both answers are the same, so their difference is 0 everywhere. Give two answers "
                "that differ in at least one token."
            )
        if self.target[:1] == self.contrast[:1]:
            raise TokenError(
                f"Both answers begin with the token of id {self.target[0]}; tokens with which both "
                "begin belong into shared=, as clrp.answer_diff puts them."
            )

    @property
    def is_one_token_each(self) -> bool:
        """Whether this is the ``logit_diff`` of two tokens: no answer enters the model.

        Example:
            >>> clrp.AnswerDiff(target=(3,), contrast=(5,)).is_one_token_each
            True
        """
        return len(self.target) == len(self.contrast) == 1

    def __call__(self, logits: Tensor) -> NoReturn:  # noqa: ARG002
        """Refuse: two answers take two runs of the model, so no one tensor of logits suffices.

        Args:
            logits: Not used.

        Raises:
            TypeError: Always; it says where the difference of two answers can be used.
        """
        raise TypeError(
            "The difference of two answers takes a run of the model for each of them, so it is no "
            "function of one tensor of logits. Use it in clrp.attribute(model, prompt, "
            "clrp.answer_diff(...)) or clrp.attribution_graph(model, prompt, ...), or among the "
            "objectives of attribute_each and attribution_graphs; everywhere else, "
            "explain the first token where the answers differ, with clrp.logit_diff."
        )

    def __str__(self) -> str:
        sides = [
            repr(text) if text else ", ".join(f"id:{i}" for i in ids)
            for text, ids in zip(self.texts, (self.target, self.contrast), strict=True)
        ]
        sums = "sums of log-probabilities" if self.logprob else "sums of logits"
        if not self.contrast:
            return f"answer {sides[0]} ({sums}; positive relevance supports it)"
        if not self.target:
            return f"− answer {sides[1]} ({sums}; negative relevance supports it)"
        return (
            f"answer {sides[0]} − answer {sides[1]} ({sums}; positive relevance supports the "
            "former)"
        )


def answer_diff(
    model: Any,
    prompt: str | Tensor,
    *,
    target: object,
    contrast: object,
    logprob: bool = False,
    prepend_bos: bool | None = None,
) -> AnswerDiff:
    """Why this answer and not that one: the difference of two continuations of a prompt.

    Δℓ is the sum of the target's logits minus that of the contrast's, each token after the prompt
    and the tokens of its own answer before it. The answers may have different lengths. The sum of
    logits grows with an answer's length, so between answers of different lengths ``logprob=True``
    is often the better question.

    Tokens with which both answers begin count as the end of the prompt. Where one answer is the
    beginning of the other, Δℓ is what the rest of the longer one adds. Where only one token of each
    is left, this is ``logit_diff`` of the two, number for number.

    Args:
        model: A ``TransformerBridge``.
        prompt: What the answers continue: text, or token ids [pos] or [1, pos].
        target: The answer that the model preferred: a text, which is tokenised as the continuation
            of another text (a leading space matters), a list of tokens, each an id or the text of
            a single token as for ``logit_diff``, or a tensor of ids [pos] or [1, pos].
        contrast: The answer it should have preferred, in the same form.
        logprob: Add up log-probabilities instead of logits. A number on the scale of probabilities;
            relevance then also shows what raised or lowered all other tokens.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        An objective for ``attribute`` and ``attribution_graph``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``, or ``logprob`` is not a bool.
        TokenError: An answer without tokens, the same answer twice, or a token that does not exist.
        PromptError: As ``attribute``; also where prompt and answers together are longer than the
            model's context.

    Example:
        >>> answers = clrp.answer_diff(
        ...     model, case.prompt, target=[case.target, case.contrast], contrast=[case.contrast]
        ... )
        >>> result = clrp.attribute(model, case.prompt, answers)
        >>> result.answer.target.str_tokens == (case.target, case.contrast)
        True
    """
    require_bridge(model)
    if not isinstance(logprob, bool):
        raise TypeError(f"logprob={logprob!r} must be True or False.")
    sides = {
        role: answer_ids(model, answer, role)
        for role, answer in (("target", target), ("contrast", contrast))
    }
    before = single_prompt(model, prompt, prepend_bos).tokens[0].tolist()
    common = _shared(*sides.values())
    shared = sides["target"][:common]
    tails = [ids[common:] for ids in sides.values()]
    if tails[0] == tails[1]:
        raise TokenError(
            f"Target and contrast are the same answer ({len(shared)} tokens), so their difference "
            "is 0 everywhere. Give two answers that differ in at least one token."
        )
    require_room(model, len(before) + common, tails)
    texts = [_text(model, [*before, *shared], tail) for tail in tails]
    return AnswerDiff(tails[0], tails[1], shared, logprob, (texts[0], texts[1]))


def require_room(model: Any, length: int, tails: Sequence[Sequence[int]]) -> None:
    """Check that the model's context holds the prompt and all tokens that are read after it.

    Args:
        model: A ``TransformerBridge``.
        length: Tokens of the prompt, with what both answers begin with.
        tails: Tokens of each answer; the last of each is predicted and not read.

    Raises:
        PromptError: It does not.
    """
    need, limit = length + max(0, *(len(tail) - 1 for tail in tails)), int(model.cfg.n_ctx)
    if need > limit:
        raise PromptError(
            f"The prompt ({length} tokens) and the longer answer ({need - length} more tokens to "
            f"read) are {need} tokens, more than the model's context of {limit}. Shorten either."
        )


def _shared(target: Sequence[int], contrast: Sequence[int]) -> int:
    """How many tokens both begin with."""
    pairs = zip(target, contrast, strict=False)
    differ = (at for at, (one, other) in enumerate(pairs) if one != other)
    return next(differ, min(len(target), len(contrast)))


def _text(model: Any, before: Sequence[int], tail: Sequence[int]) -> str:
    """What a tail reads as after the tokens before it; one token by the name that means it."""
    if len(tail) == 1:
        return token_names(model, tail)[0]
    return "".join(str_tokens(model, [*before, *tail])[len(before) :])


def answer_ids(model: Any, answer: object, role: str = "answer") -> tuple[int, ...]:
    """The tokens of an answer, in whichever form it was given.

    Args:
        model: A ``TransformerBridge``.
        answer: A text, tokenised as the continuation of another; a list of tokens, each an id or
            the text of a single token; or a tensor of ids [pos] or [1, pos].
        role: What to call it in messages: "answer", "target" or "contrast".

    Raises:
        TokenError: It is none of these, has no tokens, or one that does not exist.
    """
    if isinstance(answer, Tensor):
        shape, whole = list(answer.shape), not (answer.is_floating_point() or answer.is_complex())
        if not whole or answer.dtype == torch.bool or len(shape) > 2 or shape[:-1] not in ([], [1]):
            raise TokenError(
                f"The {role} is a tensor of {answer.dtype} and shape {shape}; token ids of one "
                "answer are integers of shape [pos] or [1, pos]."
            )
        answer = answer.flatten().tolist()
    if isinstance(answer, str) and written_id(answer) is None:
        ids = _continuation(model, answer, role)
    else:
        several = [answer] if isinstance(answer, str | Integral) else answer
        if isinstance(several, set | frozenset):
            raise TokenError(
                f"The {role} is a set, which has no order; give the tokens of the answer as a list."
            )
        if not isinstance(several, Sequence):
            raise TokenError(
                f"The {role} is {a_kind(several)}; give a text, a list of tokens, or a tensor of "
                "token ids."
            )
        for at, token in enumerate(several):
            if not isinstance(token, str | Integral | Tensor):
                raise TokenError(
                    f"Token {at} of the {role} is {a_kind(token)}; each is an id or the text of a "
                    "single token."
                )
        ids = tuple(to_token_ids(model, token, role)[0] for token in several)
    if not ids:
        raise TokenError(f"The {role} has no tokens; give at least one.")
    return ids


def _continuation(model: Any, text: str, role: str) -> tuple[int, ...]:
    if model.tokenizer is None:
        raise TokenError(f"This model has no tokenizer; give the {role} as a list of token ids.")
    ids = tuple(continuation_ids(model.tokenizer, text))
    beyond = [i for i in ids if i >= vocab_size(model)]
    if beyond:
        raise TokenError(
            f"The {role} {text!r} has a token of id {beyond[0]}, outside the vocabulary "
            f"0..{vocab_size(model) - 1}."
        )
    return ids
