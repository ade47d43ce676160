"""``result.check`` against interventions on Hugging Face's model, planted truth, and slow loops."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.replacing import OTHERS, TOKENS, N, counted_forwards, delta_of
from torch import Tensor
from truth import families
from truth.float64 import true_float64
from truth.linear_model import frozen, linear_model
from truth.planted import bridge, case
from truth.planted_wires import PLANS
from truth.replaced_tokens import of_sets

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.check import verdict as verdicts
from tl_contrastive_lrp.errors import (
    FileFormatError,
    ModelStateError,
    NonFiniteError,
    PromptError,
    TokenError,
)

QUIET: dict[str, Any] = {"progress": False}
SEGMENTS = {"beginning": (0, 3), "middle": (3, 6), "end": (7, 9)}  # and "rest", token 6


def explained(model: Any, **how: Any) -> clrp.Attribution:
    return clrp.attribute(model, TOKENS, target=7, contrast=12, **QUIET, **how)


def rows_of(check: clrp.MapCheck) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in check.to_frame().to_dict("records")]


def mask_of(positions: list[int]) -> Tensor:
    mask = torch.zeros(N, dtype=torch.bool)
    mask[positions] = True
    return mask


# ------------------------------------------------------------ measured is what interventions do


@pytest.mark.parametrize("replace", ["zero", "others"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_measured_effects_are_interventions_by_hand(name: str, replace: str) -> None:
    model, hf = families.boot(name), families.hf_model(name)
    by = None if replace == "zero" else OTHERS
    how: dict[str, Any] = {"replace": "zero" if by is None else by, **QUIET}
    with true_float64(model), true_float64(hf):
        result = explained(model)
        check = result.check(model, 3, 2, **how)
        at = check.measured_at.tolist()
        truth = of_sets(hf, TOKENS, by, torch.eye(N, dtype=torch.bool)[at], delta_of)
        limit = 1e-10 * float(truth.abs().max())
        assert len(at) == 5
        assert (check.measured - truth).abs().max() < limit
        every = result.check(model, N, window=None, **how)
        assert (every.measured - every.predicted[every.measured_at]).abs().max() == 0.0
        whole = of_sets(hf, TOKENS, by, torch.eye(N, dtype=torch.bool), delta_of)
        assert (every.predicted - whole).abs().max() < limit
    assert check.relevance.tolist() == result.tokens.double().tolist()


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_segments_are_replaced_together(name: str) -> None:
    """Without the first token, which is grey, in the segment that it begins."""
    model, hf = families.boot(name), families.hf_model(name)
    with true_float64(model), true_float64(hf):
        result = explained(model)
        check = result.check(model, 2, 2, by=SEGMENTS, **QUIET)
        singles = clrp.token_effects(model, TOKENS, clrp.logit_diff(model, 7, 12), **QUIET).effect
        spans = [[1, 2], [3, 4, 5], [6], [7, 8]]
        sets = torch.stack([mask_of(span) for span in spans])
        truth = of_sets(hf, TOKENS, None, sets, delta_of)
    assert check.names == ("beginning", "middle", "rest", "end")
    assert check.unit == "segment"
    assert (check.measured - truth).abs().max() < 1e-10 * truth.abs().max()
    tokens = result.tokens.double()
    assert check.relevance.tolist() == pytest.approx([float(tokens[s].sum()) for s in spans])
    assert check.predicted.tolist() == pytest.approx([float(singles[s].sum()) for s in spans])
    assert check.to_frame().columns.tolist()[:4] == ["segment", "start", "stop", "n_tokens"]


def test_two_answers() -> None:
    """Replaced in the run of each answer, of which the prompt and their common beginning count."""
    model, hf = families.boot("llama"), families.hf_model("llama")
    answers = clrp.answer_diff(model, TOKENS[:, :7], target=[4, 7, 9], contrast=[4, 12])
    longer = torch.cat([TOKENS[:, :7], torch.tensor([[4, 7]])], 1)

    def sides(logits: Tensor) -> Tensor:
        return logits[0, 7, 7] + logits[0, 8, 9] - logits[0, 7, 12]

    with true_float64(model), true_float64(hf):
        result = clrp.attribute(model, TOKENS[:, :7], answers, **QUIET)
        assert len(result.str_tokens) == 8
        with pytest.raises(TokenError, match="objective=objective"):
            result.check(model, **QUIET)
        check = result.check(model, 3, 2, objective=answers, **QUIET)
        sets = torch.eye(9, dtype=torch.bool)[check.measured_at]
        truth = of_sets(hf, longer, None, sets, sides)
        assert (check.measured - truth).abs().max() < 1e-10 * truth.abs().max()
        # patterns at the position explained, which the answers' common beginning counts to
        patterns = model.run_with_cache(longer[:, :8])[1]
        weights = [patterns[f"blocks.{i}.attn.hook_pattern"][0, :, 7].amax(-1)
                   for i in range(model.cfg.n_layers)]  # fmt: skip
        assert check.saturation == pytest.approx(float(torch.cat(weights).mean()), rel=1e-6)
        other = clrp.answer_diff(model, TOKENS[:, :7], target=[5, 7, 9], contrast=[5, 12])
        with pytest.raises(TokenError, match="other answers"):
            result.check(model, objective=other, **QUIET)
        longer_one = clrp.answer_diff(model, TOKENS[:, :7], target=[4, 7, 8], contrast=[4, 12])
        with pytest.raises(ModelStateError, match="another objective"):
            result.check(model, objective=longer_one, **QUIET)


# ------------------------------------------------------------ planted truth


def test_in_a_linear_model_the_map_is_the_effects() -> None:
    """Patterns and norms are held: without a token, Δℓ lacks exactly its gradient × input."""
    model = linear_model()
    with true_float64(model), frozen(model, causal=True):
        result = explained(model, rules="gradient")
        check = result.check(model, 4, 4, window=None, **QUIET)
        assert (check.best + check.relevance).abs()[1:].max() < 1e-9
        for value in (check.captured, check.agreement, check.sign_agreement):
            assert value == pytest.approx(1.0, abs=1e-9)
        assert check.verdict == "supported"
        negated = dataclasses.replace(result, tokens=-result.tokens)
        wrong = negated.check(model, 4, 4, window=None, **QUIET)
    assert wrong.captured == pytest.approx(-1.0, abs=1e-9)
    assert wrong.agreement == pytest.approx(-1.0, abs=1e-9)
    assert wrong.sign_agreement == 0.0
    assert wrong.verdict == "contradicted"
    assert "with the wrong sign" in wrong.sentence


@pytest.mark.parametrize("name", ["lookup", "induction-gqa"])
def test_planted_causes(name: str) -> None:
    """A map of the planted cause is believed; turned round it is not, nor on average moved.

    The cause without the last token, which asks: a question without it is another one, whose answer
    nobody planted.
    """
    model, plan, moved = bridge(name), PLANS[name], []
    for seed in range(3):
        planted = case(plan, seed)
        result = clrp.attribute(
            model, planted.tokens, target=planted.target, contrast=planted.contrast, **QUIET
        )
        last = len(result.str_tokens) - 1
        cause = sorted(planted.truth - {last})
        right = torch.zeros_like(result.tokens)
        right[cause] = 1.0
        order = 1 + torch.randperm(last, generator=torch.Generator().manual_seed(seed))
        found = {}
        for kind, tokens in {
            "right": right, "negated": -right, "moved": torch.cat([right[:1], right[order]])
        }.items():  # fmt: skip
            given = dataclasses.replace(result, tokens=tokens)
            found[kind] = given.check(model, len(cause), 4, **QUIET)
        assert found["right"].strongest.tolist() == cause
        assert found["right"].verdict == "supported"
        assert found["negated"].captured == -found["right"].captured
        assert found["negated"].verdict == "contradicted"
        if name == "lookup":
            assert found["right"].captured == pytest.approx(1.0, abs=1e-3)
        moved.append(found["moved"].captured)
    assert sum(moved) / len(moved) < verdicts.SUPPORTED


def test_target_and_contrast_exchanged_change_nothing() -> None:
    model = families.boot("qwen3")
    with true_float64(model):
        one = explained(model).check(model, 4, 3, **QUIET)
        other = clrp.attribute(model, TOKENS, target=12, contrast=7, **QUIET).check(
            model, 4, 3, **QUIET
        )
    assert one.strongest.tolist() == other.strongest.tolist()
    assert (one.best + other.best).abs().max() < 1e-9
    for name, value in one.statistics.items():
        assert value == pytest.approx(other.statistics[name], abs=1e-9), name
    assert one.verdict == other.verdict
    assert one.sentence == other.sentence


# ------------------------------------------------------------ the figures, by slow loops


def slow_pearson(x: list[float], y: list[float]) -> float:
    a, b = sum(x) / len(x), sum(y) / len(y)
    top = sum((p - a) * (q - b) for p, q in zip(x, y, strict=True))
    return top / math.sqrt(sum((p - a) ** 2 for p in x) * sum((q - b) ** 2 for q in y))


def test_the_figures_are_what_they_are_called() -> None:
    model = families.boot("gemma2")
    with true_float64(model):
        result = explained(model)
        check = result.check(model, 3, 2, **QUIET)
    rows = [row for row in rows_of(check) if row["ordinary"]]
    known = [r["predicted"] if math.isnan(r["measured"]) else r["measured"] for r in rows]
    named = [r for r in rows if r["chosen"] == "strongest"]
    others = [r for r in rows if r["chosen"] == "random"]
    assert [r["pos"] for r in rows] == list(range(1, N))
    assert len(named) == 3
    assert len(others) == 2
    least = min(abs(r["relevance"]) for r in named)
    assert all(abs(r["relevance"]) <= least for r in rows if r not in named)

    best = sum(sorted((abs(e) for e in known), reverse=True)[:3])
    right = sum(-math.copysign(1.0, r["relevance"]) * r["measured"] for r in named)
    sizes = sum(abs(r["measured"]) for r in named)
    agreeing = sum(abs(r["measured"]) for r in named if r["measured"] * r["relevance"] < 0)
    level = sum(abs(r["measured"]) for r in others) / 2
    both = [r for r in rows if r["chosen"]]
    expected = {
        "captured": right / best,
        "agreement": slow_pearson([-r["relevance"] for r in rows], known),
        "sign_agreement": agreeing / sizes,
        "contrast_to_random": sizes / 3 / level,
        "predicted_agreement": slow_pearson(
            [r["predicted"] for r in both], [r["measured"] for r in both]
        ),
        "share_to_tokens": result.ledger.share_to_tokens,
        "sink_share": result.sink_share,
    }
    for name, value in expected.items():
        assert check.statistics[name] == pytest.approx(value, abs=1e-12), name


def test_saturation_is_the_largest_weight_of_each_head() -> None:
    model = families.boot("llama")
    with true_float64(model):
        check = explained(model).check(model, 2, 0, **QUIET)
        _, cache = model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith("hook_pattern"))
    largest = [
        max(cache[f"blocks.{layer}.attn.hook_pattern"][0, head, -1].tolist())
        for layer in range(model.cfg.n_layers)
        for head in range(model.cfg.n_heads)
    ]
    assert check.saturation == pytest.approx(sum(largest) / len(largest), abs=1e-6)


def test_only_ordinary_tokens_count() -> None:
    """No special token, not the first one, and none that the explained position cannot read."""
    model = families.boot("llama")
    tokens = TOKENS.clone()
    tokens[0, 3] = families.BOS
    result = clrp.attribute(model, tokens, target=7, contrast=12, pos=6, **QUIET)
    check = result.check(model, 100, 100, **QUIET)
    assert torch.nonzero(check.ordinary)[:, 0].tolist() == [1, 2, 4, 5, 6]
    assert sorted(check.strongest.tolist()) == [1, 2, 4, 5, 6]
    assert check.drawn.tolist() == []
    assert check.contrast_to_random is None
    assert "the 5 strongest tokens hold" in check.sentence


def test_equal_relevance_is_taken_in_order_and_drawn_tokens_by_seed() -> None:
    model = families.boot("llama")
    result = explained(model)
    flat = dataclasses.replace(result, tokens=torch.ones(N))
    one, same, *others = (flat.check(model, 3, 2, seed=seed, **QUIET) for seed in (0, 0, 1, 2, 3))
    assert one.strongest.tolist() == [1, 2, 3]
    assert one.drawn.tolist() == same.drawn.tolist()
    assert set(one.drawn.tolist()) <= {4, 5, 6, 7, 8}
    assert len({tuple(check.drawn.tolist()) for check in (one, *others)}) > 1
    assert one.agreement is None  # relevance does not vary


def made(**changes: Any) -> clrp.MapCheck:
    """A check of four tokens, of which two were named, by hand."""
    fields: dict[str, Any] = {
        "relevance": torch.tensor([9.0, 2.0, -1.0, 0.5], dtype=torch.float64),
        "predicted": torch.tensor([0.0, -1.0, 1.0, 3.0], dtype=torch.float64),
        "measured": torch.tensor([-2.0, 1.0], dtype=torch.float64),
        "measured_at": torch.tensor([1, 2]),
        "strongest": torch.tensor([1, 2]),
        "drawn": torch.tensor([], dtype=torch.long),
        "ordinary": torch.tensor([False, True, True, True]),
        "starts": torch.arange(4),
        "stops": torch.arange(1, 5),
        "names": ("<s>", "a", "b", "c"),
        "unit": "token",
        "k": 2, "n_random": 0, "seed": 0, "window": 2, "replaced_with": "zero embeddings",
        "delta": 1.0, "objective": "o", "target": "t", "contrast": "c", "rules": "gim",
        "model_name": "m", "share_to_tokens": 0.5, "sink_share": 0.1, "saturation": 0.7,
        "forwards": 8.0, "seconds": 0.5,
    }  # fmt: skip
    return clrp.MapCheck(**fields | changes)


def test_by_hand() -> None:
    """The two largest effects are 3 and 2; the map names those of 2 and 1, with right signs."""
    check = made()
    assert check.captured == pytest.approx(3 / 5)
    assert check.sign_agreement == 1.0
    assert check.predicted_agreement == pytest.approx(1.0)
    assert check.sentence == (
        "supported: the 2 strongest tokens hold 60 % of the effect that 2 tokens can have, with "
        "the right sign."
    )
    wrong = made(measured=torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert wrong.captured == pytest.approx(-1 / 5)
    assert wrong.verdict == "contradicted"
    assert wrong.sign_agreement == pytest.approx(1 / 3)
    nothing = {
        "measured": torch.zeros(2, dtype=torch.float64),
        "predicted": torch.zeros(4, dtype=torch.float64),
    }
    for none in (made(delta=0.0), made(**nothing)):
        assert none.captured is None
        assert none.verdict == "weak"
        assert "nothing to hold the map against" in none.sentence
    assert made(**nothing).sign_agreement is None
    one = made(
        measured=torch.tensor([-2.0], dtype=torch.float64),
        measured_at=torch.tensor([1]), strongest=torch.tensor([1]), unit="segment",
    )  # fmt: skip
    assert one.sentence.startswith("supported: the strongest segment holds 67 % of the effect that")


@pytest.mark.parametrize(
    ("captured", "verdict"),
    [
        (1.0, "supported"),
        (verdicts.SUPPORTED, "supported"),
        (verdicts.SUPPORTED - 1e-9, "weak"),
        (verdicts.CONTRADICTED, "weak"),
        (verdicts.CONTRADICTED - 1e-9, "contradicted"),
        (-1.0, "contradicted"),
        (None, "weak"),
    ],
)
def test_thresholds(captured: float | None, verdict: str) -> None:
    assert verdicts.verdict_of(captured) == verdict
    assert verdict in verdicts.MEANINGS


# ------------------------------------------------------------ what is refused


def test_another_model_is_refused() -> None:
    model = families.fresh("llama", torch.float32)
    result = explained(model)
    assert result.check(model, 2, 1, **QUIET).delta == result.delta
    with torch.no_grad():
        next(model.original_model.model.layers[0].mlp.parameters()).mul_(1.05)
    with pytest.raises(ModelStateError, match="another model"):
        result.check(model, 2, 1, **QUIET)


def test_another_objective_is_refused() -> None:
    model = families.boot("llama")
    result = explained(model)
    right = clrp.logit_diff(model, 7, 12)
    found = result.check(model, 2, 1, objective=right, **QUIET)
    assert found.measured.tolist() == result.check(model, 2, 1, **QUIET).measured.tolist()
    with pytest.raises(ModelStateError, match="another objective"):
        result.check(model, objective=clrp.logit_diff(model, 7, 13), **QUIET)
    with pytest.raises(TokenError, match=r"at position 8, and the objective reads position 5"):
        result.check(model, objective=clrp.logit_diff(model, 7, 12, pos=5), **QUIET)
    with pytest.raises(TypeError, match="is not one"):
        result.check(model, objective=5, **QUIET)


def test_objectives_that_words_do_not_give_back() -> None:
    model = families.boot("llama")
    given = {
        "set": clrp.logit_diff(model, {7, 9}, 12),
        "top_k": clrp.logit_minus_top_k(model, 7, 3),
        "target": clrp.target_logit(model, 7),
        "span": clrp.span_logit(model, TOKENS, span=(5, 8), against="none"),
        "function": delta_of,
    }
    for name, objective in given.items():
        result = clrp.attribute(model, TOKENS, objective, **QUIET)
        with pytest.raises(TokenError, match="objective=objective"):
            result.check(model, **QUIET)
        check = result.check(model, 3, 2, objective=objective, **QUIET)
        truth = clrp.token_effects(model, TOKENS, objective, window=None, **QUIET).effect
        assert (check.measured - truth[check.measured_at]).abs().max() < 1e-5, name


@pytest.mark.parametrize("pos", [-1, -3, 5])
def test_the_difference_of_two_tokens_is_made_again(pos: int) -> None:
    model = families.boot("gpt2")
    result = clrp.attribute(model, TOKENS, target=7, contrast=12, pos=pos, **QUIET)
    check = result.check(model, 3, 1, **QUIET)
    objective = clrp.logit_diff(model, 7, 12, pos)
    truth = clrp.token_effects(model, TOKENS, objective, window=None, **QUIET).effect
    assert (check.measured - truth[check.measured_at]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"k": 0}, ValueError, "k=0"),
        ({"k": 2.0}, ValueError, r"k=2\.0"),
        ({"n_random": -1}, ValueError, "n_random=-1"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"window": -1}, ValueError, "window=-1"),
        ({"replace": "mask"}, ValueError, "replace='mask'"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"by": "message"}, PromptError, "no messages"),
        ({"by": {"x": (3, 99)}}, ValueError, "99"),
    ],
)
def test_wrong_arguments(how: dict[str, Any], error: type[Exception], message: str) -> None:
    model = families.boot("llama")
    with pytest.raises(error, match=message):
        explained(model).check(model, **QUIET, **how)


def test_a_prompt_without_ordinary_tokens() -> None:
    model = families.boot("llama")
    result = clrp.attribute(model, TOKENS[:, :1], target=7, contrast=12, **QUIET)
    with pytest.raises(PromptError, match="no token whose effect"):
        result.check(model, **QUIET)


def test_nothing_is_left_on_the_model(snapshot: Any) -> None:
    model = families.fresh("llama", torch.float32)
    result = explained(model)
    before = snapshot(model)
    result.check(model, 3, 2, **QUIET)
    assert snapshot(model) == before

    def hidden(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return x

    def failing(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        raise KeyError("mine")

    with model.hooks(fwd_hooks=[("blocks.1.hook_in", hidden)]):
        inside = snapshot(model)
        with pytest.raises(ModelStateError, match=r"blocks\.1\.hook_in.*window=None"):
            result.check(model, 3, 2, **QUIET)
        seen = result.check(model, 3, 2, window=None, **QUIET)
        assert snapshot(model) == inside
    with model.hooks(fwd_hooks=[("blocks.1.hook_in", failing)]):
        inside = snapshot(model)
        with pytest.raises(KeyError, match="mine"):
            result.check(model, 3, 2, window=None, **QUIET)
        assert snapshot(model) == inside
    assert snapshot(model) == before
    assert len(seen.measured) == 5


def test_numbers_that_are_none_are_refused() -> None:
    model = families.fresh("llama", torch.float32)
    result = explained(model)
    bad = result.tokens.clone()
    bad[4] = torch.nan
    with pytest.raises(NonFiniteError, match="relevance"):
        dataclasses.replace(result, tokens=bad).check(model, **QUIET)
    with pytest.raises(NonFiniteError, match="Δℓ is nan"):
        dataclasses.replace(result, delta=math.nan).check(model, **QUIET)

    def overflowing(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return x / (x.abs().sum(-1, keepdim=True) > 0)  # 0 / 0 at a zero embedding

    with model.hooks(fwd_hooks=[("blocks.0.hook_in", overflowing)]):
        hooked = explained(model)
        with pytest.raises(NonFiniteError, match="replace="):
            hooked.check(model, 3, 2, window=None, **QUIET)
    with pytest.raises(ValueError, match="NaN"):
        made(measured=torch.tensor([math.nan, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="ordinary"):
        made(ordinary=torch.zeros(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="measured_at"):
        made(strongest=torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="not of 4"):
        made(stops=torch.arange(3))


# ------------------------------------------------------------ files


@pytest.mark.parametrize("by", [None, SEGMENTS])
def test_saved_and_loaded_is_the_same(by: Any, tmp_path: Path) -> None:
    model = families.boot("llama")
    check = explained(model).check(model, 2, 1, by=by, **QUIET)
    loaded = clrp.MapCheck.load(check.save(tmp_path / "check.safetensors"))
    for field in dataclasses.fields(check):
        one, two = getattr(check, field.name), getattr(loaded, field.name)
        if isinstance(one, Tensor):
            assert one.dtype == two.dtype, field.name
            assert torch.equal(one, two), field.name
        else:
            assert one == two, field.name
            assert type(one) is type(two), field.name
    assert repr(loaded) == repr(check)


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    model = families.boot("llama")
    result = explained(model)
    with pytest.raises(FileFormatError, match="holds no check of a map"):
        clrp.MapCheck.load(result.save(tmp_path / "result.safetensors"))
    from tl_contrastive_lrp.attribution.check.result import _FILE
    from tl_contrastive_lrp.files import read_result, write_result

    path = result.check(model, 2, 1, **QUIET).save(tmp_path / "check.safetensors")
    assert "measured" in load_file(path)
    tensors, data = read_result(path, _FILE)
    del tensors["drawn"]
    write_result(path, _FILE, tensors, data)
    with pytest.raises(FileFormatError, match="damaged"):
        clrp.MapCheck.load(path)


# ------------------------------------------------------------ pages


@pytest.mark.parametrize("by", [None, SEGMENTS])
def test_the_report_shows_the_check_of_its_result_only(by: Any, tmp_path: Path) -> None:
    model = families.boot("llama")
    result = explained(model)
    check = result.check(model, 2, 1, by=by, **QUIET)
    html = result.save_html(tmp_path / "r.html", check=check).read_text("utf-8")
    assert check.sentence[1:] in html
    assert check.cost in html
    effects = [f"{value:+.3f}".replace("-", "−")[:5] for value in check.measured.tolist()]
    assert all(effect in html for effect in effects)
    for other in (
        dataclasses.replace(result, delta=result.delta + 1.0),
        dataclasses.replace(result, rules="relp"),
        dataclasses.replace(result, tokens=result.tokens * (2.0 if by is None else 1.0), rules="x"),
    ):
        with pytest.raises(ValueError, match="another result"):
            other.save_html(tmp_path / "other.html", check=check)


def test_every_forward_of_a_plain_function_is_counted() -> None:
    """Beyond those of the located objective: in the look, the prediction and the measurement."""
    model = families.boot("llama", torch.float32)
    result = explained(model)

    for window, more in ((2, 3), (None, 2)):
        found = result.check(model, 3, 2, window=window, objective=delta_of, **QUIET)
        known = result.check(model, 3, 2, window=window, **QUIET)
        assert found.forwards == pytest.approx(known.forwards + more)
    with counted_forwards(model) as runs:
        found = result.check(model, 3, 2, window=None, objective=delta_of, **QUIET)
    assert found.forwards == pytest.approx(sum(runs))
