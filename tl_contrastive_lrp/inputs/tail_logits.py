"""The sum of the logits of given tokens at consecutive positions, as an objective of one prompt.

This is what a teacher-forced continuation is worth: the logit (or log-probability) of each of its
tokens, at the position before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..rules.functions import at_least_float32


@dataclass(frozen=True)
class TailLogits:
    """Σ over tokens of their logits, or log-probabilities, each at the position that predicts it.

    Attributes:
        ids: The tokens.
        start: The position whose next token is the first of them, from 0; the others follow.
        logprob: Sum log-probabilities instead of logits.
    """

    ids: tuple[int, ...]
    start: int
    logprob: bool = False

    @property
    def positions(self) -> tuple[int, ...]:
        """The positions whose logits are read, rising."""
        return tuple(range(self.start, self.start + len(self.ids)))

    def __call__(self, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, ""]:
        """The sum.

        Args:
            logits: Those of the whole prompt.
        """
        rows = self._rows(logits)
        ids = torch.tensor(self.ids, device=logits.device)
        found = rows.gather(-1, ids[:, None])[:, 0]
        return (found - rows.logsumexp(-1)).sum() if self.logprob else found.sum()

    def are_top(self, logits: Float[Tensor, "1 pos vocab"]) -> bool:
        """Whether greedy decoding writes all of the tokens, each after those before it.

        Args:
            logits: Those of the whole prompt.
        """
        return self._rows(logits).argmax(-1).tolist() == list(self.ids)

    def _rows(self, logits: Float[Tensor, "1 pos vocab"]) -> Float[Tensor, "token vocab"]:
        return at_least_float32(logits[0, self.start : self.start + len(self.ids)])
