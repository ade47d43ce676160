"""Which phrases of an IFEval prompt state its constraints.

The published rows give the kinds of constraint and their arguments, not where the prompt says so.
A phrase is found in two steps:

1. The prompt is cut into sentences, at line breaks and after ``. ! ?`` where white space and no
   small letter follow; a sentence of more than ``LONG`` words is cut into clauses, at commas,
   semicolons and colons outside quotation marks.
2. For each constraint, the pieces that mention it are its phrases: the words that name it
   ("comma", "bullet"), or its arguments (a forbidden word beside a negation, a phrase to end with).
   Of a constraint that no piece mentions, there is no phrase.

Pieces are verbatim, but for white space around them. The text that is to be repeated is no
instruction of "repeat the request"; the sentence that asks for it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

LONG = 25

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
    pieces = [piece for sentence in _sentences(prompt) for piece in _clauses(sentence)]
    return tuple(
        dict.fromkeys(
            piece
            for piece in pieces
            if any(_mentions(piece, kind, args) for kind, args in constraints)
        )
    )


def _mentions(piece: str, kind: str, args: Mapping[str, Any]) -> bool:
    def has(pattern: str) -> bool:
        return re.search(pattern, piece, re.IGNORECASE) is not None

    def names(words: Iterable[str]) -> bool:
        return any(has(rf"(?<!\w){re.escape(word.strip())}") for word in words if word.strip())

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


def _clauses(sentence: str) -> list[str]:
    if len(sentence.split()) <= LONG:
        return [sentence]
    quoted = [m.span() for m in re.finditer(r'"[^"]*"|“[^”]*”|\([^)]*\)', sentence)]
    cuts = [
        match.end()
        for match in re.finditer(r"[,;:](?=\s)", sentence)
        if not any(a <= match.start() < b for a, b in quoted)
    ]
    clauses = [
        sentence[a:b].strip() for a, b in zip([0, *cuts], [*cuts, len(sentence)], strict=True)
    ]
    return [clause for clause in clauses if clause]
