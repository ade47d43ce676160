"""The study room: many failures of a model, collected, explained, labelled and reported.

A study is a file, ``study.yaml``, that names models and benchmarks. ``Study.load(path)`` reads it;
``plan``, ``run``, ``label`` and ``report`` are its steps, and ``clrp study`` the same steps on the
command line. What each step finds lies in a store, one file a case, so that a study can be
interrupted, continued and shared between machines.

From the bottom to the top: ``cases`` (the record of one failure), ``benchmarks`` and ``logs``
(where completions and verdicts come from), ``collect`` (from a failure to its first wrong token and
a contrast), ``analysis`` and ``analyse`` (what attribution says of a case), ``checks`` (whether
replaced tokens bear that out), ``store``, ``settings`` and ``run``, then ``labels``, ``criteria``,
``sizes`` and ``report``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .agreement import LabelAgreement, cohen_kappa, label_agreement
    from .analysis import CaseAnalysis, SegmentSum
    from .benchmarks import Benchmark, Item, open_benchmark
    from .bootstrap import Interval
    from .case_files import load_cases, save_cases, write_card
    from .cases import Case, Dropped, Provenance, Verdict
    from .collect import CollectSettings, register_locator
    from .criteria import Criteria, automatic_label, notebook_reading
    from .labels import Label, read_labels, write_labels
    from .logs import LoggedCompletion, completions_from_log
    from .models import ModelSpec, check_same_tokens, fingerprint, open_model
    from .planted import PlantedTruth, planted_truth
    from .results import ModelEntry, StudyResults
    from .study import Study

# Loaded at first use (PEP 562), by module. No name here is a module's: importing the module would
# replace it.
_NAMES = {
    "agreement": ("LabelAgreement", "cohen_kappa", "label_agreement"),
    "analysis": ("CaseAnalysis", "SegmentSum"),
    "benchmarks": ("Benchmark", "Item", "open_benchmark"),
    "bootstrap": ("Interval",),
    "case_files": ("load_cases", "save_cases", "write_card"),
    "cases": ("Case", "Dropped", "Provenance", "Verdict"),
    "collect": ("CollectSettings", "register_locator"),
    "criteria": (
        "Criteria",
        "automatic_label",
        "notebook_reading",
    ),
    "labels": (
        "Label",
        "read_labels",
        "write_labels",
    ),
    "planted": (
        "PlantedTruth",
        "planted_truth",
    ),
    "logs": ("LoggedCompletion", "completions_from_log"),
    "models": ("ModelSpec", "check_same_tokens", "fingerprint", "open_model"),
    "results": ("ModelEntry", "StudyResults"),
    "study": ("Study",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Benchmark",
    "Case",
    "CaseAnalysis",
    "CollectSettings",
    "Criteria",
    "Dropped",
    "Interval",
    "Item",
    "Label",
    "LabelAgreement",
    "LoggedCompletion",
    "ModelEntry",
    "ModelSpec",
    "PlantedTruth",
    "Provenance",
    "SegmentSum",
    "Study",
    "StudyResults",
    "Verdict",
    "automatic_label",
    "check_same_tokens",
    "cohen_kappa",
    "completions_from_log",
    "fingerprint",
    "label_agreement",
    "load_cases",
    "notebook_reading",
    "open_benchmark",
    "open_model",
    "planted_truth",
    "read_labels",
    "register_locator",
    "save_cases",
    "write_card",
    "write_labels",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
