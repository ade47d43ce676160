"""``compare``: its figures against pandas and theory, what it takes, what it refuses, its plots."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.browser import browser, visit
from torch import Tensor
from transformer_lens import patching as tl
from transformer_lens.patching import PatchingResult, make_df_from_ranges
from transformer_lens.tools.analysis.attribution_patching import (
    AttributionResult,
    EdgeAttributionConfig,
    Node,
)
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp


def noisy(*shape: int, seed: int = 0, r: float = 0.8) -> tuple[Tensor, Tensor]:
    """Two normal samples of a known correlation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x, r * x + math.sqrt(1 - r * r) * noise


def result(values: Tensor, names: list[str], base: Tensor | None, reduced: bool) -> PatchingResult:
    cells = values.shape if reduced else values.shape[:-1]
    frame = make_df_from_ranges(list(cells), names)
    return PatchingResult(values, names, frame, ["metric"], reduced, base)


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize("ties", [False, True])
def test_figures_are_those_of_pandas(ties: bool) -> None:
    x, y = noisy(3, 40)
    if ties:
        x, y = (x * 2).round(), (y * 2).round()
    comparison = clrp.compare(x, y, baseline=0.0, n_resamples=10)
    frame = comparison.to_frame()
    cells = comparison.to_cells()
    assert list(frame.index) == ["all", "0", "1", "2"]
    assert list(frame["n"]) == [120, 40, 40, 40]
    assert list(frame["k"]) == [12, 4, 4, 4]
    for group, part in [("all", cells), *((str(i), cells[cells["layer"] == i]) for i in range(3))]:
        row, both = frame.loc[group], part[["measured", "estimated"]]
        assert row["pearson"] == pytest.approx(both.corr().iloc[0, 1], abs=1e-12)
        assert row["spearman"] == pytest.approx(both.corr("spearman").iloc[0, 1], abs=1e-12)
        a, b = part["measured"].to_numpy(), part["estimated"].to_numpy()
        slope = np.linalg.lstsq(a[:, None], b, rcond=None)[0][0]
        assert row["slope"] == pytest.approx(slope, abs=1e-12)
        k = row["k"]
        tops = [set(np.argsort(-np.abs(v), kind="stable")[: int(k)]) for v in (a, b)]
        assert row["overlap"] == pytest.approx(len(tops[0] & tops[1]) / k)
        told = (a != 0) & (b != 0)
        assert row["same_sign"] == pytest.approx(np.mean(np.sign(a[told]) == np.sign(b[told])))
    assert torch.equal(comparison.measured, x.flatten())


def test_intervals_are_as_wide_as_theory_says() -> None:
    """Fisher's z of normal samples has standard deviation 1/√(n − 3)."""
    x, y = noisy(1, 600, r=0.6)
    comparison = clrp.compare(x, y, baseline=0.0, n_resamples=800, confidence=0.9)
    low, high = (math.atanh(end) for end in comparison.overall.pearson_interval)
    assert (high - low) == pytest.approx(2 * 1.645 / math.sqrt(597), rel=0.15)
    assert low < math.atanh(comparison.overall.pearson) < high
    low, high = comparison.overall.spearman_interval
    assert low < comparison.overall.spearman < high


def test_examples_are_drawn_where_there_are_several() -> None:
    """With the same effect in every example nothing varies; with few examples much does."""
    x, y = noisy(2, 30)
    base = torch.full((4,), 5.0, dtype=torch.float64)
    same = [v[..., None].expand(2, 30, 4) + 5.0 for v in (x, y)]
    axes = ["layer", "pos"]
    found = clrp.compare(*(result(v, axes, base, False) for v in same), n_resamples=50)
    assert found.resampled == "examples"
    low, high = found.overall.pearson_interval
    assert high - low < 1e-9
    assert found.overall.pearson == pytest.approx(
        torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1]
    )
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(2, 2, 30, 4, generator=generator, dtype=torch.float64)
    spread = [v + n for v, n in zip(same, noise, strict=True)]
    found = clrp.compare(*(result(v, axes, base, False) for v in spread), n_resamples=8000)
    low, high = found.overall.pearson_interval
    assert high - low > 0.05
    means = torch.stack([v.mean(-1).flatten() for v in spread])
    assert found.overall.pearson == pytest.approx(float(torch.corrcoef(means)[0, 1]))
    drawn = _all_draws(*(v.flatten(0, 1) - 5.0 for v in spread))
    assert low == pytest.approx(np.quantile(drawn, 0.025), abs=0.02)
    assert high == pytest.approx(np.quantile(drawn, 0.975), abs=0.02)


