"""The user's hooks are part of the model that is explained, plainly and in tiles.

Random hooks at random places: Δℓ is that of the model's own forward with them, and relevance that
of the computation written out with the hook in it (``written.py``; ``op_oracle.py`` for experts),
or the run is refused. Edges under hooks are tested where edges are.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hooking import delta, fresh, objective_of
from support.model_state import snapshot_of
from support.tiling import TILED, assert_same
from support.written import PLACES, Written
from torch import Tensor
from truth import zoo
from truth.families import boot, make_hf, random_tokens, true_float64
from truth.op_oracle import OpOracle

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.errors import ModelStateError, NotTileableError, UncoveredComponentError
from tl_contrastive_lrp.hooks.user_hooks import aside, observed, user_hooks

Edit = Callable[[Tensor], Tensor | None]
PLAIN: dict[str, Any] = {"memory": "plain"}
LENGTH = 11


def edits(a: int, b: int, cached: Tensor) -> dict[str, Edit]:
    """Hooks by kind, at positions a to b; what returns nothing writes in place, or only looks."""

    def write(x: Tensor) -> None:
        x[:, a:b] = 0.1

    def scale_in_place(x: Tensor) -> Tensor:
        x[:, a:b] *= 0.5
        return x

    def zero(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, a:b] = 0.0
        return out

    def mean(x: Tensor) -> Tensor:
        out = x.clone()
        out[:, a:b] = x[:, a:b].mean(1, keepdim=True)
        return out

    grown = cached.clone().requires_grad_(True) * 1.0

    return {
        "look": lambda x: print(end="" if x.isfinite().all() else " "),
        "the same": lambda x: x,
        "write": write,
        "scale in place": scale_in_place,
        "zero": zero,
        "all zero": torch.zeros_like,
        "cached": lambda x: cached.to(x),
        "cached with its graph": lambda x: grown.to(x),
        "part cached": lambda x: torch.cat([x[:, :a], cached[:, a:b].to(x), x[:, b:]], 1),
        "detach": lambda x: x.detach(),
        "scale": lambda x: 1.7 * x,
        "mean": mean,
        "shift": lambda x: x.roll(1, 1),
        # no rule is known for a sine: its ordinary gradient has to be asked for
        "bend": lambda x: x + 0.2 * clrp.rules.ordinary(torch.sin(3.0 * x)),
    }


LOOKING = ("look", "the same")
KINDS = tuple(edits(0, 1, torch.zeros(())))
# A tensor that more than one computation uses: written into, it changes for all of them.
SHARED = ("ln1.hook_in", "ln2.hook_in", "ln1.hook_out", "ln2.hook_out", "hook_out", "hook_pattern")


class Hooked(Written):
    """With a constant that a hook puts in a value's place as a leaf, so that it has a gradient."""

    def at(self, name: str, x: Tensor) -> Tensor:
        had = x.requires_grad
        if name in self.edits:
            changed = self.edits.pop(name)(x.clone())
            x = x if changed is None else changed
            x = x.detach().requires_grad_(True) if had and not x.requires_grad else x
        return super().at(name, x)


def written_in(edit: Edit, kind: str = "") -> Callable[[Tensor], Tensor]:
    """The edit as a function of a value, for computations written out."""

    def changed(x: Tensor) -> Tensor:
        returned = edit(x)
        if returned is None:
            return x
        # what another forward computed is a constant here
        return returned.detach() if kind == "cached with its graph" else returned

    return changed


def as_hook(edit: Edit) -> Any:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        return edit(tensor)

    return hook_fn


def cached_at(model: Any, point: str) -> Tensor:
    """What another prompt has at a HookPoint."""
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept["x"] = tensor.detach().clone()

    with torch.no_grad():
        model.run_with_hooks(random_tokens(1, LENGTH, seed=5), fwd_hooks=[(point, keep)])
    return kept["x"]


def own_delta(model: Any, ids: Tensor) -> float:
    with torch.no_grad():
        return float(delta(model(ids)))


def drawn(name: str, count: int) -> list[tuple[str, str, int, int, str]]:
    """(point, kind, first, stop, rules) of random hooks."""
    draw, cases = random.Random(f"hooks of {name}"), []
    while len(cases) < count:
        place, kind = draw.choice(PLACES[name]), KINDS[len(cases) % len(KINDS)]
        if kind in ("write", "scale in place") and place.endswith(SHARED):
            continue
        a, b = sorted(draw.sample(range(LENGTH + 1), 2))
        rules = draw.choice(["attnlrp", "gim"])
        cases.append((f"blocks.{draw.choice([0, 1])}.{place}", kind, a, b, rules))
    return cases


