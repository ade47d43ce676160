"""Text that is safe inside HTML and scripts, and readable there."""

from __future__ import annotations

import base64
import json
import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ABOVE, _BELOW = "\u2070\u00b9\u00b2\u00b3\u2074", "\u2080\u2081\u2082\u2083\u2084"
PARTS = "\u00b2\u2044\u2083: the second of the tokens that make one character, here three"
_SPACE_RUN = re.compile(" {2,}")


def script_json(value: Any) -> str:
    """JSON that is safe inside ``<script>``: no character in it can end or open markup.

    Non-ASCII characters (including U+2028 and lone surrogates) and ``< > & '`` become Unicode
    escapes, which mean the same to a JSON or JavaScript parser.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&'":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def inline_script(source: str) -> str:
    """JavaScript source that is safe inside ``<script>``; string literals keep their value."""
    return source.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def printable(text: str) -> str:
    """A text with the characters that no browser shows (controls, lone surrogates) made visible."""
    text = _SURROGATE.sub("\ufffd", text)
    return _CONTROL.sub(
        lambda match: "\u2421" if match[0] == "\x7f" else chr(0x2400 + ord(match[0])), text
    )


def visible(token: str) -> str:
    """A token on one line: newline ``↵``, tab ``⇥``, some spaces ``·``, the empty token ``∅``.

    A single space before a word stays a space. Spaces that are the whole token, or come in runs
    (indentation), are shown as dots.
    """
    if not token:
        return "\u2205"
    text = printable(token).replace("\r", "\u240d").replace("\n", "\u21b5").replace("\t", "\u21e5")
    if not text.strip(" "):
        return "\u00b7" * len(text)
    return _SPACE_RUN.sub(lambda run: "\u00b7" * len(run[0]), text)


def part_marks(tokens: Sequence[str]) -> list[str]:
    """A mark for every token that holds part of a character: ``¹⁄₃``, ``²⁄₃``, ``³⁄₃``.

    A character of several tokens is whole in the text of the first, and the texts of the others are
    empty (``inputs/token_text.py``). So empty texts after a character that takes several bytes in
    UTF-8 are its parts, at most as many as it has bytes. All other tokens have the mark "", also a
    token that ends a character and continues with text of its own, since it shows that text.
    """
    marks = [""] * len(tokens)
    for at in [i for i, token in enumerate(tokens) if not token and i and tokens[i - 1]]:
        most = len(tokens[at - 1][-1].encode("utf-8", "surrogatepass"))
        count = 1
        while count < most and at + count - 1 < len(tokens) and not tokens[at + count - 1]:
            count += 1
        if count > 1:
            for part in range(count):
                marks[at - 1 + part] = f"{_ABOVE[part + 1]}\u2044{_BELOW[count]}"
    return marks


def visible_tokens(tokens: Sequence[str]) -> list[str]:
    """The tokens of a prompt, each on one line.

    They are shown as ``visible`` shows them, with parts of a character marked: "你¹⁄₃", "²⁄₃",
    "³⁄₃".
    """
    return [
        (visible(token) if token or not mark else "") + mark
        for token, mark in zip(tokens, part_marks(tokens), strict=True)
    ]


def with_parts(tokens: Sequence[str]) -> list[str]:
    """Each token's text on its own; a part of a character is shown as "你²⁄₃"."""
    texts: list[str] = []
    character = ""
    for token, mark in zip(tokens, part_marks(tokens), strict=True):
        if token:
            character = token[-1]
        texts.append((token or character if mark else token) + mark)
    return texts


def inert(token: str) -> str:
    """A token that circuitsvis shows literally, although it puts token text into ``innerHTML``.

    An invisible word joiner (U+2060) after every ``<`` and ``&`` keeps an HTML parser from reading
    a tag or an entity there: both need a letter, ``/``, ``!``, ``?`` or ``#`` next. Entities would
    be shown literally in the tooltip, which circuitsvis does escape. Newlines keep their line break
    and get a visible sign.
    """
    text = printable(token) if token else "\u2205"
    text = text.replace("\n", "\u21b5\n").replace("\t", "\u21e5\t").replace("\r", "\u240d")
    return text.replace("<", "<\u2060").replace("&", "&\u2060")


def signed(value: float) -> str:
    """A number with its sign and three decimals, or an exponent if it is tiny."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    text = f"{value:+.3f}" if abs(value) >= 0.0005 else f"{value:+.1e}"
    return text.replace("-", "\u2212")


def magnitude(value: float) -> str:
    """The magnitude of a number, formatted as by :func:`signed` but without a sign."""
    return signed(abs(value)).removeprefix("+")


def percent(share: float | None) -> str:
    """A share as a signed percentage; a dash if there is none."""
    if share is None or not math.isfinite(share):
        return "\u2013"
    return f"{100 * share:+.1f} %".replace("-", "\u2212")


def rounded(array: NDArray[np.float64], digits: int) -> Any:
    """Nested lists with ``digits`` significant digits, in a third of the bytes, for tooltips."""
    values = np.vectorize(lambda value: float(f"{value:.{digits}g}"), otypes=[float])
    return values(array).tolist()


def packed(array: NDArray[np.float64]) -> str:
    """Row-major little-endian float32 in base64, for a page's script to read."""
    return base64.b64encode(array.astype("<f4").tobytes()).decode()


def packed_half(array: NDArray[np.float64]) -> tuple[str, list[float]]:
    """A matrix ``[row, column]`` as float16 in base64, and the unit of each row.

    Multiplied by their row's unit, the numbers have three digits in half the bytes. A row's largest
    magnitude becomes 2**15, so that numbers keep their digits down to 2**-29 of it.
    """
    units = np.abs(array).max(axis=1) / 2.0**15
    units = np.where(units > 0, units, 1.0)
    return base64.b64encode((array / units[:, None]).astype("<f2").tobytes()).decode(), (
        units.tolist()
    )
