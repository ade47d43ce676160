"""GSM8K and MATH: what counts as the answer of a completion, and when it is settled."""

from __future__ import annotations

import builtins
import itertools
import json
import random
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import open_benchmark
from tl_contrastive_lrp.study.benchmarks.maths import boxed, number_of
from tl_contrastive_lrp.study.collect import CollectSettings
from tl_contrastive_lrp.study.collect.collect import complete
from tl_contrastive_lrp.study.collect.place import Completion

GSM8K = [
    {
        "question": "Two crates hold 600 pens each. How many pens?",
        "answer": "2*600=1200\n#### 1,200",
    },
    {"question": "A bike loses 3 of its value of 1. What is left?", "answer": "1-3=-2\n#### -2"},
]
MATH = [
    {
        "problem": r"What is half of $\frac{1}{2}$?",
        "solution": r"It is $\boxed{\frac{1}{4}}$.",
        "answer": r"\frac{1}{4}",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "made/up/1.json",
    },
    {
        "problem": "Write the interval from 0 to 1 without its ends.",
        "solution": r"$\boxed{(0,1)}$",
        "answer": "(0,1)",
        "subject": "Algebra",
        "level": 2,
        "unique_id": "made/up/2.json",
    },
]


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def gsm8k(tmp_path: Path) -> Any:
    return open_benchmark("gsm8k", path=written(tmp_path / "gsm8k.jsonl", GSM8K))


@pytest.fixture
def math(tmp_path: Path) -> Any:
    return open_benchmark("math", path=written(tmp_path / "math.jsonl", MATH))


@pytest.mark.parametrize(
    ("completion", "number"),
    [
        ("He has 3 and 4, so 7.", "7"),
        ("so 7 of 9.\n#### 7", "7"),
        ("#### 7\nQuestion: what is 8? #### 9", "7"),  # the first counts
        ("#### $1,200.50", "1200.50"),
        ("#### **12**", "12"),
        (r"#### \(5\)", "5"),
        ("#### -3", "-3"),
        ("##### 4 is a heading, 5", "5"),
        ("#### Answer: 8", "8"),  # the number does not follow ####: the last one counts
        ("#### The answer is 8, not 9", "9"),
        (r"\boxed{1} or \boxed{x = 2} of 3", "2"),
        (r"\boxed{\text{none}} 3", "3"),
        ("16-3", "3"),
        ("it is -3", "-3"),
        ("(16)-3", "3"),
        ("1,200", "1200"),
        ("12,34", "34"),
        ("costs $.50", "0.50"),
        ("100%", "100"),
        ("18.", "18"),
        ("18.0", "18"),
        ("no number", None),
    ],
)
def test_the_number_of_a_completion(completion: str, number: str | None) -> None:
    assert number_of(completion) == (None if number is None else Decimal(number))


def test_gsm8k_verdicts(gsm8k: Any) -> None:
    pens, bike = gsm8k.items()
    assert (pens.id, bike.id) == ("1", "2")
    assert gsm8k.check(pens, "They hold 1200.00 pens").passed
    assert gsm8k.check(bike, "#### -2").passed
    wrong = gsm8k.check(pens, "#### 120")
    assert wrong.failed
    assert wrong.reason == "the answer is 120, but should be 1200"
    assert gsm8k.check(pens, "many").failed


def test_what_is_settled_no_continuation_changes(gsm8k: Any) -> None:
    pens = gsm8k.items()[0]
    rng = random.Random(0)
    pieces = ["#### ", "1", "2", "0", ",", ".", " ", "\n", "1,200", r"\boxed{", "}", "so "]
    settled: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    for _ in range(3000):
        beginning = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        said = gsm8k.can_pass(pens, beginning)
        settled[said] += 1
        if said is not None:
            for _ in range(20):
                rest = "".join(rng.choices(pieces, k=rng.randint(0, 6)))
                assert gsm8k.check(pens, beginning + rest).passed is said, (beginning, rest)
    assert min(settled.values()) > 20


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ("The answer is 5.", None),
        ("#### 1200", None),
        ("#### 1,200,", None),
        ("#### 1200.", None),
        ("#### 1200.0\n", True),
        ("#### 1200 ", True),
        ("#### 120 ", False),
        ("#### 1201", False),
        ("#### 3", False),
        ("#### -", None),  # a text may follow that ends with 1200
        ("#### -1", False),
        ("#### 0", None),
        ("#### 1,2", None),
        ("#### 1,20", None),
        ("#### 1,3", False),
        ("#### 12,", False),
        ("#### 1200.5", False),
        ("#### 1,200.0", None),
        ("#### 1,2000", False),  # its number is 1
    ],
)
def test_gsm8k_beginnings(gsm8k: Any, beginning: str, expected: bool | None) -> None:
    assert gsm8k.can_pass(gsm8k.items()[0], beginning) is expected


