"""Attention with sinks: a share of every row of the softmax goes to no key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from truth import zoo
from truth.drawn import F64, draw
from truth.op_oracle import OpOracle

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError
from tl_contrastive_lrp.hooks import attach
from tl_contrastive_lrp.rules.softmax import sink_temperature, softmax_temperature

TOKENS = zoo.random_tokens()
TARGET, CONTRAST = 7, 12


def with_sink(scores: Tensor, sink: Tensor) -> Tensor:
    """The pattern as TransformerLens makes it: softmax over keys and sink, which is dropped."""
    combined = torch.cat([scores, sink.expand(*scores.shape[:-1], 1).to(scores.dtype)], dim=-1)
    combined = combined - combined.max(dim=-1, keepdim=True).values
    return combined.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(
        scores.dtype
    )[..., :-1]


def tempered(scores: Tensor, sink: float, g: Tensor, temperature: float) -> Tensor:
    """pᵀ(s) ⊙ (g − Σ pᵀ g) row by row, with the whole Jacobian and the sink as one more key."""
    found = torch.zeros_like(scores)
    for row in range(len(scores)):
        s = torch.cat([scores[row], torch.tensor([sink], dtype=F64)]) / temperature
        e = [float((v - s.max()).exp()) for v in s]
        p = torch.tensor([v / sum(e) for v in e], dtype=F64)
        jacobian = torch.diag(p) - torch.outer(p, p)
        found[row] = (jacobian @ torch.cat([g[row], torch.zeros(1, dtype=F64)]))[:-1]
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("sink", [-60.0, -3.0, 0.5, 40.0])
def test_temperature_with_the_sinks_share(sink: float, temperature: float) -> None:
    scores = (3.0 * draw(4, 6)).masked_fill(torch.ones(4, 6).triu(3).bool(), -1e9)
    s, g = scores.clone().requires_grad_(), draw(4, 6, seed=1)
    pattern = with_sink(s, torch.tensor([sink], dtype=F64))
    out = sink_temperature(pattern, temperature, "blocks.0.attn.hook_pattern")
    assert torch.equal(out, with_sink(scores, torch.tensor([sink], dtype=F64)))
    (found,) = torch.autograd.grad((g * out).sum(), s)
    wanted = tempered(scores, sink, g, temperature)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-13 * float(wanted.abs().max()))


def test_temperature_one_is_the_ordinary_gradient() -> None:
    s, g, sink = draw(3, 5).requires_grad_(), draw(3, 5, seed=1), torch.tensor([0.3])
    (plain,) = torch.autograd.grad((g * with_sink(s, sink)).sum(), s)
    (found,) = torch.autograd.grad((g * sink_temperature(with_sink(s, sink), 1.0, "here")).sum(), s)
    assert torch.allclose(found, plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)]
)
@pytest.mark.parametrize("sink", [-12.0, 1.0])
def test_temperature_in_low_precision(dtype: torch.dtype, close: float, sink: float) -> None:
    """A sink whose share is far below the rounding of a row's sum still gets its square root."""
    scores = draw(4, 6).to(dtype)
    s, g = scores.clone().requires_grad_(), draw(4, 6, seed=1).to(dtype)
    out = sink_temperature(with_sink(s, torch.tensor([sink])), 2.0, "here")
    (found,) = torch.autograd.grad((g * out).sum(), s)
    wanted = tempered(scores.to(F64), sink, g.to(F64), 2.0)
    assert (found.to(F64) - wanted).abs().max() < close * wanted.abs().max()


def test_several_signals_at_once() -> None:
    s, g = draw(3, 5).requires_grad_(), draw(4, 3, 5, seed=1)
    out = sink_temperature(with_sink(s, torch.tensor([0.3], dtype=F64)), 2.0, "here")
    (packed,) = torch.autograd.grad(out, s, g, is_grads_batched=True, retain_graph=True)
    for signal, found in zip(g, packed, strict=True):
        assert torch.allclose(found, tempered(s.detach(), 0.3, signal, 2.0), rtol=1e-9, atol=1e-14)
        (alone,) = torch.autograd.grad(out, s, signal, retain_graph=True)
        assert torch.allclose(found, alone, rtol=1e-12, atol=1e-15)


def test_a_replaced_pattern_is_refused() -> None:
    made_up = draw(3, 5).requires_grad_() * draw(3, 5, seed=1).requires_grad_()
    with pytest.raises(ModelStateError, match=r"blocks\.3\.attn\.hook_pattern"):
        sink_temperature(made_up, 2.0, "blocks.3.attn.hook_pattern")
    for end in (draw(3, 5), draw(3, 5).requires_grad_()):  # nothing goes further back
        assert sink_temperature(end, 2.0, "here") is end


def test_a_softmax_gets_the_rule_once() -> None:
    """A pattern that is put in place of another layer's would bring its softmax the rule again."""
    pattern = draw(3, 5).requires_grad_().softmax(-1)
    softmax_temperature(pattern, 2.0)
    with pytest.raises(ModelStateError, match="another hook replaced it"):
        sink_temperature(2.0 * pattern, 2.0, "blocks.1.attn.hook_pattern")


# ---------------------------------------------------------------- the family


def seed_grad() -> Tensor:
    seed = torch.zeros(*TOKENS.shape, zoo.VOCAB, dtype=F64)
    seed[0, -1, TARGET], seed[0, -1, CONTRAST] = 1.0, -1.0
    return seed


@pytest.mark.parametrize("rule_set", ["attnlrp", "gim"])
def test_edges_of_a_model_with_sinks(rule_set: str) -> None:
    model = zoo.boot("gpt_oss")
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    graph = clrp.attribution_graph(model, TOKENS, objective, rules=rule_set)
    truth = OpOracle(zoo.hf_model("gpt_oss"), TOKENS, seed_grad(), rule_set)
    for source, target in zip(truth.sites, truth.sites[1:], strict=False):
        wanted = truth.edges(source, target)
        off = (graph.matrix(source, target).double() - wanted).abs().max()
        assert off < 1e-5 * wanted.abs().max(), (source, target)


def test_the_sinks_share_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule for a softmax without sinks would be wrong here, by far more than rounding."""
    model = zoo.boot("gpt_oss")
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    wanted = OpOracle(zoo.hf_model("gpt_oss"), TOKENS, seed_grad(), "gim").relevance["hook_embed"]

    def off() -> float:
        _, relevance = clrp.run_with_relevance(model, TOKENS, objective, rules="gim")
        return float((relevance["hook_embed"] - wanted).abs().max() / wanted.abs().max())

    assert off() < 1e-5
    blind = lambda pattern, temperature, _name: softmax_temperature(pattern, temperature)  # noqa: E731
    monkeypatch.setattr(attach, "sink_temperature", blind)
    assert off() > 1e-2
