"""Cases on disk: JSON Lines or Parquet, and the dataset card of the folder they lie in.

Both formats give back the same cases, bit for bit. A JSONL file has one case a line, nested as
``Case`` is. A Parquet file has the same fields as columns; what has no fixed shape (``JSON_FIELDS``
and the decoding) is JSON text there, because Arrow would give all messages the same keys. Its
columns are those of ``features()``, which Hugging Face ``datasets`` reads back as they are.

Every case is checked on load. A file of another version of the record is refused.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import FileFormatError, a_kind
from ..files import atomic_path
from .benchmarks import published_table
from .benchmarks.rows import Row, json_lines, parquet_rows
from .cases import CASE_VERSION, Case, case_from, record_of

# Fields that are JSON text in Parquet.
JSON_FIELDS = ("messages", "tools", "segments")


def load_cases(
    path: str | os.PathLike[str], *, on_error: Literal["raise", "skip"] = "raise"
) -> tuple[Case, ...]:
    """Load cases and check each of them.

    Args:
        path: A ``.jsonl`` or ``.parquet`` file.
        on_error: What to do with a case that is malformed: "raise", or "skip" to leave it out with
            a warning that names each. A record of another version is an error in either case.

    Returns:
        The cases, in the file's order.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is damaged, or a case is malformed, has the id of another, or
            another version of the record; the message names line and field.
        ValueError: The suffix is another, or ``on_error`` is unknown.

    Example:
        >>> len(clrp.study.save_cases([], "cases.jsonl").read_bytes())
        0
        >>> clrp.study.load_cases("cases.jsonl")
        ()
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error is {on_error!r}; use 'raise' or 'skip'.")
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    cases: dict[str, Case] = {}
    places: dict[str, str] = {}
    malformed: list[str] = []
    for row in (json_lines if suffix == ".jsonl" else parquet_rows)(path):
        try:
            if isinstance(row, FileFormatError):
                raise row
            record = row.values if suffix == ".jsonl" else _with_objects(row)
            case = case_from(record, row.where)
            if case.id in cases:
                raise FileFormatError(
                    f"{row.where}: field 'id': {case.id!r} is the id of the case at "
                    f"{places[case.id]}."
                )
        except FileFormatError as error:
            record = row.values if isinstance(row, Row) else {}
            if on_error == "raise" or record.get("version", CASE_VERSION) != CASE_VERSION:
                raise
            malformed.append(str(error))
            continue
        cases[case.id], places[case.id] = case, row.where
    if malformed:
        warnings.warn(
            f"{len(malformed)} malformed cases of {path} are left out:\n" + "\n".join(malformed),
            UserWarning,
            stacklevel=2,
        )
    return tuple(cases.values())


def save_cases(
    cases: Iterable[Case],
    path: str | os.PathLike[str],
    *,
    card: bool = False,
    licence: str = "other",
) -> Path:
    """Save cases as JSON Lines or Parquet; the file is written whole or not at all.

    Args:
        cases: The cases; no two have the same id.
        path: A ``.jsonl`` or ``.parquet`` file. Parquet is what the hub shows as a table.
        card: Whether to write a dataset card, ``README.md``, into the same folder.
        licence: The card's licence, as the hub spells it.

    Returns:
        The path.

    Raises:
        ValueError: Two cases have the same id, or the suffix is another.
        TypeError: Something is no ``Case``.
        FileNotFoundError: The folder does not exist.

    Example:
        >>> path = clrp.study.save_cases([], "cases.parquet", card=True)
        >>> path.with_name("README.md").read_text().splitlines()[:2]
        ['---', 'license: other']
    """
    cases = tuple(cases)
    path = Path(path)
    suffix = _suffix(path)
    for case in cases:
        if not isinstance(case, Case):
            raise TypeError(f"{case!r} is {a_kind(case)}; give objects of Case.")
    repeated = [id for id, count in Counter(case.id for case in cases).items() if count > 1]
    if repeated:
        raise ValueError(f"Two cases have the id {repeated[0]!r}; ids must be unique.")
    with atomic_path(path, example="cases.jsonl") as temporary:
        if suffix == ".jsonl":
            lines = (json.dumps(record_of(case), ensure_ascii=False) + "\n" for case in cases)
            temporary.write_bytes("".join(lines).encode("utf-8"))
        else:
            _write_parquet(temporary, cases)
    if card:
        write_card(cases, path, licence=licence)
    return path


def features() -> Any:
    """The columns of a Parquet file of cases.

    Returns:
        ``datasets.Features``.
    """
    from datasets import Features, Sequence, Value

    text, number, truth = Value("string"), Value("int64"), Value("bool")
    return Features(
        {
            "version": number,
            "id": text,
            "benchmark": text,
            "prompt": text,
            "prompt_ids": Sequence(number),
            "completion": text,
            "completion_ids": Sequence(number),
            "target_position": number,
            "target_id": number,
            "target": text,
            "contrast_id": number,
            "contrast": text,
            "delta": Value("float64"),
            "verdict": {"passed": truth, "reason": text, "checked": truth},
            "provenance": {
                "model": text,
                "revision": text,
                "fingerprint": text,
                "decoding": text,
                "package": text,
                "source": text,
            },
            "messages": text,
            "tools": text,
            "reference": text,
            "segments": text,
            "decisive_positions": Sequence(number),
            "locator": text,
            "contrast_source": text,
        }
    )


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"{path} is no name for a file of cases; use cases.jsonl or cases.parquet: the suffix "
            "tells its format."
        )
    return suffix


