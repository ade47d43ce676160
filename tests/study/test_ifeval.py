"""IFEval: verdicts are the published ones, nothing is downloaded, and chance decides nothing."""

from __future__ import annotations

import json
import random
import socket
from pathlib import Path
from typing import Any

import pytest
from if_verifiable import IFEvalSample, evaluate_output_for_sample
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import Item, open_benchmark
from tl_contrastive_lrp.study.benchmarks.ifeval import ARGUMENTS, NEEDS_PUNKT
from tl_contrastive_lrp.study.benchmarks.ifeval_phrases import instruction_phrases

ROWS: list[dict[str, Any]] = [
    {
        "key": 1,
        "prompt": "Describe a lamp. Do not use any commas. Mention the word bright at least twice.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
        "kwargs": [{}, {"keyword": "bright", "frequency": 2, "relation": "at least"}],
    },
    {
        "key": 2,
        "prompt": "Name a river. Your answer must have fewer than 3 sentences.",
        "instruction_id_list": ["length_constraints:number_sentences"],
        # As the hub has it: all arguments of all kinds, null where they are not the kind's own.
        "kwargs": [{"num_sentences": 3, "relation": "less than", "keywords": None}],
    },
    {
        "key": 3,
        "prompt": "Write about a cat without the word paw, in all lowercase letters.",
        "instruction_id_list": ["keywords:forbidden_words", "change_case:english_lowercase"],
        "kwargs": [{"forbidden_words": ["paw"]}, {}],
    },
    {
        "key": 4,
        "prompt": "Post a greeting with at least 2 hashtags, each beginning with #.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "#", "let_frequency": 2, "let_relation": "at least"}],
    },
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def ifeval(tmp_path: Path) -> Any:
    return open_benchmark("ifeval", path=written(tmp_path / "rows.jsonl", ROWS))


def item(benchmark: Any, key: int) -> Item:
    [found] = [item for item in benchmark.items() if item.id == str(key)]
    return found


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        "A bright lamp is bright.",
        "A bright, bright lamp.",
        "Sure, here:\nA bright lamp is bright.",
        "the cat sleeps on the warm roof",
        "the cat licks its paw on the warm roof",
        "<think>a, b</think>A bright lamp is bright.",
        "",
    ],
)
def test_verdicts_are_those_of_the_package(tmp_path: Path, answer: str, loose: bool) -> None:
    benchmark = open_benchmark("ifeval", path=written(tmp_path / "r.jsonl", ROWS), loose=loose)
    for key in (1, 3):
        row = ROWS[key - 1]
        sample = IFEvalSample(**row)
        _, scores = evaluate_output_for_sample("ifeval", sample, answer)
        expected = scores.binary_loose if loose else scores.binary_strict
        verdict = benchmark.check(item(benchmark, key), answer)
        assert verdict.checked
        assert verdict.passed == bool(expected)


def test_the_reason_names_what_is_not_followed(ifeval: Any) -> None:
    verdict = ifeval.check(item(ifeval, 1), "A bright, bright lamp.")
    assert verdict.failed
    assert verdict.reason == "not followed: punctuation:no_comma"


