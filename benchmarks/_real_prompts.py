"""Prompts for real weights, made from templates: indirect objects, agreement, facts.

Each has two answers of one token. Which of them is right is known; which one is explained is what
the model prefers, right or wrong. Indirect objects and agreement have a corrupted partner of the
same length with the other answer, for patching.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TEMPLATES = ("indirect objects", "agreement", "facts")
FAILURES, LONG = "failures", "long failures"  # groups of cases, beside those of templates

_PEOPLE = (
    ("Mary", "John"), ("Tom", "Anna"), ("Peter", "Sarah"), ("Emma", "David"), ("Paul", "Lucy"),
    ("Alice", "Mark"), ("Daniel", "Laura"), ("Julia", "Kevin"), ("Robert", "Helen"),
    ("Linda", "Michael"),
)  # fmt: skip
_SCENES = (
    "When {a} and {b} went to the store after work, {s} gave a bottle of milk to",
    "{a} and {b} had a long meeting at the office, and at the end {s} handed the report to",
)
_SUBJECTS = (
    ("key", "keys", "to the cabinet in the old kitchen"),
    ("letter", "letters", "from the manager of the two companies"),
    ("picture", "pictures", "of the children near the house"),
    ("student", "students", "behind the teachers in the hall"),
    ("author", "authors", "of the books on the table"),
    ("dog", "dogs", "next to the tall man with the hats"),
    ("car", "cars", "in front of the buildings"),
    ("window", "windows", "above the door of the shops"),
    ("report", "reports", "about the accidents on the road"),
    ("label", "labels", "on the bottle in my bag"),
)  # fmt: skip
_FACTS = (
    ("As everybody learns at school, the capital of France is the city of", "Paris", "Rome"),
    ("As everybody learns at school, the capital of Austria is the city of", "Vienna", "Berlin"),
    ("As everybody learns at school, the capital of Australia is the city of", "Canberra",
     "Sydney"),
    ("As everybody learns at school, the capital of Canada is the city of", "Ottawa", "Toronto"),
    ("As everybody learns at school, the capital of Portugal is the city of", "Lisbon", "Madrid"),
    ("As everybody learns at school, the capital of Norway is the city of", "Oslo", "Stockholm"),
    ("As everybody learns at school, the capital of India is the city of New", "Delhi", "Mumbai"),
    ("The gas in the air that people and animals need to breathe is called", "oxygen", "hydrogen"),
    ("The largest planet that goes around our sun is the planet", "Jupiter", "Saturn"),
    ("The planet next to the Earth that is called the red planet is", "Mars", "Venus"),
    ("The theory of relativity was found by the famous physicist Albert", "Einstein", "Newton"),
    ("The play about Romeo and Juliet was written by the poet William", "Shakespeare", "Dickens"),
    ("The first president of the United States of America was George", "Washington", "Lincoln"),
    ("In Brazil, most people speak a language of Europe, which is", "Portuguese", "Spanish"),
    ("The opera The Magic Flute was written by the composer", "Mozart", "Beethoven"),
    ("The ocean between Europe and North America is called the", "Atlantic", "Pacific"),
    ("The longest river of Africa, which flows through Egypt, is the", "Nile", "Amazon"),
    ("Of all animals that live on land, the largest and heaviest is the", "elephant", "whale"),
    ("Egypt and Nigeria are two large countries on the continent of", "Africa", "Asia"),
    ("A spider is no insect, because the number of its legs is", "eight", "six"),
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A text, the right and the wrong next word, and a text whose right next word is the wrong one
    here, or None."""

    group: str
    text: str
    right: str
    wrong: str
    corrupted: str | None = None


def _indirect_objects() -> Iterable[Prompt]:
    for scene in _SCENES:
        for a, b in _PEOPLE:
            clean, other = scene.format(a=a, b=b, s=b), scene.format(a=a, b=b, s=a)
            yield Prompt("indirect objects", clean, f" {a}", f" {b}", other)


def _agreement() -> Iterable[Prompt]:
    for number, (one, many, rest) in enumerate(_SUBJECTS):
        singular, plural = (f"As far as I know, the {noun} {rest}" for noun in (one, many))
        verbs = (" is", " are") if number % 2 else (" was", " were")
        yield Prompt("agreement", singular, *verbs, plural)
        yield Prompt("agreement", plural, *verbs[::-1], singular)


def _facts() -> Iterable[Prompt]:
    for text, right, wrong in _FACTS:
        yield Prompt("facts", text, f" {right}", f" {wrong}")


def prompts() -> list[Prompt]:
    """20 of each group."""
    return [*_indirect_objects(), *_agreement(), *_facts()]
