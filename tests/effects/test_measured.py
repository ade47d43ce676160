"""Sets of tokens replaced together, against Hugging Face's model run once for each set.

Runs that begin at the first replaced token, over the keys and values of one clean run, must give
the numbers of whole runs, and must be what is counted.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.replacing import (
    CAUSAL,
    NOT_CAUSAL,
    OTHERS,
    TOKENS,
    WAYS,
    WITHOUT_CACHE,
    N,
    delta_of,
)  # fmt: skip
from torch import Tensor
from truth import families, zoo
from truth.float64 import true_float64
from truth.replaced_tokens import of_sets
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.effects import measured as runs
from tl_contrastive_lrp.effects.measured import measured_sets
from tl_contrastive_lrp.inputs.facts import PromptFacts

SETS = torch.zeros(6, N, dtype=torch.bool)
for row, positions in enumerate([[8], [1, 2, 3], [0], [5, 7], [], [2, 8]]):  # in no order
    SETS[row, positions] = True


def found_of(model: Any, objective: Any, by: Tensor | None, **how: Any) -> tuple[Tensor, float]:
    how = {"which": SETS, "batch_size": 2, "progress": False, **how}
    return measured_sets(model, PromptFacts.of(model, TOKENS), objective, by=by, **how)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_float64(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hf, by = families.boot(name), families.hf_model(name), WAYS[way]
    objective = clrp.logit_diff(model, 7, 12)
    with true_float64(model), true_float64(hf):
        truth = of_sets(hf, TOKENS, by, SETS, delta_of)
        limit = 1e-10 * float(truth.abs().max())
        found, forwards = found_of(model, objective, by)
        assert truth[4] == found[4] == 0.0
        assert (found - truth).abs().max() < limit
        # By first position: [0] and [1, 2, 3] from 0 on, [2, 8] and [5, 7] from 2 on, [8] alone.
        assert forwards == pytest.approx((9 + 2 * 9 + 2 * 7 + 1) / 9)
        monkeypatch.setattr(runs, "_works_over_a_prefix", lambda *_: False)
        whole, forwards = found_of(model, objective, by)
        assert forwards == pytest.approx(6.0)
        assert (found - whole).abs().max() < limit


@pytest.mark.parametrize(("name", "way"), diagonal(CAUSAL, WAYS))
def test_every_causal_family_begins_at_the_first_replaced_token(name: str, way: str) -> None:
    model = zoo.boot(name, torch.float32)
    hf = zoo.hf_model(name, torch.float32) if name == "xglm" else zoo.hf_model(name)
    with torch.no_grad():
        scale = 2 * float(model(TOKENS).abs().max())
    truth = of_sets(hf, TOKENS, WAYS[way], SETS, delta_of)
    limit = PROMISED[torch.float32] * (scale + float(truth.abs().max()))
    found, forwards = found_of(model, clrp.logit_diff(model, 7, 12), WAYS[way])
    assert (found - truth).abs().max() < limit
    assert (forwards < 6.0) == (name not in WITHOUT_CACHE)


def test_positions_that_are_read_before_a_replaced_token_stay() -> None:
    model, hf = families.boot("gemma2"), families.hf_model("gemma2")

    def span(logits: Tensor) -> Tensor:
        return logits[0, 2, 7] + logits[0, 4, 9] + logits[0, 6, 5]

    with true_float64(model), true_float64(hf):
        truth = of_sets(hf, TOKENS, OTHERS, SETS, span)
        found, _ = found_of(model, span, OTHERS)
    assert (found - truth).abs().max() < 1e-10 * truth.abs().max()
    assert found[0] == 0.0  # token 8, which nothing reads
    assert found.count_nonzero() == 4


def test_two_answers_are_the_difference_of_each() -> None:
    model, hf = families.boot("llama"), families.hf_model("llama")
    answers = clrp.answer_diff(model, TOKENS, target=torch.tensor([7, 9]), contrast=[12])

    def sides(logits: Tensor) -> Tensor:
        return logits[0, N - 1, 7] + logits[0, N, 9] - logits[0, N - 1, 12]

    longer = torch.cat([TOKENS, torch.tensor([[7]])], 1)
    sets = torch.nn.functional.pad(SETS, (0, 1))
    with true_float64(model), true_float64(hf):
        truth = of_sets(hf, longer, torch.cat([OTHERS, torch.tensor([7])]), sets, sides)
        found, _ = found_of(model, answers, OTHERS)
    assert (found - truth).abs().max() < 1e-10 * truth.abs().max()


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_a_model_that_is_not_causal_is_run_whole(name: str) -> None:
    """What comes after the position explained counts too."""
    model, hf = zoo.boot(name), zoo.hf_model(name)

    def early(logits: Tensor) -> Tensor:
        return logits[0, 2, 7] - logits[0, 2, 12]

    truth = of_sets(hf, TOKENS, None, SETS, early)
    found, forwards = found_of(model, clrp.logit_diff(model, 7, 12, pos=2), None)
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
    assert truth[0].abs() > 1e-3 * truth.abs().max()
    assert forwards == pytest.approx(6.0)


def test_runs_whose_scores_are_large_go_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each begins at its own first token then: 9, 8, 7, 4 and 1 positions, and the clean run."""
    model, hf = families.boot("llama"), families.hf_model("llama")
    monkeypatch.setattr(runs, "_ROOM", 1)
    with true_float64(model), true_float64(hf):
        truth = of_sets(hf, TOKENS, None, SETS, delta_of)
        found, forwards = found_of(model, clrp.logit_diff(model, 7, 12), None, batch_size=16)
    assert (found - truth).abs().max() < 1e-10 * float(truth.abs().max())
    assert forwards == pytest.approx((9 + 9 + 8 + 7 + 4 + 1) / 9)


def test_hooks_see_whole_prompts() -> None:
    model, seen = families.fresh("llama", torch.float32), []

    def look(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(x.shape[1])

    with model.hooks(fwd_hooks=[("blocks.1.hook_in", look)]):
        found_of(model, clrp.logit_diff(model, 7, 12), None)
    assert set(seen) == {N}
    assert all(not point.fwd_hooks for point in model.hook_dict.values())


def test_an_error_leaves_nothing_on_the_model(snapshot: Any) -> None:
    model = families.fresh("llama", torch.float32)
    model(TOKENS)  # Hugging Face puts hooks of its own on a model that runs for the first time
    before = snapshot(model)

    def failing(logits: Tensor) -> Tensor:
        if len(seen) > 2:
            raise KeyError("mine")
        seen.append(1)
        return logits[0, -1, 7]

    seen: list[int] = []
    with pytest.raises(KeyError, match="mine"):
        found_of(model, failing, None)
    assert snapshot(model) == before