def _all_draws(x: Tensor, y: Tensor) -> list[float]:
    """Correlation under every one of the 4⁴ ways to draw four examples."""
    found = []
    for draw in np.ndindex(4, 4, 4, 4):
        at = torch.tensor(draw)
        means = torch.stack([x[:, at].mean(-1), y[:, at].mean(-1)])
        found.append(float(torch.corrcoef(means)[0, 1]))
    return found


def test_same_seed_same_intervals() -> None:
    x, y = noisy(2, 25)
    state = torch.get_rng_state()
    runs = [clrp.compare(x, y, baseline=0.0, n_resamples=50, seed=s).to_frame() for s in (0, 0, 1)]
    pd.testing.assert_frame_equal(runs[0], runs[1])
    assert not runs[0].equals(runs[2])
    assert torch.get_rng_state().equal(state)


def test_what_does_not_vary_has_no_correlation() -> None:
    x, _ = noisy(2, 10)
    found = clrp.compare(x, torch.zeros_like(x), baseline=0.0, n_resamples=20).overall
    assert math.isnan(found.pearson)
    assert math.isnan(found.spearman)
    assert math.isnan(found.same_sign)
    assert math.isnan(found.overlap)
    assert found.slope == 0.0
    assert math.isnan(found.pearson_interval[0])


# ---------------------------------------------------------------- what goes in


def test_values_become_changes_and_rounding_becomes_nothing() -> None:
    x, y = noisy(2, 20)
    shifted = [(v * 0.01 + 30.0).float() for v in (x, y)]
    plain = clrp.compare(x * 0.01, y * 0.01, baseline=0.0, n_resamples=5).overall
    found = clrp.compare(*shifted, baseline=torch.tensor(30.0), n_resamples=5).overall
    assert found.pearson == pytest.approx(plain.pearson, abs=1e-3)
    assert found.same_sign == pytest.approx(plain.same_sign, abs=0.06)
    nothing = shifted[0].clone()
    nothing[1] = 30.0
    jitter = nothing.clone()
    jitter[1] += torch.tensor([1.0, -1.0]).repeat(10) * 2e-6  # the last bit of float32 at 30
    comparison = clrp.compare(nothing, jitter, baseline=30.0, n_resamples=5)
    assert math.isnan(comparison.layers[1].same_sign)
    assert not comparison.estimated[20:].any()


def test_padding_of_grouped_queries_is_left_out() -> None:
    model = boot("qwen3", torch.float32)
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    objective = clrp.logit_diff(model, 7, 12)
    with torch.no_grad():
        cache = model.run_with_cache(clean)[1]
        measured = tl.get_act_patch_attn_head_all_pos_every(
            model, corrupted, cache, objective, baseline=True
        )
    every = clrp.patching.get_relevance_patch_attn_head_all_pos_every
    estimated = every(model, corrupted, cache, objective)
    typed = every(model, corrupted, cache, objective, baseline=True)
    found = clrp.compare(measured, typed, n_resamples=10)
    assert found.axes == ("patch_type", "layer", "head")
    assert found.overall.n == 5 * 2 * 4 - 2 * 2 * 2  # k and v have two heads of four
    assert [layer.group for layer in found.layers] == ["0", "1"]
    also = clrp.compare(
        measured.values,
        estimated,
        baseline=measured.baseline,
        axes=("patch_type", "layer", "head"),
        n_resamples=10,
    )
    pd.testing.assert_frame_equal(found.to_frame(), also.to_frame(), atol=1e-4)


