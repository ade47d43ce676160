"""docs/families.md says of every family what the tests expect of it."""

from __future__ import annotations

import re
from pathlib import Path

from support.zoo_expected import COVERED, REFUSED
from truth import zoo

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "families.md").read_text("utf-8")


def _families(section: str) -> set[str]:
    part = PAGE.partition(f"## {section}")[2].partition("\n## ")[0]
    return set(re.findall(r"^\| ([\w.-]+)(?: \*)? \|", part, re.M)) - {"family", "---"}


def test_the_page_lists_every_family_once_and_as_tested() -> None:
    """After a change: python tools/families_page.py."""
    covered, refused = _families("Covered"), _families("Refused")
    assert not covered & refused
    assert covered | refused == set(zoo.ROWS)
    assert set(COVERED) <= covered
    assert set(REFUSED) <= refused
