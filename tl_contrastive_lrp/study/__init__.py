"""The study room: many failures of a model, collected, explained, labelled and reported.

A study is a file, ``study.yaml``, that names models and benchmarks. ``Study.load(path)`` reads it;
``plan``, ``run``, ``label`` and ``report`` are its steps, and ``clrp study`` the same steps on the
command line. What each step finds lies in a store, one file a case, so that a study can be
interrupted, continued and shared between machines.

From the bottom to the top: ``cases`` (the record of one failure), ``benchmarks`` and ``logs``
(where completions and verdicts come from), ``collect`` (from a failure to its first wrong token and
a contrast), ``analysis`` and ``analyse`` (what attribution says of a case), ``store``, ``settings``
and ``run``, then ``labels``, ``sizes`` and ``report``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmarks import Benchmark, Item, open_benchmark
    from .case_files import load_cases, save_cases, write_card
    from .cases import Case, Dropped, Provenance, Verdict
    from .collect import CollectSettings, register_locator
    from .logs import LoggedCompletion, completions_from_log
    from .models import ModelSpec, check_same_tokens, fingerprint, open_model

__all__ = [
    "Benchmark",
    "Case",
    "CollectSettings",
    "Dropped",
    "Item",
    "LoggedCompletion",
    "ModelSpec",
    "Provenance",
    "Verdict",
    "check_same_tokens",
    "completions_from_log",
    "fingerprint",
    "load_cases",
    "open_benchmark",
    "open_model",
    "register_locator",
    "save_cases",
    "write_card",
]

# Loaded at first use (PEP 562), like the package's own names.
_FILES = {
    "benchmarks": ("Benchmark", "Item", "open_benchmark"),
    "case_files": ("load_cases", "save_cases", "write_card"),
    "cases": ("Case", "Dropped", "Provenance", "Verdict"),
    "collect": ("CollectSettings", "register_locator"),
    "models": ("ModelSpec", "check_same_tokens", "fingerprint", "open_model"),
    "logs": ("LoggedCompletion", "completions_from_log"),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_FILE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