def close(got: Tensor, wanted: Tensor, largest: float, what: str) -> None:
    assert float((got.double() - wanted.double()).abs().max()) <= 1e-8 * largest, what


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma2"])
def test_random_hooks_give_the_models_own_delta_and_autograds_relevance(name: str) -> None:
    model, ids, hf = boot(name), random_tokens(1, LENGTH), make_hf(name)
    clrp.next_token_table(model, ids, **TILED)  # transformers' own hooks come with the first cache
    before, refused = snapshot_of(model), 0
    with true_float64(model):
        for point, kind, a, b, rules in drawn(name, len(KINDS)):
            case = f"{kind} at {point}[{a}:{b}], {rules}"
            edit = edits(a, b, cached_at(model, point))[kind]
            truth = Hooked(hf, {point: written_in(edit, kind)}, rules)
            delta(truth.run(ids)).backward()
            with model.hooks(fwd_hooks=[(point, as_hook(edit))]):
                own = own_delta(model, ids)
                settings = {"rules": rules, "progress": False}
                try:
                    got = clrp.attribute(model, ids, objective_of(model), **PLAIN, **settings)
                    names = [n for n in truth.nodes if "scale" not in n and "normalized" not in n]
                    logits, relevance = clrp.run_with_relevance(
                        model, ids, objective_of(model), names, rules=rules
                    )
                    graph = clrp.attribution_graph(
                        model, ids, objective_of(model), **PLAIN, **settings
                    )
                except (ModelStateError, UncoveredComponentError):
                    assert kind not in LOOKING, case  # and is no silently wrong number
                    refused += 1
                    continue
                if kind in LOOKING:
                    tiled = clrp.attribute(
                        model, ids, objective_of(model), **{**TILED, **settings, "tile": 1 + a}
                    )
                    close(tiled.resid, got.resid, 1e3 * float(got.resid.abs().max()), case)
                else:
                    with pytest.raises(NotTileableError, match=f"The hook at {point}"):
                        clrp.attribute(model, ids, objective_of(model), **{**TILED, **settings})
            assert abs(got.delta - own) <= 1e-9 * max(1.0, abs(own)), case
            assert abs(float(delta(logits)) - own) <= 1e-9 * max(1.0, abs(own)), case
            assert abs(graph.delta - own) <= 1e-9 * max(1.0, abs(own)), case
            wanted = {
                n: torch.zeros_like(x) if x.grad is None else x.detach() * x.grad
                for n, x in truth.nodes.items()
            }
            largest = max(float(r.abs().max()) for r in wanted.values())
            for node in names:
                found = relevance[node].reshape(wanted[node].shape)
                close(found, wanted[node], largest, f"{case}: {node}")
            close(got.tokens, wanted["embed.hook_out"].sum(-1)[0], largest, case)
            last = f"blocks.{model.cfg.n_layers - 1}.hook_out"
            rows = [f"blocks.{i}.hook_in" for i in range(model.cfg.n_layers)]
            resid = torch.stack([wanted[n].sum(-1)[0] for n in (*rows, last)])
            close(got.resid, resid, largest, case)
            close(graph.relevance, resid, largest, case)
            for layer, heads in enumerate(got.heads):
                z = wanted[f"blocks.{layer}.attn.o.hook_in"].sum(-1)[0].T
                close(heads, z, largest, case)
    assert refused < len(KINDS) / 2
    assert snapshot_of(model) == before


EXPERT_PLACES = ("hook_in", "hook_attn_out", "hook_mlp_out")


@pytest.mark.parametrize("place", EXPERT_PLACES)
def test_hooks_on_a_model_with_experts(place: str) -> None:
    """Edits put into Hugging Face's own model, against the operation-level truth."""
    name, ids = "qwen3_moe", zoo.random_tokens(1)
    model, draw = zoo.boot(name), random.Random(place)
    cached = torch.randn(1, ids.shape[1], model.cfg.d_model, dtype=torch.float64)
    seed = torch.zeros(1, ids.shape[1], model.cfg.d_vocab, dtype=torch.float64)
    seed[0, -1, 7], seed[0, -1, 11] = 1.0, -1.0
    for kind in ("scale", "mean", "shift", "part cached", "scale in place"):
        a, b = sorted(draw.sample(range(ids.shape[1] + 1), 2))
        edit, hf = written_in(edits(a, b, cached)[kind]), zoo.make_hf(name)
        layer = hf.model.layers[1]
        if place == "hook_in":
            layer.register_forward_pre_hook(lambda _, args, edit=edit: (edit(args[0].clone()),))
        part = layer.self_attn if place == "hook_attn_out" else layer.mlp
        if place != "hook_in":
            part.register_forward_hook(
                lambda _, __, out, edit=edit: (
                    edit(out) if isinstance(out, Tensor) else (edit(out[0]), *out[1:])
                )
            )
        truth = OpOracle(hf, ids, seed, "attnlrp")
        hook = (f"blocks.1.{place}", as_hook(edits(a, b, cached)[kind]))
        with model.hooks(fwd_hooks=[hook]):
            own = own_delta(model, ids)
            got = clrp.attribute(model, ids, objective_of(model), rules="attnlrp", **PLAIN)
        assert abs(got.delta - own) <= 1e-6 * max(1.0, abs(own)), kind
        sites = {n: truth.node(n)[0] for n in truth.relevance}
        largest = max(float(r.abs().max()) for r in sites.values())
        for site, row in zip(got.sites, got.resid, strict=True):
            off = float((row.double() - sites[site]).abs().max())
            assert off <= 1e-5 * largest, (kind, site, off / largest)


