"""The destinations of results: paths, checked before any work is done, and writing to them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from .errors import CliError, Code
from .terminal import shell_word


def _check_writable(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, before a model is loaded.

    Raises:
        CliError: The path is a folder, or its folder does not exist or is read-only.
    """
    if path.is_dir():
        raise CliError(
            Code.FILE, f"{option} {path} is a folder. Give a file name, such as {path / 'report'}."
        )
    check_parent(path, option)


def check_parent(path: Path, option: str) -> None:
    """Refuse a path in a folder that does not exist or is read-only.

    Args:
        path: The path to be written.
        option: The option that names it.

    Raises:
        CliError: The folder of ``path`` does not exist or is read-only.
    """
    if not path.parent.is_dir():
        raise CliError(
            Code.FILE,
            f"{option} {path}: there is no folder {path.parent}. Make it first: "
            f"mkdir -p {shell_word(str(path.parent))}",
        )
    if not os.access(path.parent, os.W_OK):
        raise CliError(Code.FILE, f"{option} {path}: the folder is read-only.")


@dataclass(frozen=True)
class Output:
    """Where results go, and how much is printed.

    Attributes:
        top: How many rows or paths are listed.
        as_json: Print one JSON object instead of tables.
        out: The page to write.
        save: The result file to write.
        quiet: Print no progress and no notes.

    Raises:
        typer.BadParameter: Page and result are the same file.
    """

    top: int = 10
    as_json: bool = False
    out: Path | None = None
    save: Path | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.out is not None and self.out == self.save:
            raise typer.BadParameter("--out and --save name the same file.")

    @property
    def shows_progress(self) -> bool:
        """Whether spinners and progress bars are shown."""
        return not (self.quiet or self.as_json)

    def check(self) -> None:
        """Refuse paths that cannot be written, and pages named like another kind of file.

        Raises:
            CliError: A path cannot be written, or ``--out`` has a suffix that no page has.
        """
        from ..files import why_not_a_page

        if self.out is not None and (message := why_not_a_page(self.out)) is not None:
            raise CliError(Code.USAGE, f"--out {message}")
        for path, option in ((self.out, "--out"), (self.save, "--save")):
            if path is not None:
                _check_writable(path, option)


def write(path: Path | None, writer: Callable[[Path], object]) -> None:
    """Call ``writer`` with ``path``, unless that is None.

    Raises:
        CliError: The file cannot be written.
    """
    if path is None:
        return
    from safetensors import SafetensorError

    try:
        writer(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CliError(Code.FILE, f"{path} cannot be written: {reason}.") from error
