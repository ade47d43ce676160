"""Logs in their published formats: completions come out with exact ids, or are refused.

The chats are the demo's own failures, whose ids are known from the demo's files.
"""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import FileFormatError
from tl_contrastive_lrp.study import Dropped, LoggedCompletion, completions_from_log, open_benchmark
from tl_contrastive_lrp.study.cases import REASONS


@pytest.fixture(scope="module")
def model() -> Any:
    return clrp.load_demo_model()


@pytest.fixture(scope="module")
def failure() -> Any:
    return clrp.load_demo_cases("arithmetic")[0]


def ids_of(model: Any, text: str) -> tuple[int, ...]:
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_of(failure: Any) -> str:
    """The prompt of a demo case without the beginning of the answer."""
    return str(failure.prompt[: len(failure.prompt) - len(failure.answer_prefix)])


def user(failure: Any) -> dict[str, Any]:
    return {"role": "user", "content": failure.user}


# Inspect


def sample(failure: Any, **changes: Any) -> dict[str, Any]:
    answer = {
        "id": "m2",
        "role": "assistant",
        "content": failure.model_answer,
        "source": "generate",
        "model": "hf/made",
    }
    base = {
        "id": "a",
        "epoch": 1,
        "input": failure.user,
        "target": failure.answer,
        "messages": [user(failure) | {"id": "m1", "source": "input"}, answer],
        "output": {
            "model": "hf/made",
            "choices": [{"message": answer, "stop_reason": "stop"}],
            "completion": failure.model_answer,
        },
        "scores": {"match": {"value": "I", "answer": "x", "explanation": "x is wrong\nmore"}},
        "metadata": {},
        "events": [],
        "attachments": {},
    }
    return base | changes


def eval_file(path: Path, samples: list[dict[str, Any]], zstandard: bool = False) -> Path:
    """A ``.eval`` file; Python's zipfile does not write Zstandard, so its number is patched in."""
    header = {
        "version": 2,
        "status": "success",
        "eval": {
            "task": "made_task",
            "model": "hf/made",
            "packages": {"inspect_ai": "0.3.1"},
            "model_generate_config": {"max_tokens": 64},
        },
    }
    members: dict[str, Any] = {"_journal/start.json": header, "header.json": header}
    members |= {f"samples/{s['id']}_epoch_{s['epoch']}.json": s for s in samples}
    texts = {name: json.dumps(value).encode() for name, value in members.items()}
    if not zstandard:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
            for name, text in texts.items():
                file.writestr(name, text)
        return path
    import zlib

    whole, directory = b"", b""
    for name, text in texts.items():
        packed = pyarrow.compress(text, codec="zstd", asbytes=True)
        common = struct.pack(
            "<HHHHHIIIHH", 63, 0, 93, 0, 33, zlib.crc32(text), len(packed), len(text), len(name), 0
        )
        directory += b"PK\x01\x02" + struct.pack("<H", 63) + common
        directory += struct.pack("<HHHII", 0, 0, 0, 0, len(whole)) + name.encode()
        whole += b"PK\x03\x04" + common + name.encode() + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(texts), len(texts), len(directory), len(whole), 0)
    path.write_bytes(whole + directory + b"PK\x05\x06" + end)
    return path


@pytest.mark.parametrize("kind", ["deflate", "zstandard", "json"])
def test_inspect(model: Any, failure: Any, tmp_path: Path, kind: str) -> None:
    samples = [sample(failure), sample(failure, id=2, scores={"match": {"value": 1.0}})]
    if kind == "json":
        path = tmp_path / "log.json"
        header = {"task": "made_task", "model": "hf/made", "packages": {"inspect_ai": "0.3.1"}}
        header["model_generate_config"] = {"max_tokens": 64}  # type: ignore[assignment]
        path.write_text(json.dumps({"version": 2, "eval": header, "samples": samples}))
    else:
        path = eval_file(tmp_path / "log.eval", samples, kind == "zstandard")
    by_id = {one.item.id: one for one in completions_from_log(model, path)}  # type: ignore[union-attr]
    assert set(by_id) == {"a", "2"}
    wrong = by_id["a"]
    assert isinstance(wrong, LoggedCompletion)
    assert wrong.prompt == prompt_of(failure)
    assert wrong.prompt_ids == ids_of(model, wrong.prompt)
    assert wrong.completion_ids == ids_of(model, failure.model_answer)
    assert wrong.completion_ids[len(ids_of(model, failure.answer_prefix))] == failure.target_id
    assert wrong.verdict.failed
    assert wrong.verdict.reason == "x is wrong"
    assert wrong.item.reference == failure.answer
    assert not wrong.proved
    assert wrong.benchmark == "made_task"
    assert (wrong.provenance.model, wrong.provenance.package) == ("hf/made", "inspect_ai 0.3.1")
    assert wrong.provenance.decoding == {"max_tokens": 64}
    assert by_id["2"].verdict.passed  # type: ignore[union-attr]


