"""Printing to a terminal: results on stdout, messages and progress on stderr.

Token text comes from models and prompts and may hold anything. It never reaches a terminal as
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
    """Escape every character that a terminal would interpret or hide, except newlines and tabs."""
    return "".join(
        c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in _HIDDEN and c not in "\n\t"
        else c
        for c in text
    )


def shown(token: str) -> str:
    """A token on one line with its spaces and newlines visible, as the report shows it.

    The result still has to go through ``print_out``, ``print_err`` or ``table``, which escape it.
    """
    from ..render.text import visible

    return visible(token)


def print_err(message: str) -> None:
    """Print one message on stderr."""
    print(plain(message), file=sys.stderr)


def print_out(line: str = "") -> None:
    """Print one line on stdout, without wrapping it, so that it can be copied."""
    print(plain(line))


@contextmanager
def progress(words: str, show: bool) -> Iterator[None]:
    """Show a spinner on stderr while the block runs.

    Args:
        words: A description of the work.
        show: Whether to show it; it is never shown where stderr is no terminal.
    """
    if not show or not sys.stderr.isatty():
        yield
        return
    # Bound to the current stream, because the block may redirect other libraries' output.
    console = Console(file=sys.stderr)
    with console.status(Text(plain(words))):
        yield


def table(
    columns: Sequence[tuple[str, bool]],
    rows: Iterable[Sequence[str]],
    *,
    dim: Sequence[bool] = (),
) -> None:
    """Print a table on stdout.

    Args:
        columns: For each column its heading, and whether it holds numbers, aligned on the right.
        rows: Cells as text.
        dim: For each row whether it is printed faintly.
    """
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, number in columns:
        out.add_column(Text(heading), justify="right" if number else "left", overflow="fold")
    for i, row in enumerate(rows):
        cells = [Text(plain(cell)) for cell in row]
        out.add_row(*cells, style="dim" if i < len(dim) and dim[i] else None)
    Console(file=sys.stdout).print(out)


def shell_word(text: str) -> str:
    """Quote text as one word of a POSIX shell, control characters as bash and zsh write them."""
    if plain(text) == text and "\t" not in text:
        return shlex.quote(text)
    quoted = "".join(
        f"\\{c}" if c in "\\'" else c if plain(c) == c and c not in "\n\t" else _escaped(c)
        for c in text
    )
    return f"$'{quoted}'"


def _escaped(c: str) -> str:
    """A character as the escapes of its UTF-8 bytes."""
    return "".join(f"\\x{byte:02x}" for byte in c.encode("utf-8", "surrogateescape"))
