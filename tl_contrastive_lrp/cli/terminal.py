"""What the command prints: results on stdout, messages and progress on stderr.

Token text comes from models and prompts and may hold anything: it never reaches a terminal as
markup, control or formatting characters.
"""

from __future__ import annotations

import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def plain(text: str) -> str:
    """``text`` with every character that a terminal would obey or hide written as an escape.

    Newlines and tabs stay.
    """
    return "".join(
        c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in _HIDDEN and c not in "\n\t"
        else c
        for c in text
    )


def shown(token: str) -> str:
    """A token on one line, its spaces and newlines visible, as the report shows it.

    For ``print_out``, ``print_err`` and ``table``, which make it safe to print.
    """
    from ..render.text import visible

    return visible(token)


def print_err(message: str) -> None:
    """One message on stderr, as it is."""
    print(plain(message), file=sys.stderr)


def print_out(line: str = "") -> None:
    """One line on stdout, unwrapped, so that it can be copied."""
    print(plain(line))


@contextmanager
def progress(words: str, wanted: bool) -> Iterator[None]:
    """A spinner on stderr while the block runs; nothing if unwanted or not on a terminal."""
    if not wanted or not sys.stderr.isatty():
        yield
        return
    # The stream of now: libraries' own output is diverted inside the block.
    console = Console(file=sys.stderr)
    with console.status(Text(plain(words))):
        yield


def table(
    columns: Sequence[tuple[str, bool]],
    rows: Iterable[Sequence[str]],
    *,
    dim: Sequence[bool] = (),
) -> None:
    """A table on stdout.

    Args:
        columns: Heading, and whether its cells are numbers (aligned on the right).
        rows: Cells as text.
        dim: Rows to print faintly.
    """
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, number in columns:
        out.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for i, row in enumerate(rows):
        cells = [Text(plain(cell)) for cell in row]
        out.add_row(*cells, style="dim" if i < len(dim) and dim[i] else None)
    Console(file=sys.stdout).print(out)


def shell_word(text: str) -> str:
    """``text`` as one word of a POSIX shell; control characters as bash and zsh write them."""
    if plain(text) == text and "\t" not in text:
        return shlex.quote(text)
    quoted = "".join(
        f"\\{c}" if c in "\\'" else c if plain(c) == c and c not in "\n\t" else _escaped(c)
        for c in text
    )
    return f"$'{quoted}'"


def _escaped(c: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))