def test_without_the_data_of_nltk_it_is_unchecked_and_nothing_is_downloaded(
    ifeval: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in list(vars(nltk.data)):
        if name.startswith("clear_cache"):
            getattr(nltk.data, name)()
    from if_verifiable.ifeval import instructions_util

    instructions_util._get_sentence_tokenizer.cache_clear()
    verdict = ifeval.check(item(ifeval, 2), "The Nile. It is long.")
    assert not verdict.checked
    assert not verdict.passed
    assert not verdict.failed
    assert "punkt_tab" in verdict.reason


def test_a_broken_constraint_decides_whatever_cannot_be_checked(tmp_path: Path) -> None:
    row = {
        "key": 9,
        "prompt": "Answer in fewer than 3 sentences. Use no commas.",
        "instruction_id_list": ["length_constraints:number_sentences", "punctuation:no_comma"],
        "kwargs": [{"num_sentences": 3, "relation": "less than"}, {}],
    }
    benchmark = open_benchmark("ifeval", path=written(tmp_path / "r.jsonl", [row]))
    assert benchmark.check(benchmark.items()[0], "Yes, it is.").failed


def test_chance_decides_nothing_and_is_left_as_it_was(ifeval: Any) -> None:
    asked, answer = item(ifeval, 3), "ja oui the und"
    random.seed(5)
    before = random.getstate()
    verdicts = {ifeval.check(asked, answer) for _ in range(20)}
    assert len(verdicts) == 1
    assert random.getstate() == before


def test_a_sign_is_counted_as_it_is(ifeval: Any) -> None:
    """The published class draws a letter in place of #; here # is counted."""
    asked = item(ifeval, 4)
    assert all(ifeval.check(asked, "Hello #a #b").passed for _ in range(10))
    assert all(ifeval.check(asked, "Hello there, dear friends #a").failed for _ in range(10))
    assert ifeval.can_pass(asked, "Hello #a #b") is True


def test_beginnings(ifeval: Any) -> None:
    lamp = item(ifeval, 1)
    assert ifeval.can_pass(lamp, "") is None
    assert ifeval.can_pass(lamp, "A bright lamp") is None
    assert ifeval.can_pass(lamp, "A bright lamp,") is False
    assert ifeval.can_pass(lamp, "bright bright") is None  # a comma may follow
    assert ifeval.can_pass(lamp, "<think>a, b") is None
    assert ifeval.can_pass(lamp, "<think>a, b</think>A lamp") is None
    assert ifeval.can_pass(lamp, "<think>a, b</think>A lamp,") is False


def test_phrases_occur_in_the_prompt_and_leave_the_question_out(ifeval: Any) -> None:
    assert item(ifeval, 1).instructions == (
        "Do not use any commas.",
        "Mention the word bright at least twice.",
    )
    for asked in ifeval.items():
        assert asked.instructions
        assert all(phrase in asked.messages[0]["content"] for phrase in asked.instructions)


def test_the_table_of_arguments_is_the_package_s() -> None:
    assert set(ARGUMENTS) == set(INSTRUCTION_DICT)
    for kind, names in ARGUMENTS.items():
        assert sorted(INSTRUCTION_DICT[kind](kind).get_instruction_args_keys()) == sorted(names)
    assert set(NEEDS_PUNKT) <= set(ARGUMENTS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": None}, "field 'prompt' is null"),
        ({"prompt": "  "}, "field 'prompt' is blank"),
        ({"key": None}, "field 'key'"),
        ({"kwargs": [{}]}, "field 'kwargs'"),
        ({"instruction_id_list": ["new:kind", "keywords:frequency"]}, "unknown kind 'new:kind'"),
        ({"kwargs": [{}, {"keyword": "bright", "frequency": 2}]}, "relation is missing"),
        (
            {"kwargs": [{}, {"keyword": "a", "frequency": 2, "relation": "about"}]},
            "relation is neither",
        ),
        ({"kwargs": [{}, {"keyword": "a", "frequency": "2", "relation": "at least"}]}, "frequency"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    path = written(tmp_path / "rows.jsonl", [ROWS[2], ROWS[0] | change, ROWS[3]])
    with pytest.raises(FileFormatError, match=r"rows\.jsonl, line 2: ") as error:
        open_benchmark("ifeval", path=path)
    assert named in str(error.value)
    with pytest.warns(UserWarning, match=r"rows\.jsonl, line 2: "):
        kept = open_benchmark("ifeval", path=path, on_error="skip")
    assert [one.id for one in kept.items()] == ["3", "4"]


@pytest.mark.parametrize(
    ("prompt", "kind", "args", "phrases"),
    [
        ("Write a note about tea in JSON format.", "detectable_format:json_format", {},
         ["in JSON format."]),
        ("Tell a story about a cat without using any commas.", "punctuation:no_comma", {},
         ["without using any commas."]),
        ("Do not use any commas, and be kind.", "punctuation:no_comma", {},
         ["Do not use any commas,"]),
        ("Avoid these words: oak, elm and ash. Write on trees like an oak.",
         "keywords:forbidden_words", {"forbidden_words": ["oak", "elm", "ash"]},
         ["Avoid these words: oak, elm and ash."]),
        ("Is the sea blue? End it with \"So, yes.\" Thanks!", "startend:end_checker",
         {"end_phrase": "So, yes."}, ["End it with \"So, yes.\""]),
        ("A poem.\nAdd a postscript with P.S.", "detectable_content:postscript",
         {"postscript_marker": "P.S."}, ["Add a postscript with P.S."]),
        ("Nothing is said here.", "startend:quotation", {}, []),
    ],
)  # fmt: skip
def test_phrases_by_hand(prompt: str, kind: str, args: dict[str, Any], phrases: list[str]) -> None:
    found = instruction_phrases(prompt, [(kind, args)])
    assert list(found) == phrases
