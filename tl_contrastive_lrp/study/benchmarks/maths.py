r"""GSM8K and MATH: word problems with a numeric answer, and problems whose answer is an expression.

GSM8K's reference is the number after ``####`` at the end of its published solution. The answer of
a completion is, in this order:

1. the first number that directly follows a ``####`` on its line, with nothing between but spaces
   and the marks ``$ * \ ( { [ :``;
2. otherwise the last number inside the last ``\boxed{...}``;
3. otherwise the last number anywhere.

Thousands may be grouped by commas; a currency or percent sign is no part of the number. A minus
counts unless a digit, a letter or a closing bracket is before it, as in ``16-3``. The two numbers
are compared exactly, as decimals: 18, 18.0 and 18.00 are equal.

Because the first ``####`` counts, a completion is decided once the number after it is complete, and
wrong as soon as it holds a sign, a digit or a point with which no number equal to the reference
begins. With 1200 as reference, ``#### 13`` is wrong; ``#### 12``, ``#### 0`` (of 01200) and
``#### 1,2`` are open, and so is ``#### -``, after which no number need follow.

MATH is checked by the package ``math-verify``, which parses the reference and the last answer of
the completion (preferring ``\boxed{...}``) and compares them as expressions. A later box always
counts more than an earlier one, so no beginning decides a completion.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import ClassVar

from ...errors import FileFormatError
from ..cases import Verdict
from .item import Item
from .published import OnError, Published, missing_extra
from .rows import Row, Table

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = rf"(?:(?<![\w)\]}}])-\s?)?\$?(?:{_UNSIGNED})"
_ANY = re.compile(_NUMBER)
_MARKED = re.compile(rf"(?<!#)####(?!#)[ \t$*\\(\[{{:]*?({_NUMBER})")
_CAN_GROW = re.compile(r"[.,]?\d*\Z")
_WHOLE = re.compile(r"\d*|\d{1,3}(?:,\d{3})+")
_GROUPS = re.compile(r"\d{1,3}(?:,\d{3})*,\d{0,3}")


def _decimal(number: str) -> Decimal:
    return Decimal(re.sub(r"[\s$,]", "", number))


def marked_number(text: str) -> tuple[Decimal, str | None] | None:
    """The number after the first ``####`` that has one, and what more text could change.

    Args:
        text: A completion or the beginning of one.

    Returns:
        The number, and the end of the text from the number's sign on if more text could change
        the number, else None; None in place of both if there is no number.
    """
    match = _MARKED.search(text)
    if match is None:
        return None
    open = _CAN_GROW.fullmatch(text[match.end() :]) is not None
    return _decimal(match[1]), text[match.start(1) :] if open else None


def can_become(written: str, expected: Decimal) -> bool:
    """Whether a number that stands at the end of a text can grow to an expected one.

    Growing is by whole digits, commas before groups of three, and a point. A comma that turns out
    to begin no group ends the number before it, as in ``1,2000``, whose number is 1.

    Args:
        written: What is written of the number: its sign, then digits, commas and points.
        expected: The number that it should become.

    Returns:
        Whether a longer text has the expected number; that the number is as expected already is
        for the caller to see.
    """
    digits = "".join(str(int(c)) if c.isdecimal() else c for c in re.sub(r"[\s$]", "", written))
    if expected and digits.startswith("-") != (expected < 0):
        return False
    whole, point, fraction = digits.removeprefix("-").partition(".")
    wanted, _, wanted_fraction = f"{abs(expected):f}".partition(".")
    wanted, wanted_fraction = wanted.lstrip("0"), wanted_fraction.rstrip("0")
    if point:
        if not (_WHOLE.fullmatch(whole) and (fraction.isdecimal() or not fraction)):
            return False
        same = whole.replace(",", "").lstrip("0") == wanted
        return same and (wanted_fraction + "0" * len(fraction)).startswith(fraction)
    known = whole.replace(",", "").lstrip("0")
    head, comma, group = whole.rpartition(",")
    if not comma:
        return wanted.startswith(known)
    if not _GROUPS.fullmatch(whole):
        return False
    if len(group) == 3 and _decimal(head) == abs(expected):
        return True  # one more digit, and the last comma begins no group
    missing = len(wanted) - len(known)
    fills = missing >= 3 - len(group) and missing % 3 == -len(group) % 3
    return wanted.startswith(known) and (not known or fills)


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}``, with braces in it balanced.

    Args:
        text: A completion.

    Returns:
        The content; None if no box is closed.
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for brace in re.finditer(r"(?<!\\)[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[start : start + brace.start()]
    return None


def number_of(completion: str) -> Decimal | None:
    """The numeric answer of a completion, by the three steps of the module's description.

    Args:
        completion: What a model wrote.

    Returns:
        The number; None if the text holds none.
    """
    marked = marked_number(completion)
    if marked is not None:
        return marked[0]
    for text in (boxed(completion) or "", completion):
        numbers = _ANY.findall(text)
        if numbers:
            return _decimal(numbers[-1])
    return None


class _Maths(Published):
    """What both have in common: the problem, and a sentence that says how to answer.

    Args:
        rows: The rows as published.
        limit: The most items.
        on_error: What to do with malformed rows.
        request: The sentence after the problem, its only instruction; None for the class's own,
            "" for none.
        begin: What every answer begins with, such as ``####``. It is put into the model's mouth:
            the chat ends with it, the completion goes on from there, and the checker reads both.
        longest_answer: Only items whose right answer has at most that many characters (of GSM8K,
            without commas), such as one digit, which one token decides; None for all. It chooses
            among the first ``limit``.
        shots: So many answered questions come before each question, as messages of the chat. They
            are the last rows, which are no items then. Answers are as published, or where answers
            begin with ``begin``, that and the right answer alone.

    Raises:
        FileFormatError: As for all benchmarks; or no right answer is so short, or ``shots`` leaves
            no row to ask.
        ValueError: As for all benchmarks; or ``shots`` is negative.
    """

    default_request: ClassVar[str]

    def __init__(
        self,
        rows: Iterable[Row | FileFormatError],
        limit: int | None = None,
        on_error: OnError = "raise",
        request: str | None = None,
        begin: str = "",
        longest_answer: int | None = None,
        shots: int = 0,
    ) -> None:
        if not isinstance(shots, int) or isinstance(shots, bool) or shots < 0:
            raise ValueError(f"shots is {shots!r}; give a whole number, 0 for none.")
        self.begin = begin
        self.request = self.default_request if request is None else request
        self._shots: tuple[Mapping[str, str], ...] = ()
        if shots:
            rows = list(rows)
            if len(rows) <= shots:
                raise FileFormatError(
                    f"{self.name} has {len(rows)} rows here, of which shots={shots} leaves none to "
                    "ask; give more rows or fewer shots."
                )
            rows, last = rows[:-shots], rows[-shots:]
            self._shots = tuple(message for row in last for message in self._answered(row))
        super().__init__(rows, limit, on_error)
        if longest_answer is not None:
            self._items = tuple(i for i in self._items if len(self._answer(i)) <= longest_answer)
            if not self._items:
                raise FileFormatError(
                    f"No answer of {self.name} has at most longest_answer={longest_answer} "
                    "characters."
                )

    def _answer(self, item: Item) -> str:
        """The right answer of an item, as short as it can be written."""
        return item.reference or ""

    def _solution(self, row: Row) -> str:
        """The answer as published, with the way to it."""
        raise NotImplementedError

    def _answered(self, row: Row | FileFormatError) -> tuple[Mapping[str, str], ...]:
        """A row as question and answer."""
        if isinstance(row, FileFormatError):
            raise row
        item = self._item(row)
        assert item.messages is not None
        answer = self._begun(self._answer(item)) if self.begin else self._solution(row)
        return (item.messages[0], {"role": "assistant", "content": answer})

    def _begun(self, answer: str) -> str:
        """A right answer after ``begin``."""
        return f"{self.begin} {answer}"

    def _asked(self, id: str, problem: str, reference: str, row: Row) -> Item:
        text = f"{problem}\n\n{self.request}" if self.request else problem
        return Item(
            id=id,
            messages=(
                *self._shots,
                {"role": "user", "content": text},
                *([{"role": "assistant", "content": self.begin}] if self.begin else []),
            ),
            reference=reference,
            instructions=(self.request,) if self.request else (),
            row=row.values,
            source=row.where,
        )


class GSM8K(_Maths):
    """GSM8K: word problems whose answer is a number."""

    name = "gsm8k"
    table = Table("openai/gsm8k", "MIT", ("question", "answer"), subset="main")
    default_request = "Reason step by step, and end with the answer as a number after ####."

    def _item(self, row: Row) -> Item:
        question, answer = row.text("question"), row.text("answer")
        marked = marked_number(answer)
        if marked is None:
            raise row.wrong("answer", "has no number after ####")
        return self._asked(str(row.number), question, answer, row)

    def _answer(self, item: Item) -> str:
        return f"{self._expected(item):f}"

    def _solution(self, row: Row) -> str:
        return row.text("answer")

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether the completion's number is the reference's."""
        expected = self._expected(item)
        found = number_of(self.begin + completion)
        if found is None:
            return Verdict(False, "there is no number in the completion")
        if found != expected:
            return Verdict(False, f"the answer is {found}, but should be {expected}")
        return Verdict(True)

    def can_pass(self, item: Item, beginning: str) -> bool | None:
        """Whether the number after ``####`` is right; None as long as it can become so."""
        marked = marked_number(self.begin + beginning)
        if marked is None:
            return None
        (number, written), expected = marked, self._expected(item)
        if written is None:
            return number == expected
        return None if number == expected or can_become(written, expected) else False

    def _expected(self, item: Item) -> Decimal:
        marked = marked_number(item.reference or "")
        if marked is None:
            raise ValueError(f"The reference of item {item.id!r} has no number after ####.")
        return marked[0]


