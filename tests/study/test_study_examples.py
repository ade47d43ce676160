"""Examples of the labels' and the report's public objects run; ``study`` is two demo failures."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path

import pytest
from support.studies import demo_study

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.bootstrap import bootstrap
from tl_contrastive_lrp.study.label_page import label_page
from tl_contrastive_lrp.study.report import report
from tl_contrastive_lrp.study.results import StudyResults

NAMES = (
    "Criteria", "Interval", "Label", "LabelAgreement", "ModelEntry", "PlantedTruth",
    "StudyResults", "automatic_label", "cohen_kappa", "label_agreement",
    "notebook_reading", "planted_truth", "read_labels", "write_labels",
)  # fmt: skip
OBJECTS = (
    {name: getattr(clrp.study, name) for name in NAMES}
    | {
        "bootstrap": bootstrap,
        "label_page": label_page,
        "report": report,
    }
    | {
        f"StudyResults.{name}": value
        for name, value in vars(StudyResults).items()
        if name[0] != "_" and (inspect.isfunction(value) or hasattr(value, "func"))
    }
)


def test_no_public_name_is_a_modules() -> None:
    """Importing ``study/x.py`` sets ``study.x`` to the module, whatever the lazy table says."""
    modules = {path.stem for path in Path(inspect.getfile(clrp.study)).parent.iterdir()}
    assert modules & set(clrp.study.__all__) == set()
    assert all(callable(getattr(clrp.study, name)) for name in clrp.study.__all__)


@pytest.mark.parametrize("name", OBJECTS)
def test_its_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = inspect.cleandoc(OBJECTS[name].__doc__).partition("\nExample:\n")[2]
    namespace = {"clrp": clrp, "study": demo_study(2, False)}
    test = doctest.DocTestParser().get_doctest(text, namespace, name, None, None)
    assert test.examples
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=said.append)
    assert not failed, "".join(said)
