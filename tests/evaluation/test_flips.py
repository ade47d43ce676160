"""Tokens to flip, against a loop over the wrapped model with one prompt at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from evaluation.test_faithfulness import REMOVABLE, TOKENS, N
from torch import Tensor
from truth.families import boot, hf_model, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.evaluation.faithfulness import flips, tokens_to_flip
from tl_contrastive_lrp.evaluation.faithfulness.removal import Removal


def first_without(name: str, stand_ins: Tensor | None) -> Callable[[list[int]], int]:
    """The first choice of the Hugging Face model with some tokens removed."""
    model = hf_model(name)

    def run(gone: list[int]) -> int:
        with torch.no_grad(), true_float64(model):
            if stand_ins is not None:
                tokens = TOKENS.clone()
                tokens[0, gone] = stand_ins[gone]
                return int(model(input_ids=tokens).logits[0, -1].argmax())
            embedded = model.get_input_embeddings()(TOKENS).clone()
            embedded[:, gone] = 0.0
            return int(model(inputs_embeds=embedded).logits[0, -1].argmax())

    return run


def slow_flip(run: Callable[[list[int]], int], scores: Tensor, limit: int) -> int | None:
    order = sorted(REMOVABLE, key=lambda p: (-float(scores[p]), p))[:limit]
    target = run([])
    return next((k for k in range(len(order) + 1) if run(order[:k]) != target), None)


@pytest.mark.parametrize("how", ["zero", "ids"])
@pytest.mark.parametrize("size", [None, 1, 3])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_the_count_is_that_of_a_loop(
    name: str, size: int | None, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if size:
        monkeypatch.setattr(flips, "_batch_size", lambda model, n: size)  # noqa: ARG005
    model, stand_ins = boot(name), None if how == "zero" else torch.arange(N) + 20
    run, generator = first_without(name, stand_ins), torch.Generator().manual_seed(0)
    rankings = {f"r{i}": torch.randn(N, generator=generator) for i in range(6)}
    rankings["equal"] = torch.zeros(N)
    with true_float64(model):
        for limit in (1, 3, 16):
            found = tokens_to_flip(
                model, TOKENS, rankings, target=run([]), limit=limit,
                replace="zero" if stand_ins is None else stand_ins,
            )  # fmt: skip
            expected = {key: slow_flip(run, one, limit) for key, one in rankings.items()}
            assert found == expected
    assert len(set(expected.values())) > 1, "the test would pass with a constant"


def test_a_target_that_is_not_first_needs_no_token() -> None:
    model = boot("qwen3")
    top = int(model(TOKENS)[0, -1].argmax())
    scores = torch.zeros(N)
    assert tokens_to_flip(model, TOKENS, scores, target=top + 1) == {"scores": 0}
    assert tokens_to_flip(model, TOKENS, {}, target=top) == {}


def test_the_unembedding_runs_at_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, real = [], Removal.logits

    def spied(self: Removal, *arguments: Any) -> Tensor:
        shapes.append(real(self, *arguments).shape)
        return real(self, *arguments)

    monkeypatch.setattr(Removal, "logits", spied)
    model = boot("qwen3")
    tokens_to_flip(model, TOKENS, torch.zeros(N), target=int(model(TOKENS)[0, -1].argmax()))
    assert tuple(shapes[0][:2]) == (3, 1)


def test_refusals() -> None:
    model = boot("qwen3")
    for wrong, says in (
        ({"limit": 0}, "limit=0"),
        ({"limit": True}, "limit=True"),
        ({"replace": "random"}, "use 'zero'"),
        ({"scores": torch.zeros(N - 1)}, f"tensor \\[{N}\\]"),
        ({"scores": torch.full((N,), float("nan"))}, "NaN"),
    ):
        arguments = {"scores": torch.zeros(N), "target": 3, **wrong}
        with pytest.raises(ValueError, match=says):
            tokens_to_flip(model, TOKENS, **arguments)
    with pytest.raises(clrp.errors.TokenError):
        tokens_to_flip(model, TOKENS, torch.zeros(N), target=10**6)
