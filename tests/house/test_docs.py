"""What README, CONTRIBUTING and the pages under docs say: Python runs, links lead somewhere.

A page's Python blocks run in order, in one namespace of their own, offline, in an empty folder.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAME = re.compile(r"`(\w+)`")
PATH = re.compile(r"`((?:[\w.]+/)+(?:[\w.]+\.\w+)?)`")  # `folder/`, `folder/file.py`


def text_of(page: Path) -> str:
    return page.read_text("utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> list[str]:
    return BLOCK.findall(text_of(page))


# In CONTRIBUTING code shows what to write, and is no program.
RUNS = [page for page in PAGES if page.name != "CONTRIBUTING.md" and blocks_of(page)]


@pytest.mark.parametrize("page", RUNS, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks_of(page), 1):
        exec(compile(block, f"{name_of(page)}, Python block {number}", "exec"), namespace)


def test_the_pages_have_what_is_run() -> None:
    """So that a page whose fences are written otherwise does not pass by running nothing."""
    assert len(blocks_of(ROOT / "README.md")) >= 3
    assert {"coverage.md", "graph.md", "long_prompts.md", "relevance.md"} <= {p.name for p in RUNS}


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = LINK.findall(FENCED.sub("", text_of(page)))
    local = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert [link for link in local if link and not (page.parent / link).exists()] == []


def test_files_that_pages_name_exist() -> None:
    """`hooks/families.py` in the text: in the package, beside the tests, or from the root."""
    roots = (ROOT, ROOT / "tl_contrastive_lrp", ROOT / "tests")
    missing = [
        f"{name_of(page)}: {path}"
        for page in PAGES
        for path in PATH.findall(text_of(page))
        if not any((root / path).exists() for root in roots)
    ]
    assert missing == []


def test_names_that_contributing_gives_are_in_the_code() -> None:
    folders = ("tl_contrastive_lrp", "tests", "pyproject.toml")
    files = [file for name in folders for file in (ROOT / name, *(ROOT / name).rglob("*.py"))]
    words = {word for f in files if f.is_file() for word in re.findall(r"\w+", text_of(f))}
    named = NAME.findall(FENCED.sub("", text_of(ROOT / "CONTRIBUTING.md")))
    assert named
    assert sorted({name for name in named if name not in words}) == []
