"""The candidates for the next token, and which prompts are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from truth.families import VOCAB, boot, hf_model, make_tokenizer, random_tokens, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError, TokenError

A, B = 5, 6  # "a" and "b" in the test tokenizer


@pytest.fixture(scope="module")
def model() -> Any:
    return boot("qwen3", torch.float32)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize("pos", [-1, 2])
def test_next_token_table(name: str, pos: int) -> None:
    model, wrapped, ids = boot(name, torch.float64), hf_model(name), random_tokens()
    with true_float64(model):
        frame = clrp.next_token_table(model, ids, k=7, pos=pos)
    with torch.no_grad(), true_float64(wrapped):
        logits = wrapped(ids).logits[0, pos]
    order = sorted(range(VOCAB), key=lambda i: -float(logits[i]))[:7]
    exponentials = (logits - logits.max()).exp()
    tokenizer = make_tokenizer()
    assert list(frame.columns) == ["rank", "token", "id", "logit", "probability", "minus_top"]
    assert frame["rank"].tolist() == list(range(7))
    assert frame["id"].tolist() == order
    assert frame["token"].tolist() == [tokenizer.decode([i]) for i in order]
    for column, values in [
        ("logit", logits),
        ("probability", exponentials / exponentials.sum()),
        ("minus_top", logits - logits.max()),
    ]:
        wanted = [float(values[i]) for i in order]
        assert np.allclose(frame[column], wanted, rtol=1e-10, atol=1e-10), column


def test_next_token_table_takes_text_and_any_k(model: Any) -> None:
    assert len(clrp.next_token_table(model, "a b c", k=1000)) == VOCAB
    everything = clrp.next_token_table(model, "a b c", k=VOCAB)
    assert abs(everything["probability"].sum() - 1.0) < 1e-9
    with torch.inference_mode():
        clrp.next_token_table(model, "a b c")
    assert not any(p.grad is not None for p in model.original_model.parameters())


@pytest.mark.parametrize("k", [0, -3, 2.5, "3"])
def test_next_token_table_refuses_no_rows(model: Any, k: Any) -> None:
    with pytest.raises(TokenError, match=f"k={k!r} lists no candidates"):
        clrp.next_token_table(model, "a b c", k=k)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        (torch.tensor([], dtype=torch.long), "empty"),
        (torch.zeros(2, 3, dtype=torch.long), "batch of 2"),
        (torch.zeros(1, 1, 3, dtype=torch.long), "shape"),
        (torch.zeros(3), "float32"),
        (torch.zeros(3, dtype=torch.bool), "bool"),
        (torch.tensor([1, 99]), "99"),
        (torch.tensor([1, -2]), "-2"),
        ([5, 6], r"torch\.tensor"),
        (5, "int"),
        (None, "prompt is None"),
        (b"abc", "bytes"),
    ],
    ids=str,
)
def test_prompts_are_checked(model: Any, prompt: Any, said: str) -> None:
    objective = clrp.logit_diff(model, A, B)
    with pytest.raises(PromptError, match=said):
        clrp.next_token_table(model, prompt)
    with pytest.raises(PromptError, match=said):
        clrp.attribute(model, prompt, objective)
    if "batch" not in said:
        with pytest.raises(PromptError, match=said):
            clrp.run_with_relevance(model, prompt, objective)


def test_next_token_table_refuses_a_position_that_is_not_there(model: Any) -> None:
    with pytest.raises(TokenError, match="Position 9"):
        clrp.next_token_table(model, random_tokens(), pos=9)
