"""A question to a model: one prediction, and the two tokens that it is explained for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..inputs.segments import Segment

N_CANDIDATES = 10


@dataclass(frozen=True)
class Question:
    """One prediction to explain, with the facts that are printed with its result.

    Attributes:
        tokens: The prompt's ids, [1, pos].
        candidates: The most likely next tokens.
        target: Ids of the target tokens.
        contrast: Ids of the contrast tokens.
        delta: Δℓ in logits, from the forward that gave the candidates.
        names: Text of the target and contrast tokens by id.
        typed_pos: The position as typed; an objective describes -1 as "the last position".
        model_name: Name of the model.
        dtype: Its floating-point type.
        device: The device it is on.
        prepended_bos: Whether a BOS token was put before the text, None for a chat.
        notes: Sentences on what the user may not expect.
        segments: The messages of a chat; () for any other prompt.
    """

    tokens: Tensor
    candidates: pd.DataFrame
    target: tuple[int, ...]
    contrast: tuple[int, ...]
    delta: float
    names: dict[int, str]
    typed_pos: int
    model_name: str
    dtype: str
    device: str
    prepended_bos: bool | None = None
    notes: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()

    @property
    def target_is_top(self) -> bool:
        """Whether the target is the model's most likely token."""
        return self.target == (int(self.candidates["id"].iloc[0]),)

    @property
    def pos(self) -> int:
        """The position explained, from 0."""
        return self.typed_pos % self.n_tokens

    @property
    def n_tokens(self) -> int:
        """How many tokens the prompt has."""
        return int(self.tokens.shape[1])

    def side(self, ids: Sequence[int]) -> str:
        """Name the tokens of one side."""
        return " or ".join(self._quoted(ids))

    def logit_of(self, ids: Sequence[int]) -> str:
        """Name one side's term of Δℓ."""
        names = ", ".join(self._quoted(ids))
        return f"logit of {names}" if len(ids) == 1 else f"mean logit of {{{names}}}"

    def _quoted(self, ids: Sequence[int]) -> list[str]:
        from ..inputs.token_text import printed

        return [f"«{printed(self.names[i], i)}»" for i in ids]


def question_of(
    model: Any,
    tokens: Tensor,
    logits: Tensor,
    target: tuple[int, ...],
    contrast: tuple[int, ...],
    *,
    pos: int,
    model_name: str,
    prepended_bos: bool | None,
    notes: Sequence[str] = (),
    segments: tuple[Segment, ...] = (),
) -> Question:
    """Build a question; ``logits`` [vocab] are those at ``pos``."""
    from ..attribution.candidates import candidate_table
    from ..inputs.devices import precise
    from ..inputs.tokens import model_device, token_names

    both = (*target, *contrast)
    delta = precise(logits[list(target)]).mean() - precise(logits[list(contrast)]).mean()
    dtype = next(iter(model.original_model.parameters())).dtype
    return Question(
        tokens=tokens,
        candidates=candidate_table(model, logits, N_CANDIDATES),
        target=target,
        contrast=contrast,
        delta=float(delta),
        names=dict(zip(both, token_names(model, both), strict=True)),
        typed_pos=pos,
        model_name=model_name,
        dtype=str(dtype).removeprefix("torch."),
        device=str(model_device(model)),
        prepended_bos=prepended_bos,
        notes=tuple(notes),
        segments=segments,
    )
