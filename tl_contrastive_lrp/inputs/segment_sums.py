"""The input tokens' relevance, summed over segments of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from .segments import How, Segment, divide

if TYPE_CHECKING:
    import pandas as pd


class Relevant(Protocol):
    """What is summed: the fields of ``Attribution`` that it takes."""

    @property
    def tokens(self) -> Float[Tensor, " pos"]:
        """Relevance of each token."""

    @property
    def special(self) -> Bool[Tensor, " pos"]:
        """Which tokens are special tokens."""

    @property
    def str_tokens(self) -> tuple[str, ...]:
        """The tokens' texts."""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The messages."""

    @property
    def delta(self) -> float:
        """Δℓ."""


def segment_frame(result: Relevant, how: How, normalize: str) -> pd.DataFrame:
    """See ``Attribution.by``."""
    import pandas as pd

    if normalize not in ("logits", "largest"):
        raise ValueError(f'normalize={normalize!r}: use "logits" or "largest".')
    segments = divide(how, result.str_tokens, result.segments)
    relevance = result.tokens.double().numpy()
    largest = np.abs(relevance[~result.special.numpy()]).max(initial=0.0)
    if normalize == "largest" and not largest > 0:
        raise ValueError(
            'normalize="largest" needs a token that is not special and has relevance; here there '
            'is none. Use normalize="logits".'
        )
    unit = largest if normalize == "largest" else 1.0
    sizes = np.array([segment.n_tokens for segment in segments])
    of_token = np.repeat(np.arange(len(segments)), sizes)

    def summed(values: Float[np.ndarray, " pos"]) -> Float[np.ndarray, " segment"]:
        return np.bincount(of_token, weights=values, minlength=len(segments))

    total = summed(relevance)
    order = np.lexsort((-np.abs(relevance), of_token))  # a segment's largest token comes first
    firsts = np.cumsum(sizes) - sizes
    return pd.DataFrame(
        {
            "segment": [segment.name for segment in segments],
            "role": [segment.role for segment in segments],
            "kind": [segment.kind for segment in segments],
            "start": [segment.start for segment in segments],
            "stop": [segment.stop for segment in segments],
            "n_tokens": sizes,
            "relevance": total / unit,
            "share": total / (result.delta or float("nan")),
            "positive": summed(relevance.clip(min=0.0)) / unit,
            "negative": summed(relevance.clip(max=0.0)) / unit,
            "largest_token": [
                result.str_tokens[order[first]] if size else ""
                for first, size in zip(firsts, sizes, strict=True)
            ],
        }
    )
