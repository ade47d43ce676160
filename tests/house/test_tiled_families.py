"""Every covered family on 352 tokens: nodes, edges and pruned edges in tiles are the plain ones.

Tiles are uneven and leave a rest, windows are shorter and longer than a tile and end within one.
In float32 everything is held to 1e-5 of its largest value, and pruned edge sets are equal. Where an
edge is off by more (diagonals in which large parts cancel), or two edges change places at the
boundary, float64 has to show that it is rounding: there both engines agree to 1e-10 with equal
sets; float32 by itself is off as much; and the edges that changed places weigh the same but for
the error that float32 makes there with either engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.long_zoo import LENGTH, boot, float64_throughout, has_window
from support.tiling import assert_same
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.fused import fused_blocks
from tl_contrastive_lrp.errors import ModelStateError, NotTileableError
from tl_contrastive_lrp.inputs.bridge import without_neurons

LIMIT = PROMISED[torch.float32]
IDS = zoo.random_tokens(LENGTH)
TARGET, CONTRAST = 7, 12

# What no key-value cache can split, and what the refusal says.
NOT_TILEABLE = {
    "openai_gpt": "keeps no keys and values in a cache",
    "glm_moe_dsa": "keeps more than keys and values in its cache",  # an indexer's keys
    "bert": "gives other logits",  # positions see those after them
    "roberta": "gives other logits",
}
# And one whose bridge computes other logits than Hugging Face, which are what is explained.
TILEABLE = [name for name in (*COVERED, "falcon-new-mha") if name not in NOT_TILEABLE]


@dataclass(frozen=True)
class Setting:
    """How one family is run; they take turns, so that each way meets many families."""

    tile: int
    window: int
    pos: int
    granularity: str
    pruning: str

    @classmethod
    def of(cls, name: str) -> Setting:
        i = TILEABLE.index(name)
        return cls(
            tile=(128, 107, 166)[i % 3],
            window=(50, 150)[i // 3 % 2],
            pos=(-1, -1, -1, 307)[i % 4],
            granularity=("block", "sublayer")[i // 2 % 2],
            pruning=("top_k", "threshold", "none")[i // 4 % 3],
        )


def objective_of(model: Any, setting: Setting) -> clrp.Objective:
    return clrp.logit_diff(model, TARGET, CONTRAST, pos=setting.pos)


def graph(model: Any, setting: Setting, *, tiled: bool, **pruning: Any) -> clrp.AttributionGraph:
    how: dict[str, Any] = {"memory": "plain", "granularity": setting.granularity, **pruning}
    if tiled:
        how |= {"memory": "tiled", "tile": setting.tile, "progress": False}
    return clrp.attribution_graph(model, IDS, objective_of(model, setting), **how)


def attributions(model: Any, setting: Setting) -> list[clrp.Attribution]:
    """Plain and tiled; with neurons where the family shows them."""
    ways: list[dict[str, Any]] = [
        {"memory": "plain"},
        {"memory": "tiled", "tile": setting.tile, "progress": False},
    ]
    objective = objective_of(model, setting)
    neurons = without_neurons(model) is None
    return [clrp.attribute(model, IDS, objective, neurons=neurons, **way) for way in ways]


def edges_of(found: clrp.AttributionGraph) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """By transition: target · LENGTH + source, in order, and the weights."""
    sites = torch.stack([found.source_site, found.target_site]).long()
    places = found.target_pos.long() * LENGTH + found.source_pos.long()
    by_step = {}
    for step in found.transitions:
        mine = (sites[0] == step[0]) & (sites[1] == step[1])
        keys, order = places[mine].sort()
        by_step[step] = keys, found.weight[mine][order]
    return by_step


def dense(found: clrp.AttributionGraph, step: tuple[int, int]) -> Tensor:
    """A transition's weights by place, [LENGTH · LENGTH]."""
    return found.matrix(found.sites[step[0]], found.sites[step[1]]).flatten()


def not_in(these: Tensor, those: Tensor) -> Tensor:
    return these[~torch.isin(these, those)]


