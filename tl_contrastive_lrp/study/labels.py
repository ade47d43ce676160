"""What a case shows, said by one labeller: outcome and pattern, and the files of such labels.

The outcome says where the failure can be understood: in the relevance of the input tokens (M-IA),
only in the attribution graph (NC-IA+M-AG), or in neither (NC-IA+AG). The pattern says how relevance
went wrong: the relevant tokens pull too weakly to the contrast (URT), other tokens push to the
target (OIT), or both. The words are those of arXiv 2604.17761, where two people labelled by eye.
Here a first label comes from ``criteria``, and people confirm or correct it on ``label_page``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import FileFormatError
from ..files import atomic_path

LABEL_VERSION = 1
# The labeller of the first label.
AUTOMATIC = "automatic"

OUTCOMES = {
    "M-IA": "manifest in the input attribution",
    "NC-IA+M-AG": "no clue in the input attribution, manifest in the graph",
    "NC-IA+AG": "no clue in the input attribution nor in the graph",
}
PATTERNS = {
    "URT": "underweighted relevant tokens",
    "OIT": "overweighted irrelevant tokens",
    "both": "underweighted relevant and overweighted irrelevant tokens",
}


@dataclass(frozen=True)
class Label:
    """What one labeller says of one case.

    Attributes:
        case_id: The case.
        labeller: Who says so; "automatic" for the first label.
        outcome: One of ``OUTCOMES``.
        pattern: One of ``PATTERNS``; None where none is clear.
        note: The labeller's words, or which criteria held.
        date: When, as ISO 8601; "" for automatic labels, which depend on the analysis alone.

    Raises:
        ValueError: A field is empty or none of the words above.

    Example:
        >>> clrp.study.Label("ifeval/12", "Ada", "M-IA", "URT").outcome
        'M-IA'
    """

    case_id: str
    labeller: str
    outcome: str
    pattern: str | None = None
    note: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for name in ("case_id", "labeller", "outcome", "note", "date"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a text")
        for name in ("case_id", "labeller"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; a label needs one")
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}; use one of {', '.join(OUTCOMES)}")
        if self.pattern is not None and self.pattern not in PATTERNS:
            raise ValueError(
                f"pattern is {self.pattern!r}; use one of {', '.join(PATTERNS)}, or null for none"
            )
        if self.date:
            try:
                datetime.fromisoformat(self.date.replace("Z", "+00:00"))
            except ValueError:
                raise ValueError(
                    f"date is {self.date!r}; write it as 2026-01-31 or 2026-01-31T12:00:00Z"
                ) from None


def write_labels(path: str | os.PathLike[str], labels: Iterable[Label]) -> Path:
    """Write labels as JSON lines, whole or not at all.

    Args:
        path: The file.
        labels: The labels.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The folder does not exist.

    Example:
        >>> path = clrp.study.write_labels("ada.jsonl", [clrp.study.Label("a/1", "Ada", "M-IA")])
        >>> len(path.read_text().splitlines())
        1
    """
    lines = [json.dumps({"version": LABEL_VERSION, **asdict(label)}) for label in labels]
    with atomic_path(path, example="labels.jsonl") as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Path(path)


def read_labels(path: str | os.PathLike[str]) -> tuple[Label, ...]:
    """Read labels that ``write_labels`` or the labelling page wrote.

    Args:
        path: The file.

    Returns:
        The labels; of several by one labeller for one case the last, which corrects the others.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: A line is no label; the message names line and field.

    Example:
        >>> path = clrp.study.write_labels("ada.jsonl", [clrp.study.Label("a/1", "Ada", "M-IA")])
        >>> clrp.study.read_labels(path)[0].labeller
        'Ada'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    labels: dict[tuple[str, str], Label] = {}
    # Not splitlines: a browser writes U+2028 in a note as it is, and no line ends there.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            label = _label(json.loads(line))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{path}, line {number}: {error}") from error
        labels.pop((label.case_id, label.labeller), None)
        labels[label.case_id, label.labeller] = label
    return tuple(labels.values())


def _label(row: Any) -> Label:
    if not isinstance(row, Mapping):
        raise ValueError(f"a label is a JSON object, not {type(row).__name__}")
    values = dict(row)
    version = values.pop("version", None)
    if version != LABEL_VERSION:
        raise ValueError(f"version is {version!r}; this package reads {LABEL_VERSION}")
    names = {field.name for field in fields(Label)}
    unknown, missing = set(values) - names, {"case_id", "labeller", "outcome"} - set(values)
    if unknown or missing:
        words = ", ".join(sorted(unknown or missing))
        raise ValueError(f"{'unknown' if unknown else 'missing'} field: {words}")
    return Label(**values)


def now() -> str:
    """The present as an ISO 8601 date in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
