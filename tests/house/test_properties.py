"""Properties that must hold for whatever tokens, positions and rules are drawn."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from truth.families import FAMILIES, VOCAB, boot, make_tokenizer, random_tokens, true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.hooks.coverage import Coverage, CoverageRow
from tl_contrastive_lrp.inputs.tokens import to_token_ids

few = settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
many = settings(max_examples=100, deadline=None, derandomize=True, database=None)

families = st.sampled_from(FAMILIES)
rules = st.sampled_from(tuple(clrp.RULE_SETS))
token = st.integers(0, VOCAB - 1)
tokens = st.sets(token, min_size=1, max_size=3)
lengths = st.integers(1, 9)


def relevance(model: Any, ids: Tensor, objective: Any, rule: str) -> dict[str, Tensor]:
    names = ["hook_embed", "blocks.0.attn.hook_z", "blocks.1.hook_resid_mid"]
    _, r = clrp.run_with_relevance(model, ids, objective, names, rules=rule)
    return {name: r[name] for name in names}


@few
@given(families, rules, tokens, tokens, lengths)
def test_contrast_is_a_difference(
    family: str, rule: str, target: set[int], contrast: set[int], length: int
) -> None:
    """A(t, c) = A(t) − A(c)."""
    assume(not target & contrast)
    model, ids = boot(family, torch.float64), random_tokens(1, length)
    with true_float64(model):
        both = relevance(model, ids, clrp.logit_diff(model, target, contrast), rule)
        one = relevance(model, ids, clrp.target_logit(model, target), rule)
        two = relevance(model, ids, clrp.target_logit(model, contrast), rule)
    for name in both:
        largest = float(torch.stack([one[name].abs().max(), two[name].abs().max()]).max())
        error = float((both[name] - (one[name] - two[name])).abs().max())
        assert error <= PROMISED[torch.float64] * largest


@few
@given(families, rules, st.sampled_from([-2.0, 0.5, 4.0]), lengths)
def test_scaling_the_objective_scales_relevance(
    family: str, rule: str, factor: float, length: int
) -> None:
    """By a power of two: exactly."""
    model, ids = boot(family, torch.float32), random_tokens(1, length)
    objective = clrp.logit_diff(model, 7, 11)
    plain = relevance(model, ids, objective, rule)
    scaled = relevance(model, ids, lambda logits: factor * objective(logits), rule)
    for name in plain:
        assert torch.equal(scaled[name], factor * plain[name])


@few
@given(families, rules, token, token, st.integers(-4, 3))
def test_swapping_target_and_contrast_flips_every_sign_exactly(
    family: str, rule: str, target: int, contrast: int, pos: int
) -> None:
    assume(target != contrast)
    model, ids = boot(family, torch.float32), random_tokens(2, 4)
    one = relevance(model, ids, clrp.logit_diff(model, target, contrast, pos), rule)
    two = relevance(model, ids, clrp.logit_diff(model, contrast, target, pos), rule)
    for name in one:
        assert torch.equal(one[name], -two[name])
    a = clrp.attribute(model, ids[:1], target=target, contrast=contrast, pos=pos, rules=rule)
    b = clrp.attribute(model, ids[:1], target=contrast, contrast=target, pos=pos, rules=rule)
    assert a.delta == -b.delta
    assert torch.equal(a.tokens, -b.tokens)
    assert torch.equal(a.resid, -b.resid)


@few
@given(families, rules, st.integers(2, 8), st.integers(0, 3))
def test_the_future_has_no_relevance(family: str, rule: str, length: int, seed: int) -> None:
    model, ids = boot(family, torch.float32), random_tokens(1, length, seed)
    pos = seed % length
    result = relevance(model, ids, clrp.logit_diff(model, 7, 11, pos), rule)
    for value in result.values():
        assert value[:, pos + 1 :].count_nonzero() == 0
        assert value[:, pos].count_nonzero() > 0


@few
@given(families, rules, st.integers(0, 9))
def test_rows_of_a_batch_do_not_touch(family: str, rule: str, seed: int) -> None:
    model = boot(family, torch.float64)
    ids = random_tokens(2, 6, seed)
    other = torch.stack([ids[0], random_tokens(1, 6, seed + 1)[0]])
    objective = clrp.logit_diff(model, 7, 11)
    one, two = relevance(model, ids, objective, rule), relevance(model, other, objective, rule)
    for name in one:
        torch.testing.assert_close(one[name][0], two[name][0], rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- coverage

words = st.sampled_from(["norm", "qk", "half", "LN", "gradient", "at hook_z", "{odd}", "a.b"])
paths = st.one_of(
    st.builds(lambda i, leaf: f"blocks.{i}.{leaf}", st.integers(0, 12),
              st.sampled_from(["ln1", "attn", "mlp", "mlp.gate"])),
    st.sampled_from(["ln_final", "unembed", "embed"]),
)  # fmt: skip


@st.composite
def coverage_rows(draw: Any) -> CoverageRow:
    path = draw(paths)
    attached = draw(words)
    if path.startswith("blocks") and draw(st.booleans()):
        attached = f"at {path}.hook_out"
    return CoverageRow(path, draw(words), draw(words), draw(words), attached)


def _layers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        numbers += range(int(low), int(high or low) + 1)
    return numbers


@many
@given(st.lists(coverage_rows(), max_size=25))
def test_a_coverage_summary_loses_no_row(rows: list[CoverageRow]) -> None:
    """Written out again, block by block, the summary is the table."""
    coverage = Coverage("mine", tuple(rows))
    out: list[tuple[str, ...]] = []
    for row in coverage.summary():
        found = re.match(r"blocks\.([\d,-]+)\.", row.component)
        if found is None:
            out += [tuple(vars(row).values())]
            continue
        for layer in _layers(found[1]):
            texts = (text.replace(f"blocks.{found[1]}.", f"blocks.{layer}.")
                     for text in vars(row).values())  # fmt: skip
            out += [tuple(texts)]
    assert sorted(set(out)) == sorted({tuple(vars(row).values()) for row in rows})
    assert len(str(coverage).splitlines()) == 2 + len(coverage.summary())


# ---------------------------------------------------------------- rule sets and tokens

NORM, ACT, HALF = ["ln", "gradient"], ["identity", "gradient"], ["half", "gradient"]


@many
@given(
    st.sampled_from([*NORM, "x"]), st.sampled_from(ACT), st.sampled_from(ACT),
    st.sampled_from(HALF), st.sampled_from(HALF), st.sampled_from(HALF),
    st.sampled_from(["gradient", "constant", "temperature"]),
    st.sampled_from([1.0, 2.0, 0.5, 0.0, -1.0]),
)  # fmt: skip
def test_a_rule_set_is_made_or_refused_never_half(
    norm: Any, act: Any, cap: Any, gate: Any, qk: Any, pattern_v: Any, softmax: Any, t: float
) -> None:
    allowed = norm != "x" and not (softmax == "constant" and pattern_v == "half")
    allowed = allowed and ((t > 0 and t != 1.0) if softmax == "temperature" else t == 1.0)
    parts = ("mine", norm, act, cap, gate, qk, pattern_v, softmax, t)
    if not allowed:
        with pytest.raises(ValueError, match="mine"):
            clrp.RuleSet(*parts)
        return
    made = clrp.RuleSet(*parts)
    model = boot("qwen3", torch.float32)
    report = clrp.coverage(model, made)
    assert {row.rule for row in report.rows if row.operation == "gate"} == {gate}


@many
@given(st.lists(token, min_size=1, max_size=6))
def test_ids_and_their_texts_name_the_same_tokens(ids: list[int]) -> None:
    model, tokenizer = boot("qwen3", torch.float32), make_tokenizer()
    wanted = tuple(sorted(set(ids)))
    assert to_token_ids(model, ids, "target") == wanted
    assert to_token_ids(model, set(ids), "target") == wanted
    assert to_token_ids(model, torch.tensor(ids), "target") == wanted
    assert to_token_ids(model, [tokenizer.decode([i]) for i in ids], "target") == wanted
    assert to_token_ids(model, ids[0], "target") == (ids[0],)