@dataclass
class Ways:
    """One family's graphs, the plain one whole."""

    plain: clrp.AttributionGraph
    mass: clrp.AttributionGraph
    other: clrp.AttributionGraph
    pruning: dict[str, Any]

    @classmethod
    def run(cls, model: Any, setting: Setting, pruning: dict[str, Any] | None = None) -> Ways:
        plain = graph(model, setting, tiled=False)
        if pruning is None:
            largest = float(plain.weight.abs().max())
            pruning = {"top_k": 5000} if setting.pruning == "top_k" else {}
            pruning = {"threshold": 1e-3 * largest} if setting.pruning == "threshold" else pruning
        mass = graph(model, setting, tiled=True, mass=0.9)
        return cls(plain, mass, graph(model, setting, tiled=True, **pruning), pruning)

    def pairs(self) -> list[tuple[clrp.AttributionGraph, clrp.AttributionGraph]]:
        """Pruned the plain way, and while tiles came."""
        found = [(self.plain.prune(mass=0.9), self.mass)]
        if self.pruning:
            found.append((self.plain.prune(**self.pruning), self.other))
        return found


def misses(
    plain: clrp.AttributionGraph, tiled: clrp.AttributionGraph, limit: float = LIMIT
) -> list[tuple[int, int]]:
    """Transitions with an edge that tiles give otherwise; nodes must be the same."""
    assert plain.sites == tiled.sites
    assert plain.transitions == tiled.transitions
    nodes = (plain.relevance - tiled.relevance).abs().max()
    assert float(nodes) <= limit * float(plain.relevance.abs().max())
    found = []
    for step, (keys, weights) in edges_of(tiled).items():
        wanted = dense(plain, step)
        assert len(keys) > 0
        if not float((wanted[keys] - weights).abs().max()) <= limit * float(wanted.abs().max()):
            found.append(step)
    return found


def assert_same_masses(plain: clrp.AttributionGraph, tiled: clrp.AttributionGraph) -> None:
    """Σ|weight| of each transition before pruning, and what was kept: the account of all edges.

    A transition can be one edge, whose weight is a node's relevance: so nodes' bound is the least.
    """
    nodes = float(plain.relevance.abs().max())
    accounts = plain.history[-1].transitions, tiled.history[-1].transitions
    for one, other in zip(*accounts, strict=True):
        assert (one.source, one.target) == (other.source, other.target)
        bound = LIMIT * max(one.mass_before, nodes)
        assert abs(one.mass_before - other.mass_before) <= bound
        assert abs(one.mass_kept - other.mass_kept) <= bound


def swapped(ways: Ways) -> list[dict[tuple[int, int], Tensor]]:
    """By pruning and transition, the edges that only one way keeps; only those with any."""
    found = []
    for plain, tiled in ways.pairs():
        wanted, got = edges_of(plain), edges_of(tiled)
        found.append({
            step: torch.cat([not_in(wanted[step][0], got[step][0]),
                             not_in(got[step][0], wanted[step][0])])
            for step in wanted if not torch.equal(wanted[step][0], got[step][0])
        })  # fmt: skip
    return found


def assert_same_but_for_rounding(name: str, ways: Ways, setting: Setting) -> None:
    """What float32 tells apart is the same in float64, and float32 itself is as far off.

    How far float32 must be off: one rounding of each weight, a computation without any other,
    already moves the edges so much; or the plain way is off as much.

    Args:
        ways: In float32.
    """
    missed = {*misses(ways.plain, ways.mass), *misses(ways.plain, ways.other)}
    differing = swapped(ways)
    if not missed and not any(differing):
        return
    model = boot(name, setting.window, torch.float64)
    with float64_throughout(model):
        exact = Ways.run(model, setting, ways.pruning)
        round_weights_(model)
        moved = graph(model, setting, tiled=False)
    assert not any(swapped(exact))
    assert not misses(exact.plain, exact.mass, 1e-10)
    assert not misses(exact.plain, exact.other, 1e-10)
    whole = edges_of(graph(boot(name, setting.window), setting, tiled=True))
    for step in ways.plain.transitions:
        true, plain = dense(exact.plain, step), dense(ways.plain, step).double()
        tiled = torch.zeros_like(true)
        tiled[whole[step][0]] = whole[step][1].double()
        off_plain, off_tiled = (plain - true).abs(), (tiled - true).abs()
        if step in missed:
            own = max(float(off_plain.max()), float((dense(moved, step) - true).abs().max()))
            assert float(off_tiled.max()) <= 4 * own
        wrong = torch.maximum(off_plain, off_tiled)
        for (pruned, _), keys_of in zip(exact.pairs(), differing, strict=True):
            if step in keys_of:
                assert_ties(pruned, step, keys_of[step], true.abs(), wrong)


