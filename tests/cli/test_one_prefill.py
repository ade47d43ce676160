"""On the command line the prompt's forward runs once: for candidates, relevance and graph."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cli_runs import PROMPT, Run, built, same
from transformer_lens.model_bridge import TransformerBridge

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.attribute import relevance_readings
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.plain import Forward
from tl_contrastive_lrp.engine.prefilled import prefill_prompt
from tl_contrastive_lrp.engine.reading import Slots
from tl_contrastive_lrp.graph.assembly.plain import graph_readings
from tl_contrastive_lrp.graph.assembly.plan import GraphPlan
from tl_contrastive_lrp.hooks.user_hooks import as_own

LONG = " ".join("abcdefghijklmnopqrstuvwx")  # longer than the few tokens on which models are tried
TILE = 5
SIDES = ("--target", " a", "--contrast", " b")
TILED = ("--memory", "tiled", "--tile", TILE)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The ids that go into the embedding of any model that is booted, forward by forward."""
    seen: list[tuple[int, ...]] = []
    boot = TransformerBridge.boot_transformers

    def booted(*arguments: Any, **options: Any) -> Any:
        model = boot(*arguments, **options)
        # as no user's hook: one is shown the prompt by a forward of its own
        model.embed.register_forward_pre_hook(
            as_own(lambda _, given: seen.append(tuple(given[0].flatten().tolist())))
        )
        return model

    monkeypatch.setattr(TransformerBridge, "boot_transformers", booted)
    return seen


def prompt_ids(model: Any) -> tuple[int, ...]:
    ids = tuple(model.to_tokens(LONG)[0].tolist())
    assert len(ids) > 20
    return ids


@pytest.mark.parametrize("command", ["explain", "graph"])
@pytest.mark.parametrize(
    "more",
    [
        (*SIDES, "--out", "r.html"),
        (*SIDES,),
        ("--contrast", " b", "--out", "r.html"),  # the target is the top token
        (),  # only candidates
    ],
)
def test_plainly_once(
    run: Run,
    folder: Path,
    bridge: Any,
    embedded: list[tuple[int, ...]],
    command: str,
    more: tuple[str, ...],
) -> None:
    ids = prompt_ids(bridge)
    done = run(command, "--model", folder, "--prompt", LONG, *more, "--json")
    assert done.code == (0 if more else 4), done
    assert embedded.count(ids) == 1
    if "--out" in more:
        assert "<svg" in Path("r.html").read_text()


@pytest.mark.parametrize("command", ["explain", "graph"])
@pytest.mark.parametrize("more", [(*SIDES, "--out", "r.html"), ()])
def test_in_tiles_once(
    run: Run,
    folder: Path,
    bridge: Any,
    embedded: list[tuple[int, ...]],
    command: str,
    more: tuple[str, ...],
) -> None:
    """The backward runs blocks again, never the embedding; the last position is a tile."""
    ids = prompt_ids(bridge)
    done = run(command, "--model", folder, "--prompt", LONG, *TILED, *more, "--json")
    assert done.code == (0 if more else 4), done
    ends = [*range(0, len(ids) - 1, TILE), len(ids) - 1, len(ids)]
    tiles = [ids[a:b] for a, b in pairwise(ends)]
    # What models are tried on, the prompt's beginning, ends at 13 tokens.
    for tile in tiles[3:]:
        assert embedded.count(tile) == tiles.count(tile), tile
    assert ids not in embedded


def test_the_demo_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from tl_contrastive_lrp import demo

    lengths: list[int] = []
    real = demo.load_demo_model

    def loaded(**options: Any) -> Any:
        model = real(**options)
        model.embed.register_forward_pre_hook(
            as_own(lambda _, given: lengths.append(given[0].shape[1]))
        )
        return model

    monkeypatch.setattr(demo, "load_demo_model", loaded)
    assert run("demo", "--out", "r.html").code == 0
    n = max(lengths)
    assert n > 20
    assert lengths.count(n) == 1


