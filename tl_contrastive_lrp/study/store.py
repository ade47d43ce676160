"""Where a study keeps what it has found: one safetensors file a result, keyed by its causes.

A key is the hash of everything that determines a result: the caller names it all in
``Store.key(kind, ...)``, and the format's and the package's versions are always among it. A file
also holds those causes, and ``get`` compares them with the key that is asked for, so that a file
which was copied or renamed is refused and not served for something else. The content's own hash is
in the file too: half a file, or one with a changed bit, is an error that names it.

Files are written beside their final name and then renamed. Several workers, on several machines
with a shared folder, may therefore write the same key at the same time: they write the same result,
and each reader finds one of them whole. Nothing is locked.

    store.json                  format and its version; another version's store is refused
    case/3f/3f9a….safetensors   one result: its causes, its record (JSON), its tensors
    index.parquet               a table of all of them, derived; ``index`` writes it again
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import FileFormatError
from ..files import FileKind, atomic_path, read_result, write_result

if TYPE_CHECKING:
    import pandas as pd

STORE_VERSION = 1

_FILE = FileKind("tl_contrastive_lrp.study", STORE_VERSION, "a result of a study")
_KIND = re.compile(r"[a-z]+")
_OLD = 24 * 3600  # seconds after which a temporary file is taken to be left by a killed process


class Key(str):
    """The name of a result: "kind/hash".

    Attributes:
        kind: What kind of result it is.
        what: Everything that determines it.
    """

    kind: str
    what: Mapping[str, Any]

    def __new__(cls, kind: str, what: Mapping[str, Any]) -> Key:
        """Hash what determines a result."""
        digest = hashlib.sha256(canonical([kind, what]).encode()).hexdigest()
        key = super().__new__(cls, f"{kind}/{digest}")
        key.kind, key.what = kind, what
        return key


@dataclass(frozen=True, eq=False)
class Entry:
    """One result of the store.

    Attributes:
        key: "kind/hash".
        what: Everything that determines the result.
        record: The result, as JSON holds it.
        tensors: Its tensors, by name.
        notes: How this file was made (wall time and the like); no part of the result.
    """

    key: str
    what: Mapping[str, Any]
    record: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def canonical(value: object) -> str:
    """The one JSON text of a value, so that equal values have equal hashes.

    Args:
        value: Anything that JSON holds, with string keys; tuples count as lists.

    Raises:
        TypeError: Something in it is not JSON, or a key is not a string.
        ValueError: A number is NaN or infinite.
    """
    _require_string_keys(value)
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _require_string_keys(value: object) -> None:
    """Refuse {1: …}, which JSON would silently turn into the same text as {"1": …}."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is the key of a mapping; JSON needs strings.")
            _require_string_keys(part)
    elif isinstance(value, list | tuple):
        for part in value:
            _require_string_keys(part)


