r"""What the beginning of an answer already settles about one constraint of IFEval.

Each function answers False where no continuation can follow the constraint any more, True where
none can break it any more, and None otherwise. They follow the published checks to the letter,
including what those count wrongly, and are held against them on random continuations by the tests.

What is at the end of a beginning may still change: a word can go on, "***" can become "******",
a "\\n" can become "\\n\\n". So it counts only where more text cannot change it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Args = Mapping[str, Any]


def still_possible(kind: str, args: Args, beginning: str) -> bool | None:
    """Whether an answer with this beginning can still follow a constraint.

    Args:
        kind: The kind of constraint.
        args: Its arguments.
        beginning: The beginning of the answer, without white space before it; not empty.

    Returns:
        True or False where the beginning settles it, else None.
    """
    settle = _SETTLED.get(kind)
    return None if settle is None else settle(args, beginning)


def _counted(count: int, relation: str, limit: int) -> bool | None:
    """What a count that can only grow says."""
    if count < limit:
        return None
    return relation == "at least"


def _no_comma(args: Args, text: str) -> bool | None:  # noqa: ARG001
    return False if "," in text else None


def _forbidden(args: Args, text: str) -> bool | None:
    for word in args["forbidden_words"]:
        for match in re.finditer(rf"\b{word}\b", text, flags=re.IGNORECASE):
            if match.end() < len(text):  # at the end the word could go on
                return False
    return None


def _existence(args: Args, text: str) -> bool | None:
    found = all(re.search(word, text, flags=re.IGNORECASE) for word in args["keywords"])
    return True if found else None


def _frequency(args: Args, text: str) -> bool | None:
    count = len(re.findall(args["keyword"], text, flags=re.IGNORECASE))
    return _counted(count, args["relation"], args["frequency"])


def _letter(args: Args, text: str) -> bool | None:
    count = text.lower().count(args["letter"].lower())
    return _counted(count, args["let_relation"], args["let_frequency"])


def _words(args: Args, text: str) -> bool | None:
    return _counted(len(re.findall(r"\w+", text)), args["relation"], args["num_words"])


def _paragraphs(args: Args, text: str) -> bool | None:
    pieces = re.split(r"\s?\*\*\*\s?", text)
    return _pieces(pieces, args["num_paragraphs"])


def _two_responses(args: Args, text: str) -> bool | None:  # noqa: ARG001
    pieces = text.split("******")
    whole = [piece.strip() for piece in pieces[:-1] if piece.strip()]
    if len(whole) == 2 and whole[0] == whole[1]:
        return False
    return _pieces(pieces, 2)


def _pieces(pieces: list[str], number: int) -> bool | None:
    """What pieces between asterisks say that must be exactly so many, with no blank one between."""
    if any(not piece.strip() for piece in pieces[1:-1]):
        return False
    count = sum(bool(piece.strip()) for piece in pieces[:-1])
    count += bool(pieces[-1].rstrip().rstrip("*").strip())
    return False if count > number else None


def _first_word(args: Args, text: str) -> bool | None:
    pieces = text.split("\n\n")
    if sum(bool(piece.strip()) for piece in pieces) > args["num_paragraphs"]:
        return False
    n = args["nth_paragraph"]
    if len(pieces) < n:
        return None
    piece, settled = pieces[n - 1], len(pieces) > n
    words = piece.split()
    if not words:
        return False if settled else None
    word = words[0].lstrip("'").lstrip('"')
    beginning = re.split(r"""[.,?!'"]""", word)[0]
    ended = settled or len(words) > 1 or piece[-1].isspace() or len(beginning) < len(word)
    expected = args["first_word"].lower()
    if ended:
        return None if beginning.lower() == expected else False
    return None if expected.startswith(beginning.lower()) else False


def _bullets(args: Args, text: str) -> bool | None:
    text = text.rstrip()  # "* " at the very end is a bullet only if text follows
    starred = re.findall(r"^\s*\*[^\*].*$", text, flags=re.MULTILINE)
    dashed = re.findall(r"^\s*-.*$", text, flags=re.MULTILINE)
    return False if len(starred) + len(dashed) > args["num_bullets"] else None


def _placeholders(args: Args, text: str) -> bool | None:
    return _counted(len(re.findall(r"\[.*?\]", text)), "at least", args["num_placeholders"])


def _highlights(args: Args, text: str) -> bool | None:
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    count = sum(bool(found.strip("*").strip()) for found in single)
    count += sum(bool(found[2:-2].strip()) for found in double)
    return _counted(count, "at least", args["num_highlights"])


def _sections(args: Args, text: str) -> bool | None:
    mark = rf"\s?{args['section_spliter'].strip()}\s?\d+\s?"
    return _counted(len(re.split(mark, text)) - 1, "at least", args["num_sections"])


def _postscript(args: Args, text: str) -> bool | None:
    marker = args["postscript_marker"].strip()
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    found = re.search(patterns.get(marker, marker.lower()), text.lower())
    return True if found else None


def _title(args: Args, text: str) -> bool | None:  # noqa: ARG001
    found = re.findall(r"<<[^\n]+>>", text)
    return True if any(title.lstrip("<").rstrip(">").strip() for title in found) else None


def _answered(args: Args, text: str) -> bool | None:  # noqa: ARG001
    options = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
    return True if any(option in text for option in options) else None


def _repeat(args: Args, text: str) -> bool | None:
    asked, text = args["prompt_to_repeat"].strip().lower(), text.lower()
    if text.startswith(asked):
        return True
    return None if asked.startswith(text) else False


def _capital(args: Args, text: str) -> bool | None:  # noqa: ARG001
    return False if any(letter.islower() for letter in text) else None


def _lowercase(args: Args, text: str) -> bool | None:  # noqa: ARG001
    return False if any(letter.isupper() for letter in text) else None


def _quotation(args: Args, text: str) -> bool | None:  # noqa: ARG001
    return None if text.startswith('"') else False


def _json(args: Args, text: str) -> bool | None:  # noqa: ARG001
    fences = ("```json", "```Json", "```JSON", "```")
    if any(fence.startswith(text.rstrip()) for fence in fences):
        return None
    for fence in fences:
        text = text.removeprefix(fence)
    return None if begins_json(text) else False


def begins_json(text: str) -> bool:
    """Whether a text is the beginning of a JSON text, perhaps with a closing fence after it.

    Args:
        text: Any text.

    Returns:
        False if no continuation can make it one.
    """
    text = text.lstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :]
        if error.msg.startswith(("Unterminated string", "Invalid \\")):
            # An escape is wrong where its characters are there and are none.
            escape = re.search(r"\\(?:u[0-9a-fA-F]{0,4})?\Z", text)
            return error.msg.startswith("Unterminated") or escape is not None
        if error.msg.startswith("Invalid control"):
            return False
        if not rest.strip():
            return True
        if error.msg == "Extra data" and "```".startswith(rest.strip()):
            return True
        words = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
        if any(word.startswith(rest) for word in words):
            return True
        if re.search(r"-?\d+(\.|(\.\d+)?[eE][+-]?)\Z", text):  # a number that goes on
            return rest in re.findall(r"\.\Z|[eE][+-]?\Z", text)
        return error.msg.startswith("Illegal trailing comma") and not rest[1:].strip()
    return True


_SETTLED: Mapping[str, Callable[[Args, str], bool | None]] = {
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "combination:repeat_prompt": _repeat,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _answered,
    "detectable_format:json_format": _json,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "punctuation:no_comma": _no_comma,
    "startend:quotation": _quotation,
}
