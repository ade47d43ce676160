"""Spans: the sum of their tokens' objectives, each of which is held against oracles elsewhere.

Relevance is linear in the objective, so that of a span must be the sum of the relevance of
objectives of one token, run one at a time; values are computed from Hugging Face's own logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from support.tiling import PLAIN, TILED
from torch import Tensor
from truth.families import FAMILIES, boot, hf_model, random_tokens
from truth.float64 import true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import patching
from tl_contrastive_lrp.engine.tiled import prefill as prefill_module
from tl_contrastive_lrp.engine.tiled.tiles import read_ranges, runs
from tl_contrastive_lrp.errors import PromptError, TokenError
from tl_contrastive_lrp.hooks.user_hooks import as_own

IDS = random_tokens(1, 24)
SPAN = (9, 16)
WRITTEN = IDS[0, 9:16].tolist()
OTHERS = [5 + (i + 1) % 7 for i in range(7)]
FIELDS = ("tokens", "resid", "heads")
AGAINST: dict[str, dict[str, Any]] = {
    "none": {},
    "mean": {"against": "mean"},
    "top_k": {"against": "top_k", "k": 4},
    "ids": {"against": OTHERS},
    "id": {"against": 41},
}


def one_token(model: Any, kind: str, i: int) -> Any:
    """The objective of the span's i-th token alone."""
    written, pos = WRITTEN[i], SPAN[0] + i - 1
    if kind == "none":
        return clrp.target_logit(model, written, pos=pos)
    if kind == "mean":
        return clrp.logit_minus_mean(model, written, pos=pos)
    if kind == "top_k":
        return clrp.logit_minus_top_k(model, written, 4, pos=pos)
    return clrp.logit_diff(model, written, OTHERS[i] if kind == "ids" else 41, pos=pos)


def summed(model: Any, kind: str, **how: Any) -> tuple[float, dict[str, Tensor]]:
    """Δℓ and relevance, token by token."""
    each = [
        clrp.attribute(model, IDS, one_token(model, kind, i), **how) for i in range(len(WRITTEN))
    ]
    return sum(one.delta for one in each), {
        field: sum(getattr(one, field) for one in each) for field in FIELDS
    }  # type: ignore[misc]


def assert_equal(result: Any, delta: float, wanted: dict[str, Tensor], bound: float) -> None:
    assert abs(result.delta - delta) <= bound * max(1.0, abs(delta)) * 10
    scale = float(wanted["resid"].abs().max())
    for field, value in wanted.items():
        assert float((getattr(result, field) - value).abs().max()) <= bound * scale, field


def test_the_cases_test_something() -> None:
    assert all(a != b for a, b in zip(WRITTEN, OTHERS, strict=True))
    assert 41 not in WRITTEN
    assert len({*WRITTEN}) > 3


@pytest.mark.parametrize("kind", AGAINST)
@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_the_sum_over_tokens(name: str, kind: str) -> None:
    """In float64, to what is promised; then in float32, in one pass, in tiles, and fused."""
    model = boot(name)
    span = clrp.span_logit(model, IDS, SPAN, **AGAINST[kind])
    with true_float64(model):
        delta, wanted = summed(model, kind, **PLAIN)
        for way in (PLAIN, TILED):
            result = clrp.attribute(model, IDS, span, **way)
            assert result.positions == tuple(range(8, 15))
            assert_equal(result, delta, wanted, PROMISED[torch.float64])
    for way in (PLAIN, TILED):
        for attention in ("eager", "fused"):
            result = clrp.attribute(model, IDS, span, attention=attention, **way)
            assert_equal(result, delta, wanted, PROMISED[torch.float32])