# ---------------------------------------------------------------- in tiles


def late(x: Tensor, hook: Any) -> None:  # noqa: ARG001
    """Finds an empty range in every small tile."""
    x[:, 30:40] = 0.0


def guarded(x: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
    """Does nothing unless the prompt is whole."""
    return 0.5 * x if x.shape[1] > 30 else None


def only_in_place_of_data(x: Tensor, hook: Any) -> None:  # noqa: ARG001
    if x.shape[1] > 30:
        x.data[:, 35] = 0.0


def steers_gradient(x: Tensor, hook: Any) -> None:  # noqa: ARG001
    if x.requires_grad:
        x.register_hook(lambda g: 0.0 * g)


@pytest.mark.parametrize(
    ("point", "edit"),
    [
        ("blocks.0.hook_attn_out", late),
        ("blocks.0.attn.hook_v", guarded),
        ("blocks.0.hook_mlp_out", only_in_place_of_data),
    ],
)
def test_what_tiles_cannot_honour(point: str, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 48)
    objective, settings = objective_of(model), {**TILED, "tile": 7 if edit is late else 16}
    calls: dict[str, Callable[..., Any]] = {
        "nodes": lambda **how: clrp.attribute(model, ids, objective, **how).delta,
        "several": lambda **how: clrp.attribute_each(model, ids, [objective], **how)[0].delta,
        "edges": lambda **how: clrp.attribution_graph(model, ids, objective, **how).delta,
    }
    clrp.next_token_table(model, ids, **settings)  # with it come hooks of transformers' own
    without, before = own_delta(model, ids), snapshot_of(model)
    with model.hooks(fwd_hooks=[(point, edit)]):
        own, on = own_delta(model, ids), snapshot_of(model)
        assert abs(own - without) > 1e-4
        with torch.no_grad():
            logits = model(ids)[0, -1]
        for call in calls.values():
            with pytest.raises(NotTileableError, match=r"The hook at blocks.*Use memory='plain'"):
                call(**settings)
            assert snapshot_of(model) == on
            assert abs(call(memory="auto", progress=False) - own) <= 1e-5
        with pytest.raises(NotTileableError, match="The hook at blocks"):
            clrp.next_token_table(model, ids, **settings)
        # room for the forward alone, then for neither
        room = int(0.95 * memory.plain_bytes(model, 48))
        monkeypatch.setattr(memory, "free_bytes", lambda _: room)
        table = clrp.next_token_table(model, ids, k=3, progress=False)
        assert table["id"].tolist() == logits.topk(3).indices.tolist()
        for call in calls.values():
            with pytest.raises(ModelStateError, match=r"needs about .* are free.*hook at blocks"):
                call(memory="auto", progress=False)
        monkeypatch.setattr(memory, "free_bytes", lambda _: 1024)
        for call in (*calls.values(), lambda **how: clrp.next_token_table(model, ids, **how)):
            with pytest.raises(NotTileableError, match="Without the hook, tiles work"):
                call(**settings)
    assert snapshot_of(model) == before


@pytest.mark.parametrize("point", ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_pattern",
                                   "blocks.1.attn.hook_q", "unembed.hook_out"])  # fmt: skip
