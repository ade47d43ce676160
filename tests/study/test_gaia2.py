"""GAIA2: scenarios and traces in their published fields; verdicts are the run's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study.benchmarks import open_benchmark

EVENT = {
    "class_name": "Event",
    "event_type": "USER",
    "action": {
        "app": "AgentUserInterface",
        "function": "send_message_to_agent",
        "args": [{"name": "content", "value": "Book a table for two.", "value_type": "str"}],
    },
}
SCENARIO = {
    "id": "1",
    "scenario_id": "made_1",
    "split": "execution",
    "data": json.dumps({"metadata": {}, "apps": [], "events": [{"action": None}, EVENT]}),
}
CALL = {
    "seq": 1,
    "timestamp": "2026-01-01T00:00:00Z",
    "type": "llm",
    "url": "http://localhost/v1/chat/completions",
    "latency_ms": 12,
    "http_status": 200,
    "request": {
        "model": "made/model",
        "messages": [{"role": "user", "content": "Book a table."}],
        "tools": [],
    },
    "response": {
        "content": "I will.",
        "tool_calls": None,
        "usage": {"prompt_tokens": 9, "completion_tokens": 3},
    },
}


def opened(tmp_path: Path, rows: list[Any], **options: Any) -> Any:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return open_benchmark("gaia2", path=path, **options)


def test_a_scenario_asks_the_user_s_first_message_and_is_unchecked(tmp_path: Path) -> None:
    benchmark = opened(tmp_path, [SCENARIO])
    [item] = benchmark.items()
    assert item.id == "made_1"
    assert item.messages == ({"role": "user", "content": "Book a table for two."},)
    assert not benchmark.check(item, "Done").checked


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([CALL], None),
        ([CALL | {"passed": False}], False),
        ([CALL, {"type": "result", "passed": True}], True),
        ([CALL, {"type": "result", "passed": False}], False),
    ],
)
def test_a_call_has_the_run_s_verdict(tmp_path: Path, lines: list[Any], expected: Any) -> None:
    benchmark = opened(tmp_path, lines)
    [item] = benchmark.items()
    verdict = benchmark.check(item, "I will.")
    assert verdict.checked == (expected is not None)
    assert verdict.passed == (expected is True)
    assert not benchmark.check(item, "I will not.").checked


def test_raw_responses(tmp_path: Path) -> None:
    raw = {"choices": [{"message": {"role": "assistant", "content": "I will."}}]}
    for value in (raw, json.dumps(raw)):
        call = {k: v for k, v in CALL.items() if k != "response"} | {"raw_response": value}
        benchmark = opened(tmp_path, [call | {"passed": False}])
        assert benchmark.check(benchmark.items()[0], "I will.").failed


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (SCENARIO | {"data": "{"}, "field 'data' is no JSON"),
        (SCENARIO | {"data": None}, "field 'data' is null"),
        (SCENARIO | {"data": "{}"}, "field 'data' has no event"),
        ({k: v for k, v in SCENARIO.items() if k != "scenario_id"}, "'scenario_id' is missing"),
        (CALL | {"request": {"messages": []}}, "field 'request'"),
        (CALL | {"response": "no json"}, "no JSON"),
        (CALL | {"response": None}, "field 'response'"),
        (CALL | {"response": {"content": 3}}, "field 'response'"),
        (CALL | {"passed": "yes"}, "field 'passed'"),
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: Any, named: str) -> None:
    good = SCENARIO | {"scenario_id": "made_2"}
    with pytest.raises(FileFormatError, match=r"trace\.jsonl, line 2: ") as error:
        opened(tmp_path, [good, row])
    assert named in str(error.value)
    with pytest.warns(UserWarning, match="line 2"):
        assert len(opened(tmp_path, [good, row], on_error="skip").items()) == 1
