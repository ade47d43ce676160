"""Files, which this package writes whole or not at all.

Results are safetensors files, tensors plus one JSON text: no pickle, nothing executable. They are
read back exactly or refused.
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
    """The kind of content of a file.

    Attributes:
        format: Name of the format inside the file, ``tl_contrastive_lrp.<something>``.
        version: The version of the format that this package writes and reads.
        noun: Name of the content in messages, with its article.
    """

    format: str
    version: int
    noun: str


@contextmanager
def atomic_path(
    path: str | os.PathLike[str],
    temporary: Path | None = None,
    *,
    example: str = "result.safetensors",
) -> Iterator[Path]:
    """Write a file whole or not at all.

    The block writes to a temporary path, which takes the name ``path`` once the block has ended
    without an error. So no reader, and no interrupted run, ever sees half a file, and an older
    file survives a failure.

    Args:
        path: The file to write. Through a link, the file that it names is replaced, not the link.
        temporary: Where to write first, in the folder of ``path``; by default a hidden file with
            a name of its own.
        example: A file name to suggest in the message if ``path`` is a folder.

    Yields:
        The temporary path.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    target = path.resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give a file name such as {path / example}")
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {path.parent} does not exist; make it first: mkdir -p '{path.parent}'"
        )
    temporary = temporary or target.parent / f".{uuid4().hex}.tmp"
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
    """Write tensors and JSON data to a safetensors file.

    Args:
        path: The file to write.
        kind: The kind of file to write.
        tensors: Tensors by name; those that are None are left out.
        data: Data that JSON can hold.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
    """
    from safetensors.torch import save_file

    meta = {"format": kind.format, "version": str(kind.version), "data": json.dumps(data)}
    storages: set[int] = set()
    independent: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            storage = tensor.untyped_storage().data_ptr()
            # safetensors takes neither two tensors that share memory nor one with gaps.
            copied = tensor.clone() if storage in storages else tensor
            independent[name] = copied.contiguous()
            storages.add(storage)
    with atomic_path(path) as temporary:
        save_file(independent, temporary, metadata=meta)
    return Path(path)


def read_result(
    path: str | os.PathLike[str], kind: FileKind
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that ``write_result`` wrote.

    Args:
        path: The file.
        kind: The kind of file to expect.

    Returns:
        The tensors by name, and the JSON data.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged, was not written by this package, or holds another
            kind of result or another version of the format.
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
def rebuilding_from(path: str | os.PathLike[str]) -> Iterator[None]:
    """Report errors of the block, which rebuilds a result from its file, as a damaged file.

    Args:
        path: The file, for the message.

    Raises:
        FileFormatError: The data cannot be turned into a result.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileFormatError(f"{path} is damaged: {error!r}") from error


_PAGE_SUFFIXES = (".html", ".htm", ".xhtml")


def why_not_a_page(path: Path) -> str | None:
    """Why a page must not be written to a file of this name, and what to type instead.

    A page is HTML, whatever its file is called: one named .png or .pdf would not open. A suffix
    that begins with a digit, as in "Qwen3-0.6B", counts as part of the name.

    Args:
        path: The path of the page.

    Returns:
        The message, or None if the name is suitable.
    """
    if path.suffix.lower() in _PAGE_SUFFIXES or not re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):
        return None
    return (
        f"{path} would be no {path.suffix[1:].upper()} file: pages are written as HTML. Name it "
        f"{path.with_suffix('.html')}; a browser prints it to PDF or to a picture."
    )


def save_html(path: str | os.PathLike[str], html: str) -> Path:
    """Write an HTML page as UTF-8, whole or not at all.

    Args:
        path: The file to write.
        html: The page.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        ValueError: ``path`` has the suffix of another kind of file, such as .png or .pdf.
    """
    path = Path(path)
    if not path.is_dir() and (why := why_not_a_page(path)) is not None:
        raise ValueError(why)
    with atomic_path(path, example="report.html") as temporary:
        temporary.write_bytes(html.encode("utf-8"))
    return path