def test_inspect_takes_the_messages_that_the_model_got(
    model: Any, failure: Any, tmp_path: Path
) -> None:
    """From the event with the same answer, not from a scorer's own call after it."""
    answer = sample(failure)["output"]
    graded = {"choices": [{"message": {"id": "g", "role": "assistant", "content": "GRADE: I"}}]}
    one = sample(
        failure,
        messages=[{"role": "user", "content": "shown otherwise"}],
        events=[
            {"event": "model", "input": [], "input_refs": [[1, 2]], "tools": [], "output": answer},
            {"event": "model", "input": [{"role": "user", "content": "Grade"}], "output": graded},
        ],
        events_data={
            "messages": [
                {"role": "system", "content": "no"},
                user(failure) | {"content": "attachment://h"},
            ]
        },
        attachments={"h": failure.user},
    )
    [found] = completions_from_log(model, eval_file(tmp_path / "l.eval", [one]))
    assert isinstance(found, LoggedCompletion)
    assert found.prompt == prompt_of(failure)


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"error": {"message": "x"}}, "malformed", "ended with an error"),
        ({"output": {"choices": []}}, "malformed", "no choices"),
        ({"output": None}, "malformed", "no choices"),
        ({"messages": [{"role": "user", "content": "a"}]}, "tokens unknown", "not the answer"),
        ({"messages": "a"}, "malformed", "must be a list"),
        ({"input": "attachment://none"}, "malformed", "attachment 'none' is missing"),
    ],
)
def test_samples_of_inspect_that_cannot_be_used(
    model: Any, failure: Any, tmp_path: Path, changes: Any, reason: str, named: str
) -> None:
    path = eval_file(tmp_path / "l.eval", [sample(failure, **changes)])
    [dropped] = completions_from_log(model, path)
    assert isinstance(dropped, Dropped)
    assert dropped.reason == reason
    assert dropped.reason in REASONS
    assert named in dropped.detail
    assert "l.eval, samples/a_epoch_1.json" in dropped.detail or reason == "malformed"


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"content": "a", "tool_calls": [{"function": "f", "arguments": {}}]}, "tool calls parsed"),
        ({"content": [{"type": "reasoning", "reasoning": "x"}]}, "thoughts apart"),
        ({"content": [{"type": "image", "image": "x"}]}, "holds a image"),
        ({"content": ""}, "the answer is empty"),
    ],
)
def test_answers_whose_text_is_lost_are_refused(
    model: Any, failure: Any, tmp_path: Path, message: Any, named: str
) -> None:
    output = {"choices": [{"message": {"role": "assistant"} | message}]}
    [dropped] = completions_from_log(
        model, eval_file(tmp_path / "l.eval", [sample(failure, output=output)])
    )
    assert isinstance(dropped, Dropped)
    assert named in dropped.detail


@pytest.mark.parametrize("zstandard", [False, True])
def test_an_inspect_log_is_opened_once(
    model: Any, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zstandard: bool
) -> None:
    path = eval_file(tmp_path / "l.eval", [sample(failure, id=i) for i in range(4)], zstandard)
    opened, real = list[zipfile.ZipFile](), zipfile.ZipFile.__init__

    def counted(file: zipfile.ZipFile, *given: Any, **more: Any) -> None:
        opened.append(file)
        real(file, *given, **more)

    monkeypatch.setattr(zipfile.ZipFile, "__init__", counted)
    found = completions_from_log(model, path)
    assert [one.item.id for one in found] == ["0", "1", "2", "3"]  # type: ignore[union-attr]
    assert len(opened) == 1
    assert opened[0].fp is None  # and closed


