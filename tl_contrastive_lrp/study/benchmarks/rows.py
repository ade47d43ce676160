"""The rows of a benchmark's published table, from a local file or from the Hugging Face hub.

A row keeps the place it was read from, so that whatever is wrong with it can be found: the number
of its line in a JSONL or CSV file, of its element in a JSON list, of its row in Parquet or on the
hub; all count from 1. Nothing is downloaded where a path is given.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import FileFormatError, a_kind


@dataclass(frozen=True)
class Table:
    """Where a benchmark is published.

    Attributes:
        hub: The dataset's name on the hub.
        licence: Its licence.
        fields: The fields that its rows must have.
        subset: Name of the subset on the hub; None where there is one alone.
        split: The split that is the benchmark.
    """

    hub: str
    licence: str
    fields: tuple[str, ...]
    subset: str | None = None
    split: str = "test"


@dataclass(frozen=True)
class Row:
    """One row as published.

    Attributes:
        values: Its fields.
        number: Its number in the file, counted from 1.
        where: File and number, in words.
    """

    values: Mapping[str, Any]
    number: int
    where: str

    def text(self, name: str, *, empty: bool = False) -> str:
        """A field that is a text.

        Args:
            name: The field.
            empty: Whether it may be blank.

        Returns:
            The text, unchanged.

        Raises:
            FileFormatError: The field is missing, is no text, or is blank.
        """
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.wrong(name, f"is {_kind(value)}, but must be a text")
        if not empty and not value.strip():
            raise self.wrong(name, "is blank")
        return value

    def wrong(self, name: str, problem: str) -> FileFormatError:
        """The error for a field of this row.

        Args:
            name: The field.
            problem: What is wrong with it: "is blank".

        Returns:
            The error, to be raised.
        """
        missing = name not in self.values
        return FileFormatError(
            f"{self.where}: field {name!r} " + ("is missing." if missing else f"{problem}.")
        )


def read_rows(
    table: Table,
    name: str,
    path: str | os.PathLike[str] | None,
    split: str | None = None,
    revision: str | None = None,
) -> Iterator[Row | FileFormatError]:
    """Read the rows of a benchmark one by one.

    Args:
        table: Where the benchmark is published.
        name: What ``open_benchmark`` calls it, for messages.
        path: A JSONL, JSON, CSV or Parquet file; None to load it from the hub.
        split: Split on the hub; None for the benchmark's own.
        revision: Commit, branch or tag on the hub; None for the newest.

    Yields:
        The rows in the file's order; an error in place of each line that is no row.

    Raises:
        FileNotFoundError: There is no such file, or the hub cannot be read.
        ValueError: The file's suffix says nothing of its format, or a split is given with a path.
        FileFormatError: The file as a whole cannot be read.
    """
    if path is None:
        yield from map(_unicode, _from_hub(table, name, split, revision))
        return
    if split is not None or revision is not None:
        raise ValueError(
            "split and revision name a part of the hub's dataset; a file is read whole. Leave them "
            "out, or leave path out."
        )
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    readers = {
        ".jsonl": json_lines,
        ".ndjson": json_lines,
        ".json": json_list,
        ".csv": _csv,
        ".parquet": parquet_rows,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"{path} ends in none of {', '.join(readers)}; the suffix tells its format."
        )
    yield from map(_unicode, reader(path))


def json_lines(path: Path) -> Iterator[Row | FileFormatError]:
    """The lines of a JSONL file.

    Args:
        path: The file.

    Yields:
        A row for each line that is not blank; an error in place of one that is no object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                value = json.loads(line.decode("utf-8"))
            except ValueError as error:
                yield FileFormatError(f"{where}: no JSON ({error}).")
                continue
            yield _row(value, number, where)


def json_list(path: Path) -> Iterator[Row | FileFormatError]:
    """The elements of a JSON list.

    Args:
        path: The file.

    Yields:
        A row for each element; an error in place of one that is no object.

    Raises:
        FileFormatError: The file is no JSON list.
    """
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path}: no JSON ({error}).") from error
    if not isinstance(values, list):
        raise FileFormatError(
            f"{path} holds {_kind(values)}; a JSON benchmark is a list of objects, one a row."
        )
    for number, value in enumerate(values, 1):
        yield _row(value, number, f"{path.name}, element {number}")


def _csv(path: Path) -> Iterator[Row | FileFormatError]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number, start = 0, 2
        try:
            for number, values in enumerate(reader, 1):
                where = f"{path.name}, line {start}"
                start = reader.line_num + 1
                if None in values or None in values.values():
                    yield FileFormatError(
                        f"{where}: it has another number of fields than the header."
                    )
                    continue
                yield _row(dict(values), number, where)
        except (csv.Error, UnicodeDecodeError) as error:
            raise FileFormatError(f"{path}, after row {number}: {error}.") from error


def parquet_rows(path: Path) -> Iterator[Row | FileFormatError]:
    """The rows of a Parquet file.

    Args:
        path: The file.

    Yields:
        Its rows.

    Raises:
        FileFormatError: The file cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FileFormatError(f"{path} is no readable Parquet file: {error}") from error
    for number, value in enumerate(values, 1):
        yield _row(value, number, f"{path.name}, row {number}")


def _from_hub(
    table: Table, name: str, split: str | None, revision: str | None
) -> Iterator[Row | FileFormatError]:
    import datasets

    split = split or table.split
    try:
        rows = datasets.load_dataset(table.hub, table.subset, split=split, revision=revision)
    except Exception as error:  # the hub's client raises errors of many libraries
        raise FileNotFoundError(
            f"The dataset {table.hub} could not be read from the hub "
            f"({type(error).__name__}: {error}). "
            f"Without a network, give its file: open_benchmark({name!r}, path=...), a JSONL, JSON, "
            f"CSV or Parquet file with the fields {', '.join(table.fields)}, as published at "
            f"https://huggingface.co/datasets/{table.hub}."
        ) from error
    for number, value in enumerate(rows, 1):
        yield _row(value, number, f"{table.hub} ({split}), row {number}")


def _unicode(row: Row | FileFormatError) -> Row | FileFormatError:
    """An error in place of a row with half a surrogate pair, which no tokenizer takes."""
    if isinstance(row, Row):
        try:
            json.dumps(row.values, ensure_ascii=False, default=repr).encode()
        except UnicodeEncodeError as error:
            return FileFormatError(f"{row.where}: no Unicode text ({error}).")
    return row


def _row(value: Any, number: int, where: str) -> Row | FileFormatError:
    if not isinstance(value, Mapping):
        return FileFormatError(f"{where}: {_kind(value)} in place of an object with fields.")
    return Row(value, number, where)


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {str: "a text", bool: "true or false", int: "a number", float: "a number",
             list: "a list", dict: "an object", type(None): "null"}  # fmt: skip
    return kinds.get(type(value), a_kind(value))
