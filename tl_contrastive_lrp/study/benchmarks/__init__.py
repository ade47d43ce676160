"""Where items and verdicts come from: one file a benchmark."""

from __future__ import annotations

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .item import Benchmark, Item
from .rows import Table

__all__ = ["BENCHMARKS", "Benchmark", "Item", "checked_with", "open_benchmark", "published_table"]

_CLASSES = {
    "demo": (".demo", "DemoBenchmark"),
    "ifeval": (".ifeval", "IFEval"),
    "math": (".maths", "MATH"),
    "gsm8k": (".maths", "GSM8K"),
    "humaneval": (".humaneval", "HumanEval"),
    "evalplus": (".humaneval", "EvalPlus"),
    "gaia2": (".gaia2", "GAIA2"),
}

# Packages that the checkers ask, and what those read.
_LIBRARIES = {
    "ifeval": ("if-verifiable", "langdetect", "nltk"),
    "math": ("math-verify", "latex2sympy2-extended", "sympy"),
}

# Names that ``open_benchmark`` knows.
BENCHMARKS = tuple(_CLASSES)


def open_benchmark(
    name: str,
    path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    **options: Any,
) -> Benchmark:
    """Open a benchmark: its items, and the checker of their completions.

    Args:
        name: One of ``BENCHMARKS``.
        path: The file with its rows as published (JSONL, JSON, CSV or Parquet); None to load them
            from the Hugging Face hub, or, for "demo", from this package.
        limit: The most items, the first in the file's order; None for all.
        options: Besides, for all but "demo": ``split`` and ``revision`` on the hub, and
            ``on_error``, "raise" or "skip" for malformed rows, which are named in either case.
            "math" and "gsm8k": ``request``, the sentence after the problem, ``begin``, what every
            answer begins with, ``longest_answer`` in characters, and ``shots``, how many answered
            questions come first. "ifeval": ``loose``.
            "humaneval" and "evalplus": ``sandbox``, without which nothing is executed and all
            completions stay unchecked, ``timeout`` and ``chat``.

    Returns:
        The benchmark.

    Raises:
        ValueError: The name is unknown, or an option is wrong.
        FileNotFoundError: There is no such file, or the hub cannot be read.
        FileFormatError: A row is malformed.

    Example:
        >>> from pathlib import Path
        >>> text = '{"question": "How much is 2 + 2?", "answer": "#### 4"}'
        >>> _ = Path("rows.jsonl").write_text(text)
        >>> gsm8k = clrp.study.open_benchmark("gsm8k", path="rows.jsonl")
        >>> [item] = gsm8k.items()
        >>> item.source, gsm8k.check(item, "The sum is 4.").passed
        ('rows.jsonl, line 1', True)
    """
    if name not in _CLASSES:
        raise ValueError(
            f"unknown benchmark: {name!r}. Use one of {', '.join(map(repr, BENCHMARKS))}."
        )
    module, cls = _CLASSES[name]
    opened = getattr(import_module(module, __name__), cls)
    benchmark: Benchmark = opened.open(path=path, limit=limit, **options)
    return benchmark


def checked_with(name: str) -> dict[str, str | None]:
    """What the verdicts of a benchmark depend on besides this package.

    Args:
        name: Any name.

    Returns:
        The version of each package that its checker asks, None where it is not installed; and for
        IFEval where NLTK's data "punkt_tab" is there, "installed".
    """
    found = {library: _version(library) for library in _LIBRARIES.get(name, ())}
    if found.get("nltk") is not None:
        try:
            import_module("nltk").data.find("tokenizers/punkt_tab")
            found["punkt_tab"] = "installed"
        except LookupError:
            found["punkt_tab"] = None
    return found


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def published_table(name: str) -> Table | None:
    """Where a benchmark is published, and its licence.

    Args:
        name: Any name.

    Returns:
        The table; None for the demo and for names that ``open_benchmark`` does not know.
    """
    if name not in _CLASSES or name == "demo":
        return None
    module, cls = _CLASSES[name]
    table: Table = getattr(import_module(module, __name__), cls).table
    return table
