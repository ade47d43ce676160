"""Which positions an objective explains: any, several, of padded rows; and what is no position.

Truths: autograd of the stop-gradient forms (one target position at a time), the prompt cut after
the position (in a causal model nothing behind it counts), sums over positions (relevance is linear
in the objective), and the model's own forward.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from support.tiling import PLAIN, TILED
from torch import Tensor
from truth.edge_truth import TOKENS, VOCAB, between
from truth.families import boot, hf_model, random_tokens, true_float64
from truth.oracle import contrast_seed
from truth.oracle_edges import EdgeTruth, pairs

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError, TokenError
from tl_contrastive_lrp.inputs.objective import Objective, in_words, positions_of

N = TOKENS.shape[1]
WAYS = {"plain": PLAIN, "tiled": {**TILED, "tile": 3}}
P, SOME = 4, (2, 3, 6)
LIMIT = 1e-9  # float64, relative to the largest entry


def at(*positions: int) -> Any:
    """Δℓ summed over positions, as a user would write it."""

    def summed(logits: Tensor) -> Tensor:
        rows = logits[0, list(positions)]
        return (rows[:, 7] - rows[:, 12]).sum()

    return summed


def close(got: Tensor, wanted: Tensor, limit: float = LIMIT) -> None:
    assert got.shape == wanted.shape
    assert float(wanted.abs().max()) > 0
    assert float((got - wanted).abs().max()) <= limit * float(wanted.abs().max())


def seed(*positions: int) -> Tensor:
    return sum(contrast_seed(TOKENS, 7, 12, VOCAB, p) for p in positions)  # type: ignore[return-value]


# ---------------------------------------------------------------- nodes and edges


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_a_sum_over_positions_has_the_edges_of_autograd(name: str, rules: str, way: str) -> None:
    model = boot(name, torch.float64)
    truth = EdgeTruth(hf_model(name), TOKENS, seed(*SOME), rules)
    with true_float64(model):
        graph = clrp.attribution_graph(model, TOKENS, at(*SOME), rules=rules, **WAYS[way])
        result = clrp.attribute(model, TOKENS, at(*SOME), rules=rules, **WAYS[way])
        wanted = float(at(*SOME)(model(TOKENS).detach()))
    assert graph.delta == pytest.approx(wanted, abs=1e-9)
    assert (graph.final_pos, graph.final_positions) == (6, SOME)
    assert (result.pos, result.positions) == (6, SOME)
    for row, site in enumerate(graph.sites):
        close(graph.relevance[row], truth.node(site))
        close(result.resid[row], truth.node(site))
    for source, target in pairs(graph.sites):
        found, edges = graph.matrix(source, target), truth.matrix(source, target)
        close(found.diag(), edges.diag())
        close(between(found), between(edges))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_an_earlier_position_is_the_prompt_cut_after_it(name: str, way: str) -> None:
    model, cut = boot(name, torch.float64), TOKENS[:, : P + 1]
    last = clrp.logit_diff(model, 7, 12)
    how = {"heads": True, **WAYS[way]}
    with true_float64(model):
        whole = clrp.attribution_graph(model, TOKENS, at(P), **how)
        short = clrp.attribution_graph(model, cut, last, heads=True, **PLAIN)
        result = clrp.attribute(model, TOKENS, at(P), **WAYS[way])
        alone = clrp.attribute(model, cut, last, **PLAIN)
    assert (whole.final_pos, whole.final_positions) == (P, (P,)) == (result.pos, result.positions)
    close(whole.relevance[:, : P + 1], short.relevance)
    close(result.resid[:, : P + 1], alone.resid)
    close(result.heads[..., : P + 1], alone.heads)
    assert not whole.relevance[:, P + 1 :].any()
    assert not result.tokens[P + 1 :].any()
    for source, target in pairs(short.sites):
        found = whole.matrix(source, target)
        close(found[: P + 1, : P + 1], short.matrix(source, target))
        assert not found[P + 1 :].any()
    kept = whole.connected()
    assert len(kept.weight) == len(whole.weight) == len(short.connected().weight) > 0
    paths, wanted = whole.paths(8), short.paths(8)
    assert [p.positions for p in paths] == [p.positions for p in wanted]
    assert [p.strength for p in paths] == pytest.approx([p.strength for p in wanted])


@pytest.mark.parametrize("way", WAYS)
def test_a_sum_of_objectives_has_the_sum_of_their_relevance(way: str) -> None:
    model = boot("llama", torch.float64)
    asked = [clrp.logit_diff(model, 7, 12, pos=p) for p in SOME]
    many = [lambda logits: sum(one(logits) for one in asked), *asked, at(P)]
    with true_float64(model):
        graphs = clrp.attribution_graphs(model, TOKENS, many, **WAYS[way])
        results = clrp.attribute_each(model, TOKENS, many, **WAYS[way])
        cut = clrp.attribute(model, TOKENS[:, : P + 1], clrp.logit_diff(model, 7, 12), **PLAIN)
    said = [SOME, *((p,) for p in SOME), (P,)]
    assert [g.final_positions for g in graphs] == said == [r.positions for r in results]
    whole, *parts, _ = graphs
    close(whole.relevance, sum(g.relevance for g in parts))
    for ends in pairs(whole.sites):
        close(whole.matrix(*ends), sum(g.matrix(*ends) for g in parts))
    close(results[0].tokens, sum(r.tokens for r in results[1:-1]))
    close(results[-1].tokens[: P + 1], cut.tokens)


def test_packed_transitions_too() -> None:
    model, cut = boot("qwen3", torch.float64), TOKENS[:, : P + 1]
    how: dict[str, Any] = {"layers": [0, 2], "progress": False}
    with true_float64(model):
        whole = clrp.attribution_graph(model, TOKENS, at(P), **how)
        short = clrp.attribution_graph(model, cut, clrp.logit_diff(model, 7, 12), **how)
    close(whole.matrix(0, 1)[: P + 1, : P + 1], short.matrix(0, 1))
    assert len(whole.connected().weight) > 0


def test_whether_the_target_is_top_is_asked_at_its_position() -> None:
    model = boot("qwen3", torch.float32)
    top = int(model(TOKENS)[0, P].argmax())
    other = (top + 1) % VOCAB
    asked = [
        clrp.logit_diff(model, top, other, pos=P),
        clrp.logit_diff(model, other, top, pos=P),
        lambda logits: logits[0, P, top] - logits[0, P, other],
    ]
    for way in WAYS.values():
        results = clrp.attribute_each(model, TOKENS, asked, **way)
        assert [r.target_is_top for r in results] == [True, False, False]


# ---------------------------------------------------------------- which positions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_positions_are_those_with_a_gradient(dtype: torch.dtype) -> None:
    logits = torch.randn(1, 300, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    model = boot("qwen3", torch.float32)
    for objective, wanted in [
        (lambda z: z[0, 5, 3] - z[0, 5, 7], (5,)),
        (lambda z: z[0, -1, 3], (299,)),
        (lambda z: z[0, [9, 4], 3].sum() + z[0, 7].logsumexp(-1), (4, 7, 9)),
        (lambda z: z.float().mean() * 1e-3, tuple(range(300))),  # far below float16's smallest
        (lambda z: z[0, :, 3].max(), (int(logits[0, :, 3].argmax()),)),
        (lambda z: z[0, 3, :2].sum() - z[0, 3, :2].sum() + z[0, 8, 1], (8,)),
        (lambda z: z[:, 2, :4].sum(-1), (2,)),
        (clrp.logit_diff(model, 7, 12, pos=-3), (297,)),
    ]:
        before = logits.clone()
        assert positions_of(objective, logits, 300) == wanted
        assert torch.equal(logits, before)
        assert not logits.requires_grad
        with torch.inference_mode():
            assert positions_of(objective, logits * 1, 300) == wanted


@pytest.mark.parametrize("call", [clrp.attribute, clrp.attribution_graph])
@pytest.mark.parametrize("way", WAYS)
def test_no_gradient_is_no_position(call: Any, way: str, snapshot: Any) -> None:
    model = boot("qwen3", torch.float32)
    before = snapshot(model)
    with pytest.raises(ModelStateError, match="gradient is 0 at every logit"):
        call(model, TOKENS, lambda z: (0.0 * z).sum(), **WAYS[way])
    assert snapshot(model) == before


def test_positions_in_words() -> None:
    assert in_words((4,)) == "4"
    assert in_words((2, 3, 6)) == "2-3, 6"
    assert in_words(range(100)) == "0-99"
    assert in_words(range(0, 40, 2)) == "0, 2, 4, 6, 8, ..., 38"


# ---------------------------------------------------------------- graphs of several positions


@pytest.fixture(scope="module")
def several() -> Any:
    return clrp.attribution_graph(boot("qwen3"), TOKENS, at(*SOME), **PLAIN)


def test_connected_keeps_what_reaches_any_final_node(several: Any) -> None:
    pruned = several.prune(top_k=9)
    kept = pruned.connected()
    reached = {(len(several.sites) - 1, p) for p in SOME}
    wanted = 0
    edges = zip(pruned.target_site.tolist(), pruned.target_pos.tolist(),
                pruned.source_site.tolist(), pruned.source_pos.tolist(), strict=True)  # fmt: skip
    for t, j, s, i in sorted(edges, reverse=True):
        if (t, j) in reached:
            reached.add((s, i))
            wanted += 1
    assert 0 < len(kept.weight) == wanted
    assert "connected (final_positions 2-3, 6)" in str(kept)
    assert kept.final_positions == SOME
    mask = several.where(torch.zeros(len(several.weight), dtype=torch.bool)).node_mask
    assert torch.nonzero(mask).tolist() == [[len(several.sites) - 1, p] for p in SOME]


@pytest.mark.parametrize("k", [1, 7, 10_000])
def test_paths_start_at_every_final_node(several: Any, k: int) -> None:
    """Every path by hand: from each final node down, by the formula of ``paths``."""
    n, graph = len(several.str_tokens), several.prune(top_k=12)
    rows: dict[tuple[int, int], list[tuple[int, float]]] = {}
    columns = (graph.target_site, graph.target_pos, graph.source_pos, graph.weight)
    for t, j, i, w in zip(*(column.tolist() for column in columns), strict=True):
        rows.setdefault((t, j), []).append((i, w))

    def down(site: int, pos: int, sofar: float) -> list[tuple[float, tuple[int, ...]]]:
        if site == 0:
            return [(sofar, (pos,))]
        row, r = rows.get((site, pos), []), float(graph.relevance[site, pos])
        gross = sum(abs(w) for _, w in row)
        if abs(r) < 1e-3 * gross:
            return []
        share = [(i, w * np.sign(r) / max(abs(r), gross)) for i, w in row]
        return [(v, (*at, pos)) for i, s in share for v, at in down(site - 1, i, sofar * s)]

    top = len(graph.sites) - 1
    every = [p for f in SOME for p in down(top, f, float(graph.relevance[top, f]))]
    every.sort(key=lambda path: -abs(path[0]))
    paths = graph.paths(k)
    assert len(paths) == min(k, len(every))
    assert [p.strength for p in paths] == pytest.approx([v for v, _ in every[:k]], rel=1e-5)
    assert {p.positions for p in paths} <= {at for _, at in every}
    if k > len(every):
        assert {p.positions[-1] for p in paths} == set(SOME)
    assert n == N


def test_tables_and_metrics(several: Any) -> None:
    row = several.summary().iloc[0]
    assert row["arrives"] == pytest.approx(float(several.relevance[0].sum()) / several.delta)
    assert several.metrics()["nodes"].iloc[-1] == len(SOME)
    assert len(several.hubs(3)) == 3
    made = several.to_networkx()
    assert made.graph["final_pos"] == 6
    assert made.graph["final_positions"] == "2, 3, 6"


def test_files_hold_all_positions(several: Any, tmp_path: Any) -> None:
    loaded = clrp.AttributionGraph.load(several.save(tmp_path / "graph.safetensors"))
    assert loaded.final_positions == SOME
    assert torch.equal(loaded.weight, several.weight)
    result = clrp.attribute(boot("qwen3"), TOKENS, at(*SOME), **PLAIN)
    again = clrp.Attribution.load(result.save(tmp_path / "result.safetensors"))
    assert (again.pos, again.positions) == (6, SOME)
    several.to_json(tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text())["graph"]["final_positions"] == (
        "2, 3, 6"
    )
    several.to_graphml(tmp_path / "graph.graphml")


def test_files_of_one_position_are_those_of_version_0_1(tmp_path: Any) -> None:
    from safetensors import safe_open

    graph = clrp.attribution_graph(boot("qwen3"), TOKENS, at(P), **PLAIN)
    result = clrp.attribute(boot("qwen3"), TOKENS, at(P), **PLAIN)
    for thing, kind in ((graph, clrp.AttributionGraph), (result, clrp.Attribution)):
        path = thing.save(tmp_path / "one.safetensors")
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["version"] == "1"
            fields = json.loads(file.metadata()["data"])
        assert not [name for name in fields if name.startswith("earlier")]
        loaded = kind.load(path)
        assert getattr(loaded, "final_positions", getattr(loaded, "positions", None)) == (P,)


@pytest.mark.parametrize("earlier", [[7], [3, 2], [2, 2], [-1], [6], ["2"], [True], [1.5]])
def test_damaged_positions_are_refused(several: Any, tmp_path: Any, earlier: Any) -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="earlier_final_pos"):
        replace(several, earlier_final_pos=tuple(earlier))
    path = several.save(tmp_path / "graph.safetensors")
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = json.loads(header["__metadata__"]["data"])
    data["earlier_final_pos"] = earlier
    header["__metadata__"]["data"] = json.dumps(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(clrp.errors.FileFormatError, match="damaged"):
        clrp.AttributionGraph.load(path)


def test_pictures_show_every_final_node(several: Any, tmp_path: Any) -> None:
    page = several.prune(top_k=9).save_html(tmp_path / "graph.html").read_text(encoding="utf-8")
    assert page.count('<circle class="on"') == len(SOME)
    assert page.count('font-weight="700"') == len(SOME)
    assert "the predictions at 3 positions" in page
    result = clrp.attribute(boot("qwen3"), TOKENS, at(*SOME), **PLAIN)
    report = result.save_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "predictions at positions 2-3, 6" in report
    one = clrp.attribute(boot("qwen3"), TOKENS, at(P), **PLAIN)
    report = one.save_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"prediction at position {P}" in report


# ---------------------------------------------------------------- circuits and curves

CORRUPTED = TOKENS.clone()
CORRUPTED[0, 1:3] = torch.tensor([9, 20])


def test_circuits_at_an_earlier_position_are_those_of_the_cut_prompt() -> None:
    model, cut = boot("qwen3", torch.float64), slice(0, P + 1)
    last = clrp.logit_diff(model, 7, 12)
    with true_float64(model):
        whole = clrp.attribution_graph(model, TOKENS, at(P), **PLAIN)
        short = clrp.attribution_graph(model, TOKENS[:, cut], last, **PLAIN)
        found = clrp.circuit_faithfulness(
            model, whole.prune(top_k=6).connected(), at(P), corrupted=CORRUPTED
        )
        wanted = clrp.circuit_faithfulness(
            model, short.prune(top_k=6).connected(), last, corrupted=CORRUPTED[:, cut]
        )
    assert (found.edges_kept, found.edges_all) == (wanted.edges_kept, wanted.edges_all)
    for name in ("delta", "delta_full", "delta_empty"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*mean little here")  # a random model's circuits
@pytest.mark.parametrize("split", [False, True])
def test_circuits_of_several_positions(split: bool) -> None:
    """All edges: the model itself. None: every position explained as if alone."""
    model = boot("qwen3", torch.float64)
    how = {"corrupted": CORRUPTED, "progress": False}
    with true_float64(model):
        graph = clrp.attribution_graph(model, TOKENS, at(*SOME), heads=split, **PLAIN)
        curve = clrp.circuit_curve(model, graph, at(*SOME), fractions=[0.3], **how)
        full, none = float(at(*SOME)(model(TOKENS).detach())), 0.0
        for p in SOME:
            cut = slice(0, p + 1)
            alone = clrp.attribution_graph(
                model, TOKENS[:, cut], clrp.logit_diff(model, 7, 12), heads=split, **PLAIN
            )
            none += clrp.circuit_faithfulness(
                model, alone, target=7, contrast=12, corrupted=CORRUPTED[:, cut]
            ).delta_empty
        whole = clrp.circuit_faithfulness(model, graph, at(*SOME), corrupted=CORRUPTED)
    assert curve.points[0].delta == pytest.approx(none, abs=1e-9)
    assert curve.points[-1].delta == pytest.approx(full, abs=1e-9)
    assert whole.recovered == pytest.approx(1.0, abs=1e-9)


def test_circuits_of_another_position_are_refused() -> None:
    model = boot("qwen3", torch.float32)
    graph = clrp.attribution_graph(model, TOKENS, at(P), **PLAIN)
    value = graph.delta

    def same_value_elsewhere(logits: Tensor) -> Tensor:
        return at(2)(logits) - at(2)(logits).detach() + value

    with pytest.raises(ValueError, match=r"position 4, but this objective reads .* at 2"):
        clrp.circuit_faithfulness(model, graph, same_value_elsewhere, corrupted=CORRUPTED)


def test_objectives_that_move_when_edges_are_ablated_are_refused() -> None:
    """Rows not explained hold the reference's states: a maximum may move to one of them."""
    model, other = boot("qwen3", torch.float32), random_tokens(1, N, seed=5)
    with torch.no_grad():
        clean, reference = model(TOKENS)[0], model(other)[0]
    token = int((reference[: N - 1].amax(0) - clean.amax(0)).argmax())
    top = int(clean[:, token].argmax())
    assert float(reference[: N - 1, token].max()) > float(clean[top, token])
    assert int(reference[: N - 1, token].argmax()) != top

    def highest(logits: Tensor) -> Tensor:
        return logits[0, :, token].max()

    graph = clrp.attribution_graph(model, TOKENS, highest, **PLAIN)
    assert graph.final_positions == (top,)
    with pytest.raises(ValueError, match="reads other positions when edges are ablated"):
        clrp.circuit_faithfulness(model, graph, highest, corrupted=other)


