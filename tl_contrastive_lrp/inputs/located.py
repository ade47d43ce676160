"""Objectives that say which positions of a prompt they read.

The engines then compute the logits of those positions only, and hand the objective just these rows:
``at`` gives the same objective as a function of them. A plain function of the logits gets them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor


class LocatedObjective(ABC):
    """An objective that knows the positions whose logits it reads, and what to call its two sides.

    ``Objective`` reads one position, ``SpanLogit`` a stretch of them.
    """

    @abstractmethod
    def __call__(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, ""]:
        """Δℓ summed over the batch."""

    @abstractmethod
    def parts(
        self, logits: Float[Tensor, "*batch pos vocab"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
        """The target term and the contrast term (None if nothing is subtracted) of each row."""

    @abstractmethod
    def positions(self, length: int) -> tuple[int, ...]:
        """The positions whose logits are read in a prompt of this length, rising from 0.

        Raises:
            TokenError: the prompt does not have them, or the objective is not of one prompt.
        """

    @abstractmethod
    def at(self, read: tuple[int, ...], length: int) -> LocatedObjective:
        """The same objective as a function of some positions' logits, [1, len(read), vocab].

        Args:
            read: Rising positions, those of ``positions(length)`` among them.
            length: How many tokens the prompt has.

        Raises:
            TokenError: as ``positions``.
        """

    @abstractmethod
    def texts(self) -> tuple[str, str]:
        """The target's text and what it is contrasted with, for labels."""

    @abstractmethod
    def target_is_top(self, logits: Float[Tensor, "1 pos vocab"]) -> bool:
        """Whether greedy decoding writes the target, at every position that is read."""
