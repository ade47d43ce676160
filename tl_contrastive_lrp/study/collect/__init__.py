"""From a benchmark's items to cases: completions, the first wrong token, and its contrast."""

from __future__ import annotations

from .collect import CollectSettings, collect, collect_logged, complete
from .generate import Greedy
from .locate import LOCATORS, register_locator
from .place import Completion, Failure, Judge

__all__ = [
    "LOCATORS",
    "CollectSettings",
    "Completion",
    "Failure",
    "Greedy",
    "Judge",
    "collect",
    "collect_logged",
    "complete",
    "register_locator",
]