@torch.no_grad()
def round_weights_(model: Any) -> None:
    """Each weight up or down by float32's unit roundoff."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.original_model.parameters():
        up = torch.randint(0, 2, weight.shape, generator=generator)
        weight.mul_(1 + 2.0**-24 * (2 * up - 1))


def assert_ties(
    pruned: clrp.AttributionGraph, step: tuple[int, int], keys: Tensor, size: Tensor, wrong: Tensor
) -> None:
    """These edges weigh as much as what is kept last, but for how far float32 is off there."""
    settings, slack = dict(pruned.history[-1].parameters), 0.0
    boundary = float(settings.get("threshold") or 0.0)
    if "threshold" not in settings:
        kept = edges_of(pruned)[step][0]
        last = kept[size[kept].argmin()]
        boundary, slack = float(size[last]), float(wrong[last])
    gaps = (size[keys] - boundary).abs()
    assert bool((gaps <= wrong[keys] + slack).all()), (step, keys, gaps)


@pytest.mark.parametrize("name", TILEABLE)
def test_in_tiles_a_family_is_what_it_is_plainly(name: str) -> None:
    setting = Setting.of(name)
    model = boot(name, setting.window)
    plain, tiled = attributions(model, setting)
    assert_same(plain, tiled)
    assert tiled.memory == f"tiled (tile {setting.tile})"
    ways = Ways.run(model, setting)
    if has_window(name):  # one that hides nothing would show nothing
        reach = [
            int((keys // LENGTH - keys % LENGTH)[weights != 0].max())
            for keys, weights in edges_of(ways.plain).values()
        ]
        assert any(1 < r <= setting.window for r in reach)
    for pair in ways.pairs():
        assert_same_masses(*pair)
    assert_same_but_for_rounding(name, ways, setting)


def test_windows_are_shorter_and_longer_than_tiles() -> None:
    windowed = [Setting.of(name) for name in TILEABLE if has_window(name)]
    assert {(s.window > s.tile, s.window % s.tile == 0) for s in windowed} == {
        (False, False), (True, False)
    }  # fmt: skip


# ---------------------------------------------------------------- what no cache can split


@pytest.mark.parametrize("name", sorted(NOT_TILEABLE))
def test_what_cannot_run_in_tiles_says_what_it_needs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = boot(name, 50)
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    calls: list[tuple[Any, bool]] = [(clrp.attribute, False), (clrp.attribution_graph, True)]
    for call, edges in calls:
        fused = fused_blocks(model, "auto", LENGTH)
        pruned = {"mass": 0.9} if edges else {}
        need, need_pruned = (
            memory.gib(
                memory.plain_bytes(model, LENGTH, graphs=int(edges), pruned=few, fused=fused)
            )
            for few in (False, bool(pruned))
        )
        with pytest.raises(NotTileableError) as refused:
            call(model, IDS, objective, memory="tiled", tile=256, progress=False)
        assert str(refused.value).startswith("This model cannot run in tiles: ")
        assert NOT_TILEABLE[name] in str(refused.value)
        assert f"Use memory='plain', which needs about {need}" in str(refused.value)
        assert call(model, IDS, objective).memory == "plain"  # where it fits
        with monkeypatch.context() as scarce:
            scarce.setattr(memory, "free_bytes", lambda device: 1024)  # noqa: ARG005
            with pytest.raises(ModelStateError, match=f"about {need_pruned} without tiles") as no:
                call(model, IDS, objective, progress=False, **pruned)
        assert NOT_TILEABLE[name] in str(no.value)
