"""What is replaced together: each token, or the tokens of each segment.

Ordinary tokens are those that pictures do not grey and that the explained positions can read: no
special tokens, not the first one, and none after the last explained position. Attention that has
nowhere to go rests on the others; replacing them says little about the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import NonFiniteError, PromptError
from ...inputs.segment_sums import Relevant
from ...inputs.segments import How, divide
from ..ledger import Ledger


class Explained(Relevant, Protocol):
    """What is checked: the fields of ``Attribution`` that this takes."""

    @property
    def token_ids(self) -> Int[Tensor, " pos"]:
        """The prompt."""

    @property
    def greyed(self) -> Bool[Tensor, " pos"]:
        """Special tokens and the first token."""

    @property
    def objective(self) -> str:
        """The objective in words."""

    @property
    def target(self) -> str:
        """Name of the target."""

    @property
    def contrast(self) -> str:
        """Name of the contrast."""

    @property
    def rules(self) -> str:
        """Name of the rule set."""

    @property
    def model_name(self) -> str:
        """Name of the model."""

    @property
    def pos(self) -> int:
        """The last position explained."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Every position explained."""

    @property
    def answer(self) -> object:
        """The answers' own tokens, where two answers were explained."""

    @property
    def sink_share(self) -> float:
        """The share of Δℓ at greyed tokens."""

    @property
    def ledger(self) -> Ledger:
        """Where Δℓ went."""


@dataclass(frozen=True, eq=False)
class Units:
    """Tokens or segments, with their relevance.

    Attributes:
        kind: "token" or "segment".
        names: Texts of tokens, names of segments.
        starts: Position of the first token of each.
        stops: Position behind the last one.
        relevance: Of each token; of a segment, the sum over its ordinary tokens.
        ordinary: Which have an ordinary token.
        of_token: The unit that replaces each token; -1 for tokens that are not ordinary.
    """

    kind: str
    names: tuple[str, ...]
    starts: Int[Tensor, " unit"]
    stops: Int[Tensor, " unit"]
    relevance: Float[Tensor, " unit"]
    ordinary: Bool[Tensor, " unit"]
    of_token: Int[Tensor, " pos"]

    @classmethod
    def of(cls, result: Explained, by: How | None) -> Units:
        """Divide the prompt of a result.

        Args:
            result: The result.
            by: None for its tokens, or segments as for ``Attribution.by``.

        Raises:
            PromptError, ValueError: as ``Attribution.by``; or no token is ordinary.
            NonFiniteError: a relevance is NaN or infinite.
        """
        length = len(result.str_tokens)
        relevance = result.tokens.detach().cpu().double()
        if not bool(relevance.isfinite().all()):
            raise NonFiniteError(
                "The result has relevance that is NaN or infinite, which cannot be checked. "
                "Explain the prediction again with the model in float32."
            )
        ordinary = ~result.greyed & (torch.arange(length) <= result.pos)
        if not bool(ordinary.any()):
            raise PromptError(
                "Up to the explained position, the prompt has nothing but its first token and "
                "special tokens, so there is no token whose effect could be checked."
            )
        if by is None:
            every = torch.arange(length)
            of_token = every.masked_fill(~ordinary, -1)
            return cls("token", result.str_tokens, every, every + 1, relevance, ordinary, of_token)
        segments = divide(by, result.str_tokens, result.segments)
        sizes = torch.tensor([segment.n_tokens for segment in segments])
        of_token = torch.arange(len(segments)).repeat_interleave(sizes).masked_fill(~ordinary, -1)
        counts = torch.bincount(of_token[ordinary], minlength=len(segments))
        return cls(
            "segment",
            tuple(segment.name for segment in segments),
            torch.tensor([segment.start for segment in segments]),
            torch.tensor([segment.stop for segment in segments]),
            _summed(relevance, of_token, len(segments)),
            counts > 0,
            of_token,
        )

    def summed(self, of_tokens: Float[Tensor, " pos"]) -> Float[Tensor, " unit"]:
        """Numbers of tokens as those of units: of segments, sums over ordinary tokens."""
        if self.kind == "token":
            return of_tokens
        return _summed(of_tokens, self.of_token, len(self.names))


def _summed(
    of_tokens: Float[Tensor, " pos"], of_token: Int[Tensor, " pos"], n_units: int
) -> Float[Tensor, " unit"]:
    inside = of_token >= 0
    zeros = torch.zeros(n_units, dtype=torch.float64)
    return zeros.index_add_(0, of_token[inside], of_tokens[inside].double())
