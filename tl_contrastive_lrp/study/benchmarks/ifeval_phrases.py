"""Which phrases of an IFEval prompt state its constraints.

The published rows give the kinds of constraint and their arguments, not where the prompt says so.
A phrase is found in two steps:

1. The prompt is cut into sentences, at line breaks and after ``. ! ?`` where white space and no
   small letter follow; and each sentence into pieces, after commas, semicolons and colons and
   before words that begin a part of a sentence (``_BEGINS``), outside quotation marks and brackets.
2. For each constraint and each sentence, its phrases are the shortest runs of neighbouring pieces
   that mention it: by the words that name it ("comma", "bullet"), or by its arguments (a forbidden
   word beside a negation, a phrase to end with). A run has all the words of a list that the
   sentence has; runs that touch are one phrase. Of a constraint that no sentence mentions, there
   is no phrase.

Phrases are verbatim, but for white space around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

# Words beside which a forbidden, a frequent and a wanted word is an instruction.
_NOT = (
    r"\b(?:not|cannot|never|no|without|avoid\w*|exclud\w*|refrain\w*|omit\w*|skip\w*|forbid\w*"
    r"|ban\w*|free)\b|n['’]t\b"
)
_TIMES = r"\b(?:times?|once|twice|least|most|less|more|fewer|than|occur\w*|appear\w*)\b"
_INCLUDE = r"\b(?:includ\w*|keywords?|mention\w*|use|using|contain\w*|words?|add\w*|phrases?)\b"
_CAPITALS = r"capital|upper ?-?case|all[ -]caps|\bcaps\b|lower ?-?case"

# Words that name a kind of constraint.
_CUES: Mapping[str, str] = {
    "change_case:capital_word_frequency": _CAPITALS,
    "change_case:english_capital": _CAPITALS,
    "change_case:english_lowercase": rf"{_CAPITALS}|small letters",
    "combination:repeat_prompt": r"\brepeat\w*|\bword for word\b",
    "combination:two_responses": (
        r"\*{3,}|asterisk|\b(?:two|2)\b.*\b(?:responses?|answers?)\b"
        r"|\bdifferent (?:responses?|answers?)\b"
    ),
    "detectable_content:number_placeholders": r"placeholder|square bracket",
    "detectable_content:postscript": r"post ?-?script|\bP\. ?(?:P\. ?)?S",
    "detectable_format:constrained_response": (
        r"my answer is|following (?:exact )?(?:phrases|options|choices)|exact phrase"
    ),
    "detectable_format:json_format": r"\bjson\b",
    "detectable_format:multiple_sections": r"\bsections?\b",
    "detectable_format:number_bullet_lists": r"bullet|^\* ",
    "detectable_format:number_highlighted_sections": r"highlight|\*[^*\s][^*\n]*\*",
    "detectable_format:title": r"<<|angular|\btitle\b",
    "keywords:frequency": r"\b(?:times|once|twice)\b",
    "keywords:letter_frequency": r"\bletters?\b",
    "language:response_language": r"\blanguages?\b|\bonly in [A-Z]",
    "length_constraints:nth_paragraph_first_word": r"\bparagraphs?\b|first word",
    "length_constraints:number_paragraphs": r"\bparagraphs?\b|\*{3}|divider",
    "length_constraints:number_sentences": r"\bsentences?\b",
    "length_constraints:number_words": r"\bwords?\b",
    "punctuation:no_comma": r"\bcommas?\b",
    "startend:end_checker": (
        r"\b(?:end|ends|ending|finish|conclude)\b|\blast (?:sentence|words?|phrase)\b"
    ),
    "startend:quotation": r"\bquot(?:ation|ations|e|es)\b",
}


def instruction_phrases(
    prompt: str, constraints: Iterable[tuple[str, Mapping[str, Any]]]
) -> tuple[str, ...]:
    """The phrases of a prompt that state its constraints.

    Args:
        prompt: The prompt.
        constraints: Kinds of constraint, each with its arguments.

    Returns:
        The phrases in the prompt's order, each once; each occurs in the prompt verbatim.
    """
    constraints = list(constraints)
    phrases = []
    for sentence in _sentences(prompt):
        pieces = _pieces(sentence)
        found = {run for kind, args in constraints for run in _runs(sentence, pieces, kind, args)}
        phrases += [sentence[start:end].strip() for start, end in _joined(found)]
    return tuple(dict.fromkeys(phrases))


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs in order, those that touch or overlap joined."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(runs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _runs(
    sentence: str, pieces: list[tuple[int, int]], kind: str, args: Mapping[str, Any]
) -> list[tuple[int, int]]:
    """The shortest runs of pieces that mention a constraint."""
    if not _mentions(sentence, kind, args):
        return []
    words = [w for name in ("keywords", "forbidden_words") for w in args.get(name, ())]
    listed = [word for word in words if _names(sentence, [word])]
    for length in range(1, len(pieces) + 1):
        runs = [
            (pieces[first][0], pieces[first + length - 1][1])
            for first in range(len(pieces) - length + 1)
        ]
        found = [
            (start, end)
            for start, end in runs
            if _mentions(sentence[start:end], kind, args)
            and all(_names(sentence[start:end], [word]) for word in listed)
        ]
        if found:
            return found
    return []


def _names(text: str, words: Iterable[str]) -> bool:
    """Whether a text has one of some words."""
    return any(
        re.search(rf"(?<!\w){re.escape(word.strip())}", text, re.IGNORECASE) is not None
        for word in words
        if word.strip()
    )


def _mentions(piece: str, kind: str, args: Mapping[str, Any]) -> bool:
    def has(pattern: str) -> bool:
        return re.search(pattern, piece, re.IGNORECASE) is not None

    def names(words: Iterable[str]) -> bool:
        return _names(piece, words)

    if kind == "keywords:forbidden_words":
        return names(args["forbidden_words"]) and has(_NOT)
    if kind == "keywords:existence":
        return names(args["keywords"]) and has(_INCLUDE)
    if kind == "keywords:frequency":
        return has(_CUES[kind]) or (names([args["keyword"]]) and has(_TIMES))
    if kind == "keywords:letter_frequency" and not args["letter"].isalnum():
        return args["letter"] in piece
    if kind == "length_constraints:number_words":
        return has(_CUES[kind]) and has(rf"\b{args['num_words']}\b|{_TIMES}")
    if kind == "startend:end_checker" and names([args["end_phrase"]]):
        return True
    if kind == "detectable_format:multiple_sections" and names([args["section_spliter"]]):
        return True
    return has(_CUES[kind])


def _sentences(text: str) -> list[str]:
    pieces = re.split(r"\n+|(?<=[.!?])[\"'”’)\]]*\s+(?![a-z])", text)
    # A closing mark after the full stop belongs to the sentence: find each piece in the text.
    starts, place = [], 0
    for piece in pieces:
        place = text.index(piece, place)
        starts.append(place)
        place += len(piece)
    ends = [*starts[1:], len(text)]
    found = (text[a:b].strip() for a, b in zip(starts, ends, strict=True))
    return [sentence for sentence in found if sentence]


# Words before which a sentence is cut, unless "not" or "without" is before them.
_BEGINS = (
    r"(?:(?:and |but |or )?(?:in|with|without|using|including|containing|where|which|that"
    r"|make sure|please|then|by|do not|don['’]t|at the end|your)"
    r"|(?:and|but) (?:end|finish|include|highlight|mention|wrap|separate|add|use|put|repeat|keep"
    r"|avoid|mark|start|begin))\b"
)


def _pieces(sentence: str) -> list[tuple[int, int]]:
    """Where the pieces of a sentence begin and end."""
    quoted = [m.span() for m in re.finditer(r'"[^"]*"|“[^”]*”|\([^)]*\)|\[[^\]]*\]', sentence)]
    cuts = {
        match.end()
        for match in re.finditer(
            rf"[,;:](?=\s)|(?<!not)(?<!without)\s(?={_BEGINS})", sentence, re.IGNORECASE
        )
        if not any(a <= match.start() < b for a, b in quoted)
    }
    places = sorted(cuts | {0, len(sentence)})
    return list(pairwise(places))
