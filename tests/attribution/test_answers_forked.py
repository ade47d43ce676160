"""answer_diff over one forward of the prompt: who runs so, who does not, and that it is the same.

The truth is a run for each answer, with the whole prompt (``test_answers.py`` has more of those).
"""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.families import boot, random_tokens
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import forked
from tl_contrastive_lrp.inputs.rotary import depends_on_length

TARGET, CONTRAST = [7, 12, 30, 2], [9, 5]
ENCODERS = ("bert", "bert-decoder", "roberta")
# What a cache of keys and values cannot split; each answer runs with the whole prompt there.
NOT_FORKED = {"openai_gpt", "glm_moe_dsa"}
SUMS = ("tokens", "resid", "heads")


def alone(model: Any, ids: Tensor, answers: clrp.AnswerDiff, **how: Any) -> clrp.Attribution:
    """The same with a run for each answer."""
    room = importlib.import_module("tl_contrastive_lrp.attribution.attribute")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "run_forked", lambda *_: None)
        return clrp.attribute(model, ids, answers, **how)


def largest(result: Any) -> float:
    """The largest |relevance| that two runs are held against: with answers, of each of them too.

    Their difference may cancel, and each of them is rounded by itself.
    """
    runs = [result]
    if result.answer is not None:
        runs += [result.answer.target, result.answer.contrast]
    return max(float(run.resid.abs().max()) for run in runs)


def assert_same(found: clrp.Attribution, wanted: clrp.Attribution, bound: float) -> None:
    assert found.answer is not None
    assert wanted.answer is not None
    pairs = [(found, wanted), (found.answer.target, wanted.answer.target),
             (found.answer.contrast, wanted.answer.contrast)]  # fmt: skip
    scale = largest(wanted)
    assert scale > 0
    for one, two in pairs:
        for name in SUMS:
            assert (getattr(one, name) - getattr(two, name)).abs().max() <= bound * scale, name
        assert one.delta == pytest.approx(two.delta, rel=bound, abs=bound * scale)
    if wanted.neurons is not None:
        assert found.neurons is not None
        assert (found.neurons - wanted.neurons).abs().max() <= bound * scale
    for name in ("str_tokens", "sites", "target", "contrast", "objective", "pos", "target_is_top",
                 "memory", "rules", "segments"):  # fmt: skip
        assert getattr(found, name) == getattr(wanted, name), name
    assert found.target_logit == pytest.approx(wanted.target_logit, rel=bound, abs=bound * scale)
    for row, other in zip(found.ledger.rows, wanted.ledger.rows, strict=True):
        assert row.site == other.site
        for part in ("total", "biases", "positions", "other"):
            assert abs(getattr(row, part) - getattr(other, part)) <= 40 * bound * scale


@pytest.mark.parametrize("name", [name for name in COVERED if name not in ENCODERS])
def test_every_family_is_forked_but_those_named(name: str) -> None:
    """A fork gives what whole runs give: windows, soft-caps, sinks, experts, latent heads."""
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens()
    with torch.no_grad():
        model(ids)  # a family may put hooks of its own on at the first forward
    seen = Counter[bool]()
    room = importlib.import_module("tl_contrastive_lrp.attribution.attribute")
    original = room.run_forked

    def watched(*given: Any) -> Any:
        found = original(*given)
        seen[found is not None] += 1
        return found

    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "run_forked", watched)
        found = clrp.attribute(model, ids, answers)
    assert seen == {name not in NOT_FORKED: 1}
    assert_same(found, alone(model, ids, answers), 2 * PROMISED[torch.float32])


@pytest.mark.parametrize("name", ["gemma3", "qwen3", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "fused"])
@pytest.mark.parametrize("logprob", [False, True])
def test_each_way_of_attention(name: str, attention: Any, logprob: bool) -> None:
    model, ids = boot(name, torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST, logprob=logprob)
    how: dict[str, Any] = {"attention": attention, "neurons": True}
    found, wanted = clrp.attribute(model, ids, answers, **how), alone(model, ids, answers, **how)
    assert found.attention == wanted.attention
    assert_same(found, wanted, 2 * PROMISED[torch.float32])


