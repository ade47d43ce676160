"""From the forwards to effects: the steps of ``token_effects`` on a checked prompt.

    effect_i = Δℓ(rows read inside the window, exact) − Δℓ                      i near the end
    effect_i = Δℓ(last position, exact) − Δℓ + Σ_{i + w < j < last} ⟨z'_j − z_j, g_j⟩     else

Where the model keeps no key-value cache, or the objective reads several positions, the last
position is one of the linear sum too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..engine.fused import AttentionKind
from .gradients import gradients_at_z
from .later import LaterPositions
from .passes import Replaced, last_logits, run_streams
from .questions import Questions, used_tokens

_NUMBERS = 1 << 23  # of one [row, head, tile, key] tensor, or of the logits of a batch
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
    used, last = used_tokens(model, replaced, read), read[-1]
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
    of_read = torch.stack([streams.logits[p] for p in read])  # [read, row, vocab]
    at = torch.tensor(read)
    near = torch.unique(at[:, None] - torch.arange(window + 1))
    for positions in torch.split(near[near >= 0], max(1, _NUMBERS // clean.numel())):
        offset = at - positions[:, None]
        row = torch.where((offset >= 0) & (offset <= window), offset, -1)  # the last is clean
        effect[:, positions] += questions.values(of_read[torch.arange(len(at)), row]) - delta
    if with_last:
        for positions, logits in last_logits(model, used, streams, window, batch_size, progress):
            effect[:, positions.cpu()] += questions.values(logits[:, None]) - delta
    forwards = streams.forwards + (later is not None)
    return Estimate(effect, exact, clean, forwards * used.length / length)
