"""People's labels count for the failure they were given for, and for no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.study_bench import patched, small

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.collect import LOCATORS
from tl_contrastive_lrp.study.labels import Label, write_labels
from tl_contrastive_lrp.study.study import Study
from tl_contrastive_lrp.study.tables import all_labels


@pytest.fixture(autouse=True)
def benchmark() -> Iterator[None]:
    with patched():
        yield


def study_with(folder: Path, locators: tuple[str, ...]) -> Study:
    study = small(folder, limit=9, rules="gradient")
    collect = replace(study.settings.collect, locators=locators, contrast=("given",))
    study = Study(replace(study.settings, collect=collect), folder)
    study.run(progress=False)
    return study


def test_a_label_is_not_that_of_another_failure_of_the_same_item(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two studies share a store; the same items fail at another token in the second."""
    first = study_with(tmp_path, ("divergence",))
    case = first.results().cases[0]
    label = Label(case.id, "Ada", "M-IA", "URT")
    first.add_labels(write_labels(tmp_path / "ada.jsonl", [label]))
    assert first.results().labels == (label,)
    minimum = replace(first.settings.collect, min_delta=0.5)  # computed anew, the same failure
    wider = Study(replace(first.settings, collect=minimum), tmp_path)
    wider.run(progress=False)
    assert wider.results().labels == (label,)

    monkeypatch.setitem(LOCATORS, "first token", lambda *_: 0)
    second = study_with(tmp_path, ("first token",))
    found = second.results()
    assert case.id in found.by_id
    assert found.by_id[case.id].target_position == 0 != case.target_position
    assert found.labels == ()
    assert first.results().labels == (label,)
    # The file of another labeller, who has seen the second study.
    other = Label(case.id, "Bo", "NC-IA+AG")
    second.add_labels(write_labels(tmp_path / "bo.jsonl", [other]))
    assert second.results().labels == (other,)
    assert first.results().labels == (label,)
    (first.store.folder / "labels" / "ada.cases.json").write_text("[")
    with pytest.raises(FileFormatError, match=r"ada.cases.json says of which .* study label --add"):
        first.results()


def test_the_automatic_label_is_no_person_s(tmp_path: Path) -> None:
    study = study_with(tmp_path, ("divergence",))
    path = write_labels(tmp_path / "all.jsonl", all_labels(study.results()))
    with pytest.raises(FileFormatError, match=r"all.jsonl.*'automatic'.*another name"):
        study.add_labels(path)
    assert study.results().labels == ()
