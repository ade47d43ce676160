"""Two answers to a chat, and traces: their messages, against two separate runs and slow sums."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp

MESSAGES = [
    {"role": "tool", "content": "Log:\nmail: badge Una 39\nchat: Zoe asked Ben"},
    {"role": "tool", "content": "Log:\noffice: badge Una 29"},
    {"role": "user", "content": "Send Una the oldest badge."},
]
TARGET, CONTRAST = ' badge Una 29"}', ' badge Una 39 Una"}'
FROM = pytest.mark.parametrize("so_far", ["", '{"tool": "send", "args": "entry:'])


@functools.cache
def asked(so_far: str) -> tuple[Any, Any, Any]:
    model = clrp.load_demo_model(device="cpu")
    prompt = clrp.chat(model, MESSAGES, answer=so_far)
    answers = clrp.answer_diff(model, prompt, target=TARGET, contrast=CONTRAST)
    return model, prompt, answers


def with_answer(so_far: str, answer: str) -> Any:
    """The ids of the chat and its answer, tokenised as one text."""
    model, prompt, _ = asked(so_far)
    more = model.to_tokens(str(prompt) + answer, prepend_bos=False)[0]
    assert more[: len(prompt.tokens)].equal(prompt.tokens)
    return more


@FROM
def test_messages_are_the_difference_of_two_runs(so_far: str) -> None:
    model, prompt, answers = asked(so_far)
    found = clrp.attribute(model, prompt, answers).by("message").set_index("segment")["relevance"]
    start = len(prompt.tokens)
    sums = []
    for answer in (TARGET, CONTRAST):
        ids = with_answer(so_far, answer)
        span = clrp.span_logit(model, ids, (start, len(ids)))
        sums.append(clrp.attribute(model, ids[:-1], span).tokens.double())
    names = [s.name for s in prompt.segments]
    for segment in prompt.segments[:-1]:  # the last is continued by what the answers share
        at = slice(segment.start, segment.stop)
        wanted = float(sums[0][at].sum() - sums[1][at].sum())
        scale = float(sums[0].abs().max() + sums[1].abs().max())
        assert (
            abs(found[segment.name] - wanted) <= segment.n_tokens * PROMISED[torch.float32] * scale
        )
    assert list(found.index) == (names if so_far else [*names, "answer"])


@FROM
def test_the_graph_has_both_answers_as_segments(so_far: str) -> None:
    model, prompt, answers = asked(so_far)
    graph = clrp.attribution_graph(model, prompt, answers, progress=False)
    between = graph.by("message")
    assert between.str_tokens[-3:] == ("answer", "target answer", "contrast answer")
    assert [s.stop - s.start for s in graph.segments[-2:]] == [1, 2]
    total = float(graph.weight.double().sum())
    assert float(between.weight.sum()) == pytest.approx(total, abs=1e-9 * len(graph.weight))
    result = clrp.attribute(model, prompt, answers)
    sides = (result.answer.target, result.answer.contrast)
    scale = sum(float(side.tokens.abs().max()) for side in sides) + float(result.tokens.abs().max())
    found = between.relevance[0].tolist()[: len(result.segments)]
    for node, row in zip(found, result.by("message").to_dict("records"), strict=True):
        assert abs(node - row["relevance"]) <= row["n_tokens"] * PROMISED[torch.float32] * scale


@FROM
def test_reports_and_files_have_the_messages(so_far: str, tmp_path: Path) -> None:
    """In pictures and reports both answers follow the prompt, as further messages."""
    model, prompt, answers = asked(so_far)
    result = clrp.attribute(model, prompt, answers)
    page = result.save_html(tmp_path / "report.html").read_text("utf-8")
    assert "target answer" in page
    assert "contrast answer" in page
    result.show()
    result.save(tmp_path / "result.safetensors")
    loaded = clrp.Attribution.load(tmp_path / "result.safetensors")
    assert loaded.by("message").equals(result.by("message"))
    graph = clrp.attribution_graph(model, prompt, answers, progress=False)
    graph.by("message").save_html(tmp_path / "graph.html")
    graph.save(tmp_path / "graph.safetensors")
    assert clrp.AttributionGraph.load(tmp_path / "graph.safetensors").segments == graph.segments


def test_one_token_each_is_a_chat_too() -> None:
    model, prompt, _ = asked("")
    answers = clrp.answer_diff(model, prompt, target=" badge Una", contrast=" badge Zoe")
    result = clrp.attribute(model, prompt, answers)
    assert result.by("message")["segment"].tolist()[-1] == "answer"
    assert result.segments[-1].text == " badge"


def test_without_messages_there_are_none() -> None:
    model, prompt, answers = asked("")
    graph = clrp.attribution_graph(model, prompt.tokens, answers, progress=False)
    assert graph.segments == ()
    assert clrp.attribute(model, prompt.tokens, answers).segments == ()


def test_a_trace_is_summed_by_message() -> None:
    so_far = '{"tool": "send", "args": "entry: badge Una'
    model, prompt, _ = asked(so_far)
    (answer,) = [s for s in prompt.segments if s.name == "answer"]
    objective = clrp.logit_diff(model, " 29", " 39")
    trace = clrp.trace_back(model, prompt, objective, (answer.start, answer.stop), progress=False)
    found = trace.by("message")
    for row, segment in zip(found.to_dict("records"), prompt.segments, strict=True):
        wanted = sum(trace.tokens[segment.start : segment.stop].double().tolist())
        assert row["relevance"] == pytest.approx(wanted, abs=1e-12)
        assert row["share"] == pytest.approx(wanted / trace.delta, abs=1e-12)