def test_files_that_are_no_log_of_inspect(model: Any, failure: Any, tmp_path: Path) -> None:
    path = tmp_path / "l.eval"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("_journal/start.json", "{}")
    with pytest.raises(FileFormatError, match="not finished"):
        completions_from_log(model, path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("header.json", "{}")
    with pytest.raises(FileFormatError, match="'eval'"):
        completions_from_log(model, path)
    whole = eval_file(path, [sample(failure)], zstandard=True).read_bytes()
    checksum = whole.rindex(b"samples/a") - 46 + 16  # in the directory at the end
    path.write_bytes(whole[:checksum] + bytes(4) + whole[checksum + 4 :])
    [dropped] = completions_from_log(model, path)
    assert isinstance(dropped, Dropped)
    assert "its checksum is wrong" in dropped.detail


@pytest.mark.parametrize(
    ("scores", "score", "passed"),
    [
        ({"a": {"value": "C"}, "b": {"value": True}}, None, True),
        ({"a": {"value": "C"}, "b": {"value": "I"}}, None, None),
        ({"a": {"value": "C"}, "b": {"value": "I"}}, "b", False),
        ({"a": {"value": "C"}}, "z", None),
        ({"a": {"value": 0.4}}, None, None),
        ({"a": {"value": 0.4}, "b": {"value": 0}}, None, False),
        ({"a": {"value": "P"}}, None, False),
        ({"a": {"value": {"x": 1}}}, None, None),
        ({}, None, None),
    ],
)
def test_scores(
    model: Any, failure: Any, tmp_path: Path, scores: Any, score: Any, passed: Any
) -> None:
    path = eval_file(tmp_path / "l.eval", [sample(failure, scores=scores)])
    [found] = completions_from_log(model, path, score=score)
    assert isinstance(found, LoggedCompletion)
    assert found.verdict.checked == (passed is not None)
    assert found.verdict.passed == (passed is True)


# lm-evaluation-harness


def lm_row(failure: Any, **changes: Any) -> dict[str, Any]:
    base = {
        "doc_id": 0,
        "doc": {"question": failure.user, "answer": "#### 3"},
        "target": failure.answer,
        "arguments": {
            "gen_args_0": {
                "arg_0": prompt_of(failure),
                "arg_1": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 64},
            }
        },
        "resps": [[failure.model_answer]],
        "filtered_resps": [failure.model_answer],
        "filter": "strict-match",
        "metrics": ["exact_match"],
        "doc_hash": "d",
        "prompt_hash": "p",
        "target_hash": "t",
        "exact_match": 0.0,
    }
    return base | changes


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["new", "old", "api"])
def test_lm_eval(model: Any, failure: Any, tmp_path: Path, form: str) -> None:
    row = lm_row(failure)
    settings = row["arguments"]["gen_args_0"]["arg_1"]
    if form == "old":
        row["arguments"] = [[prompt_of(failure), settings]]
    if form == "api":
        asked = [json.dumps([user(failure)])]
        row["arguments"] = {"gen_args_0": {"arg_0": asked, "arg_1": settings}}
    path = lines(tmp_path / "samples_gsm8k_2026-01-01T00-00-00.0.jsonl", [row])
    [found] = completions_from_log(model, path, prepend_bos=False)
    assert isinstance(found, LoggedCompletion)
    assert found.benchmark == "gsm8k"
    assert found.prompt == prompt_of(failure)
    assert found.prompt_ids == ids_of(model, found.prompt)
    assert found.completion_ids == ids_of(model, failure.model_answer)
    assert found.verdict.failed
    assert found.item.row == row["doc"]
    assert found.provenance.decoding == settings