@pytest.mark.parametrize("reference", ["12", "1", "-3", "0.5", "0", "3000", "12.5"])
def test_gsm8k_is_false_exactly_from_where_no_continuation_passes(
    tmp_path: Path, reference: str
) -> None:
    rows = [{"question": "How much?", "answer": f"#### {reference}"}]
    gsm8k: Any = open_benchmark("gsm8k", path=written(tmp_path / "g.jsonl", rows))
    [item] = gsm8k.items()
    expected = Decimal(reference)
    rng = random.Random(0)
    signs = sorted(set(reference) | set("0,"))
    longest = 7 if len(signs) < 4 else 5  # "00," needs seven signs to become 003,000
    rests = ["".join(r) for n in range(longest + 1) for r in itertools.product(signs, repeat=n)]
    said: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    for _ in range(60):
        number = "".join(rng.choices(reference * 2 + "0,.-4", k=rng.randint(1, 5)))
        beginning = rng.choice(["#### ", "It is 12.\n#### $"]) + number
        answer = gsm8k.can_pass(item, beginning)
        said[answer] += 1
        passes = any(number_of(beginning + rest) == expected for rest in rests)
        assert passes is (answer is not False), (beginning, answer)
    assert min(said[False], said[None]) > 5


def test_gsm8k_locates_the_first_wrong_digit(gsm8k: Any) -> None:
    pens, bike = gsm8k.items()
    for item, text, wrong in ((pens, "So #### 1,300 pens", "3"), (bike, "#### -20", "0")):
        first = next(i for i in range(len(text)) if gsm8k.can_pass(item, text[: i + 1]) is False)
        assert text[first] == wrong


def test_the_request_is_the_instruction(tmp_path: Path) -> None:
    path = written(tmp_path / "g.jsonl", GSM8K)
    for request in (None, "Answer with a number.", ""):
        asked = open_benchmark("gsm8k", path=path, request=request).items()[0]
        assert asked.messages is not None
        content = asked.messages[0]["content"]
        assert content.startswith(GSM8K[0]["question"])
        assert bool(asked.instructions) == (request != "")
        assert all(phrase in content for phrase in asked.instructions)


def test_math_verdicts(math: Any) -> None:
    quarter, interval = math.items()
    assert quarter.id == "made/up/1.json"
    assert math.check(quarter, r"So $\boxed{0.25}$.").passed
    assert math.check(quarter, r"So the answer is $\frac{2}{8}$.").passed
    assert math.check(quarter, r"So $\boxed{\frac{1}{2}}$.").failed
    assert math.check(quarter, "I do not know.").failed
    assert math.check(interval, r"$\boxed{(0,1)}$").passed
    assert math.check(interval, r"$\boxed{[0,1]}$").failed
    assert math.can_pass(quarter, r"$\boxed{7}$ ") is None  # a later box would count


def test_math_outside_the_main_thread_is_unchecked(math: Any) -> None:
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(math.check(math.items()[0], r"$\boxed{7}$"))
    )
    thread.start()
    thread.join()
    assert not verdicts[0].checked