class Store:
    """A folder of results.

    Args:
        folder: The folder; it is made if it does not exist.

    Raises:
        FileFormatError: The folder is a store of another format version, or holds something else.
        NotADirectoryError: ``folder`` is a file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; a store is a folder.")
        marker = self.folder / "store.json"
        holds = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        # Looked up after the listing: another worker may just have made the store.
        if marker.exists():
            self._check(marker)
        elif any(not name.startswith(".") for name in holds):
            raise FileFormatError(
                f"{self.folder} is not empty and no store of a study (it lacks store.json); name "
                "another folder under store: in the study's file."
            )
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(marker) as temporary:
                temporary.write_text(json.dumps({"format": _FILE.format, "version": STORE_VERSION}))

    def _check(self, marker: Path) -> None:
        try:
            data = json.loads(marker.read_text("utf-8"))
            found, version = data["format"], data["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise FileFormatError(f"{marker} is damaged: {error!r}") from error
        if found != _FILE.format:
            raise FileFormatError(f"{self.folder} is no store of a study: its format is {found!r}.")
        if version != STORE_VERSION:
            raise FileFormatError(
                f"The store {self.folder} has format version {version}, this package reads "
                f"{STORE_VERSION}. Name another folder under store: in the study's file, or use "
                "the version of tl_contrastive_lrp that wrote it."
            )

    def key(self, kind: str, **what: Any) -> Key:
        """The key of a result.

        Args:
            kind: What kind of result it is: a word of small letters, the folder of its files.
            what: Everything that determines the result, as JSON holds it. The format's and the
                package's versions are added.

        Raises:
            ValueError: ``kind`` is no such word, or a number is NaN or infinite.
            TypeError: Something cannot be written as JSON.
        """
        from .. import __version__

        if not _KIND.fullmatch(kind):
            raise ValueError(f"kind={kind!r} must be a word of small letters, such as 'case'.")
        versions = {"format": STORE_VERSION, "package": __version__}
        return Key(kind, {**what, "versions": versions})

    def path(self, key: str) -> Path:
        """The file of a key, whether it exists or not."""
        kind, _, digest = key.partition("/")
        return self.folder / kind / digest[:2] / f"{digest}.safetensors"

    def has(self, key: str) -> bool:
        """Whether there is a file of this key; ``get`` says whether it can be read."""
        return self.path(key).is_file()

    def put(
        self,
        key: Key,
        record: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a result, whole or not at all; one of the same key is replaced.

        Args:
            key: From ``key``.
            record: The result, as JSON holds it.
            tensors: Its tensors, by name.
            notes: How it was made: wall time and the like, which is no part of the result.
        """
        path, tensors = self.path(key), dict(tensors or {})
        path.parent.mkdir(parents=True, exist_ok=True)
        data = {
            "key": str(key),
            "what": key.what,
            "record": record,
            "digest": digest_of(record, tensors),
            "notes": notes or {},
        }
        write_result(path, _FILE, tensors, data)

    def get(self, key: str) -> Entry:
        """Read a result.

        Args:
            key: The key.

        Raises:
            KeyError: There is no such result.
            FileFormatError: Its file is damaged, of another version, or of another key.
        """
        path = self.path(key)
        try:
            tensors, data = read_result(path, _FILE)
        except FileNotFoundError:
            raise KeyError(f"The store {self.folder} has no {key}.") from None
        missing = {"key", "what", "record", "digest", "notes"} - set(data)
        if missing:
            raise FileFormatError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}.")
        if data["key"] != key or Key(str(key).partition("/")[0], data["what"]) != key:
            raise FileFormatError(
                f"{path} holds the result of other causes than its name says; it was renamed or "
                "copied. Delete it, and run the study again."
            )
        if digest_of(data["record"], tensors) != data["digest"]:
            raise FileFormatError(
                f"{path} is damaged: its content has another hash than when it was written. Delete "
                "it, and run the study again."
            )
        return Entry(str(key), data["what"], data["record"], tensors, data["notes"])

    def keys(self, kind: str) -> list[str]:
        """The keys of all results of a kind, sorted.

        Args:
            kind: What kind of results.
        """
        paths = (self.folder / kind).glob("??/*.safetensors")
        return sorted(f"{kind}/{path.stem}" for path in paths)

    def index(self) -> pd.DataFrame:
        """The table of all results, also written as ``index.parquet``.

        It is derived from the files, and may be deleted. Files that cannot be read are in it too,
        with the reason.

        Returns:
            One row a result: kind, key, file, bytes, error ("" where it can be read), and each
            cause that is a text or a number.
        """
        import pandas as pd

        rows = [self._row(path) for path in self._files()]
        first = ["kind", "key", "file", "bytes", "error"]
        frame = pd.DataFrame(rows)
        frame = frame.reindex(columns=[*first, *sorted(set(frame.columns) - set(first))])
        with atomic_path(self.folder / "index.parquet") as temporary:
            frame.to_parquet(temporary, index=False)
        return frame

    def _files(self) -> Iterator[Path]:
        yield from sorted(self.folder.glob("*/??/*.safetensors"))

    def _row(self, path: Path) -> dict[str, Any]:
        kind = path.parent.parent.name
        row: dict[str, Any] = {
            "kind": kind,
            "key": f"{kind}/{path.stem}",
            "file": path.relative_to(self.folder).as_posix(),
            "bytes": path.stat().st_size,
            "error": "",
        }
        try:
            what = self.get(row["key"]).what
        except FileFormatError as error:
            return {**row, "error": str(error)}
        # As texts, since one name may be a number for one kind and a text for another.
        scalars = {n: str(v) for n, v in what.items() if isinstance(v, str | int | float | bool)}
        return {**row, **{n: v for n, v in scalars.items() if n not in row}}

    def sweep(self) -> int:
        """Delete temporary files that killed processes have left for more than a day.

        Returns:
            How many there were.
        """
        now, n = time.time(), 0
        for path in self.folder.glob("*/??/.*.tmp"):
            try:
                if now - path.stat().st_mtime > _OLD:
                    path.unlink()
                    n += 1
            except FileNotFoundError:  # another worker swept it
                continue
        return n


def digest_of(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash of a result's record and of each tensor's name, type, shape and bytes.

    Args:
        record: The result, as JSON holds it; NaN is allowed here.
        tensors: Its tensors, by name.
    """
    import torch

    hashed = hashlib.sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        hashed.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        hashed.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