def test_curves_take_any_position() -> None:
    model, cut = boot("qwen3", torch.float64), slice(0, P + 1)
    scores = torch.arange(N, dtype=torch.float32).flip(0)
    how: dict[str, Any] = {"progress": False, "exclude": range(P + 1, N)}
    with true_float64(model):
        found = clrp.faithfulness_curves(model, TOKENS, scores, at(P), **how)
        wanted = clrp.faithfulness_curves(
            model, TOKENS[:, cut], scores[cut], target=7, contrast=12, progress=False
        )
    close(found.morf, wanted.morf)
    close(found.lerf, wanted.lerf)


def test_verify_takes_any_position() -> None:
    found = clrp.verify(boot("qwen3"), TOKENS, objective=at(*SOME))
    assert found["conservation"].verdict == "ok"
    assert found["gradient"].verdict == "ok"


def test_checkpoints_of_functions(tmp_path: Any) -> None:
    model, how = boot("qwen3"), {**TILED, "checkpoint_dir": tmp_path}
    one, two = at(*SOME), at(P)
    first = clrp.attribution_graphs(model, TOKENS, [one, two], **how)
    assert json.loads((tmp_path / "question.json").read_text())["tile"] == TILED["tile"]
    (tmp_path / "block_0.safetensors").unlink()
    again = clrp.attribution_graphs(model, TOKENS, [one, two], **how)
    plain = clrp.attribution_graphs(model, TOKENS, [one, two], **PLAIN)
    for graphs in (first, again, plain):
        assert [g.final_positions for g in graphs] == [SOME, (P,)]
    for found, wanted in zip(again, plain, strict=True):
        close(found.relevance, wanted.relevance, 1e-5)
    with pytest.raises(clrp.errors.FileFormatError, match="another run"):
        clrp.attribution_graphs(model, TOKENS, [two, one], **how)


