"""Pages of published studies are made of their files of numbers; nothing is typed by hand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    """A study's script, as a module."""
    path = ROOT / "studies" / name / "run.py"
    spec = importlib.util.spec_from_file_location(f"study_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_s_page_is_made_of_its_numbers() -> None:
    page = script("demo_family").page()
    assert page == (ROOT / "docs" / "study_demo.md").read_text("utf-8")
    assert "{{" not in page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", page):
        assert (ROOT / "docs" / link).is_file(), link


def test_a_template_s_marks() -> None:
    from studies.markdown import filled

    columns = [
        {"key": "a", "title": "Σ|R|", "kind": "text"}, {"key": "n", "title": "n", "kind": "count"},
    ]  # fmt: skip
    rows = [{"a": "attnlrp", "n": 1200}, {"a": "x|y", "n": None}]
    numbers = {"tables": {"t": {"columns": columns, "rows": rows}}}
    text = filled("{{who}}: {{t/a=attnlrp/n}}\n{{table t}}\n{{table t: n}}", numbers, {"who": "I"})
    assert text.split("\n") == [
        "I: 1,200",
        "| Σ\\|R\\| | n |", "| --- | --- |", "| AttnLRP | 1,200 |", "| x\\|y | – |",
        "| n |", "| --- |", "| 1,200 |", "| – |",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="not enough values"):
        filled("{{t/a=other/n}}", numbers, {})
