"""Where results go: paths that are checked before work is done for nothing, and writing them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import CliError, Code
from .terminal import shell_word


def check_writable(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, before the model is loaded for nothing.

    Raises:
        CliError: it is a folder, or its folder does not exist or is read-only.
    """
    if path.is_dir():
        raise CliError(
            Code.FILE, f"{option} {path} is a folder. Give a file name, such as {path / 'report'}."
        )
    check_parent(path, option)


def check_parent(path: Path, option: str) -> None:
    """Refuse a path in a folder that does not exist or is read-only.

    Raises:
        CliError: it is.
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
    """Where results go, and how much is said."""

    top: int = 10
    as_json: bool = False
    out: Path | None = None
    save: Path | None = None
    quiet: bool = False

    @property
    def spins(self) -> bool:
        return not (self.quiet or self.as_json)

    def check(self) -> None:
        """Refuse paths that cannot be written, and a page by the name of something else.

        Raises:
            CliError: as ``check_writable``; ``--out`` that does not end as a page.
        """
        from ..files import not_a_page

        if self.out is not None and (why := not_a_page(self.out)) is not None:
            raise CliError(Code.USAGE, f"--out {why}")
        for path, option in ((self.out, "--out"), (self.save, "--save")):
            if path is not None:
                check_writable(path, option)


def write(path: Path | None, writer: Callable[[Path], object]) -> None:
    """Have ``writer`` write to ``path``, if there is one.

    Raises:
        CliError: it cannot be written.
    """
    if path is None:
        return
    from safetensors import SafetensorError

    try:
        writer(path)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise CliError(Code.FILE, f"{path} cannot be written: {why}.") from error
