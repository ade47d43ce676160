"""Writing HTML to disk: whole or not at all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from uuid import uuid4

_PAGES = (".html", ".htm", ".xhtml")


def not_a_page(path: Path) -> str | None:
    """Why no page is written to a file of that name, and what to type; None if one may be.

    A page is HTML, whatever its name says: a file named .png or .pdf would not open. Endings that
    begin with a digit, as in "Qwen3-0.6B", are taken for a part of the name.
    """
    if path.suffix.lower() in _PAGES or not re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):
        return None
    return (
        f"{path} would be no {path.suffix[1:].upper()} file: pages are written as HTML. Name it "
        f"{path.with_suffix('.html')}; a browser prints it to PDF or to a picture."
    )


def save_html(path: str | os.PathLike[str], html: str) -> Path:
    """Write ``html`` to ``path`` as UTF-8 and return the path.

    The text goes to a temporary file next to ``path`` that then takes its name, so a reader (or
    an interrupted run) never sees half a page, and an older file survives a failure.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: ``path`` ends as a file of another kind, such as .png or .pdf.
    """
    wanted = Path(path)
    if not wanted.is_dir() and (why := not_a_page(wanted)) is not None:
        raise ValueError(why)
    target = wanted.resolve()  # through a link: replace the file it names, not the link
    if target.is_dir():
        raise IsADirectoryError(
            f"{wanted} is a folder; give a file name such as {wanted / 'report.html'}"
        )
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"the folder {wanted.parent} does not exist; make it first: mkdir -p '{wanted.parent}'"
        )
    data = html.encode("utf-8")
    temporary = target.parent / f".{uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return wanted
