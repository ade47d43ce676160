"""What was asked: from typed options to a model, a prompt and two tokens, or to the candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..inputs.token_text import printed

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

CANDIDATES = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One prediction to explain: ids of both sides, and the likeliest tokens.

    at is the position as typed: -1 reads "the last position" in an objective's words. delta is
    Δℓ in the forward that the candidates are from; prepended_bos is as results have it.
    """

    tokens: Tensor
    candidates: pd.DataFrame
    target: tuple[int, ...]
    contrast: tuple[int, ...]
    delta: float
    names: dict[int, str]
    at: int
    model_name: str
    dtype: str
    device: str
    prepended_bos: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def target_is_top(self) -> bool:
        return self.target == (int(self.candidates["id"].iloc[0]),)

    @property
    def pos(self) -> int:
        return self.at % self.n_tokens

    @property
    def n_tokens(self) -> int:
        return int(self.tokens.shape[1])

    def side(self, ids: Sequence[int]) -> str:
        """One side's tokens in words."""
        return " or ".join(f"«{printed(self.names[i], i)}»" for i in ids)

    def logit_of(self, ids: Sequence[int]) -> str:
        """One side's term of Δℓ in words."""
        names = ", ".join(f"«{printed(self.names[i], i)}»" for i in ids)
        return f"logit of {names}" if len(ids) == 1 else f"mean logit of {{{names}}}"


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
) -> Question:
    """The question with what telling its answer needs; logits [vocab] are those at ``pos``."""
    from ..attribution.candidates import candidate_table
    from ..inputs.devices import precise
    from ..inputs.tokens import model_device, token_names

    both = (*target, *contrast)
    return Question(
        tokens,
        candidate_table(model, logits, CANDIDATES),
        target,
        contrast,
        float(precise(logits[list(target)]).mean() - precise(logits[list(contrast)]).mean()),
        dict(zip(both, token_names(model, both), strict=True)),
        pos,
        model_name,
        str(next(iter(model.original_model.parameters())).dtype).removeprefix("torch."),
        str(model_device(model)),
        prepended_bos,
        tuple(notes),
    )
