"""What a caller hands in, checked: TransformerLens' version, bridge, devices, tokens, objective.

Everything behind this door may rely on it; what is wrong is said here, with what to type instead.

The objectives are imported when they are asked for: the command line's help and the check of
TransformerLens' version come through this door before torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import objective

    return getattr(objective, name)
