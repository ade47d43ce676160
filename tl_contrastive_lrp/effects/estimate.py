"""From the forwards to effects: the steps of ``token_effects`` on a checked prompt.

    effect_i = Δℓ(rows read inside the window, exact) − Δℓ                      i near the end
    effect_i = Δℓ(last position, exact) − Δℓ + Σ_{i + w < j < last} ⟨z'_j − z_j, g_j⟩     else

Where the model keeps no key-value cache, or the objective reads several positions, the last
position is one of the linear sum too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..engine.fused import AttentionKind
from ..inputs.facts import ObjectiveFacts
from ..inputs.located import LocatedObjective
from ..inputs.objective import positions_of
from ..inputs.rotary import depends_on_length
from .gradients import gradients_at_z
from .later import LaterPositions
from .passes import Replaced, last_logits, logits_at, measured_logits, run_streams

Objective = Callable[[Tensor], Tensor]

_NUMBERS = 1 << 23  # of one [row, head, tile, key] tensor
_TILES = (16, 128)  # the smallest, and the largest on a processor: later keys are not computed


@dataclass(frozen=True, eq=False)
class Estimate:
    """Effects, and what they cost.

    Attributes:
        effect: Δℓ with each token replaced minus Δℓ, [objective, pos].
        exact: Which of them are exact, [pos].
        clean: The prompt's logits at the positions that are read, [read, vocab].
        forwards: What the run cost, in forwards of the prompt; the backward is not counted.
    """

    effect: Float[Tensor, "objective pos"]
    exact: Bool[Tensor, " pos"]
    clean: Float[Tensor, "read vocab"]
    forwards: float


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

    @classmethod
    def of(cls, model: Any, objectives: Sequence[Objective], tokens: Tensor) -> Questions:
        """Find the positions that objectives read.

        Raises:
            TokenError, ModelStateError: as ``positions_of``.
        """
        length = int(tokens.shape[1])
        located = [one for one in objectives if isinstance(one, LocatedObjective)]
        if len(located) == len(objectives):
            read = sorted({p for one in located for p in one.positions(length)})
            return cls(tuple(one.at(tuple(read), length) for one in located), tuple(read), length)
        with torch.no_grad():
            logits: Tensor = model(tokens)
        read = sorted({p for one in objectives for p in positions_of(one, logits, length)})

        def within(one: Objective) -> Objective:
            def evaluated(rows: Tensor) -> Tensor:
                whole = logits.repeat(len(rows), 1, 1)
                return one(whole.index_copy(1, torch.tensor(read, device=rows.device), rows))

            return evaluated

        return cls(tuple(within(one) for one in objectives), tuple(read), length, logits)

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


def tile_of(model: Any, tokens: Tensor, window: int) -> int:
    """Positions per tile, such that no tensor of scores is larger than a fixed size."""
    length = int(tokens.shape[1])
    least, most = _TILES[0], _TILES[1] if tokens.device.type == "cpu" else length
    room = _NUMBERS // ((window + 2) * int(model.cfg.n_heads) * length)
    return max(least, min(most, length, room))


def estimated(
    model: Any,
    parts: dict[str, Any],
    replaced: Replaced,
    questions: Questions,
    window: int,
    tile: int | None,
    batch_size: int,
    attention: AttentionKind,
    progress: bool,
) -> Estimate:
    """Predict what replacing each token does to each objective.

    Args:
        model: The bridge.
        parts: Its attention components by path.
        replaced: The prompt and what replaces its tokens.
        questions: The objectives.
        window: Positions after the replaced token whose streams are computed exactly.
        tile: Positions in a tile; None for all at once, without a key-value cache.
        batch_size: Replaced tokens in a batch of the last position.
        attention: Whether attention is fused in the forward with gradients.
        progress: Whether to show progress bars.
    """
    length, read = replaced.length, questions.read
    used, last = _used(model, replaced, read), read[-1]
    window = min(window, last)
    effect = torch.zeros(len(questions.objectives), length, dtype=torch.float64)
    far = last - window  # tokens whose window ends before the last position
    exact = torch.arange(length) >= far
    with_last = tile is not None and len(read) == 1 and far > 0
    later = None
    if far > 0:
        gradients = gradients_at_z(model, parts, used.tokens, questions.objectives, read, attention)
        later = LaterPositions(gradients, window, last if with_last else last + 1)
    streams = run_streams(
        model, parts, used, window, read, None if later is None else later.add, tile, progress
    )
    clean = torch.stack([streams.logits[p][-1] for p in read])
    delta = questions.values(clean[None])
    if later is not None:
        for of_objective, found in zip(effect, later.effects, strict=True):
            of_objective[: used.length] += found
    # Tokens whose window holds a position that is read: its logits are known exactly.
    near = sorted({p - o for p in read for o in range(window + 1) if p >= o})
    for positions in torch.split(torch.tensor(near), batch_size):
        rows = clean.repeat(len(positions), 1, 1)
        for row, i in enumerate(positions.tolist()):
            for n, p in enumerate(read):
                if 0 <= p - i <= window:
                    rows[row, n] = streams.logits[p][p - i]
        effect[:, positions] += questions.values(rows) - delta
    if with_last:
        for positions, logits in last_logits(model, used, streams, window, batch_size, progress):
            effect[:, positions.cpu()] += questions.values(logits[:, None]) - delta
    forwards = streams.forwards + (later is not None)
    return Estimate(effect, exact, clean, forwards * used.length / length)


def _used(model: Any, replaced: Replaced, read: tuple[int, ...]) -> Replaced:
    """The tokens that matter: by causality, none after the last position that is read.

    All do where rotary positions depend on the length of the prompt.
    """
    if depends_on_length(model, replaced.length):
        return replaced
    return replaced.first(read[-1] + 1)


def measured(
    model: Any, replaced: Replaced, questions: Questions, batch_size: int, progress: bool
) -> Estimate:
    """Measure what replacing each token does to each objective, a run for each token."""
    used = _used(model, replaced, questions.read)
    effect = torch.zeros(len(questions.objectives), replaced.length, dtype=torch.float64)
    with torch.no_grad():
        (clean,) = logits_at(model, used.tokens, questions.read)
    delta = questions.values(clean[None])
    for positions, logits in measured_logits(model, used, questions.read, batch_size, progress):
        effect[:, positions.cpu()] = questions.values(logits) - delta
    exact = torch.ones(replaced.length, dtype=torch.bool)
    runs = float(used.length + 1) * used.length / replaced.length
    return Estimate(effect, exact, clean, runs)