def test_hooks_that_look_are_shown_the_whole_prompt_once(point: str) -> None:
    model, ids, seen = fresh("qwen3"), random_tokens(1, 40), list[Tensor]()
    objective = objective_of(model)

    def look(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen.append(tensor.detach())

    def same(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return tensor

    plain = clrp.attribute(model, ids, objective, **PLAIN)
    bare = clrp.attribute(model, ids, objective, **TILED)
    model.add_hook(point, look)
    model.hook_dict[point].add_perma_hook(same)
    own_delta(model, ids)
    (wanted,) = seen
    for call in (
        lambda: clrp.attribute(model, ids, objective, **TILED),
        lambda: clrp.attribution_graph(model, ids, objective, mass=0.9, **TILED),
        lambda: clrp.next_token_table(model, ids, **TILED),
        lambda: clrp.attribute(model, ids, objective, **PLAIN),
    ):
        seen.clear()
        found = call()
        (shown,) = seen
        assert torch.equal(shown, wanted)
        if isinstance(found, clrp.Attribution):
            assert_same(plain, found)
            assert torch.equal(found.resid, (bare if "tiled" in found.memory else plain).resid)


def test_hooks_of_the_backward_are_left_to_the_plain_way() -> None:
    model, ids = boot("gpt2", torch.float32), random_tokens(1, 40)
    objective, point = objective_of(model), "blocks.1.hook_resid_pre"

    def halve(gradient: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 0.5 * gradient

    alone = clrp.attribute(model, ids, objective, **PLAIN)
    with model.hooks(bwd_hooks=[(point, halve)]):
        plain = clrp.attribute(model, ids, objective, **PLAIN)
        assert torch.allclose(plain.tokens, 0.5 * alone.tokens, atol=1e-6)
        with pytest.raises(NotTileableError, match=r"The backward hook at blocks\.1\.hook_in"):
            clrp.attribute(model, ids, objective, **TILED)
        clrp.next_token_table(model, ids, **TILED)  # runs no backward
    with model.hooks(fwd_hooks=[(point, steers_gradient)]):
        assert not clrp.attribute(model, ids, objective, **PLAIN).tokens.any()
        with pytest.raises(NotTileableError, match="asks for its tensor's gradient"):
            clrp.attribute(model, ids, objective, **TILED)


def test_the_demo_models_tool_prompt() -> None:
    """Zeros at 50 positions of 1,250: as in the model's own forward, or a refusal."""
    model = clrp.load_demo_model()
    case = next(c for c in clrp.load_demo_cases("tool") if c.n_tokens == 1250)
    ids, objective = model.to_tokens(case.prompt), clrp.logit_diff(
        model, case.target_id, case.contrast_id
    )  # fmt: skip
    n = ids.shape[1]

    def hide(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        x[:, n - 60 : n - 10] = 0.0

    with model.hooks(fwd_hooks=[("blocks.1.hook_attn_out", hide)]):
        with torch.no_grad():
            own = float(objective(model(ids)))
        assert abs(own - 6.9375) < 1e-3
        got = clrp.attribute(model, ids, objective)
        assert got.memory == "plain"
        assert abs(got.delta - own) < 1e-5
        with pytest.raises(NotTileableError, match=r"blocks\.1\.hook_attn_out"):
            clrp.attribute(model, ids, objective, **{**TILED, "tile": 256})


# ---------------------------------------------------------------- what hooks did


def test_user_hooks_are_found_watched_and_set_aside() -> None:
    model, ids = fresh("gpt2"), random_tokens(1, 9)
    assert user_hooks(model) == ()
    before = own_delta(model, ids)

    def edit(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return 2.0 * x

    def late_write(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        x[:, 100:] = 1.0

    model.add_hook("blocks.0.hook_mlp_out", edit)
    model.add_hook("blocks.0.hook_mlp_out", lambda g, hook: None, dir="bwd")  # noqa: ARG005
    model.hook_dict["blocks.1.attn.hook_v"].add_perma_hook(late_write)
    model.original_model.register_forward_hook(lambda *_: None)
    hooks = user_hooks(model)
    assert [(h.kind, h.on_hook_point) for h in hooks].count(("forward", True)) == 2
    assert sorted(h.kind for h in hooks) == ["backward", "forward", "forward", "forward"]
    assert "blocks.0.hook_mlp_out" in str(next(h for h in hooks if h.fn is edit))
    with_them, state = own_delta(model, ids), snapshot_of(model)
    with observed(hooks) as seen:
        assert own_delta(model, ids) == with_them
    calls = {call.hook.fn: call for call in seen}
    assert calls[edit].how == "returned"
    assert calls[edit].changed
    assert calls[late_write].how == "in place"  # though no value is another
    assert not calls[late_write].changed
    assert not calls[late_write].looked_only
    assert sum(call.looked_only for call in seen) == 1
    with aside(hooks):
        assert own_delta(model, ids) == before
    assert snapshot_of(model) == state
    with pytest.raises(RuntimeError, match="within"), aside(hooks), observed(()):
        raise RuntimeError("within")
    assert snapshot_of(model) == state
