"""The house is built as CONTRIBUTING.md says: every file has a room, and imports go downhill."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tl_contrastive_lrp"
TABLE = [
    re.findall(r"`([^`]+)`", line.split("|")[1])
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
FILES = sorted(
    p for p in PACKAGE.rglob("*.py") if not p.name.startswith("__") or p.parent != PACKAGE
)


def room_of(path: Path) -> str:
    """A file's room: its own name, or its folder's with a slash."""
    first, *rest = path.relative_to(PACKAGE).parts
    return f"{first}/" if rest else path.stem


def row_of(room: str) -> int | None:
    rows = [i for i, row in enumerate(TABLE) if any(fnmatch(room, pattern) for pattern in row)]
    assert len(rows) <= 1, f"{room} is in the table of CONTRIBUTING.md more than once"
    return rows[0] if rows else None


def at_import(path: Path) -> Iterator[str]:
    """Rooms that a file imports when it is imported: not for types only, not inside functions."""
    here = ("tl_contrastive_lrp", *path.relative_to(PACKAGE).parts)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple(node.module.split(".")) if node.module else ()
        whole = (*here[: len(here) - node.level], *module) if node.level else module
        if whole[:1] != here[:1]:
            continue
        for name in node.names:
            inner = (*whole[1:], name.name)
            folder = (PACKAGE / inner[0]).is_dir()
            yield f"{inner[0]}/" if folder else inner[0]


def test_every_file_has_a_room_and_every_room_a_file() -> None:
    rooms = {room_of(path) for path in FILES}
    assert sorted(room for room in rooms if row_of(room) is None) == []
    for pattern in (pattern for row in TABLE for pattern in row):
        assert any(fnmatch(room, pattern) for room in rooms), f"{pattern} is no file"


def test_imports_go_downhill() -> None:
    uphill = []
    for path in FILES:
        own = row_of(room_of(path))
        for room in at_import(path):
            row = row_of(room)
            if own is None or row is None or row > own:
                uphill.append(f"{path.relative_to(PACKAGE)} imports {room}")
    assert uphill == []
