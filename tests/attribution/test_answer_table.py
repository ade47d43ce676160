"""Answers token by token: the numbers of Hugging Face's own forward, and of steps one at a time."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from truth.families import FAMILIES, boot, hf_model, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError, TokenError
from tl_contrastive_lrp.inputs.tokens import token_names

IDS = random_tokens(1, 30)
PROMPT, ANSWER = IDS[:, :20], IDS[0, 20:].tolist()
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"memory": "plain"},
    "tiled": {"memory": "tiled", "tile": 7, "progress": False},
    "fused": {"attention": "fused"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_the_models_own_next_token(name: str, way: str) -> None:
    """One token at a time: a forward of what came before, and no more.

    Two of the tokens are the ones that the model would write itself.
    """
    model, other, ids = boot(name), hf_model(name, torch.float32), IDS.clone()
    with torch.no_grad():
        for at in (20, 26):
            ids[0, at] = other(ids[:, :at]).logits[0, -1].argmax()
    table = clrp.answer_table(model, PROMPT, ids[0, 20:], k=3, **WAYS[way])
    assert len(table) == len(ANSWER)
    assert table["pos"].tolist() == list(range(20, 30))
    assert table["id"].tolist() == ids[0, 20:].tolist()
    assert table["rank"][0] == table["rank"][6] == 0
    for row in table.to_dict("records"):
        with torch.no_grad():
            logits = other(ids[:, : row["pos"]]).logits[0, -1].double().numpy()
        scale = 1e-5 * np.abs(logits).max()
        written = logits[row["id"]]
        assert row["logit"] == pytest.approx(written, abs=scale)
        assert row["rank"] == (logits > written).sum()
        logprob = written - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        assert row["logprob"] == pytest.approx(logprob, abs=3 * scale)
        assert row["probability"] == pytest.approx(np.exp(logprob), rel=1e-3)
        order = [i for i in np.argsort(-logits) if i != row["id"]]
        assert row["alternative_id"] == order[0]
        assert row["delta"] == pytest.approx(logits[order[0]] - written, abs=2 * scale)
        assert (row["delta"] > 0) == (row["rank"] > 0)
        assert row["alternatives"] == token_names(model, [int(i) for i in order[:3]])
        assert row["alternatives"][0] == row["alternative"]


def test_rows_explain_themselves() -> None:
    """Δℓ of a row is that of ``attribute`` for its two tokens, with the sign stated."""
    model = boot("qwen2")
    table = clrp.answer_table(model, PROMPT, ANSWER)
    assert "alternatives" not in table
    row = table.iloc[int(table["delta"].to_numpy().argmax())]
    result = clrp.attribute(
        model, IDS, target=int(row.alternative_id), contrast=int(row.id), pos=int(row.pos) - 1
    )
    assert result.delta == pytest.approx(row.delta, abs=1e-5)
    assert result.target_is_top


def test_texts_and_ids() -> None:
    model, case = clrp.load_demo_model(), clrp.load_demo_cases()[0]
    text = clrp.answer_table(model, case.prompt, case.target + case.contrast)
    before = model.to_tokens(case.prompt)
    ids = text["id"].tolist()
    for answer in (ids, torch.tensor(ids), torch.tensor([ids])):
        assert clrp.answer_table(model, before, answer).equals(text)
    assert "".join(text["token"]) == case.target + case.contrast
    assert text["rank"][0] == 0


def test_long_answers_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    room = import_module("tl_contrastive_lrp.attribution.answer_table")
    model = boot("gpt2")
    whole = clrp.answer_table(model, PROMPT, ANSWER)
    monkeypatch.setattr(room, "_ROWS", 3)
    assert clrp.answer_table(model, PROMPT, ANSWER).equals(whole)


@pytest.mark.parametrize(
    ("answer", "how", "error", "words"),
    [
        ("", {}, TokenError, "answer has no tokens"),
        ([], {}, TokenError, "answer has no tokens"),
        ([1.5], {}, TokenError, "Token 0 of the answer is a float"),
        ([5, [6, 7]], {}, TokenError, "Token 1 of the answer is a list"),
        (5.0, {}, TokenError, "The answer is a float"),
        (None, {}, TokenError, "The answer is None"),
        ([99], {}, TokenError, "outside the vocabulary"),
        (torch.tensor([[5, 6], [7, 8]]), {}, TokenError, "of one answer"),
        (torch.tensor([True]), {}, TokenError, "integers"),
        ([5] * 2000, {}, PromptError, "context"),
        ([5], {"k": 0}, TokenError, "k=0"),
        ([5], {"k": True}, TokenError, "k=True"),
        ([5], {"k": 48}, TokenError, "k=48"),
        ([5], {"memory": "much"}, ValueError, "much"),
    ],
)
def test_refusals(answer: Any, how: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        clrp.answer_table(boot("gpt2"), PROMPT, answer, **how)
