"""What is measured on real weights, on a small random model: against plain runs, TransformerLens'
patching and the package's curves; and nothing changes when target and contrast are exchanged."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import patching as tl_patching
from truth import zoo
from truth.replaced_tokens import effects as by_replacing

import tl_contrastive_lrp as clrp

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _faithfulness_runs as runs
import _real_measures as measures
import real_faithfulness as real
from _real_effects import measured_effects
from _real_prompts import TEMPLATES, prompts

N = 14
IDS = zoo.random_tokens(N)[0].clamp_min(4)
OTHER = zoo.random_tokens(N, seed=5)[0].clamp_min(4)
TARGET, CONTRAST = 7, 12


def delta_of(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, TARGET] - logits[0, -1, CONTRAST]


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.boot("qwen3")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The same weights; a bridge changes the model that it is put around."""
    return copy.deepcopy(zoo.hf_model("qwen3"))


def same(one: Any, other: Any, path: str = "") -> None:
    """Equal but for rounding; seconds, and which token was right, are another matter."""
    if isinstance(one, dict):
        assert set(one) == set(other), path
        for key in set(one) - {"seconds", "right"}:
            same(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, pair in enumerate(zip(one, other, strict=True)):
            same(*pair, f"{path}[{number}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), path
    else:
        assert one == other, path


# ------------------------------------------------------------ effects from shared prefixes


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_shared_prefixes_are_plain_runs(
    plain: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("_real_effects.ROWS", rows)
    monkeypatch.setattr("_real_effects.NUMBERS", 1)
    ways: dict[str, Any] = {"zero": None, "other": OTHER}
    truth = torch.cat([by_replacing(plain, IDS[None], by, delta_of) for by in ways.values()])
    asked: list[tuple[int, int | None]] = [
        (p, None if by is None else int(by[p])) for by in ways.values() for p in range(N)
    ]
    shuffled = torch.randperm(len(asked), generator=torch.Generator().manual_seed(0)).tolist()
    which = [asked[i] for i in shuffled]
    found = measured_effects(plain, IDS, TARGET, CONTRAST, which)
    torch.testing.assert_close(found, truth[shuffled], rtol=1e-4, atol=1e-5)


def test_a_token_in_its_own_place_does_nothing(plain: Any) -> None:
    which: list[tuple[int, int | None]] = [(p, int(IDS[p])) for p in range(N)]
    found = measured_effects(plain, IDS, TARGET, CONTRAST, which)
    torch.testing.assert_close(found, torch.zeros(N, dtype=torch.float64), rtol=0, atol=1e-5)


# ------------------------------------------------------------ patching and area


def test_patches_are_those_of_transformer_lens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "EVERY", 1)
    monkeypatch.setattr(tl_patching, "tqdm", lambda rows: rows)
    with torch.no_grad():
        cache = model.run_with_cache(IDS[None])[1]
        found, base = measures.patches(model, cache, OTHER, TARGET, CONTRAST)
        args = (model, OTHER[None], cache, delta_of)
        truth = {
            "residual stream": tl_patching.get_act_patch_resid_pre(*args),
            "heads": tl_patching.get_act_patch_attn_head_out_all_pos(*args),
        }
        assert base == pytest.approx(float(delta_of(model(OTHER[None]))), abs=1e-5)
    for what, values in truth.items():
        torch.testing.assert_close(found[what].float(), values - base, rtol=1e-3, atol=1e-4)


def test_an_area_is_that_of_the_curves_at_these_steps(model: Any) -> None:
    scores = {name: torch.randn(N, generator=torch.Generator().manual_seed(s))
              for s, name in enumerate("ab")}  # fmt: skip
    found = measures.area(model, IDS, TARGET, CONTRAST, scores)
    how = {"target": TARGET, "contrast": CONTRAST, "steps": N, "progress": False}
    curves = clrp.faithfulness_curves(model, IDS, scores, **how)
    steps = {round(share * curves.removable) for share in measures.SHARES}
    for name, part in curves.to_frame().groupby("name"):
        wide = part.pivot(index="removed", columns="order", values="delta").loc[sorted(steps)]
        x = wide.index.to_numpy() / curves.removable
        truth = np.trapezoid(wide["LeRF"] - wide["MoRF"], x) / curves.scale
        assert found[str(name)] == pytest.approx(float(truth), abs=1e-5)


# ------------------------------------------------------------ target and contrast exchanged


def exchanged(one: real.Asked) -> real.Asked:
    return replace(one, target=one.contrast, contrast=one.target)


def test_exchanging_target_and_contrast_changes_nothing(
    model: Any, plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All templates' measures, and those of a failure of which only some tokens are replaced."""
    monkeypatch.setattr(measures, "WHOLE", N - 1)
    monkeypatch.setattr(measures, "LEAST_GAP", -100.0)
    monkeypatch.setattr(measures, "SAMPLED", 5)
    monkeypatch.setattr(measures, "STRONGEST", 3)
    with torch.no_grad():
        first, second = model(IDS[None])[0, -1].topk(2).indices.tolist()
    asked = [
        real.Asked("indirect objects", 0, 0, IDS[:-1], TARGET, CONTRAST, OTHER[:-1]),
        real.Asked("indirect objects", 1, 1, IDS[1:], first, second, OTHER[1:]),
        real.Asked(real.FAILURES, 4, 0, IDS, first, second),
    ]
    summaries = []
    for way, these in (("as is", asked), ("exchanged", [exchanged(one) for one in asked])):
        out = tmp_path / way
        out.mkdir()
        (out / "about.json").write_text("{}")
        real.measure(model, plain, these, out, (1, 1))
        summaries.append(real.summary(out))
    one, other = summaries
    del one["about"], other["about"]
    one["prompts"].pop("right"), other["prompts"].pop("right")
    assert one["prompts"]["sampled"][-1] >= 5
    assert {"area", "flips", "share", "spearman_zero", "patching pearson heads", "cmd"} <= set(
        one["methods"]
    )
    assert any(value is not None for value in one["methods"]["flips"])
    same(one, other)


def test_nor_on_the_models_trained_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comprehensiveness and sufficiency too, which ask what happens to the target."""
    monkeypatch.setattr(runs, "RULES", ("attnlrp", "relp"))
    plan = next(iter(runs.planted.PLANS.values()))
    name = next(iter(runs.planted.PLANS))
    bridge, case = runs.planted.bridge(name), runs.planted.case(plan, 0)
    other = replace(case, target=case.contrast, contrast=case.target)
    for one in ("zero", "random"):
        frames = [runs.on_removal(bridge, [c], one, quiet=True)[0] for c in (case, other)]
        truth, found = (f.set_index("method").sort_index() for f in frames)
        assert (truth["comprehensiveness"] != 0).any()
        np.testing.assert_allclose(found.to_numpy(), truth.to_numpy(), rtol=1e-3, atol=1e-5)
    sums = [runs.on_sums(bridge, [c], quiet=True)["share"] for c in (case, other)]
    np.testing.assert_allclose(*sums, rtol=1e-4)
    circuits = [runs.on_circuits(bridge, [(c, c.tokens, c.corrupted)], quiet=True)
                for c in (case, other)]  # fmt: skip
    for column in ("cpr", "cmd"):
        np.testing.assert_allclose(circuits[0][column], circuits[1][column], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------ small things


def test_a_stopped_run_goes_on(model: Any, plain: Any, tmp_path: Path, capsys: Any) -> None:
    asked = [real.Asked("facts", number, number, IDS[number:], 7, 12) for number in range(3)]
    real.measure(model, plain, asked, tmp_path, (1, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "facts-0000.base.json", "facts-0000.removal.json",
        "facts-0002.base.json", "facts-0002.removal.json",
    ]  # fmt: skip
    before = (tmp_path / "facts-0000.base.json").stat().st_mtime_ns
    real.measure(model, plain, asked, tmp_path, (1, 1))
    assert (tmp_path / "facts-0000.base.json").stat().st_mtime_ns == before
    assert "2 of 6 to do" in capsys.readouterr().out
    found = json.loads((tmp_path / "facts-0001.base.json").read_text())
    assert found["measured"]["pos"] == found["ordinary"]
    assert "x" not in json.dumps(found["relevance"]["gim"]), "numbers, no texts"


def test_which_tokens_are_replaced() -> None:
    ids, free = torch.arange(200), list(range(1, 200))
    scores = torch.zeros(200)
    scores[[3, 50, 199]] = torch.tensor([1.0, -2.0, 3.0])
    at = measures.positions(ids, free, scores, seed=0)
    sampled = [p for p, why in at.items() if why != "strongest"]
    strong = [p for p, why in at.items() if why != "sampled"]
    assert (len(sampled), len(strong)) == (measures.SAMPLED, measures.STRONGEST)
    assert {3, 50, 199} <= set(strong)
    assert list(at) == sorted(at)
    assert at == measures.positions(ids, free, scores, seed=0)
    few = measures.WHOLE
    assert set(measures.positions(ids[:few], free[: few - 1], scores, 0).values()) == {"sampled"}


def test_a_uniform_sample_is_uniform() -> None:
    """Each of 199 tokens in 16/199 of 2,000 samples; 5 standard deviations are 0.031."""
    ids, free, hits = torch.arange(200), list(range(1, 200)), torch.zeros(200)
    for seed in range(2000):
        at = measures.positions(ids, free, torch.arange(200.0), seed)
        hits[[p for p, why in at.items() if why != "strongest"]] += 1 / 2000
    assert (hits[1:] - measures.SAMPLED / 199).abs().max() < 0.031


def test_correlations_by_hand() -> None:
    assert measures.correlation([1, 2, 3], [2, 4, 6], "pearson") == pytest.approx(1.0)
    assert measures.correlation([1, 2, 9], [1, 3, 2], "spearman") == pytest.approx(0.5)
    assert math.isnan(measures.correlation([1, 1, 1], [1, 2, 3], "pearson"))


def test_templates() -> None:
    found = prompts()
    assert [sum(p.group == group for p in found) for group in TEMPLATES] == [20, 20, 20]
    assert len({p.text for p in found}) == 60
    for p in found:
        assert p.right != p.wrong
        assert (p.corrupted is None) == (p.group == "facts")
        assert p.corrupted != p.text


def test_failures_in_random_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [*range(50, 250), *range(300, 500)]
    cases = [SimpleNamespace(ids=(1,) * n, target_id=5, contrast_id=6) for n in lengths]
    monkeypatch.setattr(clrp.study, "load_cases", lambda _: cases)
    monkeypatch.setattr(real, "FAR", 350)
    found = real.from_cases(tmp_path, most=100, most_long=60, longest=450)
    groups = [one.group for one in found]
    assert (groups.count(real.FAILURES), groups.count(real.LONG)) == (100, 60)
    assert real.LONG in groups[:20]
    assert real.FAILURES in groups[:20]
    assert sorted(one.rank for one in found) == list(range(160))
    early = [one.rank for one in found if len(one.ids) <= 350]
    assert early == sorted(early)
    assert [len(one.ids) > 350 for one in found] == sorted(len(one.ids) > 350 for one in found)
    assert len({one.number for one in found}) == 160
    for one in found:
        assert len(one.ids) == lengths[one.number] <= 450
        assert (one.group == real.LONG) == (len(one.ids) > real.BOUND)
    short = [one for one in found if len(one.ids) <= real.SHORT]
    assert [one.number for one in found if one.removal] == [s.number for s in short[: real.SUBSET]]
    assert [one.number for one in found] != sorted(one.number for one in found)


def test_circuits_are_left_out_where_nothing_is_to_restore(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same prompt twice; else each set's curve is the package's own."""
    args = (model, IDS)
    assert measures.circuits(*args, IDS, TARGET, CONTRAST, ["relp"], seed=0) == {}
    target, contrast, _ = measures.preferred(model, IDS, TARGET, CONTRAST)
    monkeypatch.setattr(measures, "LEAST_GAP", -100.0)
    found = measures.circuits(*args, OTHER, target, contrast, ["relp"], seed=0)
    assert set(found) == {"relp", "random"}
    how = {"target": target, "contrast": contrast}
    graph = clrp.attribution_graph(*args, **how, rules="relp")
    curve = clrp.circuit_curve(model, graph, **how, corrupted=OTHER[None], progress=False)
    assert found["relp"] == {"cpr": pytest.approx(curve.cpr), "cmd": pytest.approx(curve.cmd)}
