"""Numbers that say how unevenly values are spread: over edges, nodes, or the prompt's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .ranking import fewest

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")


def gini(values: Float[Tensor, " item"]) -> float:
    """Inequality of |values|: 0 where all are equal, near 1 where one holds everything.

    With |x| sorted upwards and i from 1: G = Σ_i (2i − n − 1) |x|_(i) / (n Σ|x|). NaN where there
    are no values or all are 0.
    """
    size = np.sort(values.abs().numpy()).astype(np.float64)
    n, total = len(size), size.sum()
    if not total:
        return NAN
    return float(np.arange(1 - n, n, 2, dtype=np.float64) @ size / (n * total))


def top_count(values: Float[Tensor, " item"], share: float = 0.9) -> int:
    """How few of the largest positive values hold ``share`` of the sum of all positive ones.

    0 where no value is positive. For negative ones give the values with their sign changed.
    """
    return fewest(values[values > 0], share)


def input_metrics(relevance: Float[Tensor, " pos"], top: int = 5) -> pd.DataFrame:
    """How the relevance of input tokens is spread: ``graph.relevance[0]``, ``result.tokens``.

    Rows: all tokens by |R|; those with R > 0 (they support the target); those with R < 0.
    With q_i = |R_i| / Σ|R| over the row's tokens:

    Columns:
        part: "all", "target" or "contrast".
        tokens: How many of the row's tokens have R ≠ 0.
        mass: Σ|R|, logits.
        entropy: H = −Σ q ln q, nats.
        effective_tokens: e^H: so many tokens with equal shares would have the same entropy.
        entropy_share: H / ln n, n all tokens of the prompt; NaN for a prompt of one token.
        gini: Gini of |R| over all n tokens (those outside the row count as 0).
        top_share: Σ of the ``top`` largest q.
        centre: Σ q · pos, a position.

    Raises:
        ValueError: relevance of another shape than [pos], or top below 1.
    """
    import pandas as pd

    if relevance.ndim != 1 or not len(relevance):
        raise ValueError(f"relevance has shape {tuple(relevance.shape)}; give one row, [pos].")
    if top < 1:
        raise ValueError(f"top={top} must be 1 or more.")
    values = relevance.detach().cpu().double()
    parts = {
        "all": values.abs(),
        "target": values.clamp_min(0),
        "contrast": (-values).clamp_min(0),
    }
    return pd.DataFrame([{"part": name, **_spread(size, top)} for name, size in parts.items()])


def _spread(size: Float[Tensor, " pos"], top: int) -> dict[str, Any]:
    n, mass = len(size), float(size.sum())
    if not mass:
        names = ("entropy", "effective_tokens", "entropy_share", "gini", "top_share", "centre")
        return {"tokens": 0, "mass": 0.0, **dict.fromkeys(names, NAN)}
    share = size / mass
    entropy = float(-torch.special.xlogy(share, share).sum())
    return {
        "tokens": int((size > 0).sum()),
        "mass": mass,
        "entropy": entropy,
        "effective_tokens": float(np.exp(entropy)),
        "entropy_share": entropy / float(np.log(n)) if n > 1 else NAN,
        "gini": gini(size),
        "top_share": float(torch.topk(share, min(top, n)).values.sum()),
        "centre": float((share * torch.arange(n)).sum()),
    }
