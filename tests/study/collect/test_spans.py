"""Where instructions lie among the tokens of a prompt."""

from __future__ import annotations

import pytest
import torch
from support.study_failures import made_up

from tl_contrastive_lrp.study.benchmarks.item import Item
from tl_contrastive_lrp.study.collect.spans import instruction_tokens
from tl_contrastive_lrp.study.segments import instruction_groups, segment_masks

TEXTS = ["Use", " no", " commas", ".", " Say", " comma", " now", "!"]


def found(*phrases: str) -> dict[str, tuple[tuple[int, int], ...]]:
    item = Item("1", prompt="".join(TEXTS), instructions=phrases)
    return dict(instruction_tokens("".join(TEXTS), TEXTS, item))


def test_each_phrase_is_a_stretch_of_its_own() -> None:
    """Phrases that touch or share a token stay two: the groups ask which holds the target."""
    both = found("Use no commas.", " Say comma now")
    assert both == {"instruction": ((0, 4), (4, 7)), "query": ((7, 8),)}
    assert found(" Say comma now", "Use no commas.") == both
    assert found("Use no com", "mas. Say") == {
        "instruction": ((0, 3), (2, 5)), "query": ((5, 8),)
    }  # fmt: skip
    assert found("no", "no") == {"instruction": ((1, 2),), "query": ((0, 1), (2, 8))}
    assert found("elsewhere") == {"query": ((0, 8),)}


def test_phrases_that_touch_are_counted_in_their_own_groups() -> None:
    segments = found("Use no commas.", " Say comma now")
    case = made_up([*range(8)], 9, 10, text=" comma", segments=segments)
    relevance = torch.tensor([1.0, 2, 4, 8, -16, -32, -64, 128])
    special = torch.zeros(8, dtype=torch.bool)
    groups = instruction_groups(case, TEXTS, relevance, special)
    assert groups == {"with target": -112 / 128, "without target": 15 / 128}
    masks = segment_masks(case, TEXTS, special)
    assert masks["instruction"].tolist() == [True] * 7 + [False]


@pytest.mark.parametrize(
    "last", [{"role": "assistant", "content": "!"}, {"role": "tool", "content": "now"}]
)
def test_the_question_is_the_user_s_though_another_message_is_last(last: dict[str, str]) -> None:
    """Of a begun answer, and of a tool's result."""
    asked = {"role": "user", "content": "Use no commas."}
    item = Item("1", messages=(asked, last), instructions=("no commas",))
    spans = instruction_tokens("".join(TEXTS), TEXTS, item)
    assert spans == {"instruction": ((1, 3),), "query": ((0, 1), (3, 4))}