def test_the_prompt_runs_once() -> None:
    """One forward of the prompt and one of what is read of each answer, besides the probe's."""
    model, ids = boot("qwen3", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    lengths: list[int] = []
    real = forked.forward

    def counted(model: Any, tokens: Tensor, *rest: Any, **more: Any) -> Any:
        lengths.append(tokens.shape[1])
        return real(model, tokens, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forked, "forward", counted)
        clrp.attribute(model, ids, answers)
        clrp.attribute(model, ids, clrp.answer_diff(model, ids, target=[1, 2, 3], contrast=[1]))
        clrp.attribute(model, ids, clrp.answer_diff(model, ids, target=[3], contrast=[1, 2, 3]))
        clrp.attribute(model, ids, clrp.answer_diff(model, ids, target=[3], contrast=[1]))
    assert lengths == [9, 3, 1, 10, 1, 9, 2]


def test_a_prompt_of_one_token() -> None:
    model, ids = boot("llama", torch.float32), random_tokens()[:, :1]
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    assert_same(clrp.attribute(model, ids, answers), alone(model, ids, answers), 2e-5)


def test_bfloat16_is_the_same_up_to_its_rounding() -> None:
    model, ids = boot("llama", torch.bfloat16), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    assert_same(clrp.attribute(model, ids, answers), alone(model, ids, answers), 0.05)


def test_hooks_of_the_user_see_whole_prompts() -> None:
    """In a fork a hook would be given the answers in pieces, so each answer runs by itself."""
    model, ids = boot("llama", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    free = clrp.attribute(model, ids, answers)
    widths: list[int] = []
    model.blocks[0].hook_resid_pre.add_hook(lambda x, **_: widths.append(x.shape[1]))
    try:
        result = clrp.attribute(model, ids, answers)
    finally:
        model.reset_hooks()
    assert sorted({*widths}) == [10, 12]
    assert_same(result, free, 2 * PROMISED[torch.float32])


@pytest.mark.parametrize(
    ("rope", "length", "refused"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, 40, True),
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 17, True),
        ({"rope_type": "longrope", "original_max_position_embeddings": 16}, 16, False),
        ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 8},
          "sliding_attention": {"rope_type": "default"}}, 9, True),
        ({"rope_type": "linear", "factor": 2.0}, 400, False),
        (None, 400, False),
    ],
)  # fmt: skip
def test_rotary_positions_that_depend_on_the_length(rope: Any, length: int, refused: bool) -> None:
    """The prompt's keys would be rotated as in a short text, the answers' as in a long one."""

    class Config:
        rope_parameters = rope
        max_position_embeddings = 32

    class Model:
        class original_model:
            config = Config()

    assert depends_on_length(Model(), length) == refused


def test_an_answer_that_sees_the_other_is_found_out() -> None:
    """The probe compares the second of two tails, so a cache that is shared by both fails it."""
    model, ids = boot("llama", torch.float32), random_tokens()
    answers = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forked._ForkedCache, "fork", lambda cache: cache)
        with pytest.raises(forked._NotForkableError):
            forked._require_own_logits(model, ids)
        found = clrp.attribute(model, ids, answers)
    assert_same(found, alone(model, ids, answers), 2e-6)


# ---------------------------------------------------------------- among other objectives


@pytest.mark.parametrize("several_prompts", [False, True])
def test_among_other_objectives(several_prompts: bool) -> None:
    """Each keeps its place, and is what ``attribute`` gives for it."""
    model, ids = boot("qwen3", torch.float32), random_tokens()
    diff = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    one_each = clrp.answer_diff(model, ids, target=[7], contrast=[9])
    objectives = [clrp.logit_diff(model, 3, 4), diff, clrp.target_logit(model, 8), one_each]
    prompts = [ids[:, : 9 - i] for i in range(4)] if several_prompts else [ids] * 4
    given = prompts if several_prompts else ids
    found = clrp.attribute_each(model, given, objectives)
    for result, prompt, objective in zip(found, prompts, objectives, strict=True):
        alone = clrp.attribute(model, prompt, objective)
        assert (result.answer is None) == (alone.answer is None)
        assert result.objective == alone.objective
        bound = PROMISED[torch.float32] * largest(alone)
        assert (result.tokens - alone.tokens).abs().max() <= bound


def test_only_differences_of_answers() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    diff = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    for prompts in (ids, [ids]):
        (result,) = clrp.attribute_each(model, prompts, [diff])
        assert torch.allclose(result.tokens, clrp.attribute(model, ids, diff).tokens, atol=1e-6)


def test_errors_name_the_place_in_the_list() -> None:
    model, ids = boot("llama", torch.float32), random_tokens()
    diff = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    far = clrp.logit_diff(model, 3, 4, pos=40)
    with pytest.raises(clrp.errors.TokenError, match=r"objectives\[1\]"):
        clrp.attribute_each(model, [ids] * 3, [diff, far, far])
    limit = int(model.cfg.n_ctx)
    long = torch.ones(1, limit, dtype=torch.long)
    with pytest.raises(clrp.errors.PromptError, match=r"objectives\[1\]: .*context"):
        clrp.attribute_each(model, [ids, long], [diff, diff])


def test_graphs_of_both_kinds() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens()
    diff = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    objectives = [diff, clrp.logit_diff(model, 3, 4), diff]
    graphs = clrp.attribution_graphs(model, ids, objectives, mass=0.9)
    for graph, objective in zip(graphs, objectives, strict=True):
        alone = clrp.attribution_graph(model, ids, objective, mass=0.9)
        assert graph.str_tokens == alone.str_tokens
        bound = PROMISED[torch.float32] * largest(clrp.attribute(model, ids, objective))
        assert (graph.relevance - alone.relevance).abs().max() <= bound
        assert len(graph.weight) == len(alone.weight)


@pytest.mark.parametrize("given", [{"checkpoint_dir": "folder"}, {"prefilled": object()}])
def test_what_belongs_to_one_prompt_is_refused(given: Any) -> None:
    model, ids = boot("llama", torch.float32), random_tokens()
    diff = clrp.answer_diff(model, ids, target=TARGET, contrast=CONTRAST)
    for call in (clrp.attribute_each, clrp.attribution_graphs):
        with pytest.raises(ValueError, match=r"objectives\[1\] is the difference of two answers"):
            call(model, ids, [clrp.logit_diff(model, 3, 4), diff], **given)
