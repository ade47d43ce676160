"""What is asked of the logits: objectives as functions of the positions that they read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..inputs.facts import ObjectiveFacts
from ..inputs.located import LocatedObjective
from ..inputs.objective import positions_of
from ..inputs.rotary import depends_on_length
from .passes import Replaced

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Questions:
    """Objectives as functions of the logits of the positions that they read.

    Attributes:
        objectives: Functions of logits [1, read, vocab].
        read: The positions, rising.
        length: Number of tokens in the prompt.
        logits: Those of all positions, where an objective is a plain function of them.
    """

    objectives: tuple[Objective, ...]
    read: tuple[int, ...]
    length: int
    logits: Float[Tensor, "1 pos vocab"] | None = None

    @property
    def forwards(self) -> int:
        """Forwards of the prompt behind the positions: one where a plain function gets logits."""
        return int(self.logits is not None)

    @classmethod
    def of(
        cls,
        model: Any,
        objectives: Sequence[Objective],
        tokens: Tensor,
        logits: Float[Tensor, "1 pos vocab"] | None = None,
    ) -> Questions:
        """Find the positions that objectives read.

        Args:
            model: The bridge.
            objectives: The objectives.
            tokens: The prompt.
            logits: Its logits, if they are known; else the model runs once if there is a plain
                function.

        Raises:
            TokenError, ModelStateError: as ``positions_of``.
        """
        length = int(tokens.shape[1])
        located = [one for one in objectives if isinstance(one, LocatedObjective)]
        if len(located) == len(objectives):
            read = sorted({p for one in located for p in one.positions(length)})
            return cls(tuple(one.at(tuple(read), length) for one in located), tuple(read), length)
        if logits is None:
            with torch.no_grad():
                logits = model(tokens)
        given: Tensor = logits
        read = sorted({p for one in objectives for p in positions_of(one, given, length)})

        def within(one: Objective) -> Objective:
            def evaluated(rows: Tensor) -> Tensor:
                whole = given.repeat(len(rows), 1, 1)
                return one(whole.index_copy(1, torch.tensor(read, device=rows.device), rows))

            return evaluated

        return cls(tuple(within(one) for one in objectives), tuple(read), length, given)

    def values(self, logits: Float[Tensor, "run read vocab"]) -> Float[Tensor, "objective run"]:
        """Each objective's value on each row, in float64."""
        found = []
        for one in self.objectives:
            if isinstance(one, LocatedObjective):
                target, contrast = one.parts(logits)
                found.append(target if contrast is None else target - contrast)
            else:
                found.append(torch.stack([one(row[None]).detach() for row in logits]).flatten())
        return torch.stack([value.detach().cpu().double() for value in found])

    def described(
        self, objectives: Sequence[Objective], clean: Float[Tensor, "read vocab"]
    ) -> list[ObjectiveFacts]:
        """The objectives, as the caller gave them, in words and with their values."""
        values = self.values(clean[None])[:, 0]
        logits = clean[None] if self.logits is None else self.logits
        return [
            ObjectiveFacts.of(
                given, logits, value, self.length, None if self.logits is not None else local
            )
            for given, local, value in zip(objectives, self.objectives, values, strict=True)
        ]


def used_tokens(model: Any, replaced: Replaced, read: tuple[int, ...]) -> Replaced:
    """The tokens that matter: by causality, none after the last position that is read.

    All do in models that are not causal, and where rotary positions depend on the prompt's length.
    """
    causal = getattr(model.cfg, "attention_dir", "causal") == "causal"
    if not causal or depends_on_length(model, replaced.length):
        return replaced
    return replaced.first(read[-1] + 1)
