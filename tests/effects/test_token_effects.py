"""``token_effects`` against the model run once for each token, and against what must hold.

The oracle (``truth/replaced_tokens.py``) replaces tokens of the Hugging Face model, one at a time.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.replacing import (
    CAUSAL,
    FOLLOWED_NOT,
    NOT_CAUSAL,
    OTHERS,
    TOKENS,
    WAYS,
    WITHOUT_CACHE,
    N,
    counted_forwards,
    delta_of,
)  # fmt: skip
from support.stretched import stretched
from torch import Tensor
from truth import families, zoo
from truth.float64 import true_float64
from truth.replaced_tokens import effects as by_replacing
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.effects import followed
from tl_contrastive_lrp.effects.later import LaterPositions
from tl_contrastive_lrp.effects.streams import Seen
from tl_contrastive_lrp.errors import ModelStateError, PromptError, UncoveredComponentError

QUIET: dict[str, Any] = {"progress": False}


def effects_of(model: Any, way: str, **how: Any) -> clrp.TokenEffects:
    replace: Any = "zero" if way == "zero" else WAYS[way]
    objective = clrp.logit_diff(model, 7, 12)
    return clrp.token_effects(model, TOKENS, objective, replace=replace, **QUIET, **how)


# ------------------------------------------------------------ what is exact


@pytest.mark.parametrize(("name", "way"), diagonal(CAUSAL, WAYS))
def test_every_causal_family(name: str, way: str) -> None:
    """Measured, and with a window to the end, effects are the oracle's; so are the last tokens'."""
    dtype = torch.float32
    model, hf = zoo.boot(name, dtype), zoo.hf_model(name)
    if name == "xglm":  # its mask has no float64 form
        hf = zoo.hf_model(name, dtype)
    # An effect is a difference of two Δℓ, each off by what is promised of the largest logit.
    with torch.no_grad():
        scale = 2 * float(model(TOKENS).abs().max())
    truth = by_replacing(hf, TOKENS, WAYS[way], delta_of)
    limit = PROMISED[dtype] * (scale + float(truth.abs().max()))
    assert truth.abs().max() > 100 * limit  # it would be seen
    measured = effects_of(model, way, window=None)
    whole = effects_of(model, way, window=N - 1)
    short = effects_of(model, way, window=2, tile=4)
    assert measured.exact.all()
    assert whole.exact.all()
    assert short.exact.tolist() == [False] * (N - 3) + [True] * 3
    assert (measured.effect - truth).abs().max() < limit
    assert (whole.effect - truth).abs().max() < limit
    assert (short.effect - truth)[short.exact].abs().max() < limit
    assert followed._known[model][1] == (name not in WITHOUT_CACHE)
    same = clrp.token_effects(
        model, TOKENS, clrp.logit_diff(model, 7, 12), replace=TOKENS[0], window=2, **QUIET
    )
    assert same.effect.abs().max() < PROMISED[dtype] * scale


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", families.FAMILIES)
def test_float64(name: str, way: str) -> None:
    model, hf = families.boot(name), families.hf_model(name)
    with true_float64(model), true_float64(hf):
        truth = by_replacing(hf, TOKENS, WAYS[way], delta_of)
        limit = 1e-9 * float(truth.abs().max())
        for window in (None, N - 1, N + 5):
            found = effects_of(model, way, window=window)
            assert (found.effect - truth).abs().max() < limit, window
        assert followed._known[model][1]  # over a cache, with the last position exact
        for window, tile in ((0, 3), (1, 5), (3, 16)):
            found = effects_of(model, way, window=window, tile=tile)
            assert (found.effect - truth)[found.exact].abs().max() < limit, window
            assert int(found.exact.sum()) == window + 1


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_token_itself_does_nothing(name: str) -> None:
    model = families.boot(name)
    with true_float64(model):
        objective = clrp.logit_diff(model, 7, 12)
        for window in (0, 2, None):
            same = clrp.token_effects(
                model, TOKENS, objective, replace=TOKENS[0], window=window, **QUIET
            )
            assert same.effect.abs().max() < 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_one_block_is_exact(way: str) -> None:
    """Before the last position, nothing but z has changed in the only block."""
    model = one_block()
    truth = effects_of(model, way, window=None)
    for window in (0, 1, 4):
        found = effects_of(model, way, window=window)
        assert (found.effect - truth.effect).abs().max() < 1e-5


def one_block() -> Any:
    """A Llama whose second block adds nothing."""
    model = families.fresh("llama", torch.float32)
    with torch.no_grad():
        for block in model.original_model.model.layers[1:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return model


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_error_is_of_second_order(name: str, window: int) -> None:
    """Small replacements are predicted to first order: half of one leaves a quarter of the error.

    Each token's embedding gets a step in a direction of its own; the step is halved twice.
    """
    model = families.fresh(name, torch.float64)
    table = model.original_model.get_input_embeddings().weight
    original = table.detach().clone()
    generator = torch.Generator().manual_seed(3)
    step = torch.randn(N, original.shape[1], generator=generator, dtype=torch.float64)
    tokens, others = torch.arange(4, 4 + N)[None], torch.arange(4 + N, 4 + 2 * N)
    objective = clrp.logit_diff(model, 40, 41)
    errors, sizes = [], []
    with true_float64(model):
        for size in (0.02, 0.01, 0.005):
            with torch.no_grad():
                table.copy_(original)
                table[others] = original[tokens[0]] + size * step
            how: dict[str, Any] = {"replace": others, **QUIET}
            truth = clrp.token_effects(model, tokens, objective, window=None, **how)
            found = clrp.token_effects(model, tokens, objective, window=window, **how)
            far = ~found.exact
            errors.append((found.effect - truth.effect)[far])
            sizes.append(truth.effect[far].abs().max())
    assert sizes[2] > 0.4 * sizes[1]  # effects themselves only halve
    for coarse, fine in ((errors[0], errors[1]), (errors[1], errors[2])):
        assert 3.0 < float(coarse.norm() / fine.norm()) < 5.0
    assert errors[2].abs().max() < 0.1 * sizes[2]


# ------------------------------------------------------------ the closed form


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_later_positions_by_a_slow_softmax(window: int, sink: bool) -> None:
    """Each token, head and query by itself: scores replaced, softmax, values replaced."""
    heads, n, d, hidden = 2, 9, 3, 3
    generator = torch.Generator().manual_seed(window)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * 2.0

    scores, values = drawn(window + 2, heads, n, n + sink), drawn(window + 2, heads, n, d)
    g = drawn(2, heads, n, d)
    rows = torch.arange(n)
    unseen = (rows > rows[:, None]) | (rows < rows[:, None] - hidden - window)
    scores[..., :n] = scores[..., :n].masked_fill(unseen, torch.finfo(torch.float64).min)
    if sink:
        scores[..., n] = scores[-1, 0, 0, n]
    pattern = scores[-1].softmax(-1)[..., :n]
    z = pattern @ values[-1]

    stop = n - 1
    expected = torch.zeros(2, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i + window + 1, stop):
            for h in range(heads):
                row, value = scores[-1, h, j].clone(), values[-1, h].clone()
                for o in range(window + 1):
                    row[i + o], value[i + o] = scores[o, h, j, i + o], values[o, h, i + o]
                changed = row.softmax(-1)[:n] @ value
                expected[:, i] += g[:, h, j] @ (changed - z[h, j])

    later = LaterPositions({"attn": g}, window, stop)
    for start, end in ((0, 2), (2, 6), (6, n)):  # by tiles of queries
        keys = [*range(end), *([n] if sink else [])]
        own = slice(start, end)
        later.add(
            Seen("attn", start, scores[:, :, own][..., keys], values[:, :, :end],
                 pattern[:, own, :end])
        )  # fmt: skip
    assert expected.abs().max() > 1.0
    assert (torch.stack(later.effects) - expected).abs().max() < 1e-12


def test_a_token_that_has_all_attention_is_replaced_without_dividing_by_zero() -> None:
    scores = torch.tensor([[[[0.0, -50.0]] * 3], [[[200.0, -50.0]] * 3]])
    scores = torch.cat([scores, torch.full((2, 1, 3, 1), -60.0)], -1)
    values = torch.tensor([[[[5.0]] * 3], [[[1.0]] * 3]])
    mask = torch.ones(3, 3, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(mask, -torch.inf)
    pattern = scores[-1].softmax(-1)
    later = LaterPositions({"attn": torch.ones(1, 1, 3, 1)}, 0, 3)
    later.add(Seen("attn", 0, scores, values, pattern))
    (found,) = later.effects
    assert found.isfinite().all()
    # The clean score of 200 becomes 0, still far above the others, so 1 becomes 5 at both.
    assert float(found[0]) == pytest.approx(8.0, abs=1e-4)


# ------------------------------------------------------------ what must not change a result


def test_tiles_and_fused_attention_change_nothing() -> None:
    model = families.boot("gemma2")
    with true_float64(model):
        whole = effects_of(model, "zero", tile=64, attention="eager")
        for tile in (1, 2, 5):
            found = effects_of(model, "zero", tile=tile, batch_size=3, attention="fused")
            assert (found.effect - whole.effect).abs().max() < 1e-9


def test_objectives_together_are_objectives_alone() -> None:
    model = families.boot("qwen3")
    each = [clrp.logit_diff(model, 7, 12), clrp.target_logit(model, 9, pos=5), delta_of]
    with true_float64(model):
        together = clrp.token_effects_each(model, TOKENS, each, **QUIET)
        for one, found in zip(each, together, strict=True):
            alone = clrp.token_effects(model, TOKENS, one, **QUIET)
            measured = clrp.token_effects(model, TOKENS, one, window=None, **QUIET)
            assert found.delta == pytest.approx(measured.delta, abs=1e-9)
            assert (found.effect - alone.effect).abs().max() < 1e-9
            assert torch.equal(found.exact, alone.exact)
            assert (found.effect - measured.effect)[found.exact].abs().max() < 1e-9
    assert (together[0].effect - together[2].effect).abs().max() < 1e-9  # the same, as a function
    assert together[1].effect[6:].abs().max() == 0.0  # nothing after it is read
    assert together[1].pos == 5


def test_several_positions() -> None:
    """A span's effects are those of its positions, added up; none after it."""
    model = families.boot("llama")
    with true_float64(model):
        span = clrp.span_logit(model, TOKENS, span=(5, 8), against="none")
        read = span.positions(N)
        ids = TOKENS[0, [p + 1 for p in read]].tolist()
        measured = clrp.token_effects(model, TOKENS, span, window=None, **QUIET)
        parts = [
            clrp.token_effects(model, TOKENS, clrp.target_logit(model, t, pos=p), window=None,
                               **QUIET)
            for t, p in zip(ids, read, strict=True)
        ]  # fmt: skip
        total = torch.stack([one.effect for one in parts]).sum(0)
        assert (measured.effect - total).abs().max() < 1e-9
        whole = clrp.token_effects(model, TOKENS, span, window=N, **QUIET)
        assert (whole.effect - measured.effect).abs().max() < 1e-9
        short = clrp.token_effects(model, TOKENS, span, window=2, **QUIET)
        assert torch.corrcoef(torch.stack([short.effect, measured.effect]))[0, 1] > 0.8
        assert (short.effect - measured.effect)[short.exact].abs().max() < 1e-9
        assert short.effect[max(read) + 1 :].abs().max() == 0.0


