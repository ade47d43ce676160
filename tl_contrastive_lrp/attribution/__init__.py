"""Relevance of one prediction: ``attribute``, its result and ledger, and candidate tokens.

A call here turns a prompt and an objective into a plan, has the engine run it, and returns a frozen
result; ``run_with_relevance`` does the same for every HookPoint, as TransformerLens'
``run_with_cache`` does.
"""

from __future__ import annotations

from .answer_parts import AnswerRelevance, AnswerSide
from .answer_table import answer_table
from .attribute import attribute, attribute_each
from .candidates import next_token_table
from .check import MapCheck
from .explain_answer import AnswerExplanations, explain_answer
from .ledger import Ledger
from .relevance_cache import run_with_relevance
from .result import Attribution
from .trace import Trace
from .trace_back import trace_back

__all__ = [
    "AnswerExplanations",
    "AnswerRelevance",
    "AnswerSide",
    "Attribution",
    "Ledger",
    "MapCheck",
    "Trace",
    "answer_table",
    "attribute",
    "attribute_each",
    "explain_answer",
    "next_token_table",
    "run_with_relevance",
    "trace_back",
]