# ---- the forward itself ------------------------------------------------------------------


def prepared(model: Any, ids: torch.Tensor, *, tile: int | None = None, uses: int = 2) -> Any:
    calls: dict[int, Any] = {}
    readings = relevance_readings(model) + graph_readings(
        GraphPlan.of(model, clrp.DEFAULT_RULES), calls
    )
    way: Any = "plain" if tile is None else "tiled"
    plan = memory.plan_memory(model, ids.shape[1], way, tile)
    return prefill_prompt(model, ids, clrp.DEFAULT_RULES, readings, plan, calls=calls, uses=uses)


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("order", ["relevance first", "graph first"])
def test_results_of_a_shared_forward_are_those_of_their_own(
    bridge: Any, tile: int | None, order: str
) -> None:
    ids = bridge.to_tokens(LONG)
    tiles: dict[str, Any] = {"memory": "plain"}
    if tile is not None:
        tiles = {"memory": "tiled", "tile": tile}
    sides = {"target": " a", "contrast": " b"}
    expected = clrp.attribute(bridge, ids, **sides, **tiles, progress=False)
    graph = clrp.attribution_graph(bridge, ids, **sides, **tiles, progress=False)
    with torch.no_grad():
        logits = bridge(ids)[0, -1]
    shared = prepared(bridge, ids, tile=tile)
    torch.testing.assert_close(shared.logits, logits, rtol=1e-5, atol=1e-5)
    options: dict[str, Any] = {**sides, "prefilled": shared, "progress": False}
    if order == "graph first":
        found_graph = clrp.attribution_graph(bridge, ids, **options)
        found = clrp.attribute(bridge, ids, **options)
    else:
        found = clrp.attribute(bridge, ids, **options)
        found_graph = clrp.attribution_graph(bridge, ids, **options)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.resid, expected.resid)
    assert torch.equal(found.heads, expected.heads)
    assert found.ledger == expected.ledger
    assert found.memory == expected.memory
    assert same(found_graph, graph)
    # The truth is autograd's: gradients at the embeddings under the rules.
    leaf: list[torch.Tensor] = []

    def start(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        leaf.append(x.detach().requires_grad_(True))
        return leaf[0]

    target, contrast = (bridge.to_single_token(t) for t in (" a", " b"))
    with bridge.hooks(fwd_hooks=[("embed.hook_out", start)]), clrp.lrp(bridge):
        at = bridge(ids)[0, -1]
        (g,) = torch.autograd.grad(at[target] - at[contrast], leaf[0])
    torch.testing.assert_close(found.tokens, (leaf[0] * g).sum(-1)[0].detach(), rtol=0, atol=2e-5)
    assert all(p.grad is None and p.requires_grad for p in bridge.original_model.parameters())
    assert bridge.list_hooks() == {}


def test_several_objectives_of_a_shared_forward(bridge: Any) -> None:
    ids = bridge.to_tokens(LONG)
    asked = [clrp.logit_diff(bridge, " a", " b"), clrp.top_logit()]
    shared = prepared(bridge, ids)
    for found, objective in zip(
        clrp.attribute_each(bridge, ids, asked, prefilled=shared), asked, strict=True
    ):
        expected = clrp.attribute(bridge, ids, objective)
        assert torch.equal(found.tokens, expected.tokens)
    assert same(
        clrp.attribution_graph(bridge, ids, asked[0], prefilled=shared),
        clrp.attribution_graph(bridge, ids, asked[0]),
    )


def test_a_forward_serves_no_other_question(bridge: Any, folder: Path) -> None:
    ids, sides = bridge.to_tokens(LONG), {"target": " a", "contrast": " b"}
    shared = prepared(bridge, ids, uses=1)
    other = TransformerBridge.boot_transformers(str(folder), device="cpu")
    for call in (clrp.attribute, clrp.attribution_graph):
        with pytest.raises(ValueError, match="another model"):
            call(other, ids, **sides, prefilled=shared)
        with pytest.raises(ValueError, match="another prompt"):
            call(bridge, ids[:, 1:], **sides, prefilled=shared)
        with pytest.raises(ValueError, match="another rules"):
            call(bridge, ids, **sides, rules="cplrp", prefilled=shared)
    with pytest.raises(ValueError, match="not prepared for reading"):
        clrp.attribute(bridge, ids, **sides, neurons=True, prefilled=shared)
    scale = ("blocks.0.hook_attn_out", lambda x, hook: 2 * x)  # noqa: ARG005
    for call in (clrp.attribute, clrp.attribution_graph):
        # The forward was run without the hook: its value is not the model's own by now.
        with bridge.hooks([scale]), pytest.raises(ValueError, match="hooks have changed"):
            call(bridge, ids, **sides, prefilled=shared)
    clrp.attribute(bridge, ids, **sides, prefilled=shared)
    with pytest.raises(ValueError, match="used up"):
        clrp.attribute(bridge, ids, **sides, prefilled=shared)


def test_a_forward_serves_no_changed_model(bridge: Any) -> None:
    """What it explains would not be the model's own forward any more."""
    ids, sides = bridge.to_tokens(PROMPT), {"target": " a", "contrast": " b"}
    shared, weight = prepared(bridge, ids), next(bridge.original_model.parameters())
    hook = [("blocks.0.hook_mlp_out", lambda x, hook: 2.0 * x)]  # noqa: ARG005
    for call in (clrp.attribute, clrp.attribution_graph):
        with bridge.hooks(fwd_hooks=hook), pytest.raises(ValueError, match="hooks have changed"):
            call(bridge, ids, **sides, prefilled=shared)
    clrp.attribute(bridge, ids, **sides, prefilled=shared)
    with torch.no_grad():
        weight.mul_(1.0)
    with pytest.raises(ValueError, match="weights or your hooks"):
        clrp.attribution_graph(bridge, ids, **sides, prefilled=shared)


def test_a_graph_under_hooks_lets_go_of_the_forward_that_it_cannot_use(bridge: Any) -> None:
    ids, sides = bridge.to_tokens(PROMPT), {"target": " a", "contrast": " b"}
    with bridge.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda x, hook: 2.0 * x)]):  # noqa: ARG005
        shared, expected = prepared(bridge, ids), clrp.attribution_graph(bridge, ids, **sides)
        result = clrp.attribute(bridge, ids, **sides, prefilled=shared)
        graph = clrp.attribution_graph(bridge, ids, **sides, prefilled=shared)
        assert result.delta == graph.delta == expected.delta
        torch.testing.assert_close(graph.weight, expected.weight)
        assert not shared.plain.logits.requires_grad
        with pytest.raises(ValueError, match="used up"):
            clrp.attribute(bridge, ids, **sides, prefilled=shared)


def test_a_forward_for_relevance_alone_makes_no_graph(bridge: Any) -> None:
    ids = bridge.to_tokens(LONG)
    plan = memory.plan_memory(bridge, ids.shape[1], "plain", None)
    shared = prefill_prompt(bridge, ids, clrp.DEFAULT_RULES, relevance_readings(bridge), plan)
    with pytest.raises(ValueError, match=r"not prepared for edges of block 0"):
        clrp.attribution_graph(bridge, ids, target=" a", contrast=" b", prefilled=shared)


def test_the_last_use_lets_go_of_the_graph(bridge: Any) -> None:
    ids = bridge.to_tokens(PROMPT)
    shared = prepared(bridge, ids)
    plain: Forward = shared.plain
    assert isinstance(plain.slots, Slots)
    clrp.attribute(bridge, ids, target=" a", contrast=" b", prefilled=shared)
    torch.autograd.grad(plain.logits.sum(), plain.ends, retain_graph=True)
    clrp.attribution_graph(bridge, ids, target=" a", contrast=" b", prefilled=shared)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(plain.logits.sum(), plain.ends)
    assert plain.slots._seen == {}
    assert built(bridge).delta != 0
