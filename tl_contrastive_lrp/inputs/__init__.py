"""Checks of a caller's input: TransformerLens' version, bridge, devices, tokens, objective.

All packages above this one may rely on these checks; their messages say what to type instead.

The objectives are imported at first use: the command line's help and the check of TransformerLens'
version import this package before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import AnswerDiff, answer_diff
    from .objective import (
        Objective,
        logit_diff,
        logit_minus_mean,
        logit_minus_top_k,
        target_logit,
        top_logit,
    )
    from .spans import SpanLogit, span_logit

__all__ = [
    "AnswerDiff",
    "Objective",
    "SpanLogit",
    "answer_diff",
    "logit_diff",
    "logit_minus_mean",
    "logit_minus_top_k",
    "span_logit",
    "target_logit",
    "top_logit",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import answers, objective, spans

    if name in ("AnswerDiff", "answer_diff"):
        return getattr(answers, name)
    return getattr(spans if name in ("SpanLogit", "span_logit") else objective, name)
