"""Cases that contradict themselves are refused, with the field's name; others come back exactly."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from support.study_cases import made_case

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.cases import Case, Provenance, Verdict, case_from, record_of


def test_a_record_gives_the_same_case() -> None:
    case = made_case()
    record = json.loads(json.dumps(record_of(case)))
    again = case_from(record)
    assert again == case
    assert all(getattr(again, f.name) == getattr(case, f.name) for f in fields(Case))
    assert math.frexp(again.delta) == math.frexp(case.delta)
    assert case.ids == (1, 5, 9, 2, 7, 11)


def test_lists_become_tuples_and_later_changes_do_not_reach_the_case() -> None:
    message = {"role": "user", "content": "a"}
    decoding: dict[str, Any] = {"stop": ("x",)}
    case = made_case(
        prompt_ids=[1, 2, 3, 4, 5],
        messages=[message],
        segments={"a": [[0, 1]]},
        provenance=Provenance("m", decoding=decoding),
    )
    message["content"] = "b"
    decoding["more"] = 1
    assert case.prompt_ids == (1, 2, 3, 4, 5)
    assert case.messages == ({"role": "user", "content": "a"},)
    assert case.segments == {"a": ((0, 1),)}
    assert case.provenance.decoding == {"stop": ["x"]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"id": ""}, "'id' is blank"),
        ({"benchmark": None}, "'benchmark'"),
        ({"prompt": 3}, "'prompt'"),
        ({"prompt": "\ud83d"}, "'prompt' is no Unicode text"),
        ({"prompt_ids": ()}, "'prompt_ids'"),
        ({"prompt_ids": (1, -2)}, "'prompt_ids'"),
        ({"prompt_ids": (1, 2.0)}, "'prompt_ids'"),
        ({"prompt_ids": (1, True)}, "'prompt_ids'"),
        ({"completion_ids": "abc"}, "'completion_ids'"),
        ({"target_position": 3}, "'target_position' is 3, but the completion has 3 tokens"),
        ({"target_position": -1}, "'target_position'"),
        ({"target_id": 13}, "'target_id' is 13, but completion_ids has 12 at position 1"),
        ({"contrast_id": 12}, "'contrast_id' is the target's"),
        ({"delta": float("nan")}, "'delta'"),
        ({"delta": "3"}, "'delta'"),
        ({"delta": True}, "'delta'"),
        ({"verdict": Verdict(True)}, "'verdict' says that the completion passes"),
        ({"verdict": Verdict.unchecked("no")}, "'verdict' says that the completion is unchecked"),
        ({"verdict": False}, "'verdict'"),
        ({"provenance": {"model": "m"}}, "'provenance'"),
        ({"messages": ({"content": "a"},)}, "message 1 has no role"),
        ({"messages": {"role": "user"}}, "'messages'"),
        ({"messages": ({"role": "user", "x": {1: 2}},)}, "'messages' has keys that are no texts"),
        ({"messages": ({"role": "user", "x": float("inf")},)}, "'messages' cannot be written"),
        ({"tools": (lambda: 0,)}, "'tools' cannot be written"),
        ({"reference": 3}, "'reference'"),
        ({"segments": {"a": ((5, 7),)}}, "'segments': 'a' has (5, 7)"),
        ({"segments": {"a": ((2, 2),)}}, "'segments': 'a' has (2, 2)"),
        ({"segments": {"a": (1, 2)}}, "'segments': 'a' has 1"),
        ({"segments": [(0, 1)]}, "'segments'"),
        ({"decisive_positions": (6,)}, "'decisive_positions' has 6, but 6 tokens"),
        ({"decisive_positions": (2, 1)}, "'decisive_positions' must ascend"),
        ({"decisive_positions": 3}, "'decisive_positions'"),
        ({"locator": ""}, "'locator' is blank"),
        ({"version": 2}, "'version' is 2, this package reads 1"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=r"^field ") as error:
        made_case(**changes)
    assert named in str(error.value)


def test_a_verdict_is_consistent() -> None:
    assert Verdict(False).failed
    assert not Verdict(True).failed
    assert not Verdict.unchecked("no checker").failed
    with pytest.raises(ValueError, match="checked"):
        Verdict(True, checked=False)
    with pytest.raises(ValueError, match="passed"):
        Verdict(1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"provenance\.model"):
        Provenance("")


@pytest.mark.parametrize(
    "missing", ["id", "target_id", "version", "verdict", "provenance", "delta"]
)
def test_missing_fields_are_named(missing: str) -> None:
    record = record_of(made_case())
    del record[missing]
    with pytest.raises(FileFormatError, match=rf"^f, line 3: field '{missing}' is missing"):
        case_from(record, "f, line 3")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": 1}, "no field 'colour'"),
        ({"verdict": {"passed": False, "checked": True, "why": ""}}, "no field 'verdict.why'"),
        ({"verdict": {"checked": True}}, "field 'verdict.passed' is missing"),
        ({"verdict": None}, "field 'verdict' must be an object"),
        ({"provenance": {}}, "field 'provenance.model' is missing"),
        ({"provenance": {"model": 3}}, "field 'provenance.model'"),
        ({"version": 2}, "version 2, this package reads 1"),
        ({"version": "1"}, "version '1', this package reads 1"),
        ({"version": True}, "field 'version' is True"),
        ({"target_id": 13}, "field 'target_id' is 13"),
    ],
)
def test_malformed_records_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(FileFormatError, match=r"^f, line 3: ") as error:
        case_from(record_of(made_case()) | change, "f, line 3")
    assert named in str(error.value)


def test_every_optional_field_may_be_left_out() -> None:
    case = made_case(messages=None, tools=None, reference=None, decisive_positions=None)
    record = {k: v for k, v in record_of(case).items() if v is not None}
    for name in ("segments", "locator", "contrast_source"):
        del record[name]
    again = case_from(record)
    assert again == replace(case, segments={}, locator="given", contrast_source="given")
