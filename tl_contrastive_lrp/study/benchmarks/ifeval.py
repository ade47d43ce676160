"""IFEval: prompts with constraints that a program can check.

Constraints are checked by the classes of the package ``if-verifiable``, which are the published
ones. A completion passes if it follows all of them. Five things are done here besides:

- Nothing is downloaded. Two kinds of constraint (``NEEDS_PUNKT``) need NLTK's data "punkt_tab";
  where it is not installed they cannot be checked, and a completion that breaks no other
  constraint is unchecked.
- Language detection draws random numbers; it gets the same seed at each call.
- The published class for the frequency of a letter replaces one outside a-z, such as "#", by a
  letter drawn at random. Here the one in the row is counted.
- Arguments that a row lacks are drawn at random by the published classes; here that row is
  malformed.
- Thoughts up to ``</think>`` are no part of the answer.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...errors import FileFormatError
from ..cases import Verdict
from .ifeval_beginnings import still_possible
from .ifeval_phrases import instruction_phrases
from .item import Item
from .published import OnError, Published, missing_extra
from .rows import Row, Table

# The arguments of each kind of constraint, all of which a row must give.
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "change_case:capital_word_frequency": ("capital_frequency", "capital_relation"),
    "change_case:english_capital": (),
    "change_case:english_lowercase": (),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "combination:two_responses": (),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:constrained_response": (),
    "detectable_format:json_format": (),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:title": (),
    "keywords:existence": ("keywords",),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:frequency": ("keyword", "frequency", "relation"),
    "keywords:letter_frequency": ("letter", "let_frequency", "let_relation"),
    "language:response_language": ("language",),
    "length_constraints:nth_paragraph_first_word": (
        "num_paragraphs",
        "nth_paragraph",
        "first_word",
    ),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_sentences": ("num_sentences", "relation"),
    "length_constraints:number_words": ("num_words", "relation"),
    "punctuation:no_comma": (),
    "startend:end_checker": ("end_phrase",),
    "startend:quotation": (),
}
# Kinds that split a text into sentences or words with NLTK's data.
NEEDS_PUNKT = ("length_constraints:number_sentences", "change_case:capital_word_frequency")

_LISTS = ("keywords", "forbidden_words")
_NUMBERS = (
    "capital_frequency", "frequency", "let_frequency", "nth_paragraph", "num_bullets",
    "num_highlights", "num_paragraphs", "num_placeholders", "num_sections", "num_sentences",
    "num_words",
)  # fmt: skip


class IFEval(Published):
    """IFEval: 541 prompts, each with one to three constraints.

    Args:
        rows: The rows as published.
        limit: The most items.
        on_error: What to do with malformed rows.
        loose: Whether a constraint counts as followed where it is without the first or last line
            or the asterisks, the published "loose" accuracy; by default the text counts as it is.
    """

    name = "ifeval"
    table = Table(
        "google/IFEval",
        "Apache-2.0",
        ("key", "prompt", "instruction_id_list", "kwargs"),
        split="train",
    )

    def __init__(
        self,
        rows: Iterable[Row | FileFormatError],
        limit: int | None = None,
        on_error: OnError = "raise",
        loose: bool = False,
    ) -> None:
        self.loose = loose
        super().__init__(rows, limit, on_error)

    def _item(self, row: Row) -> Item:
        prompt = row.text("prompt")
        key = row.values.get("key")
        if not isinstance(key, int | str) or isinstance(key, bool):
            raise row.wrong("key", "must be a number or a text")
        constraints = _constraints(row)
        return Item(
            id=str(key),
            messages=({"role": "user", "content": prompt},),
            instructions=instruction_phrases(prompt, constraints),
            row={**row.values, "constraints": constraints},
            source=row.where,
        )

    def check(self, item: Item, completion: str) -> Verdict:
        """Whether all constraints are followed; the reason names those that are not."""
        try:
            from if_verifiable.common import strip_thinking
        except ImportError:
            return missing_extra("if-verifiable", "Checking IFEval")
        answer = strip_thinking(completion)
        if not answer.strip():
            return Verdict(False, "the answer is empty")
        followed = [(kind, self._follows(kind, args, answer)) for kind, args in _of(item)]
        broken = [kind for kind, yes in followed if yes is False]
        if broken:
            return Verdict(False, "not followed: " + ", ".join(broken))
        unknown = [kind for kind, yes in followed if yes is None]
        if unknown:
            return Verdict.unchecked(
                f"{', '.join(unknown)} needs NLTK's data punkt_tab: nltk.download('punkt_tab')"
            )
        return Verdict(True)

    def can_pass(self, item: Item, beginning: str) -> bool | None:
        """Whether an answer that begins so can still follow all constraints.

        It is False as soon as one constraint is broken for good, True once all of them are
        fulfilled for good, and otherwise None. Thoughts are passed over; in the loose reading,
        where a first line can be taken back, nothing is told.
        """
        if self.loose:
            return None
        answer = beginning.lstrip()
        if answer.startswith("<think>"):
            if "</think>" not in answer:
                return None
            answer = answer.split("</think>", 1)[1].lstrip()
        if not answer:
            return None
        possible = [still_possible(kind, args, answer) for kind, args in _of(item)]
        return False if False in possible else True if all(possible) else None

    def _follows(self, kind: str, args: Mapping[str, Any], answer: str) -> bool | None:
        """Whether an answer follows one constraint; None without NLTK's data."""
        from if_verifiable.common import get_loose_transformations

        texts = get_loose_transformations(answer) if self.loose else [answer]
        try:
            return any(bool(text.strip()) and follows(kind, args, text) for text in texts)
        except LookupError:
            return None