@pytest.mark.parametrize("kind", AGAINST)
def test_the_value_by_hand(kind: str) -> None:
    with torch.no_grad():
        logits = hf_model("gpt2", torch.float32)(IDS).logits
    rows = logits[0].double().numpy()
    wanted = 0.0
    for p, written in zip(range(*SPAN), WRITTEN, strict=True):
        row = rows[p - 1]
        held = {
            "none": 0.0,
            "mean": row.mean(),
            "top_k": np.sort(np.delete(row, written))[-4:].mean(),
            "ids": row[OTHERS[p - SPAN[0]]],
            "id": row[41],
        }[kind]
        wanted += row[written] - held
    model = boot("gpt2")
    span = clrp.span_logit(model, IDS, SPAN, **AGAINST[kind])
    assert float(span(logits)) == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    target, contrast = span.parts(logits)
    assert float(span(torch.cat([logits, logits]))) == pytest.approx(2 * wanted, abs=1e-4)
    assert (contrast is None) == (kind == "none")
    assert float(target[0]) == pytest.approx(
        sum(rows[p - 1][w] for p, w in zip(range(*SPAN), WRITTEN, strict=True)), rel=1e-5
    )
    assert str(span).count("8-14") == 1


@pytest.mark.parametrize("way", [PLAIN, TILED], ids=["plain", "tiled"])
def test_log_probabilities_have_the_gradient_of_log_softmax(way: dict[str, Any]) -> None:
    """An objective written as a plain function, whose gradient is torch's own."""
    model = boot("qwen3")

    def by_hand(logits: Tensor) -> Tensor:
        logprob = torch.log_softmax(logits[0, 8:15].float(), -1)
        return logprob[torch.arange(7), torch.tensor(WRITTEN)].sum()

    span = clrp.span_logit(model, IDS, SPAN, logprob=True)
    result = clrp.attribute(model, IDS, span, **way)
    wanted = clrp.attribute(model, IDS, by_hand, **PLAIN)
    assert_equal(result, wanted.delta, {f: getattr(wanted, f) for f in FIELDS}, 1e-5)
    assert result.delta < 0
    assert "log-probability" in result.objective
    # A difference of log-probabilities at one position is that of the logits.
    both = [clrp.span_logit(model, IDS, SPAN, "mean", logprob=x) for x in (True, False)]
    assert both[0](model(IDS)).item() == pytest.approx(both[1](model(IDS)).item(), rel=1e-5)


@pytest.mark.parametrize("way", [PLAIN, TILED], ids=["plain", "tiled"])
@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_several_objectives(way: dict[str, Any], attention: str) -> None:
    """Of overlapping and separate positions, each as alone."""
    model = boot("gemma2")
    asked = [
        clrp.span_logit(model, IDS, SPAN, "mean"),
        clrp.logit_diff(model, 7, 11, pos=12),
        clrp.span_logit(model, IDS, (14, 24), "top_k", logprob=True),
        clrp.logit_diff(model, 7, 11),
        clrp.span_logit(model, IDS, (2, 3)),
    ]
    results = clrp.attribute_each(model, IDS, asked, attention=attention, **way)
    for objective, result in zip(asked, results, strict=True):
        alone = clrp.attribute(model, IDS, objective, attention="eager", **PLAIN)
        assert_equal(result, alone.delta, {f: getattr(alone, f) for f in FIELDS}, 1e-5)
        assert result.positions == objective.positions(24)
        assert result.target_is_top == alone.target_is_top
        assert result.target == objective.texts()[0]


