"""run_with_relevance: linear in the objective, and a batch is its prompts one at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hooking import objective_of
from torch import Tensor
from truth.families import FAMILIES, boot, left_padded, random_tokens, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError

RULES = tuple(clrp.RULE_SETS)


@pytest.mark.parametrize("rules", RULES)
def test_relevance_is_linear_in_the_objective(rules: str) -> None:
    model, ids = boot("gemma2", torch.float64), random_tokens(2)

    def run(objective: Any) -> Tensor:
        name = "blocks.0.hook_resid_mid"
        return clrp.run_with_relevance(model, ids, objective, name, rules=rules)[1][name]

    one, two = clrp.logit_diff(model, 7, 11), clrp.target_logit(model, 20, pos=3)
    with true_float64(model):
        mixed = run(lambda logits: 2.5 * one(logits) - 0.5 * two(logits) + 3.0)
        parts = 2.5 * run(one) - 0.5 * run(two)
    torch.testing.assert_close(mixed, parts, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp", "gim"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_is_its_prompts_one_at_a_time(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    rows = random_tokens(3, 8)
    _, batch = clrp.run_with_relevance(model, rows, objective_of(model), rules=rules)
    for i in range(3):
        _, single = clrp.run_with_relevance(
            model, rows[i : i + 1], objective_of(model), rules=rules
        )
        largest = float(single["hook_embed"].abs().max())
        for key in ("hook_embed", "blocks.1.hook_resid_mid", "blocks.0.attn.hook_z"):
            error = float((batch[key][i] - single[key][0]).abs().max())
            assert error < 1e-5 * largest, key


@pytest.mark.parametrize("rules", ["attnlrp", "cplrp", "gim"])
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_no_prompt(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    ids, mask = left_padded((9, 6, 8))
    logits, batch = clrp.run_with_relevance(
        model, ids, objective_of(model), rules=rules, attention_mask=mask
    )
    for i, length in enumerate((9, 6, 8)):
        alone = ids[i : i + 1, 9 - length :]
        plain, single = clrp.run_with_relevance(model, alone, objective_of(model), rules=rules)
        torch.testing.assert_close(logits[i, 9 - length :], plain[0], rtol=1e-4, atol=1e-5)
        for key in ("hook_embed", "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"):
            largest = float(single[key].abs().max())
            error = float((batch[key][i, 9 - length :] - single[key][0]).abs().max())
            assert error < 2e-5 * largest, key
            assert float(batch[key][i, : 9 - length].abs().max().nan_to_num() if length < 9
                         else 0.0) == 0.0  # fmt: skip


def test_texts_of_different_lengths_are_not_explained_at_their_padding() -> None:
    """Padded on the right, the last position is a pad: refused; on the left, as one at a time."""
    model = boot("qwen3", torch.float32)
    texts, name = ["a b c d", "e f"], "hook_embed"
    single = [
        clrp.run_with_relevance(model, text, objective_of(model), name)[1][name][0]
        for text in texts
    ]
    with pytest.raises(PromptError, match=r"2 to 4|lengths"):
        clrp.run_with_relevance(model, texts, objective_of(model), name)
    ids = torch.zeros(2, 4, dtype=torch.long)
    mask = torch.zeros(2, 4, dtype=torch.long)
    for i, text in enumerate(texts):
        row = model.to_tokens(text)[0]
        ids[i, 4 - len(row) :], mask[i, 4 - len(row) :] = row, 1
    _, r = clrp.run_with_relevance(model, ids, objective_of(model), name, attention_mask=mask)
    for row, wanted in zip(r[name], single, strict=True):
        torch.testing.assert_close(row[4 - len(wanted) :], wanted, rtol=1e-4, atol=1e-5)


def test_texts_of_one_length_are_a_batch() -> None:
    model, name = boot("qwen3", torch.float32), "hook_embed"
    texts = ["a b c", "e f g"]
    _, r = clrp.run_with_relevance(model, texts, objective_of(model), name)
    for row, text in zip(r[name], texts, strict=True):
        _, single = clrp.run_with_relevance(model, text, objective_of(model), name)
        torch.testing.assert_close(row, single[name][0], rtol=1e-4, atol=1e-6)


def test_ids_of_any_integer_type_and_shape() -> None:
    model, name = boot("gpt2", torch.float32), "hook_embed"
    ids = random_tokens()
    _, wanted = clrp.run_with_relevance(model, ids, objective_of(model), name)
    for form in (ids[0], ids.int(), ids.to(torch.int16)):
        _, got = clrp.run_with_relevance(model, form, objective_of(model), name)
        assert torch.equal(got[name], wanted[name])
