"""Results on disk: safetensors files of tensors plus one JSON text; no pickle, nothing executable.

A file is written whole or not at all, and read back exactly or refused.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor

from .errors import FileFormatError


@dataclass(frozen=True)
class FileKind:
    """What a file holds.

    Attributes:
        format: Name inside the file, ``tl_contrastive_lrp.<something>``.
        version: Version of the format this package writes and reads.
        noun: What it is called in messages, with its article.
    """

    format: str
    version: int
    noun: str


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path next to ``path`` that takes its name once the block ends without error.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    target = Path(path).resolve()  # through a link: replace the file it names, not the link
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name inside it.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"The folder {target.parent} does not exist; make it first.")
    temporary = target.parent / f".{uuid4().hex}.tmp"
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(
    path: str | os.PathLike[str],
    kind: FileKind,
    tensors: Mapping[str, Tensor | None],
    data: Mapping[str, Any],
) -> Path:
    """Write tensors (those that are not None) and JSON data to a safetensors file.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    from safetensors.torch import save_file

    meta = {"format": kind.format, "version": str(kind.version), "data": json.dumps(data)}
    # Clones where two fields share memory: safetensors refuses to write those.
    seen: set[int] = set()
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            start = tensor.untyped_storage().data_ptr()
            whole[name] = tensor.clone() if start in seen else tensor.contiguous()
            seen.add(start)
    with written_whole(path) as temporary:
        save_file(whole, temporary, metadata=meta)
    return Path(path)


def read_result(
    path: str | os.PathLike[str], kind: FileKind
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON data of a file that ``write_result`` wrote with the same ``kind``.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is damaged, foreign, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise FileFormatError(f"{path} is no readable safetensors file: {error}") from error
    if meta.get("format") != kind.format:
        raise FileFormatError(f"{path} holds no {kind.noun.split(' ', 1)[1]} of this package.")
    if meta.get("version") != str(kind.version):
        raise FileFormatError(
            f"{path} has format version {meta.get('version')}, this package reads {kind.version}; "
            f"upgrade tl_contrastive_lrp, or save {kind.noun} again."
        )
    try:
        data = json.loads(meta["data"])
    except (KeyError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise FileFormatError(f"{path} is damaged: its data is no JSON object.")
    return tensors, data


@contextmanager
def damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """What goes wrong while a result is rebuilt from its file means that the file is damaged."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged: {error!r}") from error


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