def test_nodes_and_edges() -> None:
    model = boot("llama", torch.float32)
    clean, corrupted = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
    objective = clrp.logit_diff(model, 7, 12)
    edges = EdgeAttributionConfig(granularity="edge")
    one, other = (
        clrp.patching.relevance_patch(model, clean, corrupted, objective, edges, rules=rules)
        for rules in ("gradient", "relp")
    )
    nodes = clrp.compare(one, other, n_resamples=10)
    assert nodes.overall.n == len(one.node_scores) == 4 * (1 + 2 * 5)
    assert [layer.group for layer in nodes.layers] == ["embed", "0", "1"]
    assert {"0.attn_head_out.3", "embed", "1.mlp_out"} <= set(nodes.to_cells()["node"])
    of_edges = clrp.compare(one.edge_scores, other.edge_scores, n_resamples=10)
    assert of_edges.overall.n == len(one.edge_scores)
    wanted = np.corrcoef(list(one.edge_scores.values()), list(other.edge_scores.values()))[0, 1]
    assert of_edges.overall.pearson == pytest.approx(wanted, abs=1e-5)
    turned = dict(reversed(list(other.node_scores.items())))
    assert clrp.compare(one, turned, n_resamples=10).overall == nodes.overall


def test_apart_names_where_they_differ_most() -> None:
    x, _ = noisy(2, 5)
    y = x.clone()
    y[1, 3] += 9.0
    y[0, 2] -= 4.0
    frame = clrp.compare(x, y, baseline=0.0, axes=("layer", "pos"), n_resamples=5).apart(2)
    assert list(frame[["layer", "pos"]].itertuples(index=False, name=None)) == [(1, 3), (0, 2)]
    assert list(frame["difference"].round(9)) == [9.0, -4.0]


# ---------------------------------------------------------------- refusals


def test_refusals() -> None:
    x, y = noisy(2, 5)
    axes = ["layer", "pos"]
    bad = x.clone()
    bad[0, 0] = float("nan")
    node = AttributionResult({Node("embed", i): 1.0 * i for i in range(4)})
    fewer = AttributionResult({Node("embed", i): 1.0 * i for i in range(3)})
    typed = result(x, axes, None, True)
    two = dataclasses.replace(typed, values=x[None], has_metric_axis=True)
    cases: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
        (ValueError, r"baseline=objective\(model\(corrupted_tokens\)\)", (x, y), {}),
        (ValueError, r"\[2, 5\].*\[5, 2\]", (x, y.T), {"baseline": 0.0}),
        (ValueError, "relevance result holds values that are not", (x, bad), {"baseline": 0.0}),
        (ValueError, "patching result holds", (bad, x), {"baseline": 0.0}),
        (ValueError, "must name the 2 axes", (x, y), {"baseline": 0.0, "axes": ("pos", "head")}),
        (ValueError, "one number", (x, y), {"baseline": torch.zeros(2)}),
        (ValueError, "at least three", (x[:1, :2], y[:1, :2]), {"baseline": 0.0}),
        (ValueError, "k=11.*1 to 10", (x, y), {"baseline": 0.0, "k": 11}),
        (ValueError, "k=True", (x, y), {"baseline": 0.0, "k": True}),
        (ValueError, "n_resamples=0", (x, y), {"baseline": 0.0, "n_resamples": 0}),
        (ValueError, "confidence=95", (x, y), {"baseline": 0.0, "confidence": 95}),
        (TypeError, "Tensor with a dict", (x, {}), {}),
        (TypeError, "two tensors", (x.tolist(), y.tolist()), {}),
        (ValueError, "1 are in one of them only", (node, fewer), {}),
        (ValueError, "effects already", (node, node), {"baseline": 0.0}),
        (ValueError, "baseline=True", (typed, typed), {}),
        (ValueError, r"several metrics.*result\['metric'\]", (two, two), {}),
        (ValueError, "different cells", (typed, result(x, ["layer", "head"], None, True)), {}),
        (ValueError, "leave axes out", (typed, typed), {"axes": ("layer", "pos")}),
    ]  # fmt: skip
    for error, message, pair, how in cases:
        with pytest.raises(error, match=message):
            clrp.compare(*pair, **how)