def test_filters_become_one_completion(model: Any, failure: Any, tmp_path: Path) -> None:
    rows = [
        lm_row(failure),
        lm_row(failure, filter="flexible-extract", exact_match=1.0),
    ]
    path = lines(tmp_path / "samples_x.jsonl", rows)
    expected = {
        None: None, "strict-match": False, "flexible-extract": True,
        "flexible-extract/exact_match": True, "exact_match": None, "other": None,
    }  # fmt: skip
    for score, passed in expected.items():
        [found] = completions_from_log(model, path, score=score, prepend_bos=False)
        assert isinstance(found, LoggedCompletion)
        assert found.verdict.checked == (passed is not None), score
        assert found.verdict.passed == (passed is True), score


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"doc": None}, "'doc_id' or 'doc'"),
        ({"arguments": {}}, "not one request"),
        ({"arguments": {"gen_args_0": {"arg_0": "a", "arg_1": " b"}}}, "likelihood"),
        ({"arguments": {"gen_args_0": {"arg_0": ["x"], "arg_1": {}}}}, "no messages"),
        ({"arguments": {"gen_args_0": {"arg_0": 3, "arg_1": {}}}}, "no prompt"),
        ({"resps": [["a", "b"]]}, "2 completions"),
        ({"resps": [[""]]}, "no text"),
    ],
)
def test_samples_of_lm_eval_that_cannot_be_used(
    model: Any, failure: Any, tmp_path: Path, changes: Any, named: str
) -> None:
    rows = [lm_row(failure, **changes), lm_row(failure, doc_id=1)]
    path = lines(tmp_path / "samples_x.jsonl", rows)
    found = completions_from_log(model, path, "lm-eval", prepend_bos=False)
    [dropped] = [one for one in found if isinstance(one, Dropped)]
    assert dropped.reason == "malformed"
    assert "samples_x.jsonl, line 1" in dropped.detail
    assert named in dropped.detail
    assert len(found) == 2


def test_one_document_with_two_answers_is_refused(model: Any, failure: Any, tmp_path: Path) -> None:
    rows = [lm_row(failure), lm_row(failure, filter="x", resps=[["no"]])]
    path = lines(tmp_path / "samples_x.jsonl", rows)
    found = completions_from_log(model, path, prepend_bos=False)
    assert [type(one) for one in found] == [Dropped]
    assert "line 1" in found[0].detail  # type: ignore[union-attr]


# Message lists and traces


def message_row(failure: Any, **changes: Any) -> dict[str, Any]:
    chat = [user(failure), {"role": "assistant", "content": failure.model_answer}]
    return {"id": "q1", "messages": chat, "passed": False} | changes


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_message_lists(model: Any, failure: Any, tmp_path: Path, suffix: str) -> None:
    rows = [message_row(failure), message_row(failure, id="q2", passed=True)]
    path = tmp_path / f"chats{suffix}"
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        lines(path, rows)
    first, second = completions_from_log(model, path)
    assert isinstance(first, LoggedCompletion)
    assert isinstance(second, LoggedCompletion)
    assert first.prompt_ids == ids_of(model, prompt_of(failure))
    assert first.completion_ids == ids_of(model, failure.model_answer)
    assert (first.verdict.failed, second.verdict.passed) == (True, True)


def test_only_a_newline_ends_a_line_of_a_log(model: Any, failure: Any, tmp_path: Path) -> None:
    rows = [message_row(failure, id=id, note="a\u2028b\x85c") for id in ("q1", "q2")]
    path = tmp_path / "c.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(text.encode())
    found = completions_from_log(model, path)
    assert [one.item.id for one in found] == ["q1", "q2"]  # type: ignore[union-attr]


