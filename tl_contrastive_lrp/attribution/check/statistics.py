"""How well a relevance map agrees with what replacing tokens does.

R is relevance, m a measured effect, and ê the measured effect where there is one, else the
predicted one. An effect is Δℓ after minus before, so a token of positive relevance should have a
negative effect. Exchanging target and contrast turns the signs of R, m and ê, and changes none of
these figures.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def captured(
    relevance: Float[Tensor, " strongest"],
    measured: Float[Tensor, " strongest"],
    best: Float[Tensor, " ordinary"],
) -> float | None:
    """Σ −sign(R) · m over the strongest, of the sum of as many largest |ê|; None if that is 0.

    Args:
        relevance: Of the strongest units.
        measured: Their effects.
        best: ê of all ordinary units, those of the strongest among them.
    """
    most = float(best.abs().topk(len(relevance)).values.sum())
    if most == 0.0:
        return None
    share = float((-relevance.sign() * measured).sum()) / most
    return max(-1.0, min(1.0, share))  # rounding


def sign_agreement(
    relevance: Float[Tensor, " strongest"], measured: Float[Tensor, " strongest"]
) -> float | None:
    """The share of Σ|m| whose sign is what relevance says; None if all m are 0."""
    size = measured.abs()
    total = float(size.sum())
    right = float(size[measured.sign() == -relevance.sign()].sum())
    return right / total if total else None


def contrast_to_random(
    strongest: Float[Tensor, " strongest"], drawn: Float[Tensor, " drawn"]
) -> float | None:
    """Mean |m| of the strongest over that of random ones; None if there are none, or it is 0."""
    level = float(drawn.abs().mean()) if len(drawn) else 0.0
    return float(strongest.abs().mean()) / level if level else None


def pearson(x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> float | None:
    """Pearson's correlation; None where one of the two does not vary."""
    if len(x) < 2:
        return None
    x, y = x - x.mean(), y - y.mean()
    norms = float(x.norm()) * float(y.norm())
    if not norms:
        return None
    return max(-1.0, min(1.0, float(x @ y) / norms))