def follows(kind: str, args: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer follows one constraint, by the published class.

    Args:
        kind: The kind of constraint, a key of ``ARGUMENTS``.
        args: Its arguments.
        answer: The whole answer.

    Returns:
        Whether it is followed.

    Raises:
        LookupError: NLTK's data is needed and not installed.
    """
    from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT

    letter = str(args.get("letter", "a")).lower()
    if kind == "keywords:letter_frequency" and not "a" <= letter <= "z":
        count = answer.lower().count(letter)
        enough = bool(count >= args["let_frequency"])
        return enough if args["let_relation"] == "at least" else not enough
    with _same_chance():
        checker = INSTRUCTION_DICT[kind](kind)
        checker.build_description(**args)
        return bool(checker.check_following(answer))


@contextmanager
def _same_chance() -> Iterator[None]:
    """Seed what the package draws at random, and leave both generators as they were."""
    from langdetect import DetectorFactory

    seed, state = DetectorFactory.seed, random.getstate()
    DetectorFactory.seed = 0
    random.seed(0)
    try:
        yield
    finally:
        DetectorFactory.seed = seed
        random.setstate(state)


def _of(item: Item) -> Iterable[tuple[str, Mapping[str, Any]]]:
    constraints: Iterable[tuple[str, Mapping[str, Any]]] = item.row["constraints"]
    return constraints


def _constraints(row: Row) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The constraints of a row, each with the arguments that are its own."""
    kinds, kwargs = row.values.get("instruction_id_list"), row.values.get("kwargs")
    if not isinstance(kinds, list) or not kinds:
        raise row.wrong("instruction_id_list", "must be a list that is not empty")
    if not isinstance(kwargs, list) or len(kwargs) != len(kinds):
        raise row.wrong("kwargs", "must be a list with one object for each instruction")
    constraints = []
    for kind, given in zip(kinds, kwargs, strict=True):
        if kind not in ARGUMENTS:
            raise row.wrong("instruction_id_list", f"has the unknown kind {kind!r}")
        if not isinstance(given, Mapping):
            raise row.wrong("kwargs", f"has no object for {kind}")
        args = {name: value for name, value in given.items() if value is not None}
        for name in ARGUMENTS[kind]:
            problem = _wrong_argument(name, args.get(name))
            if problem:
                raise row.wrong("kwargs", f"of {kind}: {name} {problem}")
        constraints.append((kind, {name: args[name] for name in ARGUMENTS[kind]}))
    return tuple(constraints)


def _wrong_argument(name: str, value: Any) -> str | None:
    if value is None:
        return "is missing"
    if name in _NUMBERS:
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        return None if whole and value >= 0 and value == int(value) else "is no whole number"
    if name in _LISTS:
        texts = isinstance(value, list) and value and all(isinstance(v, str) for v in value)
        return None if texts else "is no list of texts"
    if not isinstance(value, str) or not value:
        return "is no text"
    if name.endswith("relation") and value not in ("less than", "at least"):
        return "is neither 'less than' nor 'at least'"
    if name == "letter" and len(value) != 1:
        return "is not one letter"
    return None
