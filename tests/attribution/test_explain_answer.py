"""explain_answer(): which tokens are explained, by what, and the page on which a click opens it."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from truth.families import boot, random_tokens
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.explain_answer import _in_doubt

ANSWER = [7, 12, 30, 2, 9]


def test_each_is_the_difference_of_its_two_tokens() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    found = clrp.explain_answer(model, ids, ANSWER, most=3)
    table = clrp.answer_table(model, ids, ANSWER)
    assert found.table.equals(table)
    assert len(found.results) == 3
    whole = torch.cat([ids, torch.tensor([ANSWER])], dim=1)
    with torch.no_grad():
        logit = float(model(whole).abs().max())
    for row, result in found.results.items():
        one = table.iloc[row]
        both = [int(one["alternative_id"]), ANSWER[row]]
        preferred, other = both if one["delta"] > 0 else both[::-1]
        alone = clrp.attribute(
            model, whole, clrp.logit_diff(model, preferred, other, pos=int(one["pos"]) - 1)
        )
        # The two runs may differ by what is promised, of relevance and of each of two logits.
        bound = PROMISED[torch.float32]
        relevance = float(alone.resid.abs().max())
        assert (result.tokens - alone.tokens).abs().max() <= bound * relevance
        assert result.delta == pytest.approx(abs(one["delta"]), rel=0, abs=2 * bound * logit)
        assert not result.tokens[int(one["pos"]) :].any()


@pytest.mark.parametrize(
    ("deltas", "wanted"),
    [
        ([-3.0, 1.0, -0.5, 4.0, 2.0], [1, 3, 4, 2, 0]),  # the first wrong one, then by lead
        ([-3.0, -1.0, -2.0], [1, 2, 0]),
        ([5.0], [0]),
    ],
)
def test_the_order(deltas: list[float], wanted: list[int]) -> None:
    assert _in_doubt(deltas) == wanted


def test_a_chat_keeps_its_messages() -> None:
    model, ids = boot("llama", torch.float32), random_tokens(1, 9)
    texts = clrp.attribute(model, ids, target=7, contrast=9).str_tokens
    message = clrp.Segment("user 1", "user", "user", 0, 9, "".join(texts))
    chat = clrp.ChatPrompt("".join(texts), ids[0], (message,), texts)
    (result,) = clrp.explain_answer(model, chat, ANSWER, most=1).results.values()
    assert [s.name for s in result.segments] == ["user 1", "answer"]


@pytest.mark.parametrize("most", [0, -1, True, 1.5, "all"])
def test_refusals(most: Any) -> None:
    model = boot("llama", torch.float32)
    with pytest.raises(ValueError, match="number of tokens to explain"):
        clrp.explain_answer(model, random_tokens(), ANSWER, most)


def test_the_page_is_offline_escaped_and_linked(tmp_path: Path) -> None:
    model = clrp.load_demo_model()
    case = clrp.load_demo_cases("code")[0]
    answer = case.contrast + " </iframe><script>alert(1)</script>"
    found = clrp.explain_answer(model, case.prompt, answer, most=3)
    page = found.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<iframe") == page.count("</iframe>") == 3
    assert "<script" not in page  # those of the reports are text of the frames
    assert not re.search(r'(src|href)="(?!#)[^"]', page)
    links = {int(n) for n in re.findall(r'<li><a href="#row-(\d+)"', page)}
    sections = {int(n) for n in re.findall(r'<section class="explanation" id="row-(\d+)"', page)}
    assert links == sections == set(found.results)
    frames = [html.unescape(x) for x in re.findall(r'srcdoc="([^"]*)"', page)]
    for frame, result in zip(frames, found.results.values(), strict=True):
        assert frame.startswith("<!doctype html>")
        assert "The model wrote" not in frame
        assert f"at position {result.pos}" in frame
        hashes = re.search(r"script-src ([^;]*);", frame)
        assert hashes is not None
        policy = page[: page.index("<style>")]
        assert all(one in html.unescape(policy) for one in hashes[1].split())