def test_the_result_checks_itself() -> None:
    x, y = noisy(2, 5)
    found = clrp.compare(x, y, baseline=0.0, n_resamples=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.seed = 3  # type: ignore[misc]
    for change in (
        {"measured": x.flatten()[:3]},
        {"estimated": y.flatten() / 0.0},
        {"cells": found.cells[:-1] + found.cells[:1]},
        {"layers": found.layers[:1]},
    ):
        with pytest.raises(ValueError, match="Comparison"):
            dataclasses.replace(found, **change)
    for change in ({"pearson": 1.5}, {"overlap_interval": (0.4, 0.2)}, {"k": 0}):
        with pytest.raises(ValueError, match="Agreement of all"):
            dataclasses.replace(found.overall, **change)
    assert repr(found).startswith("Comparison(10 cells: Pearson 0.")


# ---------------------------------------------------------------- plots


@pytest.mark.parametrize(
    ("axes", "rows", "columns"),
    [
        (("layer", "pos"), 3, 4),
        (("layer", "pos", "head"), 6, 4),
        (("layer", "head_index", "dest_pos", "src_pos"), 24, 3),
        (("layer",), 1, 5),
    ],
)
def test_a_scatter_and_two_heatmaps(axes: tuple[str, ...], rows: int, columns: int) -> None:
    shape = {2: (3, 4), 3: (3, 4, 2), 4: (3, 2, 4, 3), 1: (5,)}[len(axes)]
    x, y = noisy(*shape)
    comparison = clrp.compare(x, y, baseline=0.0, axes=axes, n_resamples=5)
    figure = comparison.plot()
    points = [t for t in figure.data if t.type == "scatter" and t.mode == "markers"]
    assert len(points) == shape[0]
    assert sorted(v for t in points for v in t.x) == sorted(x.flatten().tolist())
    assert sorted(v for t in points for v in t.y) == sorted(y.flatten().tolist())
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(maps) == 2
    for trace, values in zip(maps, (x, y), strict=True):
        z = np.array(trace.z, dtype=float)
        assert z.shape in {(rows, columns), (columns, columns)}
        assert np.nansum(z) == pytest.approx(float(values.sum()))
    assert figure.layout.coloraxis.cmid == 0.0
    assert figure.layout.coloraxis.colorscale[0][1] == "rgb(103,0,31)"  # RdBu: negative is red
    if len(axes) == 2:
        assert np.array(maps[0].z, dtype=float).tolist() == x.tolist()


def test_plots_without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = clrp.compare(*noisy(2, 5), baseline=0.0, n_resamples=5)
    for name in [n for n in sys.modules if n.split(".")[0] == "plotly"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ImportError, match=r"pip install plotly.*to_frame"):
        comparison.plot()


@browser
def test_the_page_draws_without_network(tmp_path: Path) -> None:
    comparison = clrp.compare(*noisy(3, 6), baseline=0.0, axes=("layer", "pos"), n_resamples=5)
    file = comparison.save_html(tmp_path / "compare.html")
    seen = visit(tmp_path, file.read_text("utf-8"), "document.querySelectorAll('.point').length")
    assert seen.probe == 18
    assert seen.requests == []
    assert "<html" not in comparison.show()._repr_html_()[:200]
    with pytest.raises(FileNotFoundError, match="mkdir"):
        comparison.save_html(tmp_path / "missing" / "compare.html")
