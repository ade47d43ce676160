"""A benchmark of the demo model's recorded failures and successes, and small studies of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.benchmarks.item import Item
from tl_contrastive_lrp.study.cases import Verdict
from tl_contrastive_lrp.study.settings import read_settings
from tl_contrastive_lrp.study.study import Study

FILE = """
version: 1
name: small
store: {store}
base: {{model: demo}}
benchmarks: [{{name: recorded, limit: {limit}}}]
collect: {{max_new_tokens: 12, batch_size: {batch_size}, locators: [divergence], contrast: [given]}}
analyse: {{rules: [{rules}], graph: true, flip_limit: 4, mass: {mass}}}
"""


class Recorded:
    """Items of the demo's recorded cases; the right answer is known."""

    name = "recorded"

    def __init__(self, limit: int | None) -> None:
        self.limit = limit

    def items(self) -> Sequence[Item]:
        cases = [*clrp.load_demo_cases(failed=None)][::7][: self.limit]
        return [
            Item(
                id=case.id,
                messages=({"role": "user", "content": case.user},),
                reference=case.answer,
                row={"prompt": case.user, "contrast_id": case.contrast_id},
            )
            for case in cases
        ]

    def check(self, item: Item, completion: str) -> Verdict:
        passed = completion.strip() == str(item.reference).strip()
        return Verdict(passed, "" if passed else "another answer")

    def can_pass(self, item: Item, beginning: str) -> bool | None:
        return str(item.reference).startswith(beginning)

    def decisive(self, item: Item, completion: str, position: int) -> None:  # noqa: ARG002
        return None


def open_recorded(name: str, path: Any = None, limit: int | None = None, **options: Any) -> Any:
    assert (name, path, options) == ("recorded", None, {})
    return Recorded(limit)


def patched() -> Any:
    """Lets ``open_benchmark`` of the study's run know the benchmark "recorded"."""
    return mock.patch("tl_contrastive_lrp.study.run.open_benchmark", open_recorded)


def small(
    folder: Path,
    *,
    limit: int = 9,
    batch_size: int = 4,
    rules: str = "attnlrp, gradient",
    mass: float = 0.85,
    store: str = "store",
    more: str = "",
) -> Study:
    text = FILE.format(store=store, limit=limit, batch_size=batch_size, rules=rules, mass=mass)
    return Study(read_settings(text + more), folder)


def main(arguments: Sequence[str]) -> None:
    """In a process of its own: run the command line, with the benchmark known."""
    from tl_contrastive_lrp import cli

    sys.argv = ["clrp", *arguments]
    with patched():
        cli.main()


if __name__ == "__main__":
    main(sys.argv[1:])