def test_two_answers_are_the_difference_of_each() -> None:
    model = families.boot("llama")
    answers = clrp.answer_diff(model, TOKENS, target=torch.tensor([7, 9]), contrast=[12])
    found = clrp.token_effects(model, TOKENS, answers, replace=OTHERS, window=None, **QUIET)
    assert len(found.effect) == N

    def sides(logits: Tensor) -> Tensor:
        return logits[0, N - 1, 7] + logits[0, N, 9] - logits[0, N - 1, 12]

    longer = torch.cat([TOKENS, torch.tensor([[7]])], 1)
    by = torch.cat([OTHERS, torch.tensor([7])])
    hf = families.hf_model("llama")
    with true_float64(model), true_float64(hf):
        found = clrp.token_effects(model, TOKENS, answers, replace=OTHERS, window=None, **QUIET)
        truth = by_replacing(hf, longer, by, sides)[:N]
    assert (found.effect - truth).abs().max() < 1e-9


# ------------------------------------------------------------ refusals


def test_hooks_are_refused_with_a_window_and_run_without() -> None:
    model = families.fresh("llama", torch.float32)
    plain = effects_of(model, "zero", window=None)

    def doubled(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 2 * x

    with model.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", doubled)]):
        with pytest.raises(ModelStateError, match=r"blocks\.0\.mlp\.hook_out.*window=None"):
            effects_of(model, "zero")
        hooked = effects_of(model, "zero", window=None)
    assert (hooked.effect - plain.effect).abs().max() > 1e-3


@pytest.mark.parametrize("name", [*NOT_CAUSAL, *FOLLOWED_NOT])
def test_what_cannot_be_followed_is_refused_and_can_be_measured(name: str) -> None:
    model = zoo.boot(name)
    with pytest.raises(UncoveredComponentError, match="window=None"):
        effects_of(model, "zero")
    measured = effects_of(model, "zero", window=None)
    truth = by_replacing(zoo.hf_model(name), TOKENS, None, delta_of)
    assert (measured.effect - truth).abs().max() < 1e-4 * truth.abs().max()


def test_tokens_that_mix_outside_attention_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    silu = torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, *_, **__: silu(x).cumsum(1))
    with pytest.raises(UncoveredComponentError, match="differ by"):
        effects_of(families.fresh("llama", torch.float32), "zero")