class MATH(_Maths):
    """MATH-500: competition problems whose answer is an expression."""

    name = "math"
    table = Table(
        "HuggingFaceH4/MATH-500",
        "MIT",
        ("problem", "solution", "answer", "subject", "level", "unique_id"),
    )
    default_request = r"Reason step by step, and put your final answer within \boxed{}."

    def _item(self, row: Row) -> Item:
        id = row.text("unique_id") if "unique_id" in row.values else str(row.number)
        return self._asked(id, row.text("problem"), row.text("answer"), row)

    def _solution(self, row: Row) -> str:
        return row.text("solution")

    def _begun(self, answer: str) -> str:
        opened = self.begin.count("{") - self.begin.count("}")
        return f"{self.begin}{answer}{'}' * max(0, opened)}"

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether math-verify finds the completion's answer equal to the reference."""
        try:
            from math_verify import parse, verify
        except ImportError:
            return missing_extra("math-verify", "Checking MATH")
        if threading.current_thread() is not threading.main_thread():
            return Verdict.unchecked("math-verify limits its time only in the main thread")
        expected = parse(rf"\boxed{{{item.reference}}}")
        if not expected:
            return Verdict.unchecked("math-verify cannot read the reference")
        found = parse(self.begin + completion)
        if not found:
            return Verdict(False, "there is no answer in the completion")
        if verify(expected, found):
            return Verdict(True)
        return Verdict(False, f"the answer is {found[-1]}, but should be {item.reference}")
