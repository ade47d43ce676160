"""The measurements behind ``messages.py``: does the message that decides an answer rank first?

Chats whose decisive message is known: ``tests/support/demo_chats.py``. All messages are ranked by
``result.by("message")``, highest relevance first: tool results, the question and the answer so far,
not the template. Beside it a random ranking, and the last tool result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import pandas as pd
import torch
from support.demo_chats import ChatCase, chat_cases

import tl_contrastive_lrp as clrp

CHANCE, RIVALS, LATEST = "chance", "chance among messages with such a number", "last tool result"


def first_message(model: Any, case: ChatCase, rules: Any) -> str:
    """The name of the message of highest relevance, for what the model prefers of the two."""
    tokens = torch.as_tensor(case.prompt.tokens)[None]
    with torch.no_grad():
        logits = model(tokens)[0, -1]
    target, contrast = sorted((case.target, case.contrast), key=lambda i: (-float(logits[i]), i))
    result = clrp.attribute(model, case.prompt, target=target, contrast=contrast, rules=rules)
    messages = result.by("message").query("kind != 'template'").set_index("segment")
    return str(messages["relevance"].idxmax())


def firsts(model: Any, cases: Iterable[ChatCase], methods: Mapping[str, Any]) -> pd.DataFrame:
    """prompt, method, right, hit: whether, or how likely, the decisive message ranks first."""
    rows: list[tuple[int, str, bool, float]] = []
    for number, case in enumerate(cases):
        ranked = sum(segment.kind != "template" for segment in case.prompt.segments)
        found = {
            name: float(first_message(model, case, rules) == case.decisive)
            for name, rules in methods.items()
        }
        found[CHANCE] = 1 / ranked
        found[RIVALS] = 1 / case.rivals
        found[LATEST] = float(case.latest == case.decisive)
        rows += [(number, name, case.right, hit) for name, hit in found.items()]
    return pd.DataFrame(rows, columns=["prompt", "method", "right", "hit"])


def measured(
    model: Any, chats: int, methods: Mapping[str, Any]
) -> dict[bool, tuple[pd.DataFrame, int]]:
    """For chats where one message, or several, could be meant: the frame, and how many chats were
    tried for it."""
    found = {}
    for several in (False, True):
        cases, tried = chat_cases(model, chats, several=several)
        found[several] = (firsts(model, cases, methods), tried)
    return found
