"""What a caller hands in, checked: TransformerLens' version, bridge, devices, tokens, objective.

Everything behind this door may rely on it; what is wrong is said here, with what to type instead.
"""

from __future__ import annotations

from .objective import (
    Objective,
    logit_diff,
    logit_minus_mean,
    logit_minus_top_k,
    target_logit,
    top_logit,
)

__all__ = [
    "Objective",
    "logit_diff",
    "logit_minus_mean",
    "logit_minus_top_k",
    "target_logit",
    "top_logit",
]
