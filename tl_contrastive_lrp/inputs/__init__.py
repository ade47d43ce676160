"""A caller's input, checked: TransformerLens' version, bridge, devices, tokens, chats, objective.

All packages above this one may rely on these checks; their messages say what to type instead.

The public names are imported at first use: the command line's help and the check of
TransformerLens' version import this package before torch is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .answers import AnswerDiff, answer_diff
    from .chat_prompt import ChatPrompt
    from .chats import chat
    from .objective import (
        Objective,
        logit_diff,
        logit_minus_mean,
        logit_minus_top_k,
        target_logit,
        top_logit,
    )
    from .segments import Segment
    from .spans import SpanLogit, span_logit

__all__ = [
    "AnswerDiff",
    "ChatPrompt",
    "Objective",
    "Segment",
    "SpanLogit",
    "answer_diff",
    "chat",
    "logit_diff",
    "logit_minus_mean",
    "logit_minus_top_k",
    "span_logit",
    "target_logit",
    "top_logit",
]

_MODULES = {
    "AnswerDiff": "answers",
    "ChatPrompt": "chat_prompt",
    "Segment": "segments",
    "SpanLogit": "spans",
    "answer_diff": "answers",
    "chat": "chats",
    "span_logit": "spans",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f".{_MODULES.get(name, 'objective')}", __name__)
    value: object = getattr(module, name)
    globals()[name] = value
    return value