def _write_parquet(path: Path, cases: Sequence[Case]) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = []
    for case in cases:
        row = record_of(case)
        for name in JSON_FIELDS:
            row[name] = json.dumps(row[name], ensure_ascii=False)
        decoding = row["provenance"]["decoding"]
        row["provenance"]["decoding"] = json.dumps(decoding, ensure_ascii=False)
        rows.append(row)
    table = pyarrow.Table.from_pylist(rows, schema=features().arrow_schema)
    pyarrow.parquet.write_table(table, path)


def _with_objects(row: Row) -> Mapping[str, Any]:
    """A row of a Parquet file with its texts of JSON as what they hold."""
    values = dict(row.values)
    try:
        for name in JSON_FIELDS:
            values[name] = _unpacked(values, name)
        if isinstance(values.get("provenance"), Mapping):
            decoding = _unpacked(values["provenance"], "decoding")
            values["provenance"] = {**values["provenance"], "decoding": decoding}
    except ValueError as error:
        raise FileFormatError(f"{row.where}: {error}.") from error
    return values


def _unpacked(row: Mapping[str, Any], name: str) -> Any:
    """The JSON value of a text column."""
    value = row.get(name)
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} must be JSON text")
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"field {name!r} is no JSON ({error})") from error


def write_card(
    cases: Iterable[Case], path: str | os.PathLike[str], *, licence: str = "other"
) -> Path:
    """Write the dataset card of a file of cases, ``README.md`` in its folder.

    Its header is what the hub reads: licence, size, the file as the split "train", and for Parquet
    the columns. Below stand the counts by benchmark, the benchmarks' own licences, and the models
    that wrote the completions.

    Args:
        cases: The cases in the file.
        path: The file of cases.
        licence: The dataset's licence, as the hub spells it. "other" says that each text keeps the
            licence of its benchmark.

    Returns:
        The card's path.

    Raises:
        FileNotFoundError: The folder does not exist.

    Example:
        >>> path = clrp.study.save_cases([], "cases.jsonl")
        >>> print(clrp.study.write_card([], path, licence="mit").name)
        README.md
    """
    from huggingface_hub import DatasetCardData

    cases, path = tuple(cases), Path(path)
    fields: dict[str, Any] = {
        "license": licence,
        "pretty_name": "Failures of language models, with target and contrast tokens",
        "tags": ["interpretability", "attribution", "tl_contrastive_lrp"],
        "size_categories": [_size_category(len(cases))],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": path.name}]}
        ],
    }
    data = DatasetCardData(**fields)
    if path.suffix.lower() == ".parquet":
        from datasets import DatasetInfo
        from datasets.info import DatasetInfosDict

        info = DatasetInfo(features=features(), config_name="default")
        DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    target = path.with_name("README.md")
    with atomic_path(target, example="README.md") as temporary:
        text = f"---\n{data.to_yaml()}\n---\n{_card_text(cases, path)}"
        temporary.write_bytes(text.encode("utf-8"))
    return target


def _card_text(cases: Sequence[Case], path: Path) -> str:
    counts = Counter(case.benchmark for case in cases)
    rows = []
    for name, count in sorted(counts.items()):
        table = published_table(name)
        source = f"[{table.hub}](https://huggingface.co/datasets/{table.hub})" if table else ""
        rows.append(f"| {name} | {count} | {source} | {table.licence if table else ''} |")
    written = Counter(
        (case.provenance.model, case.provenance.revision or "", case.provenance.package)
        for case in cases
    )
    models = [f"| {a} | {b} | {c} | {n} |" for (a, b, c), n in sorted(written.items())]
    kind = "Parquet" if path.suffix.lower() == ".parquet" else "JSON Lines"
    json_note = (
        f" {', '.join(JSON_FIELDS)} and provenance.decoding are JSON texts."
        if kind == "Parquet"
        else ""
    )
    return f"""
# Failures with target and contrast tokens

{len(cases)} completions that a benchmark's checker rejects. Each names the first wrong token
(target), the token that should have been written instead (contrast), and the exact token ids of
prompt and completion, so that it can be explained by contrastive attribution: why did the model
write the target and not the contrast?

## Splits

`{path.name}` ({kind}): one split, "train", with {len(cases)} cases.{json_note} Load it with
`clrp.study.load_cases("{path.name}")` of the Python package tl_contrastive_lrp, which checks each
case (version {CASE_VERSION} of the record), or with Hugging Face `datasets`.

## Benchmarks and licences

Prompts and references are the benchmarks' texts and keep their licences.

| benchmark | cases | source | licence |
| --- | --- | --- | --- |
{chr(10).join(rows)}

## Provenance

Completions were written by these models; each case's `provenance` has the decoding besides.

| model | revision | written with | cases |
| --- | --- | --- | --- |
{chr(10).join(models)}

## Fields

| field | meaning |
| --- | --- |
| id, benchmark | the case's name, "benchmark/item" |
| prompt, prompt_ids | text and token ids before the completion, chat template included |
| completion, completion_ids | what the model wrote |
| target_position, target_id, target | the first wrong token: its index in completion_ids |
| contrast_id, contrast | the token that should have been written there |
| delta | logit(target) − logit(contrast) of the model that wrote the completion |
| verdict | what the checker said: passed, reason, checked |
| provenance | model, revision, fingerprint of its weights, decoding, package, source of the item |
| messages, tools, reference | the chat, the tools it offered, and the right answer |
| segments | named stretches of the tokens before the target, (start, end), end excluded |
| decisive_positions | positions before the target that decide which token is right, if known |
| locator, contrast_source | how the target and the contrast were found |
| version | version of this record |
"""


def _size_category(count: int) -> str:
    limits = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
    return next((name for limit, name in limits if count < limit), "100K<n<1M")
