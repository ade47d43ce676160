"""Starting a script of this folder as a process of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1]


def command(name: str, *arguments: str) -> list[str]:
    """What runs ``tests/support/{name}.py``."""
    return [sys.executable, str(_TESTS / "support" / f"{name}.py"), *arguments]


def environment() -> dict[str, str]:
    """The environment, in which the script finds ``support`` and ``truth``."""
    paths = [str(_TESTS), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