def test_a_pattern_that_is_no_softmax_is_refused() -> None:
    scores, values = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 5)
    later = LaterPositions({"blocks.7.attn": torch.ones(1, 2, 4, 5)}, 1, 4)
    for pattern in (scores[-1].softmax(-1) ** 2, scores[0].softmax(-1)):
        seen = Seen("blocks.7.attn", 0, scores, values, pattern)
        with pytest.raises(UncoveredComponentError, match=r"blocks\.7\.attn.*not the softmax"):
            later.add(seen)


def test_a_model_is_tried_once_and_again_with_other_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tried = families.fresh("gpt2", torch.float32), []
    real = followed._try
    monkeypatch.setattr(followed, "_try", lambda *a: (tried.append(a[-1]), real(*a)))
    effects_of(model, "zero")
    effects_of(model, "others")
    assert tried == [4]
    with torch.no_grad():
        next(model.original_model.parameters()).mul_(1.01)
    effects_of(model, "zero")
    assert tried == [4, 4]


def test_a_model_without_a_cache_is_followed_without_one() -> None:
    model = zoo.boot("openai_gpt")
    found = effects_of(model, "zero", window=2)
    truth = effects_of(model, "zero", window=None)
    assert torch.corrcoef(torch.stack([found.effect, truth.effect]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"replace": "mask"}, ValueError, "replace='mask' is unknown"),
        ({"replace": OTHERS[:4]}, PromptError, "has 4 tokens and the prompt 9"),
        ({"replace": 4000}, PromptError, "4000"),
        ({"window": -1}, ValueError, "window=-1"),
        ({"tile": 0}, ValueError, "tile=0"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"attention": "sparse"}, ValueError, "attention='sparse'"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = families.boot("llama")
    with pytest.raises(error, match=message):
        clrp.token_effects(model, TOKENS, clrp.logit_diff(model, 7, 12), **QUIET, **how)


