"""Circuits: reference states, curves, refusals, words and pictures."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.computed_graphs import circuit_graph
from support.hooking import fresh
from torch import Tensor
from truth.circuit_truth import ASKED, CORRUPTED, TOKENS, N, objective, states
from truth.families import random_tokens, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import PromptError
from tl_contrastive_lrp.evaluation.circuits.results import CircuitCurve, CircuitFaithfulness
from tl_contrastive_lrp.evaluation.circuits.runs import reference_states
from tl_contrastive_lrp.evaluation.circuits.setting import CircuitSetting

# reference states


def test_mean_states_are_means_over_prompts() -> None:
    model, graph = circuit_graph("qwen3", granularity="sublayer")
    prompts = random_tokens(5, N, seed=8)
    with true_float64(model):
        found = reference_states(model, prompts, 2)
        each = [states(model, row[None], {}, list(found)) for row in prompts]
    for number, name in enumerate(found):
        wanted = torch.stack([run[number] for run in each]).mean(0)
        assert (found[name] - wanted).abs().max() <= 1e-12, name
    with true_float64(model):
        one = clrp.circuit_faithfulness(model, graph, **ASKED, mean_over=CORRUPTED)
        same = clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED[0])
        many = clrp.circuit_faithfulness(model, graph, **ASKED, mean_over=prompts)
    assert replace(one, ablation="corrupted") == same
    assert many.delta_full == pytest.approx(same.delta_full, abs=1e-12)
    assert many.delta_empty != pytest.approx(same.delta_empty, abs=1e-3)


# the curve


def test_cpr_and_cmd_of_known_curves() -> None:
    def point(kept: int, delta: float) -> CircuitFaithfulness:
        return CircuitFaithfulness(
            kept, 10, delta, delta_full=4.0, delta_empty=2.0, ablation="mean"
        )

    straight = CircuitCurve("x", (point(0, 2.0), point(10, 4.0)))
    assert (straight.cpr, straight.cmd) == pytest.approx((0.5, 0.5))
    over = CircuitCurve("x", (point(0, 2.0), point(5, 6.0), point(10, 4.0)))  # f: 0, 2, 1
    assert over.cpr == pytest.approx(0.5 * 1.0 + 0.5 * 1.5)
    assert over.cmd == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)
    frame = over.to_frame()
    assert frame["recovered"].tolist() == [0.0, 2.0, 1.0]
    assert frame["share"].tolist() == [0.0, 0.5, 1.0]


def test_circuits_grow_by_weight_or_by_given_scores() -> None:
    model, graph = circuit_graph("qwen3")
    how = {**ASKED, "corrupted": CORRUPTED, "progress": False}
    with true_float64(model):
        curve = clrp.circuit_curve(model, graph, fractions=[0.25], **how)
        size = curve.points[-1].edges_all
        strongest = graph.where(
            graph.weight.abs() >= graph.weight.abs().sort().values[-round(size / 4)]
        )
        alone = clrp.circuit_faithfulness(model, strongest, **ASKED, corrupted=CORRUPTED)
        same = clrp.circuit_curve(model, graph, fractions=[0.25], by=graph.weight.abs(), **how)
        other = clrp.circuit_curve(model, graph, fractions=[0.25], by=-graph.weight.abs(), **how)
        drawn = [
            clrp.circuit_curve(model, graph, by="random", seed=seed, **how) for seed in (0, 0, 1)
        ]
    assert alone.edges_kept == curve.points[1].edges_kept == round(size / 4)
    assert alone.delta == pytest.approx(curve.points[1].delta, abs=1e-10)
    assert same.points[1].delta == pytest.approx(curve.points[1].delta, abs=1e-10)
    assert other.points[1].delta != pytest.approx(curve.points[1].delta, abs=1e-3)
    assert drawn[0].cpr == pytest.approx(drawn[1].cpr, abs=1e-12)
    assert drawn[0].cpr != pytest.approx(drawn[2].cpr, abs=1e-6)
    assert (curve.name, same.name, drawn[0].name) == (clrp.DEFAULT_RULES, "scores", "random")


def test_edges_without_weight_come_last() -> None:
    """A pruned graph as ranking: its edges first, whatever it lost after them."""
    model, graph = circuit_graph("qwen3")
    half = graph.prune(top_k=12)
    how = {**ASKED, "corrupted": CORRUPTED, "progress": False}
    with true_float64(model):
        size = clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED).edges_all
        alone = clrp.circuit_faithfulness(model, half, **ASKED, corrupted=CORRUPTED)
        curve = clrp.circuit_curve(model, half, fractions=[len(half.weight) / size], **how)
    assert curve.points[1].edges_kept == len(half.weight) == alone.edges_kept
    assert curve.points[1].delta == pytest.approx(alone.delta, abs=1e-10)


def test_compatibility_mode() -> None:
    model, graph = circuit_graph("qwen3", heads=True)
    with true_float64(model):
        wanted = clrp.circuit_faithfulness(model, graph.prune(), **ASKED, corrupted=CORRUPTED)
    other = fresh("qwen3", torch.float64)
    other.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    with true_float64(other):
        pruned = clrp.attribution_graph(other, TOKENS, **ASKED, heads=True).prune()
        found = clrp.circuit_faithfulness(other, pruned, **ASKED, corrupted=CORRUPTED)
    assert found.delta == pytest.approx(wanted.delta, abs=1e-9)


# refusals


def test_what_cannot_be_right_is_refused(snapshot: Any) -> None:
    model, graph = circuit_graph("qwen3")
    clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED)
    before = snapshot(model)
    good = {**ASKED, "corrupted": CORRUPTED}

    def refused(what: str, error: type = ValueError, g: Any = graph, **changes: Any) -> None:
        with pytest.raises(error, match=what), true_float64(model):
            clrp.circuit_curve(model, g, **{**good, "progress": False, **changes})

    refused("corrupted=", corrupted=None)
    refused("corrupted=", mean_over=CORRUPTED)
    refused("same number of tokens", PromptError, corrupted=CORRUPTED[:, :-1])
    refused("one prompt", PromptError, corrupted=random_tokens(2))
    refused("Token ids must lie", PromptError, corrupted=CORRUPTED + 60)
    refused("changes nothing", corrupted=TOKENS)
    refused("made with", contrast=13)
    refused("shares of edges", fractions=[1.5])
    refused("unknown", by="size")
    refused("one finite score", by=torch.ones(3))
    refused("batch_size", batch_size=0)
    refused("both", TypeError, target=None)
    with true_float64(model):
        far = clrp.attribution_graph(model, TOKENS, **ASKED, layers=[0], progress=False)
    refused("block by block", g=far)
    assert snapshot(model) == before


def test_the_model_is_left_as_found(snapshot: Any) -> None:
    model, graph = circuit_graph("gemma2", heads=True)
    before = snapshot(model)
    with true_float64(model):
        clrp.circuit_faithfulness(model, graph, **ASKED, corrupted=CORRUPTED)

    def breaks(logits: Tensor) -> Tensor:
        if len(logits) == 1 and not torch.allclose(logits, clean):
            raise RuntimeError("mine")
        return objective(logits)

    with true_float64(model):
        clean = model(TOKENS).detach()
        with pytest.raises(RuntimeError, match="mine"):
            clrp.circuit_faithfulness(model, graph, breaks, corrupted=CORRUPTED)
    assert snapshot(model) == before


def test_what_is_said() -> None:
    point = CircuitFaithfulness(25, 100, 3.0, delta_full=4.0, delta_empty=2.0, ablation="mean")
    assert str(point) == (
        "25 of 100 edges (25.00%) recover 50.0% of Δℓ: +3.000 logits, from +2.000 (none, mean "
        "states) to +4.000 (all)"
    )
    assert str(CircuitCurve("gim", (replace(point, edges_kept=0, delta=2.0), point))) == (
        "gim: CPR 0.062, CMD 0.188 (2 circuits, Δℓ +2.000 from no edge to all)"
    )


def test_plot_holds_the_curve() -> None:
    pytest.importorskip("plotly")
    point = CircuitFaithfulness(0, 100, 2.0, delta_full=4.0, delta_empty=2.0, ablation="mean")
    points = (point, replace(point, edges_kept=25, delta=3.0), replace(point, edges_kept=100))
    (line,) = CircuitCurve("gim", points).plot().data
    assert (line.name, list(line.x), list(line.y)) == ("gim", [0.25, 1.0], [0.5, 0.0])


@pytest.mark.parametrize(("gap", "warns"), [(0.05, True), (0.5, False)])
def test_a_gap_that_is_nearly_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, gap: float, warns: bool
) -> None:
    """Δℓ of 2 with no edge, 2 + gap with all, 3 with half: 1 / gap of the difference."""
    model, graph = circuit_graph("qwen3")
    setting = CircuitSetting.of(
        model, graph, clrp.logit_diff(model, **ASKED), CORRUPTED, None, 8, None
    )
    deltas = iter([2.0, 2.0 + gap, 3.0])
    monkeypatch.setattr(CircuitSetting, "_delta", lambda *_: next(deltas))
    keep = torch.zeros(1, setting.space.size, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        point = setting.measure(keep, 8, progress=False)[0]
    assert point.recovered == pytest.approx(1 / gap)
    assert [("mean little" in str(one.message)) for one in caught] == [True] * warns
