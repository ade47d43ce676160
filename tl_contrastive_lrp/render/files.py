"""Writing HTML to disk: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def save_html(path: str | os.PathLike[str], html: str) -> Path:
    """Write ``html`` to ``path`` as UTF-8 and return the path.

    The text goes to a temporary file next to ``path`` that then takes its name, so a reader (or
    an interrupted run) never sees half a page, and an older file survives a failure.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    wanted = Path(path)
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