@pytest.mark.parametrize("way", [PLAIN, TILED], ids=["plain", "tiled"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_graph_has_several_final_positions(name: str, way: dict[str, Any]) -> None:
    """Its nodes are the relevance of ``attribute``; what a node passes on is a column's sum."""
    model = boot(name)
    span = clrp.span_logit(model, IDS, SPAN, "top_k", 4)
    graph = clrp.attribution_graph(model, IDS, span, **way)
    _, wanted = summed(model, "top_k", **PLAIN)
    scale = float(wanted["resid"].abs().max())
    assert graph.final_positions == tuple(range(8, 15))
    assert float((graph.relevance - wanted["resid"]).abs().max()) <= 1e-5 * scale
    for s, t in graph.transitions:
        matrix = graph.matrix(graph.sites[s], graph.sites[t])
        assert float((matrix.sum(0) - graph.relevance[s]).abs().max()) <= 2e-5 * scale
    (both, other) = clrp.attribution_graphs(
        model, IDS, [span, clrp.logit_diff(model, 7, 11)], **way
    )
    assert float((both.relevance - graph.relevance).abs().max()) <= 1e-5 * scale
    assert other.final_positions == (23,)
    assert graph.prune(mass=0.8).connected().final_positions == graph.final_positions


def test_no_other_logits_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused, only rows that predict the span; in tiles, a span is cut as other positions are."""
    model, widths, tiles = boot("qwen3"), [], []
    span = clrp.span_logit(model, IDS, SPAN)
    clrp.attribute(model, IDS, span)  # the audit's own forwards come first

    @as_own  # a user's hook could look at the other logits, which would then be computed
    def look(module: Any, args: Any, out: Tensor) -> None:  # noqa: ARG001
        widths.append(out.shape[1])

    handle = model.unembed.register_forward_hook(look)
    begin = prefill_module.RecordingCache.begin

    def counted(self: Any, start: int, stop: int) -> None:
        tiles.append((start, stop))
        begin(self, start, stop)

    monkeypatch.setattr(prefill_module.RecordingCache, "begin", counted)
    try:
        clrp.attribute(model, IDS, span, attention="fused", memory="plain")
        assert widths == [7]
        widths.clear()
        clrp.attribute(model, IDS, span, memory="tiled", tile=5, progress=False)
    finally:
        handle.remove()
    assert tiles[-4:] == [(0, 5), (5, 8), (8, 13), (13, 15)]  # those after it are not run
    assert widths[-2:] == [5, 2]


def test_ranges() -> None:
    model = boot("gpt2")
    asked = [
        clrp.span_logit(model, IDS, (3, 6)),
        clrp.top_logit(pos=5),
        clrp.top_logit(pos=9),
        clrp.top_logit(),
    ]
    assert read_ranges(asked, 24) == ((2, 6), (9, 10), (23, 24))
    assert read_ranges([*asked, lambda x: x.sum()], 24) == ((0, 24),)
    assert runs(()) == ()
    assert runs((4,)) == ((4, 5),)


def test_other_uses() -> None:
    """As a metric of patching, in ``run_with_relevance``, ``compare`` and faithfulness."""
    model = boot("gpt2")
    span = clrp.span_logit(model, IDS, SPAN, "mean")
    _, wanted = summed(model, "mean", **PLAIN)
    logits, relevance = clrp.run_with_relevance(model, IDS, span, "blocks.0.hook_resid_pre")
    found = relevance["blocks.0.hook_resid_pre"][0].sum(-1)
    scale = float(wanted["resid"].abs().max())
    assert float((found - wanted["resid"][0]).abs().max()) <= 1e-5 * scale
    assert float(span(logits)) == pytest.approx(clrp.attribute(model, IDS, span).delta, abs=1e-4)
    corrupt = IDS.clone()
    corrupt[0, 3] = (corrupt[0, 3] + 5) % 40 + 4
    _, cache = model.run_with_cache(IDS)
    one_by_one = sum(
        patching.get_relevance_patch_resid_pre(model, corrupt, cache, one_token(model, "mean", i))
        for i in range(len(WRITTEN))
    )
    together = patching.get_relevance_patch_resid_pre(model, corrupt, cache, span)
    assert torch.allclose(together, one_by_one, atol=1e-4)
    scores = clrp.attribute(model, IDS, span).tokens
    curves, *each = (
        clrp.faithfulness_curves(model, IDS, scores, objective, progress=False)
        for objective in (span, *(one_token(model, "mean", i) for i in range(len(WRITTEN))))
    )
    assert torch.allclose(curves.morf, sum(one.morf for one in each), atol=1e-3)
    assert clrp.verify(model, IDS, objective=span).verdict == "ok"


def test_circuits_are_run_for_a_span() -> None:
    """With every edge Δℓ is the model's own; a plain function of the same positions agrees."""
    model = boot("qwen3")
    span = clrp.span_logit(model, IDS, SPAN)
    corrupted = IDS.clone()
    corrupted[0, 3:7] = torch.tensor([9, 8, 7, 6])
    graph = clrp.attribution_graph(model, IDS, span)
    one, other = (
        clrp.circuit_faithfulness(model, graph.prune(mass=0.9), objective, corrupted=corrupted)
        for objective in (span, lambda logits: span(logits))
    )
    assert one == other
    assert one.delta_full == pytest.approx(span(model(IDS)).item(), abs=1e-3)


def test_two_prompts_at_once_and_saved_results(tmp_path: Any) -> None:
    model, other = boot("llama"), random_tokens(1, 19, seed=3)
    spans = [clrp.span_logit(model, IDS, SPAN, "mean"), clrp.span_logit(model, other, (4, 19))]
    results = clrp.attribute_each(model, [IDS, other], spans)
    for ids, span, result in zip((IDS, other), spans, results, strict=True):
        alone = clrp.attribute(model, ids, span)
        assert_equal(result, alone.delta, {f: getattr(alone, f) for f in FIELDS}, 1e-5)
    path = tmp_path / "r.safetensors"
    results[0].save(path)
    assert clrp.Attribution.load(path).positions == results[0].positions
    assert "tokens 9-15" in results[0].objective
    for more, words in (
        ({}, "summed logit of "),
        ({"logprob": True}, "summed log-probability of "),
    ):
        span = clrp.span_logit(model, IDS, SPAN, **more)
        page = clrp.attribute(model, IDS, span).save_html(tmp_path / "r.html")
        assert words in page.read_text("utf-8")


def test_words() -> None:
    model = boot("gpt2")
    assert str(clrp.SpanLogit((1, 2), 3)).startswith("logit of tokens 4-5, summed at positions 3-4")
    assert str(clrp.SpanLogit((1,), 3)).startswith("logit of token 4 at position 3 (")
    other = clrp.span_logit(model, IDS, SPAN, OTHERS)
    assert "instead" in str(other)
    assert clrp.span_logit(model, IDS, SPAN, OTHERS).contrast == tuple(OTHERS)
    assert clrp.span_logit(model, IDS, SPAN, torch.tensor(OTHERS)) == other
    assert clrp.span_logit(model, IDS, SPAN, [f"id:{i}" for i in OTHERS]) == other
    long = clrp.span_logit(model, random_tokens(1, 60), (1, 60))
    assert len(long.texts()[0]) <= 50


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "first token": ((0, 3), {}, "begin at 1"),
    "backwards": ((5, 5), {}, "1 <= start < stop <= 24"),
    "too long": ((5, 25), {}, "stop <= 24"),
    "negative": ((-4, -1), {}, "1 <= start"),
    "one number": (5, {}, "is no span"),
    "fractions": ((1.0, 2.0), {}, "is no span"),
    "booleans": ((True, 2), {}, "is no span"),
    "keyword": (SPAN, {"against": "topk"}, "'top_k'"),
    "too few": (SPAN, {"against": OTHERS[:3]}, "has 3 tokens, but the span has 7"),
    "itself": (SPAN, {"against": WRITTEN}, "repeats every token"),
    "out of range": (SPAN, {"against": 10_000}, "outside the vocabulary"),
    "none": (SPAN, {"against": None}, "is unknown"),
    "k": (SPAN, {"against": "top_k", "k": 0}, "k=0 must lie"),
    "k too large": (SPAN, {"against": "top_k", "k": 48}, "k=48 must lie"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    span, how, words = REFUSED[case]
    with pytest.raises(TokenError, match=words.replace("(", r"\(")):
        clrp.span_logit(boot("gpt2"), IDS, span, **how)


@pytest.mark.parametrize("way", [PLAIN, TILED], ids=["plain", "tiled"])
def test_a_prompt_without_the_span(way: dict[str, Any]) -> None:
    model = boot("gpt2")
    span = clrp.span_logit(model, IDS, SPAN)
    run = partial(clrp.attribute, model, IDS[:, :12], span)
    with pytest.raises(TokenError, match="position 14"):
        run(**way)
    with pytest.raises(TokenError, match="position 14"):
        run(attention="fused", **way)
    with pytest.raises(PromptError, match="empty"):
        clrp.span_logit(model, "", SPAN)
    with pytest.raises(TypeError, match="TransformerBridge"):
        clrp.span_logit(torch.nn.Linear(2, 2), IDS, SPAN)
