"""What a beginning settles, held against the published checks on random continuations.

A beginning that "can no longer pass" must fail with every continuation tried, and one that "cannot
be broken any more" must pass with every one; otherwise the locator would name a token too early.
"""

from __future__ import annotations

import json
import random

import pytest

from tl_contrastive_lrp.study.benchmarks.ifeval import ARGUMENTS, NEEDS_PUNKT, follows
from tl_contrastive_lrp.study.benchmarks.ifeval_beginnings import (
    _SETTLED,
    begins_json,
    still_possible,
)

# For each kind, arguments and the pieces that random answers are made of.
KINDS: dict[str, tuple[dict[str, object], list[str]]] = {
    "change_case:english_capital": (
        {},
        ["THE DOG RAN INTO THE HOUSE ", "AND THE ", "1 ", "é", "x", "ǅ"],
    ),
    "change_case:english_lowercase": (
        {},
        ["the dog ran into the house ", "and the ", "1 ", "É", "X", "ǅ"],
    ),
    "combination:repeat_prompt": (
        {"prompt_to_repeat": "Say Ab a\n"}, ["s", "S", "ay ", "ab", " a", "say ab"],
    ),
    "combination:two_responses": ({}, ["*", "**", "***", "******", "a", "b", " ", "\n"]),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[", "]", "a", "\n"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.P.S"}, ["p", ".", "P.", "s", "p.s", " ", "\n"],
    ),
    "detectable_format:constrained_response": (
        {}, ["My answer ", "is ", "no.", ".", "is yes.", "My answer is "],
    ),
    "detectable_format:json_format": (
        {},
        ["{", "}", '"', "a", ":", ",", " ", "1", ".", "-", "e", "[", "]", "true", "nu", "```",
         "json", "\\", "u00", "\n", "Here"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2},
        ["Section", " ", "1", "2", "a", "\n"],
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["*", "-", " ", "a", "\n"]),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2}, ["*", "**", "a", "\n"],
    ),
    "detectable_format:title": ({}, ["<", "<<", ">", ">>", "a", " ", "\n"]),
    "keywords:existence": ({"keywords": ["ab", "c"]}, ["a", "b", "C", " "]),
    "keywords:forbidden_words": ({"forbidden_words": ["ab", "c"]}, ["a", "b", "C", " ", ".", "d"]),
    "keywords:frequency": (
        {"keyword": "ab", "frequency": 3, "relation": "less than"}, ["a", "b", "A", " "],
    ),
    "keywords:letter_frequency": (
        {"letter": "#", "let_frequency": 3, "let_relation": "at least"}, ["#", "a", " "],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "abc"},
        ["ab", "abc", "c", " ", "\n", "\n\n", '"', "'", ".", "d"],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2}, ["*", "**", "***", "a", " ", "\n"],
    ),
    "length_constraints:number_words": (
        {"num_words": 4, "relation": "less than"}, ["a", "b", " ", ".", "\n"],
    ),
    "punctuation:no_comma": ({}, ["a", " ", ",", "."]),
    "startend:quotation": ({}, ['"', "a", " "]),
}  # fmt: skip


def _text(rng: random.Random, pieces: list[str], most: int) -> str:
    return "".join(rng.choices(pieces, k=rng.randint(0, most)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_settled_no_continuation_changes(kind: str) -> None:
    args, pieces = KINDS[kind]
    rng = random.Random(kind)
    slow = kind.startswith("change_case")
    settled = {True: 0, False: 0}
    for relation in ("less than", "at least"):
        args = {k: relation if "relation" in k else v for k, v in args.items()}
        for _ in range(40 if slow else 400):
            beginning = _text(rng, pieces, 14).lstrip()
            said = still_possible(kind, args, beginning) if beginning else None
            if said is None:
                continue
            settled[said] += 1
            for _ in range(4 if slow else 30):
                answer = (beginning + _text(rng, pieces, 12)).strip()
                if answer:
                    assert follows(kind, args, answer) is said, (beginning, answer)
    assert sum(settled.values()) >= 20, "the beginnings of this test settle nothing"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_is_open_can_go_either_way(kind: str) -> None:
    """The converse on short texts: some beginnings are open, and of these some answers pass."""
    args, pieces = KINDS[kind]
    rng = random.Random(kind)
    passed = 0
    cased = kind.startswith("change_case")
    for _ in range(300 if cased else 1500):
        beginning = _text(rng, pieces, 3).lstrip()
        answer = (beginning + _text(rng, pieces, 2 if cased else 14)).strip()
        if beginning and answer and follows(kind, args, answer):
            assert still_possible(kind, args, beginning) is not False, (beginning, answer)
            passed += 1
    assert passed >= 3, "no answer of this test passes"


def test_every_kind_is_settled_or_said_to_be_open() -> None:
    open_kinds = {"language:response_language", "startend:end_checker", *NEEDS_PUNKT}
    assert set(_SETTLED) | open_kinds == set(ARGUMENTS)
    assert not set(_SETTLED) & open_kinds
    assert set(KINDS) == set(_SETTLED)
    assert all(still_possible(kind, {}, "Anything, here.") is None for kind in open_kinds)


@pytest.mark.parametrize(
    ("kind", "args", "beginning", "expected"),
    [
        ("punctuation:no_comma", {}, "Yes", None),
        ("punctuation:no_comma", {}, "Yes,", False),
        ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "They rock", None),
        ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "They rocket ", None),
        ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "They Rock ", False),
        ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "a b", None),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "less than"},
            "a b c",
            False,
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "at least"},
            "a b c",
            True,
        ),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b ***", None),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b *** c", False),
        ("change_case:english_lowercase", {}, "sure! H", False),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Write it."}, "write", None),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Write it."}, "Sure", False),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Write it."}, "Write it. Well", True),
        ("detectable_format:json_format", {}, "``", None),
        ("detectable_format:json_format", {}, '```json\n{"a": [1, tr', None),
        ("detectable_format:json_format", {}, '{"a": 1} So', False),
        ("detectable_format:json_format", {}, "Here", False),
        ("startend:quotation", {}, "Sure", False),
        ("detectable_format:title", {}, "<<A>", None),
        ("detectable_format:title", {}, "<<A>> b", True),
    ],
)
def test_by_hand(kind: str, args: dict[str, object], beginning: str, expected: bool | None) -> None:
    assert still_possible(kind, args, beginning) is expected


def _value(rng: random.Random, depth: int = 3) -> object:
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.choice([True, False, None])
    if kind == 1:
        return rng.randrange(-(10**6), 10**6)
    if kind == 2:
        return rng.choice([0.5, -1.25e-7, 3e20, 1e-3, -0.0])
    if kind in (3, 4):
        return "".join(rng.choices('aé"\\\n\u2028/ ', k=rng.randrange(4)))
    if kind == 5:
        return [_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return {str(k): _value(rng, depth - 1) for k in range(rng.randrange(3))}


def test_every_beginning_of_json_is_one() -> None:
    rng = random.Random(0)
    checked = 0
    for _ in range(600):
        text = json.dumps(
            _value(rng), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, 1])
        )
        text += rng.choice(["", "\n```", "  "])
        for end in range(1, len(text) + 1):
            assert begins_json(text[:end]), text[:end]
            checked += 1
    assert checked > 3000
