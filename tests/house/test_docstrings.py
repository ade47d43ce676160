"""Every public object is documented: a summary, all its arguments, and an example that runs.

One test per object and question; ``pytest tests/house/test_docstrings.py -k prune -n 0`` runs those
of one name. An example is a doctest under ``Example:`` and finds these names:

``clrp``, ``torch``, ``json``, ``Path``, ``model`` (the demo model), ``case`` (a case of the demo,
with ``prompt``, ``target`` and ``contrast``), ``objective``, ``result`` (``attribute`` of that
case), ``graph`` (its ``attribution_graph``) and ``results`` (a study of two failures of the demo).
It runs in an empty folder and leaves the model as it was; a locator that it registers is forgotten.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from support.model_state import snapshot_of
from support.studies import demo_study

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.bootstrap import bootstrap
from tl_contrastive_lrp.study.collect import LOCATORS
from tl_contrastive_lrp.study.label_page import label_page
from tl_contrastive_lrp.study.report import report

PACKAGE = clrp.__name__
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = {
    "clrp": clrp,
    "clrp.patching": clrp.patching,
    "clrp.faithfulness": clrp.faithfulness,
    "clrp.rules": clrp.rules,
    "clrp.errors": clrp.errors,
    "clrp.demo": clrp.demo,
    "clrp.study": clrp.study,
}
# Calls that are documented, but imported from their own modules.
CALLS = (bootstrap, label_page, report)
# Values, which have a comment where they are defined, as Python has no docstrings for them.
CONSTANTS = {
    "clrp.DEFAULT_RULES",
    "clrp.RULE_SETS",
    "clrp.demo.KINDS",
    "clrp.faithfulness.BASELINES",
}


@dataclasses.dataclass(frozen=True)
class Documented:
    """A public object: its name, as callers write it, and what carries its docstring."""

    name: str
    value: Any

    @property
    def docstring(self) -> str:
        """The cleaned docstring, or "" without one of its own."""
        text = self.value.__doc__
        inherited = text is not None and text == getattr(type(self.value), "__doc__", None)
        return "" if text is None or inherited else inspect.cleandoc(text)

    @property
    def is_error(self) -> bool:
        return isinstance(self.value, type) and issubclass(self.value, BaseException)

    @property
    def arguments(self) -> list[str]:
        """The names of the arguments that a caller passes; none for classes and properties."""
        if isinstance(self.value, type | property | functools.cached_property):
            return []
        return [n for n in inspect.signature(self.value).parameters if n not in ("self", "cls")]

    def section(self, *titles: str) -> list[str]:
        """What stands under each section with one of these titles, dedented."""
        pattern = rf"^(?:{'|'.join(titles)}):\n((?:[ ]{{4}}.*\n?|\n)+)"
        return [inspect.cleandoc(s) for s in re.findall(pattern, self.docstring, re.MULTILINE)]


def public_names(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = vars(module).items()
    return [n for n, v in own if n[0] != "_" and getattr(v, "__module__", "") == module.__name__]


def members_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that this package defines, inherited ones too."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(PACKAGE):
            continue
        for name, value in vars(base).items():
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            kinds = FunctionType | property | functools.cached_property
            if name[0] != "_" and name not in seen and isinstance(value, kinds):
                seen.add(name)
                yield name, value


def public_objects() -> list[Documented]:
    """Each object once, under the first name that it has."""
    found: dict[int, Documented] = {}
    for prefix, module in MODULES.items():
        for name in public_names(module):
            value, full = getattr(module, name), f"{prefix}.{name}"
            if isinstance(value, ModuleType) or full in CONSTANTS or id(value) in found:
                continue
            if any(value is getattr(MODULES[c.rpartition(".")[0]], c.rpartition(".")[2])
                   for c in CONSTANTS):  # fmt: skip
                continue
            found[id(value)] = Documented(full, value)
            if isinstance(value, type):
                for member, method in members_of(value):
                    found.setdefault(id(method), Documented(f"{full}.{member}", method))
    for call in CALLS:
        found[id(call)] = Documented(call.__module__.replace(PACKAGE, "clrp"), call)
    return list(found.values())


OBJECTS = public_objects()
WITH_EXAMPLE = [one for one in OBJECTS if not one.is_error or ">>>" in one.docstring]


def named(objects: list[Documented]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("documented", objects, ids=lambda one: one.name)


def test_the_list_is_whole() -> None:
    names = {one.name for one in OBJECTS}
    assert {"clrp.attribute", "clrp.AttributionGraph", "clrp.AttributionGraph.prune"} <= names
    assert {"clrp.Attribution.save", "clrp.RuleSet", "clrp.errors.LrpError"} <= names
    assert {"clrp.patching.relevance_patch", "clrp.rules.uniform"} <= names
    assert {"clrp.study.Study.run", "clrp.study.StudyResults.base"} <= names
    assert {f"clrp.study.{name}" for name in clrp.study.__all__} <= names
    assert len(names) == len(OBJECTS) > 100


def test_no_public_name_of_the_study_is_a_modules() -> None:
    """Importing ``study/x.py`` sets ``study.x`` to the module, whatever the lazy table says."""
    modules = {path.stem for path in Path(inspect.getfile(clrp.study)).parent.iterdir()}
    assert modules & set(clrp.study.__all__) == set()
    assert all(callable(getattr(clrp.study, name)) for name in clrp.study.__all__)


@named(OBJECTS)
def test_it_has_a_summary(documented: Documented) -> None:
    """A sentence on the first line, or on the first lines up to an empty one."""
    summary = documented.docstring.partition("\n\n")[0]
    assert summary, f"{documented.name} has no docstring"
    assert re.search(r"[.!?:]$", summary), f"{documented.name}: {summary!r} is no sentence"
    assert summary[0].isupper() or summary[0] in "`*0123456789ΔR", summary


@named([one for one in OBJECTS if one.arguments])
def test_all_its_arguments_are_documented(documented: Documented) -> None:
    text = "\n".join(documented.section("Args", "Keyword Args"))
    entries = re.findall(r"^((?:\*{0,2}\w+(?:, )?)+)(?: \([^)]*\))?:", text, re.MULTILINE)
    names = [name.lstrip("*") for entry in entries for name in entry.split(", ")]
    assert sorted(names) == sorted(documented.arguments), f"{documented.name} lists {names}"


@pytest.fixture(scope="session")
def namespace() -> dict[str, Any]:
    """What every example finds; made once for each worker."""
    model, case = clrp.load_demo_model(), clrp.load_demo_cases("code")[0]
    objective = clrp.logit_diff(model, case.target, case.contrast)
    return {
        "clrp": clrp,
        "json": json,
        "Path": Path,
        "torch": torch,
        "model": model,
        "case": case,
        "objective": objective,
        "result": clrp.attribute(model, case.prompt, objective),
        "graph": clrp.attribution_graph(model, case.prompt, objective),
        "results": demo_study(2, graphs=False),
    }


@named(WITH_EXAMPLE)
def test_its_example_runs(
    documented: Documented,
    namespace: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    examples = documented.section("Example", "Examples")
    assert len(examples) == 1, f"{documented.name} has {len(examples)} sections 'Example:'"
    test = doctest.DocTestParser().get_doctest(
        examples[0], dict(namespace), documented.name, None, None
    )
    assert test.examples, f"{documented.name} has an example without >>>"
    assert any(e.want or "assert" in e.source for e in test.examples), "it shows nothing"
    monkeypatch.chdir(tmp_path)
    before, said = snapshot_of(namespace["model"]), []
    with mock.patch.dict(LOCATORS):
        failed, _ = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=said.append)
    assert not failed, "".join(said)
    assert snapshot_of(namespace["model"]) == before, "the example changes the model"
