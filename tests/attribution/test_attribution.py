"""attribute(): its fields, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grids import diagonal
from truth.families import FAMILIES, boot, random_tokens, true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError, TokenError

RULES = tuple(clrp.RULE_SETS)
TEXT = "a b c d e f"


@pytest.fixture(scope="module")
def result() -> clrp.Attribution:
    model = boot("gemma2", torch.float32)
    return clrp.attribute(model, TEXT, target="a", contrast=" b", neurons=True)


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULES))
def test_fields_equal_run_with_relevance(name: str, rules: str) -> None:
    model, ids = boot(name, torch.float64), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    with true_float64(model):
        result = clrp.attribute(model, ids, objective, rules=rules, neurons=True)
        logits, r = clrp.run_with_relevance(model, ids, objective, rules=rules)
    n = model.cfg.n_layers
    assert result.sites == (
        *(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post"
    )  # fmt: skip
    assert result.resid.shape == (n + 1, 9)
    assert result.heads.shape == (n, model.cfg.n_heads, 9)
    assert result.neurons is not None
    assert result.neurons.shape == (n, 9, 40)
    largest = float(r["hook_embed"].sum(-1).abs().max())
    pairs = [(result.tokens, r["hook_embed"][0].sum(-1))]
    pairs += [
        (row, r[site][0].sum(-1)) for row, site in zip(result.resid, result.sites, strict=True)
    ]
    for i in range(n):
        pairs.append((result.heads[i], r[f"blocks.{i}.attn.hook_z"][0].sum(-1).T))
        pairs.append((result.neurons[i], r[f"blocks.{i}.mlp.hook_post"][0]))
    for got, wanted in pairs:
        assert got.device.type == "cpu"
        error = float((got - wanted).abs().max())
        assert error <= PROMISED[torch.float64] * max(largest, 1.0)
    assert result.token_ids.tolist() == ids[0].tolist()
    target, contrast = float(logits[0, -1, 7]), float(logits[0, -1, 11])
    assert math.isclose(result.target_logit, target, rel_tol=1e-6)
    assert math.isclose(result.contrast_logit or 0.0, contrast, rel_tol=1e-6)
    assert math.isclose(result.delta, target - contrast, rel_tol=1e-4, abs_tol=1e-6)
    assert result.rules == result.coverage.rules == rules
    assert clrp.attribute(model, ids, objective, rules=rules).neurons is None


def test_texts(result: clrp.Attribution) -> None:
    assert (result.target, result.contrast) == ("a", " b")
    assert "logit('a') − logit(' b')" in result.objective
    assert "".join(result.str_tokens) == "<bos>" + TEXT
    assert repr(result).startswith("Attribution(")
    assert f"{result.delta:+.4f}" in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.delta = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("form", ["objective", "ids", "strings", "sets", "1-d ids"])
def test_ways_to_ask(form: str) -> None:
    model = boot("qwen3", torch.float32)
    ids = model.to_tokens(TEXT)
    wanted = clrp.attribute(model, TEXT, clrp.logit_diff(model, 5, 32))
    calls: dict[str, Any] = {
        "objective": lambda: clrp.attribute(model, ids, clrp.logit_diff(model, "a", " b")),
        "ids": lambda: clrp.attribute(model, ids, target=5, contrast=32),
        "strings": lambda: clrp.attribute(model, TEXT, target="a", contrast=" b"),
        "sets": lambda: clrp.attribute(model, TEXT, target={5}, contrast=["b", " b"][1:]),
        "1-d ids": lambda: clrp.attribute(model, ids[0], target=5, contrast=32, pos=5),
    }
    got = calls[form]()
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.delta == wanted.delta


def test_token_id_zero_is_a_token() -> None:
    model = boot("qwen3", torch.float32)
    got = clrp.attribute(model, TEXT, target=0, contrast=5)
    assert got.target == "<pad>"


def test_a_function_of_ones_own() -> None:
    model = boot("qwen3", torch.float32)

    def my_metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, 7] - logits[0, -1, 11]

    got = clrp.attribute(model, random_tokens(), my_metric)
    wanted = clrp.attribute(model, random_tokens(), target=7, contrast=11)
    torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-5, atol=1e-6)
    assert got.objective == "my_metric"
    assert got.contrast_logit is None
    assert (got.target, got.contrast) == ("", "")


@pytest.mark.parametrize("make", ["target", "top", "top_k", "mean"])
def test_other_objectives(make: str, tmp_path: Path) -> None:
    model = boot("gpt2", torch.float32)
    objective = {
        "target": clrp.target_logit(model, 7),
        "top": clrp.top_logit(),
        "top_k": clrp.logit_minus_top_k(model, 7, 3),
        "mean": clrp.logit_minus_mean(model, 7),
    }[make]
    result = clrp.attribute(model, random_tokens(), objective)
    with torch.no_grad():
        assert math.isclose(result.delta, float(objective(model(random_tokens()))), rel_tol=1e-5)
    contrast = result.contrast_logit
    assert (contrast is None) == (make in ("target", "top"))
    assert math.isclose(result.target_logit - (contrast or 0.0), result.delta, rel_tol=1e-5)
    loaded = clrp.Attribution.load(result.save(tmp_path / "r.safetensors"))
    assert loaded.contrast_logit == contrast


def test_an_earlier_position_is_not_reached_by_later_tokens() -> None:
    model = boot("qwen3", torch.float32)
    result = clrp.attribute(model, random_tokens(), target=7, contrast=11, pos=4)
    assert result.tokens[5:].count_nonzero() == 0
    assert result.resid[:, 5:].count_nonzero() == 0
    assert result.tokens[:5].count_nonzero() == 5


def test_greyed_tokens() -> None:
    model = boot("qwen3", torch.float32)
    ids = torch.tensor([[6, 1, 7, 2, 9]])  # neither <bos> nor <eos> is first
    result = clrp.attribute(model, ids, target=7, contrast=11)
    assert result.special.tolist() == [False, True, False, True, False]
    assert result.greyed.tolist() == [True, True, False, True, False]
    assert result.special.tolist() == [False, True, False, True, False]  # not written through
    assert result.str_tokens[1] == "<bos>"


def test_frames(result: clrp.Attribution) -> None:
    frame = result.to_frame()
    assert list(frame.columns) == ["pos", "token", "id", "relevance", "share", "special"]
    assert frame["token"].tolist() == list(result.str_tokens)
    assert torch.allclose(torch.tensor(frame["relevance"].to_numpy()), result.tokens)
    assert math.isclose(frame["share"].sum(), result.ledger.share_to_tokens, rel_tol=1e-5)
    top = result.top(3)
    order = result.tokens.abs().argsort(descending=True)[:3].tolist()
    assert top["pos"].tolist() == order
    assert top.index.tolist() == [0, 1, 2]
    assert len(result.top(1000)) == len(result.str_tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rules", ["attnlrp", "cplrp"])
def test_precisions(dtype: torch.dtype, rules: str, tmp_path: Path) -> None:
    model = boot("gemma2", dtype)
    result = clrp.attribute(
        model, random_tokens(), target=7, contrast=11, rules=rules, neurons=True
    )
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (result.tokens, result.resid, result.heads)} == {wanted}
    assert result.neurons is not None
    assert result.neurons.isfinite().all()
    loaded = clrp.Attribution.load(result.save(tmp_path / "r"))
    assert torch.equal(loaded.resid, result.resid)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target": 7},
        {"contrast": 7},
        {"objective": True, "target": 7},
        {"objective": True, "contrast": 7},
        {"objective": True, "target": 7, "contrast": 11},
    ],
    ids=str,
)
def test_half_an_objective_is_refused(given: dict[str, Any]) -> None:
    model = boot("qwen3", torch.float32)
    if "objective" in given:
        given = {**given, "objective": clrp.logit_diff(model, 7, 11)}
    with pytest.raises(TypeError, match="next_token_table"):
        clrp.attribute(model, TEXT, **given)


def test_a_position_beside_an_objective_is_refused() -> None:
    """The objective has its own position; this one would go unheard."""
    model = boot("qwen3", torch.float32)
    with pytest.raises(TypeError, match="pos"):
        clrp.attribute(model, TEXT, clrp.logit_diff(model, 7, 11), pos=2)


@pytest.mark.parametrize("ask", [clrp.attribute, clrp.attribution_graph])
def test_a_token_in_place_of_an_objective_is_refused(ask: Any) -> None:
    with pytest.raises(TypeError, match=r"The objective ' a' is not one; use clrp\.logit_diff"):
        ask(boot("llama", torch.float32), TEXT, " a")


def test_a_batch_is_refused() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(PromptError, match="batch of 2"):
        clrp.attribute(model, random_tokens(2), target=7, contrast=11)
    with pytest.raises(PromptError, match="batch of 2"):
        clrp.attribute(model, ["a b", "c d"], target=7, contrast=11)  # type: ignore[arg-type]


def test_tokens_and_positions_are_checked() -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(TokenError, match="2 tokens"):
        clrp.attribute(model, TEXT, target="ab", contrast="a")
    with pytest.raises(TokenError, match="Position 6"):
        clrp.attribute(model, TEXT, target="a", contrast="b", pos=6)


@pytest.mark.parametrize("name", ["tokens", "resid", "heads", "token_ids", "special", "neurons"])
def test_shapes_are_checked(result: clrp.Attribution, name: str) -> None:
    whole = getattr(result, name)
    short = whole[:, :-1] if name == "neurons" else whole[..., :-1]
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(result, **{name: short})