def test_nothing_is_left_on_the_model_after_an_error() -> None:
    model = families.fresh("llama", torch.float32)
    before = copy.deepcopy({k: v.clone() for k, v in model.original_model.state_dict().items()})

    def failing(logits: Tensor) -> Tensor:  # noqa: ARG001
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        clrp.token_effects(model, TOKENS, failing, **QUIET)
    assert all(not point.fwd_hooks for point in model.hook_dict.values())
    after = model.original_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.requires_grad for p in model.original_model.parameters())


# ------------------------------------------------------------ the result


def test_random_tokens_are_drawn_by_seed_and_are_not_special() -> None:
    model = families.boot("llama")
    objective = clrp.logit_diff(model, 7, 12)
    one, same, other = (
        clrp.token_effects(model, TOKENS, objective, replace="random", seed=seed, **QUIET)
        for seed in (1, 1, 2)
    )
    assert one.replaced_by is not None
    assert torch.equal(one.replaced_by, same.replaced_by)
    assert not torch.equal(one.replaced_by, other.replaced_by)
    assert not torch.isin(one.replaced_by, torch.tensor([0, 1, 2])).any()
    given = clrp.token_effects(model, TOKENS, objective, replace=one.replaced_by, **QUIET)
    assert torch.equal(one.effect, given.effect)