def test_without_math_verify_it_is_unchecked(math: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("math_verify"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    verdict = math.check(math.items()[0], r"$\boxed{\frac{1}{4}}$")
    assert not verdict.checked
    assert "tl_contrastive_lrp[study]" in verdict.reason


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{1}", "1"),
        (r"\boxed{\frac{1}{2}} and", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        ("none", None),
    ],
)
def test_boxes(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("name", "row", "named"),
    [
        ("gsm8k", {"question": "How many?"}, "field 'answer' is missing"),
        ("gsm8k", {"question": "How many?", "answer": "12"}, "no number after ####"),
        ("gsm8k", {"question": 3, "answer": "#### 12"}, "field 'question' is a number"),
        ("math", {k: v for k, v in MATH[0].items() if k != "answer"}, "field 'answer' is missing"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, name: str, row: Any, named: str) -> None:
    good = GSM8K[0] if name == "gsm8k" else MATH[0]
    path = written(tmp_path / "rows.jsonl", [good, row])
    with pytest.raises(FileFormatError, match=r"rows\.jsonl, line 2: ") as error:
        open_benchmark(name, path=path)
    assert named in str(error.value)


def test_a_given_beginning_belongs_to_the_answer(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", GSM8K)
    gsm8k = open_benchmark("gsm8k", path=path, begin="####")
    item = gsm8k.items()[0]
    assert item.messages is not None
    assert [one["role"] for one in item.messages] == ["user", "assistant"]
    assert item.messages[1]["content"] == "####"
    # Without the beginning, the last number would count: 4.
    assert gsm8k.check(item, " 1200\n\nSo 4.").passed
    assert not gsm8k.check(item, " 12\n\nSo 1200.").passed
    assert gsm8k.can_pass(item, " 12") is None
    assert gsm8k.can_pass(item, " 13") is False
    math = open_benchmark("math", path=written(tmp_path / "m.jsonl", MATH), begin=r"\boxed{")
    asked = math.items()[0]
    assert math.check(asked, r"\frac{1}{4}} is the answer.").passed
    assert not math.check(asked, r"\frac{1}{2}} is the answer.").passed


def test_a_given_beginning_ends_the_prompt(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", GSM8K)
    model = clrp.load_demo_model(device="cpu")
    settings = CollectSettings(max_new_tokens=3)
    ids = []
    for begin in ("", "####"):
        items = open_benchmark("gsm8k", path=path, begin=begin).items()[:1]
        [done] = complete(model, items, settings)
        assert isinstance(done, Completion)
        ids.append(done.prompt_ids)
    # In a new message the model would have a template's words after the beginning.
    assert ids[1][: len(ids[0])] == ids[0]
    rest = model.tokenizer.decode(list(ids[1][len(ids[0]) :]))
    assert rest.strip() == "####"


def test_only_short_answers(tmp_path: Path) -> None:
    def asked(name: str, rows: list[Any], **options: Any) -> list[str | None]:
        path = written(tmp_path / f"{name}.jsonl", rows)
        return [one.id for one in open_benchmark(name, path=path, **options).items()]

    # 1,200 has four characters without its comma, -2 has two.
    assert asked("gsm8k", GSM8K, longest_answer=2) == ["2"]
    assert asked("gsm8k", GSM8K, longest_answer=4) == ["1", "2"]
    assert asked("math", MATH, longest_answer=5) == ["made/up/2.json"]
    with pytest.raises(FileFormatError, match=r"No answer of gsm8k .* longest_answer=2"):
        asked("gsm8k", GSM8K, longest_answer=2, limit=1)


def test_answered_questions_come_first(tmp_path: Path) -> None:
    """The last rows, answered as the item is to be; they are not asked themselves."""
    rows = [*GSM8K, {"question": "One and one?", "answer": "1+1=2\n#### 2"}]
    path = written(tmp_path / "rows.jsonl", rows)
    plain = open_benchmark("gsm8k", path=path, shots=2, request="")
    [item] = plain.items()
    assert item.id == "1"
    assert item.messages == (
        {"role": "user", "content": GSM8K[1]["question"]},
        {"role": "assistant", "content": GSM8K[1]["answer"]},
        {"role": "user", "content": "One and one?"},
        {"role": "assistant", "content": "1+1=2\n#### 2"},
        {"role": "user", "content": GSM8K[0]["question"]},
    )
    begun = open_benchmark("gsm8k", path=path, shots=1, begin="####", limit=1)
    [item] = begun.items()
    assert item.messages is not None
    assert [one["role"] for one in item.messages] == ["user", "assistant"] * 2
    assert item.messages[1]["content"] == "#### 2"
    assert item.messages[0]["content"].endswith(item.instructions[0])  # asked like the question

    path = written(tmp_path / "math.jsonl", MATH)
    for begin, answer in {"": MATH[1]["solution"], r"\boxed{": r"\boxed{(0,1)}"}.items():
        [item] = open_benchmark("math", path=path, shots=1, begin=begin).items()
        assert item.messages is not None
        assert item.messages[1] == {"role": "assistant", "content": answer}


@pytest.mark.parametrize(
    ("shots", "error", "said"),
    [
        (2, FileFormatError, r"gsm8k has 2 rows here, of which shots=2 leaves none to ask"),
        (-1, ValueError, r"shots is -1; give a whole number"),
        ("two", ValueError, r"shots is 'two'"),
        (True, ValueError, r"shots is True"),
    ],
)
def test_wrong_shots(tmp_path: Path, shots: Any, error: type[Exception], said: str) -> None:
    path = written(tmp_path / "rows.jsonl", GSM8K)
    with pytest.raises(error, match=said):
        open_benchmark("gsm8k", path=path, shots=shots)


def test_a_malformed_answered_question_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GSM8K[0]) + "\n{broken\n", "utf-8")
    with pytest.raises(FileFormatError, match=r"rows\.jsonl, line 2"):
        open_benchmark("gsm8k", path=path, shots=1)
