"""Completions and rollouts against a loop that runs one unpadded forward for each token."""

from __future__ import annotations

import copy

import pytest
import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.study.collect import Greedy


@pytest.fixture(scope="module")
def model():
    return clrp.load_demo_model(device="cpu")


def slowly(model, ids, limit, ends=(2,)):
    """The argmax of one forward at a time, without cache or padding."""
    now = list(ids)
    while len(now) - len(ids) < limit:
        with torch.no_grad():
            now.append(int(model.original_model(torch.tensor([now])).logits[0, -1].argmax()))
        if now[-1] in ends:
            break
    return tuple(now[len(ids) :])


@pytest.fixture(scope="module")
def prompts(model):
    cases = clrp.load_demo_cases("format")[:4] + clrp.load_demo_cases("arithmetic")[:3]
    made = [clrp.chat(model, [{"role": "user", "content": c.user}]) for c in cases]
    ids = [p.tokens.tolist() for p in made]
    assert len({len(i) for i in ids}) > 3  # so that rows are padded
    return ids


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_batches_write_what_a_slow_loop_writes(model, prompts, batch_size):
    limits = [40, 40, 3, 40, 1, 40, 40]
    written = Greedy(model, batch_size).write(prompts, limits)
    assert written == [slowly(model, p, n) for p, n in zip(prompts, limits, strict=True)]
    assert any(w[-1] == 2 for w in written)
    assert any(w[-1] != 2 for w in written)


def test_a_reading_holds_the_logits_of_each_token(model, prompts):
    greedy = Greedy(model)
    written = slowly(model, prompts[0], 40)
    reading = greedy.read(prompts[0], written)
    assert reading.logits.shape[0] == len(written) + 1
    assert tuple(reading.logits[:-1].argmax(-1).tolist()) == written
    assert reading.cache is not None


@pytest.mark.parametrize("with_cache", [True, False])
def test_rollouts_are_what_a_slow_loop_writes_after_the_other_token(model, prompts, with_cache):
    greedy = Greedy(model, batch_size=5)
    for prompt in prompts[:2]:
        written = slowly(model, prompt, 40)
        reading = greedy.read(prompt, written)
        if not with_cache:
            object.__setattr__(reading, "cache", None)
        second = reading.logits.topk(2).indices[:, 1].tolist()
        branches = [(i, second[i]) for i in range(len(written))] + [(1, 2)]
        rolled = greedy.roll(reading, branches, 30)
        for (at, token), got in zip(branches, rolled, strict=True):
            start = (*written[:at], token)
            more = () if token == 2 else slowly(model, (*prompt, *start), max(0, 30 - len(start)))
            assert got == start + more, (at, token)


def test_the_models_own_generation_settings_change_nothing_and_are_kept(model, prompts):
    hf = model.original_model
    own = hf.generation_config
    before = Greedy(model).write(prompts[:1], [20])
    hf.generation_config = copy.deepcopy(own)
    hf.generation_config.update(repetition_penalty=50.0, do_sample=True, temperature=9.0)
    changed = hf.generation_config
    try:
        assert Greedy(model).write(prompts[:1], [20]) == before
        assert hf.generation_config is changed
    finally:
        hf.generation_config = own


def test_texts_and_pieces_spell_the_same(model, prompts):
    greedy = Greedy(model)
    written = slowly(model, prompts[1], 40)
    pieces = greedy.pieces(prompts[1], written)
    assert written[-1] == 2
    assert "".join(pieces[:-1]) == greedy.text(written)


def test_what_cannot_write_is_refused(model):
    with pytest.raises(ValueError, match="batch_size is 0"):
        Greedy(model, 0)
    with pytest.raises(TypeError, match="TransformerBridge"):
        Greedy(model.original_model)