# ---------------------------------------------------------------- padded rows

LENGTHS = (9, 6, 8)


def padded(side: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """ids and mask [batch, pos], and each row alone; what pads hold is drawn too."""
    rows = [random_tokens(1, n, seed=n) for n in LENGTHS]
    ids, mask = random_tokens(len(rows), max(LENGTHS), seed=1), torch.zeros(3, max(LENGTHS)).long()
    for i, row in enumerate(rows):
        n = row.shape[1]
        own = slice(0, n) if side == "right" else slice(max(LENGTHS) - n, None)
        ids[i, own], mask[i, own] = row[0], 1
    return ids, mask, rows


@pytest.mark.parametrize("pos", [-1, -3])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2", "mistral"])
def test_minus_one_is_each_rows_last_real_token(name: str, side: str, pos: int) -> None:
    model, key = boot(name, torch.float32), "blocks.1.hook_resid_pre"
    ids, mask, rows = padded(side)
    objective = clrp.logit_diff(model, 7, 11, pos=pos)
    logits, batch = clrp.run_with_relevance(model, ids, objective, key, attention_mask=mask)
    value = objective.with_mask(mask)(logits)
    wanted_value = 0.0
    for i, row in enumerate(rows):
        n = row.shape[1]
        own = slice(0, n) if side == "right" else slice(max(LENGTHS) - n, None)
        _, alone = clrp.run_with_relevance(model, row, objective, key)
        close(batch[key][i, own], alone[key][0], 2e-5)
        rest = batch[key][i, mask[i] == 0]
        assert not rest.any()
        end = model(row)[0, pos].detach()
        wanted_value += float(end[7] - end[11])
    assert float(value) == pytest.approx(wanted_value, abs=1e-3)


def test_functions_of_pads_are_refused(snapshot: Any) -> None:
    model = boot("qwen3", torch.float32)
    ids, mask, _ = padded("right")
    before = snapshot(model)
    with pytest.raises(TokenError, match=r"position 8 of row 1.*logit_diff"):
        clrp.run_with_relevance(
            model, ids, lambda z: (z[:, -1, 7] - z[:, -1, 11]).sum(), attention_mask=mask
        )
    assert snapshot(model) == before
    last = mask.sum(1) - 1

    def real(logits: Tensor) -> Tensor:
        rows = logits[torch.arange(3), last]
        return (rows[:, 7] - rows[:, 11]).sum()

    _, found = clrp.run_with_relevance(model, ids, real, "hook_embed", attention_mask=mask)
    objective = clrp.logit_diff(model, 7, 11)
    _, wanted = clrp.run_with_relevance(model, ids, objective, "hook_embed", attention_mask=mask)
    close(found["hook_embed"], wanted["hook_embed"], 1e-6)


def test_positions_of_padded_rows_that_do_not_exist_are_refused() -> None:
    model = boot("qwen3", torch.float32)
    ids, mask, _ = padded("right")
    for pos, said in [
        (7, "Position 7 of row 1 is padding"),
        ([8, 5, 8], "Position 8 of row 2 is padding"),
        (-7, "Position -7 does not exist in row 1, which has 6 tokens"),
        (9, "Position 9 does not exist in a prompt of 9"),
        ([1, 2], "2 positions were given for a batch of 3"),
    ]:
        with pytest.raises(TokenError, match=said):
            clrp.run_with_relevance(
                model, ids, clrp.logit_diff(model, 7, 11, pos=pos), attention_mask=mask
            )
    objective = clrp.logit_diff(model, 7, 11)
    assert objective.with_mask(torch.ones(2, 5)) is objective
    assert objective.with_mask(torch.tensor([[1, 1, 0]])).pos == 1
    assert objective.with_mask(torch.tensor([[1, 1, 0], [0, 1, 1]])).pos == (1, 2)


# ---------------------------------------------------------------- what is no position

LISTS = [[-1], (3,), torch.tensor([3]), np.array([-1]), []]


@pytest.mark.parametrize("pos", LISTS, ids=repr)
def test_a_list_of_one_position_is_refused_by_every_objective(pos: Any) -> None:
    model = boot("qwen3", torch.float32)
    for make in (
        lambda: clrp.logit_diff(model, 7, 12, pos=pos),
        lambda: clrp.target_logit(model, 7, pos=pos),
        lambda: clrp.top_logit(pos=pos),
        lambda: clrp.logit_minus_top_k(model, 7, 2, pos=pos),
        lambda: clrp.logit_minus_mean(model, 7, pos=pos),
        lambda: Objective((7,), (12,), pos=pos),
    ):
        with pytest.raises(TokenError, match=r"list of [01]; use (pos=(-1|3)\.|a whole number)"):
            make()


ONE_PROMPT: dict[str, Any] = {
    "attribute": lambda m, **q: clrp.attribute(m, TOKENS, **q),
    "attribution_graph": lambda m, **q: clrp.attribution_graph(m, TOKENS, **q),
    "circuit_faithfulness": lambda m, **q: clrp.circuit_faithfulness(
        m, clrp.attribution_graph(m, TOKENS, at(P)), corrupted=CORRUPTED, **q
    ),
    "circuit_curve": lambda m, **q: clrp.circuit_curve(
        m, clrp.attribution_graph(m, TOKENS, at(P)), corrupted=CORRUPTED, **q
    ),
    "faithfulness_curves": lambda m, **q: clrp.faithfulness_curves(m, TOKENS, torch.rand(N), **q),
    "baseline_scores": lambda m, **q: clrp.baseline_scores(m, TOKENS, **q),
}


@pytest.mark.parametrize("name", ONE_PROMPT)
def test_one_prompt_takes_one_whole_number(name: str) -> None:
    model, call = boot("qwen3", torch.float32), ONE_PROMPT[name]
    for pos in [*LISTS, [1, 2], torch.tensor([1, 2]), True, 1.5, "last", None]:
        with pytest.raises(TokenError, match="pos="):
            call(model, target=7, contrast=12, pos=pos)
    with pytest.raises(TokenError, match=r"one prompt: use one whole number, such as pos=2"):
        call(model, objective=clrp.logit_diff(model, 7, 12, pos=[1, 2]))
    with pytest.raises((TypeError, TokenError), match="pos"):
        call(model, objective=at(P), pos=torch.tensor([1, 2]))
    with pytest.raises(TokenError, match=r"Position 99 does not exist"):
        call(model, target=7, contrast=12, pos=99)


@pytest.mark.parametrize("way", WAYS)
def test_whole_numbers_of_any_library(way: str) -> None:
    model = boot("qwen3", torch.float32)
    wanted = clrp.attribute(model, TOKENS, target=7, contrast=12, pos=P, **WAYS[way])
    for pos in (np.int64(P), np.array(P), torch.tensor(P), P - N):
        found = clrp.attribute(model, TOKENS, target=7, contrast=12, pos=pos, **WAYS[way])
        assert found.pos == P
        assert type(found.pos) is int
        assert torch.equal(found.tokens, wanted.tokens)


def test_other_calls_that_take_a_position() -> None:
    model = boot("qwen3", torch.float32)
    for pos in [[-1], torch.tensor([1]), True, 1.5]:
        with pytest.raises(TokenError, match="pos="):
            clrp.next_token_table(model, TOKENS, pos=pos)
    with pytest.raises(TokenError, match="Position 99"):
        clrp.next_token_table(model, TOKENS, pos=99)
    wanted = clrp.next_token_table(model, TOKENS, pos=P)
    assert wanted["id"].tolist() == model(TOKENS)[0, P].topk(10).indices.tolist()
    assert clrp.next_token_table(model, TOKENS, pos=np.int64(P)).equals(wanted)  # type: ignore[arg-type]
    detailed = clrp.attribution_graph(model, TOKENS, at(P), details=True, **PLAIN)
    with pytest.raises(ValueError, match="pos="):
        detailed.explain_node(0, [1])
    with pytest.raises(TokenError, match="one whole number"):
        clrp.verify(model, TOKENS, objective=clrp.logit_diff(model, 7, 12, pos=[1, 2]))


def test_patching_with_positions_for_other_rows_is_refused() -> None:
    model = boot("gpt2", torch.float32)
    with pytest.raises(TokenError, match="2 positions were given for a batch of 1"):
        clrp.patching.relevance_patch(
            model, TOKENS, CORRUPTED, clrp.logit_diff(model, 7, 12, pos=[1, 2])
        )
    found = clrp.patching.relevance_patch(model, TOKENS, CORRUPTED, at(P)).node_scores
    cut = slice(0, P + 1)
    wanted = clrp.patching.relevance_patch(
        model, TOKENS[:, cut], CORRUPTED[:, cut], clrp.logit_diff(model, 7, 12)
    ).node_scores
    largest = max(map(abs, wanted.values()))
    for node, score in found.items():
        assert score == pytest.approx(wanted.get(node, 0.0), abs=1e-5 * largest)