def test_recorded_counts_and_texts_prove_the_ids_or_refuse_them(
    model: Any, failure: Any, tmp_path: Path
) -> None:
    prompt, answer = ids_of(model, prompt_of(failure)), ids_of(model, failure.model_answer)
    texts = [model.tokenizer.decode([id]) for id in answer]
    end = model.tokenizer.eos_token
    logprobs = [{"content": [{"token": text} for text in t]} for t in (texts, [*texts, end])]
    split = [{"token": "".join(texts[:2])}, *({"token": text} for text in texts[2:])]
    n, m = len(prompt), len(answer)
    proved = [
        {"usage": {"prompt_tokens": n, "completion_tokens": m}},
        {"usage": {"input_tokens": n, "output_tokens": m + 1}},
        {"logprobs": logprobs[0]},
        {"logprobs": logprobs[1]},
    ]
    refuted = [
        {"usage": {"prompt_tokens": n + 1, "completion_tokens": m}},
        {"usage": {"completion_tokens": m - 1}},
        {"usage": {"completion_tokens": m + 2}},
        {"logprobs": {"content": split}},
        {"logprobs": {"content": [{"token": t} for t in texts[:-1]]}},
    ]
    rows = [message_row(failure, id=str(k), **more) for k, more in enumerate(proved + refuted)]
    found = completions_from_log(model, lines(tmp_path / "c.jsonl", rows))
    for one in found[: len(proved)]:
        assert isinstance(one, LoggedCompletion)
        assert one.proved
    for one in found[len(proved) :]:
        assert isinstance(one, Dropped)
        assert one.reason == "tokens unknown"


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"messages": []}, "malformed", "not empty"),
        (
            {"messages": [{"role": "user", "content": "a"},
                          {"role": "assistant", "content": "\ud83d"}]},
            "malformed", "no Unicode text",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "malformed", "assistant's"),
        ({"messages": [{"content": "a"}]}, "malformed", "message 1 has no role"),
        ({"tools": "f"}, "malformed", "'tools'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]},
                          {"role": "assistant", "content": "a"}]},
            "tokens unknown", "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                          {"role": "assistant", "content": "c"}]},
            "tokens unknown", "assistant's too",
        ),
        (
            {"messages": [{"role": "user", "content": "a"},
                          {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
            "tokens unknown", "thoughts apart",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tokens unknown", "tools"),
    ],
)  # fmt: skip
def test_message_lists_that_cannot_be_used(
    model: Any, failure: Any, tmp_path: Path, changes: Any, reason: str, named: str
) -> None:
    path = lines(tmp_path / "c.jsonl", [message_row(failure, **changes)])
    [dropped] = completions_from_log(model, path)
    assert isinstance(dropped, Dropped)
    assert (dropped.reason, dropped.id) == (reason, "c/q1")
    assert named in dropped.detail


def test_a_text_that_the_tokenizer_changes_is_refused(
    model: Any, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_contrastive_lrp.study.logs import rebuild

    real = rebuild.continuation_ids
    monkeypatch.setattr(
        rebuild, "continuation_ids", lambda t, text: real(t, text.rstrip("0123456789"))
    )
    chat = [user(failure), {"role": "assistant", "content": "it is 12"}]
    [dropped] = completions_from_log(
        model, lines(tmp_path / "c.jsonl", [message_row(failure, messages=chat)])
    )
    assert isinstance(dropped, Dropped)
    assert "changes the completion's text" in dropped.detail


def test_traces(model: Any, failure: Any, tmp_path: Path) -> None:
    def call(seq: int, response: dict[str, Any]) -> dict[str, Any]:
        request = {"model": "made", "messages": [user(failure)], "tools": []}
        return {
            "seq": seq,
            "type": "llm",
            "http_status": 200,
            "request": request,
            "response": response,
        }

    rows = [
        call(1, {"content": failure.model_answer, "tool_calls": [], "usage": {}}),
        call(2, {"content": None, "tool_calls": [{"function": {"name": "f"}}], "usage": {}}),
        call(3, {"content": 3}),
        {"type": "result", "passed": False},
    ]
    path = lines(tmp_path / "trace.jsonl", rows)
    first, second, third = completions_from_log(model, path)
    assert isinstance(first, LoggedCompletion)
    assert first.verdict.failed
    assert first.item.id == "call 1"
    assert isinstance(second, Dropped)
    assert second.reason == "tokens unknown"
    assert isinstance(third, Dropped)
    assert third.reason == "malformed"


# Whatever the format


def test_items_of_a_benchmark_are_found_by_their_question(
    model: Any, failure: Any, tmp_path: Path
) -> None:
    rows = [{"question": failure.user, "answer": "#### 3"}, {"question": "b", "answer": "#### 4"}]
    benchmark = open_benchmark("gsm8k", path=lines(tmp_path / "g.jsonl", rows), request="")
    logs = [
        lines(tmp_path / "c.jsonl", [message_row(failure)]),
        lines(tmp_path / "samples_x.jsonl", [lm_row(failure)]),
        eval_file(tmp_path / "l.eval", [sample(failure)]),
    ]
    for path in logs:
        [found] = completions_from_log(model, path, benchmark=benchmark, prepend_bos=False)
        assert isinstance(found, LoggedCompletion)
        assert found.item.id == "1"
        assert found.item.reference == "#### 3"
        assert found.benchmark == "gsm8k"
        assert benchmark.check(found.item, "#### 3").passed
    chat = [{"role": "user", "content": "unknown"}, {"role": "assistant", "content": "a"}]
    other = lines(tmp_path / "o.jsonl", [message_row(failure, messages=chat)])
    [dropped] = completions_from_log(model, other, benchmark=benchmark)
    assert isinstance(dropped, Dropped)
    assert "no item with this question" in dropped.detail


def test_an_item_that_was_asked_several_times_gives_cases_of_their_own(
    model: Any, failure: Any, tmp_path: Path
) -> None:
    rows = [{"question": failure.user, "answer": "#### 3"}]
    benchmark = open_benchmark("gsm8k", path=lines(tmp_path / "g.jsonl", rows))
    unknown = [{"role": "user", "content": "unknown"}, {"role": "assistant", "content": "a"}]
    path = lines(
        tmp_path / "c.jsonl",
        [message_row(failure, id="7"), message_row(failure, id="8"),
         message_row(failure, id="1", messages=unknown), message_row(failure, id="9")],
    )  # fmt: skip
    found = completions_from_log(model, path, benchmark=benchmark)
    ids = [one.id if isinstance(one, Dropped) else f"gsm8k/{one.item.id}" for one in found]
    assert ids == ["gsm8k/1", "gsm8k/1 (2)", "gsm8k/1 (3)", "gsm8k/1 (4)"]
    assert isinstance(found[2], Dropped)
    same = [one.completion_ids for one in found if isinstance(one, LoggedCompletion)]
    assert len(same) == 3
    assert len(set(same)) == 1


def test_the_question_may_be_what_the_item_itself_asks(
    model: Any, failure: Any, tmp_path: Path
) -> None:
    """The demo's rows have no field of a published name; GSM8K's request follows the problem."""
    demo = open_benchmark("demo", limit=3)
    rows = [{"question": failure.user, "answer": "#### 3"}]
    gsm8k = open_benchmark("gsm8k", path=lines(tmp_path / "g.jsonl", rows))
    for benchmark, item in ((demo, demo.items()[2]), (gsm8k, gsm8k.items()[0])):
        chat = [*item.messages, {"role": "assistant", "content": "No."}]
        path = lines(tmp_path / "c.jsonl", [message_row(failure, messages=chat)])
        [found] = completions_from_log(model, path, benchmark=benchmark)
        assert isinstance(found, LoggedCompletion)
        assert found.item.id == item.id


def test_a_text_that_may_begin_with_bos_needs_to_be_told(
    model: Any, failure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tl_contrastive_lrp.inputs.bos import Own
    from tl_contrastive_lrp.study.logs import rebuild

    row = lm_row(failure)
    row["arguments"]["gen_args_0"]["arg_0"] = "Once"
    path = lines(tmp_path / "samples_x.jsonl", [row])
    for own, refused in ((Own(True, False), True), (None, True), (Own(False, False), False)):
        monkeypatch.setattr(rebuild, "own_tokens", lambda _, own=own: own)
        [found] = completions_from_log(model, path)
        assert isinstance(found, Dropped) == refused
        if isinstance(found, Dropped):
            assert "prepend_bos" in found.detail


def test_kinds_that_cannot_be_told(model: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="give kind="):
        completions_from_log(model, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="unknown kind"):
        completions_from_log(model, tmp_path / "a.jsonl", "csv")
    with pytest.raises(FileNotFoundError):
        completions_from_log(model, tmp_path / "none.jsonl")
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(FileFormatError, match="no completion"):
        completions_from_log(model, tmp_path / "e.jsonl", "messages")
    with pytest.raises(TypeError):
        completions_from_log("model", tmp_path / "a.jsonl")
