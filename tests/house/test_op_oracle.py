"""The operation oracle on whole models is itself checked: explicit propagation, and mutations."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from support.grids import diagonal
from torch import Tensor
from truth import op_oracle, zoo
from truth.autograd_forms import draw, off
from truth.families import ALL, FAMILIES, hf_model, random_tokens, true_float64
from truth.op_forms import RULES, RuleMode, UnknownOperationError
from truth.op_oracle import OpOracle, audit
from truth.oracle import contrast_seed, propagate
from truth.oracle_edges import EdgeTruth

F = torch.nn.functional
TARGET, CONTRAST, VOCAB = 7, 12, 48
NAMES = tuple(RULES)


def seed_of(tokens: Tensor) -> Tensor:
    return contrast_seed(tokens, TARGET, CONTRAST, VOCAB)


# whole models, against the explicit propagation


@pytest.mark.parametrize("rules", NAMES)
@pytest.mark.parametrize("name", ALL)
def test_relevance_equals_explicit_propagation(name: str, rules: str) -> None:
    model, tokens = hf_model(name), random_tokens()
    with true_float64(model):
        found = OpOracle(model, tokens, seed_of(tokens), rules)
    wanted = propagate(model, tokens, seed_of(tokens), rules)
    assert off(found.logits, wanted.logits) < 1e-12
    for site in ("hook_embed", *found.sites):
        assert off(found.activation[site], wanted.activation[site]) < 1e-12
        assert off(found.relevance[site], wanted.relevance[site]) < 1e-9, site


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, NAMES))
def test_edges_equal_explicit_propagation(name: str, rules: str) -> None:
    model, tokens = hf_model(name), random_tokens()
    with true_float64(model):
        found = OpOracle(model, tokens, seed_of(tokens), rules)
    truth = EdgeTruth(model, tokens, seed_of(tokens), rules)
    first, second, *_, last = found.sites
    for source, target in ((first, second), (second, last), (first, last)):
        edges = found.edges(source, target)
        assert off(edges, truth.explicit_matrix(source, target)) < 1e-9
        assert off(edges.sum(0), found.node(source)[0]) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_untouched_forward_of_the_family_gives_the_same(name: str) -> None:
    """Without float64.py's replacements: Hugging Face's own norms and rotary tables."""
    model, tokens = hf_model(name), random_tokens()
    found = OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    wanted = propagate(model, tokens, seed_of(tokens), "attnlrp")
    assert max(off(found.relevance[s], wanted.relevance[s]) for s in found.sites) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_model_is_left_as_it_was(name: str) -> None:
    model, tokens = hf_model(name), random_tokens()
    for p in model.parameters():
        p.requires_grad_(True)
    before = {key: dict(m.__dict__) for key, m in model.named_modules()}
    hooks = {key: len(m._forward_hooks) + len(m._forward_pre_hooks) for key, m in
             model.named_modules()}  # fmt: skip
    OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert {key: set(m.__dict__) for key, m in model.named_modules()} == {
        key: set(d) for key, d in before.items()
    }
    assert hooks == {key: len(m._forward_hooks) + len(m._forward_pre_hooks) for key, m in
                     model.named_modules()}  # fmt: skip
    assert torch.get_default_dtype() == torch.float32


# many families, by an account that needs no oracle: relevance is neither made nor lost

CONSTANTS = re.compile(
    r"bias$|_bias|wpe|positions_embed|embed_positions|position_embeddings|token_type|sinks"
)
# What no parameter can switch off takes relevance there.
NOT_KEPT = {
    "xglm": "a table of positions that is no parameter",
    "gemma4_text": "token embeddings of each layer's own, beside the one at the bottom",
    "hrm_text": "the stacks start from a learned state",
    "gpt_oss": "the + 1 in (up + 1) * gate",
    "deepseek_v4": "constants that mix its streams",
}
KINDS = ("decoder", "encoder")


@pytest.mark.parametrize("name", [row.name for row in zoo.ROWS.values() if row.kind in KINDS])
def test_without_constants_cplrp_keeps_the_logit_difference(name: str) -> None:
    """Attention, routers and gates are constants then, and every other form passes all on."""
    model, tokens = zoo.make_hf(name), zoo.random_tokens()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if CONSTANTS.search(key):
                parameter.zero_()
    oracle = OpOracle(model, tokens, seed_of(tokens), "cplrp")
    wanted = (seed_of(tokens) * oracle.logits).sum()
    kept = abs(oracle.relevance["hook_embed"].sum() / wanted - 1) < 1e-9
    assert bool(kept) == (name not in NOT_KEPT)


# it is not blind

FIELDS = ("activation", "softcap", "gate", "attention")


@pytest.mark.parametrize("field", FIELDS)
def test_dropping_a_rule_changes_the_result(field: str) -> None:
    model, tokens = hf_model("gemma2"), random_tokens()
    whole = OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    changed = dataclasses.replace(RULES["attnlrp"], **{field: "gradient"})
    less = OpOracle(model, tokens, seed_of(tokens), changed)
    assert off(less.relevance["hook_embed"], whole.relevance["hook_embed"]) > 1e-2


def test_dropping_the_norm_rule_changes_the_result_and_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = hf_model("gpt2"), random_tokens()
    whole = OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    plain = torch.native_layer_norm

    def no_rule(_mode: Any, _name: str, x: Tensor, shape: Any, **more: Any) -> Tensor:
        return plain(x, shape, more["weight"], more["bias"], more["eps"])[0]

    monkeypatch.setattr(RuleMode, "_norm", no_rule)
    with pytest.raises(UnknownOperationError, match="NativeLayerNorm"):
        OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    monkeypatch.setattr(op_oracle, "audit", lambda *_, **__: None)
    less = OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    assert off(less.relevance["hook_embed"], whole.relevance["hook_embed"]) > 1e-2


@pytest.mark.parametrize("softmax", ["constant", "hot"])
def test_the_softmax_rule_changes_the_result(softmax: str) -> None:
    model, tokens = hf_model("qwen3"), random_tokens()
    whole = OpOracle(model, tokens, seed_of(tokens), "attnlrp")
    other = OpOracle(
        model, tokens, seed_of(tokens), dataclasses.replace(RULES["attnlrp"], softmax=softmax)
    )
    assert off(other.relevance["hook_embed"], whole.relevance["hook_embed"]) > 1e-2


@pytest.mark.parametrize(
    ("f", "word"),
    [
        (lambda x: x.pow(2).sum(), "Pow"), (lambda x: x.exp().sum(), "Exp"),
        (lambda x: (x * x).sum(), "two computed"), (lambda x: F.silu(x).sum(), "Silu"),
        (lambda x: (x[:, None] @ x[None]).sum(), "two computed"),
        (lambda x: F.layer_norm(x, (4,)).sum(), "NativeLayerNorm"),
    ],
)  # fmt: skip
def test_the_audit_sees_what_the_mode_did_not(f: Any, word: str) -> None:
    y = f(draw(4).requires_grad_())
    with pytest.raises(UnknownOperationError, match=word):
        audit(y.grad_fn, [], matrix=False)
