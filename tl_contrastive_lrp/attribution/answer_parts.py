"""What remains at the answers' own tokens, where two answers are explained.

An answer's tokens are read by the model as well: each but the last is input to the predictions
after it. Relevance that ends there is part of the account of Δℓ, with the same sign: positive
supports the target, negative the contrast. The relevance of the prompt and of both answers' tokens
adds up to what the ledger says arrives at the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..inputs.forced import SIDES

_TENSORS = ("tokens", "resid", "heads", "token_ids", "special")


@dataclass(frozen=True, eq=False)
class AnswerSide:
    """One of the two answers, from the token where they differ.

    Attributes:
        token_ids: Its tokens.
        str_tokens: What each of them contributes to the text.
        special: Which of them are special tokens of the tokenizer.
        tokens: Relevance of each of them as an input, in logits and signed as Δℓ. The last is not
            read by the model, so that it has none.
        resid: Relevance of the hidden states at their positions, rows as ``Attribution.sites``.
        heads: Relevance of the heads' outputs at their positions.
        delta: What this answer adds to Δℓ: the sum of its tokens' logits (or log-probabilities),
            negative for the contrast; 0 for an answer that has no token of its own.

    Example:
        >>> answers = clrp.answer_diff(model, case.prompt, target=[5, 6], contrast=[7])
        >>> side = clrp.attribute(model, case.prompt, answers).answer.target
        >>> side.token_ids.tolist(), float(side.tokens[-1])
        ([5, 6], 0.0)
    """

    token_ids: Int[Tensor, " token"]
    str_tokens: tuple[str, ...]
    special: Bool[Tensor, " token"]
    tokens: Float[Tensor, " token"]
    resid: Float[Tensor, "site token"]
    heads: Float[Tensor, "layer head token"]
    delta: float

    @property
    def n_read(self) -> int:
        """How many of its tokens the model reads: all but the last.

        Example:
            >>> answers = clrp.answer_diff(model, case.prompt, target=[5, 6], contrast=[7])
            >>> clrp.attribute(model, case.prompt, answers).answer.target.n_read
            1
        """
        return max(0, len(self.str_tokens) - 1)


@dataclass(frozen=True, eq=False)
class AnswerRelevance:
    """The two answers of a result: their tokens, and the relevance of those.

    Attributes:
        target: The answer that the model preferred.
        contrast: The answer it should have preferred.
        shared: How many tokens at the end of the prompt are what both answers begin with.
        logprob: Whether Δℓ and both ``delta`` are in log-probabilities; never so for one token
            each, where a difference of log-probabilities is one of logits.

    Example:
        >>> answers = clrp.answer_diff(model, case.prompt, target=[5, 6], contrast=[7])
        >>> result = clrp.attribute(model, case.prompt, answers)
        >>> parts = result.answer.target.delta + result.answer.contrast.delta
        >>> abs(parts - result.delta) < 1e-4
        True
    """

    target: AnswerSide
    contrast: AnswerSide
    shared: int
    logprob: bool


def tensors_of(answer: AnswerRelevance) -> dict[str, Tensor]:
    """The tensors of both answers, by the names under which a file holds them."""
    return {
        f"answer.{side}.{name}": getattr(getattr(answer, side), name)
        for side in SIDES
        for name in _TENSORS
    }


def facts_of(answer: AnswerRelevance) -> dict[str, Any]:
    """Everything else about both answers, as JSON."""
    sides = {side: getattr(answer, side) for side in SIDES}
    facts: dict[str, Any] = {
        side: {"str_tokens": list(one.str_tokens), "delta": one.delta}
        for side, one in sides.items()
    }
    return {**facts, "shared": answer.shared, "logprob": answer.logprob}


def answer_from(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> AnswerRelevance:
    """The answers of a file, from what ``tensors_of`` and ``facts_of`` gave.

    Raises:
        KeyError, TypeError: Something is missing.
    """
    sides = {
        side: AnswerSide(
            **{name: tensors[f"answer.{side}.{name}"] for name in _TENSORS},
            str_tokens=tuple(facts[side]["str_tokens"]),
            delta=float(facts[side]["delta"]),
        )
        for side in SIDES
    }
    return AnswerRelevance(**sides, shared=int(facts["shared"]), logprob=bool(facts["logprob"]))


def read_part(answer: AnswerRelevance, name: str) -> Tensor:
    """A tensor of both answers one after the other, target first, without their last tokens."""
    sides = (answer.target, answer.contrast)
    return torch.cat([getattr(side, name)[..., : side.n_read] for side in sides], dim=-1)