def test_segments_sum_tokens() -> None:
    found = effects_of(families.boot("llama"), "zero")
    frame = found.by({"beginning": (0, 4)})
    assert frame["effect"].tolist() == pytest.approx(
        [float(found.effect[:4].sum()), float(found.effect[4:].sum())]
    )
    assert "share" not in frame


def test_colours_mean_what_they_mean_for_relevance() -> None:
    """What is red is what Δℓ would lose without the token."""
    found = effects_of(families.boot("llama"), "zero")
    page = str(found.show(include_special=True))
    match = re.search(r'"values": ?(\[[^\]]*\])', page)
    assert match is not None
    shown = json.loads(match[1])
    assert shown == pytest.approx((-found.effect).tolist(), rel=1e-4, abs=1e-5)  # as it is written


def test_a_file_gives_the_result_back(tmp_path: Any) -> None:
    for way in WAYS:
        found = effects_of(families.boot("llama"), way)
        read = clrp.TokenEffects.load(found.save(tmp_path / "effects.safetensors"))
        assert torch.equal(read.effect, found.effect)
        assert read.by({"all": (0, N)}).equals(found.by({"all": (0, N)}))
        assert repr(read) == repr(found)
        assert (read.window, read.forwards, read.earlier_pos) == (2, found.forwards, ())


@pytest.mark.parametrize("pos", [-1, 12])
def test_positions_stretched_for_long_prompts_run_at_once(pos: int) -> None:
    """Beyond 20 tokens all angles change, those of a tile and of a prompt that is cut off too."""
    model = stretched(20)
    how = {"target": 7, "contrast": 11, "pos": pos, "replace": 5, "progress": False}
    ids = zoo.random_tokens(24)
    found = clrp.token_effects(model, ids, tile=6, window=23, **how)
    truth = clrp.token_effects(model, ids, window=None, **how)
    with torch.no_grad():
        logits = model(ids)
        scale = 2 * float(logits.abs().max())
    delta = float(logits[0, pos, 7] - logits[0, pos, 11])
    assert found.delta == pytest.approx(delta, abs=PROMISED[torch.float32] * scale)
    assert truth.delta == pytest.approx(delta, abs=PROMISED[torch.float32] * scale)
    limit = PROMISED[torch.float32] * (scale + float(truth.effect.abs().max()))
    assert truth.effect.abs().max() > 100 * limit
    assert (found.effect - truth.effect).abs().max() < limit


def test_measuring_lets_a_hook_at_the_unembedding_see_every_position() -> None:
    model, seen = families.boot("llama"), list[int]()
    with model.hooks([("unembed.hook_in", lambda x, **_: seen.append(x.shape[1]))]):
        hooked = effects_of(model, "zero", window=None)
    assert {*seen} == {N}
    bare = effects_of(model, "zero", window=None)
    with torch.no_grad():
        scale = 2 * float(model(TOKENS).abs().max())
    assert (hooked.effect - bare.effect).abs().max() < PROMISED[torch.float32] * scale


# ------------------------------------------------------------ what it costs


def test_the_forward_behind_a_plain_function_is_counted() -> None:
    """What positions a function reads is found in the prompt's logits, which take a forward."""
    model = families.boot("llama", torch.float32)
    located = clrp.logit_diff(model, 7, 12)

    for objective, more in ((located, 0), (delta_of, 1)):
        for window in (None, 2):
            clrp.token_effects(model, TOKENS, objective, window=window, **QUIET)  # probes a cache
        with counted_forwards(model) as runs:
            found = clrp.token_effects(model, TOKENS, objective, window=None, **QUIET)
        assert found.forwards == pytest.approx(sum(runs))
        predicted = clrp.token_effects(model, TOKENS, objective, window=2, **QUIET)
        known = clrp.token_effects(model, TOKENS, located, window=2, **QUIET)
        assert predicted.forwards == known.forwards + more
    with counted_forwards(model) as runs:
        each = clrp.token_effects_each(
            model, TOKENS, [delta_of, lambda x: 2 * delta_of(x), located], window=None, **QUIET
        )
    assert [one.forwards for one in each] == [pytest.approx(sum(runs))] * 3
    assert torch.equal(each[1].effect, 2 * each[0].effect)
