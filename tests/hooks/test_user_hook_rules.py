"""What a user's hook computes has a rule, or is refused by the names of hook and HookPoint.

Truth is ``written.py``: the whole model in plain torch with every rule as a detached factor, the
hook's computation written out the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.hooking import delta, fresh, objective_of, off
from support.model_state import snapshot_of
from support.written import Written
from torch import Tensor
from truth.families import boot, make_hf, random_tokens, true_float64
from truth.sparse_autoencoder import ERRORS, KINDS, Error, Kind, SparseAutoencoder

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError, UncoveredComponentError

F64 = torch.float64
OUT = "blocks.0.mlp.hook_out"
READ = ("embed.hook_out", "blocks.0.hook_in", "blocks.1.hook_in", "blocks.0.attn.hook_out")
Edit = Callable[[Tensor], Tensor]


def half(y: Tensor) -> Tensor:
    return 0.5 * y + (0.5 * y).detach()


def hook_of(edit: Edit) -> Callable[..., Tensor]:
    return lambda tensor, hook: edit(tensor)  # noqa: ARG005


def compare(name: str, point: str, edit: Edit, written: Edit, rules: str = "attnlrp") -> Any:
    """Relevance at nodes on either side of the hook; returns the coverage's rows for it."""
    model, ids = boot(name, F64), random_tokens(1)
    truth = Written(make_hf(name, F64), {point: written}, rules)
    logits = truth.run(ids)
    delta(logits).backward()
    with true_float64(model), model.hooks(fwd_hooks=[(point, hook_of(edit))]):
        got, cache = clrp.run_with_relevance(model, ids, objective_of(model), READ, rules=rules)
        result = clrp.attribute(model, ids, objective_of(model), rules=rules, memory="plain")
    assert off(got, logits) < 1e-10
    for node in READ:
        x = truth.nodes[node]
        assert x.grad is not None
        assert off(cache[node], x * x.grad) < 1e-9, node
    embedded = truth.nodes["embed.hook_out"]
    assert embedded.grad is not None
    assert off(result.tokens, (embedded * embedded.grad).sum(-1)[0]) < 1e-9
    return [row for row in result.coverage.rows if row.component == point]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_spliced_sparse_autoencoders(kind: Kind, error: Error) -> None:
    sae = SparseAutoencoder(24, kind, error).to(F64)
    rows = compare("qwen3", OUT, sae, sae.written)
    assert all(row.class_name.startswith("user hook") for row in rows)
    rules = {(row.operation, row.rule) for row in rows}
    assert any(rule == "identity" for _, rule in rules)
    assert ("sub", "constant") in rules if error == "constant" else len(rules) == 1
    assert all(p.grad is None for p in sae.parameters())


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
@pytest.mark.parametrize("point", ["blocks.1.hook_in", "blocks.0.attn.hook_out"])
def test_sparse_autoencoders_elsewhere_and_under_gim(point: str, rules: str) -> None:
    """Under GIM, activations keep their ordinary gradient: the same for a ReLU."""
    sae = SparseAutoencoder(24, "relu", "constant").to(F64)
    compare("gpt2", point, sae, sae.written, rules)


def _gelu(x: Tensor) -> Tensor:
    return x + torch.nn.functional.gelu(2.0 * x)


def _gelu_written(x: Tensor) -> Tensor:
    u = 2.0 * x
    return x + u * (torch.nn.functional.gelu(u) / u).detach()


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def _rms_written(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5).detach()


def _project_out(x: Tensor, direction: Tensor) -> Tensor:
    unit = direction / direction.norm()
    return x - (x @ unit)[..., None] * unit


def _scaled_in_place(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 2:5] *= 0.5
    x[:, 1] = 0.25
    return x


def _scaled(x: Tensor) -> Tensor:
    factor = torch.ones(x.shape[1], 1, dtype=x.dtype)
    factor[2:5] = 0.5
    factor[1] = 0.0
    constant = torch.zeros(x.shape[1], 1, dtype=x.dtype)
    constant[1] = 0.25
    return factor * x + constant


WITH_RULES: dict[str, tuple[Edit, Edit, str]] = {
    "gelu": (_gelu, _gelu_written, "identity"),
    "product": (lambda x: x * x.roll(1, -1), lambda x: half(x * x.roll(1, -1)), "half"),
    "rms norm": (_rms, _rms_written, "constant"),
    "written in place": (_scaled_in_place, _scaled, "gradient"),
    "steering": (lambda x: x + 0.3, lambda x: x + 0.3, "gradient"),
    "norm as a constant": (
        lambda x: x + 0.1 * x.norm(dim=-1, keepdim=True),
        lambda x: x + (0.1 * x.norm(dim=-1, keepdim=True)).detach(),
        "constant",
    ),
    "marked": (
        lambda x: x + clrp.rules.ordinary(torch.sin(x)),
        lambda x: x + torch.sin(x),
        "gradient",
    ),
}


@pytest.mark.parametrize("name", WITH_RULES)
def test_operations_with_rules(name: str) -> None:
    edit, written, rule = WITH_RULES[name]
    rows = compare("qwen3", OUT, edit, written)
    assert rule in {row.rule for row in rows}


def test_directions_of_parameters_are_no_computed_factors() -> None:
    """x·W with W made of a model's parameters is linear in x: nothing is halved."""
    made = make_hf("qwen3", F64)
    direction = made.lm_head.weight[5] - made.lm_head.weight[9]
    assert direction.requires_grad
    edit = partial(_project_out, direction=direction)
    compare("qwen3", OUT, edit, partial(_project_out, direction=direction.detach()))
    assert made.lm_head.weight.grad is None


def bend(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
    return tensor + torch.sin(tensor)


WITHOUT_RULES: dict[str, Edit] = {
    "sin": torch.sin,
    "exp": lambda x: (-x.abs()).exp(),
    "sigmoid": torch.sigmoid,
    "division": lambda x: x / (1.0 + x.roll(1, -1).abs()),
    "squared in place": lambda x: x.clone().pow_(2),
    "a cubed slice": lambda x: torch.cat((x[:, :1], x[:, 1:] ** 3), 1),
    "sign": lambda x: x * torch.sign(x),
    "rounded": lambda x: x + torch.round(x),
}


@pytest.mark.parametrize("name", WITHOUT_RULES)
def test_operations_without_rules_are_refused(name: str) -> None:
    model, ids = boot("qwen3"), random_tokens(1)
    before = model(ids)
    with model.hooks(fwd_hooks=[(OUT, hook_of(WITHOUT_RULES[name]))]):
        with pytest.raises(UncoveredComponentError, match=rf"(?s)<lambda> at {OUT}.*clrp.rules"):
            clrp.attribute(model, ids, objective_of(model), rules="attnlrp")
        (handle,) = model.hook_dict[OUT].fwd_hooks
        assert (
            model.hook_dict[OUT]
            ._forward_hooks[handle.hook.id]
            .__qualname__.startswith("HookPoint.add_hook")
        )
    assert torch.equal(model(ids), before)


def test_every_way_in_refuses() -> None:
    model, ids = boot("qwen3"), random_tokens(1)
    objective, hooks = objective_of(model), [(OUT, bend)]
    refused = pytest.raises(UncoveredComponentError, match=f"bend at {OUT}")
    with model.hooks(fwd_hooks=hooks):
        with refused:
            clrp.run_with_relevance(model, ids, objective)
        with refused:
            clrp.attribution_graph(model, ids, objective, progress=False)
        with refused:
            clrp.attribution_graph(model, ids, objective, layers=[0], progress=False)
        with clrp.lrp(model), refused:
            model(ids)
    with clrp.lrp(model), model.hooks(fwd_hooks=hooks), refused:
        model(ids)
    with clrp.lrp(model), torch.no_grad():
        model.run_with_hooks(ids, fwd_hooks=hooks)  # no gradient, no relevance
    assert not model.hook_dict[OUT]._forward_hooks
    assert "register_forward_hook" not in vars(model.hook_dict[OUT])


def test_ordinary_gradients_are_what_the_gradient_rules_ask_for() -> None:
    model, ids = boot("qwen3", F64), random_tokens(1)
    kept: list[Tensor] = []

    def start(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept.append(tensor.detach().requires_grad_(True))
        return kept[-1]

    with true_float64(model), model.hooks(fwd_hooks=[(OUT, bend)]):
        with model.hooks(fwd_hooks=[("embed.hook_out", start)]):
            (gradient,) = torch.autograd.grad(delta(model(ids)), kept[0])
        got = clrp.attribute(model, ids, objective_of(model), rules="gradient", memory="plain")
    assert off(got.tokens, (kept[0] * gradient).sum(-1)[0]) < 1e-9
    (row,) = (row for row in got.coverage.rows if row.component == OUT)
    assert row.class_name == "user hook bend"
    assert (row.operation, row.rule) == ("sin", "gradient")


def test_lookers_leave_no_row_and_editors_one() -> None:
    model, ids, seen = boot("qwen3"), random_tokens(1), []

    def look(tensor: Tensor, hook: Any) -> Tensor:
        seen.append(hook.name)
        return tensor

    def patched(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return torch.zeros_like(tensor)

    points = ["blocks.0.attn.q.hook_out", OUT, "blocks.1.hook_in"]
    with model.hooks(fwd_hooks=[(p, look) for p in points]), clrp.lrp(model) as coverage:
        before = coverage.rows
        model(ids)
        assert coverage.rows == before
        with model.hooks(fwd_hooks=[(OUT, patched)]):
            model(ids)
            model(ids)
        (row,) = (row for row in coverage.rows if row not in before)
    assert row.class_name == "user hook patched"
    assert (row.component, row.operation, row.rule) == (OUT, "replacement", "constant")
    assert len(seen) == 9


def test_what_is_said_before_any_hook_has_run() -> None:
    model = boot("qwen3")
    assert clrp.audit(model).hooks == ()
    with model.hooks(fwd_hooks=[(OUT, bend)]):
        report = clrp.audit(model)
        (row,) = (row for row in clrp.coverage(model).rows if row.component == OUT)
    assert report.hooks == (OUT,)
    assert report.clean
    assert f"hooks that you put at {OUT} are not part of this audit" in str(report)
    assert (row.class_name, row.attached) == ("user hook bend", "seen when it runs")
    assert clrp.audit(model).hooks == ()


@pytest.mark.parametrize("place", ["module", "module before", "point before", "point, keywords"])
def test_torch_hooks_are_judged_as_hook_functions_are(place: str) -> None:
    model, ids = boot("qwen3"), random_tokens(1)
    module, point = model.blocks[0].mlp, model.hook_dict[OUT]
    clrp.attribute(model, ids, objective_of(model))
    handle = {
        "module": lambda: module.register_forward_hook(lambda _, args, y: torch.sin(y)),  # noqa: ARG005
        "module before": lambda: module.register_forward_pre_hook(
            lambda _, args, kwargs: ((torch.sin(args[0]), *args[1:]), kwargs), with_kwargs=True
        ),
        "point before": lambda: point.register_forward_pre_hook(lambda _, args: torch.sin(args[0])),
        "point, keywords": lambda: point.register_forward_hook(
            lambda _, args, kwargs, y: torch.sin(y),  # noqa: ARG005
            with_kwargs=True,
        ),
    }[place]()
    try:
        for call in (clrp.attribute, clrp.attribution_graph, clrp.run_with_relevance):
            with pytest.raises(UncoveredComponentError, match=r"at blocks\.0\.mlp.*\n  Sin"):
                call(model, ids, objective_of(model))
        with pytest.raises(UncoveredComponentError, match="Sin"), clrp.lrp(model):
            model(ids)
        assert any("<lambda>" in row.class_name for row in clrp.coverage(model).rows)
        got = clrp.attribute(model, ids, objective_of(model), rules="gradient")
        with torch.no_grad():
            assert abs(got.delta - float(delta(model(ids)))) < 1e-6
    finally:
        handle.remove()
    clrp.attribute(model, ids, objective_of(model))


def test_torch_hooks_put_on_inside_the_rules_are_judged() -> None:
    model, ids = fresh("qwen3"), random_tokens(1)
    with clrp.lrp(model):
        model.blocks[0].mlp.register_forward_hook(lambda _, args, y: torch.sin(y))  # noqa: ARG005
        with pytest.raises(UncoveredComponentError, match="Sin"):
            model(ids)
    assert not any("register_forward_hook" in vars(m) for m in model.modules())


@pytest.mark.parametrize("memory", ["plain", "tiled"])
def test_a_hook_that_adds_one_is_refused(memory: Any) -> None:
    """What the other one does would be lost in tiles, and get no rule plainly."""
    model, ids = fresh("qwen3"), random_tokens(1)

    def add(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        model.add_hook("blocks.1.hook_mlp_out", bend)

    model.add_hook("blocks.0.hook_mlp_out", add)
    with pytest.raises(ModelStateError, match=r"put at blocks\.1\..*while the model ran"):
        clrp.attribute(
            model, ids, objective_of(model), memory=memory,
            tile=3 if memory == "tiled" else None, progress=False,
        )  # fmt: skip


def test_a_hook_that_takes_the_rules_off_is_refused() -> None:
    model, ids = fresh("qwen3"), random_tokens(1)

    def reset(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
        model.reset_hooks()

    with torch.no_grad():
        model(ids)  # with the first run come hooks of transformers' own
    before = snapshot_of(model)
    for call in (
        lambda: clrp.attribute(model, ids, objective_of(model)),
        lambda: clrp.run_with_relevance(model, ids, objective_of(model), "embed.hook_out"),
    ):
        model.add_hook("blocks.0.hook_mlp_out", reset)
        with pytest.raises(ModelStateError, match=r"removed from.*Remove only your own hooks"):
            call()
    with pytest.raises(ModelStateError, match="removed from"), clrp.lrp(model):
        model.reset_hooks()
    assert snapshot_of(model) == before


def test_a_module_in_a_hookpoints_place_is_refused_with_what_to_type() -> None:
    """SAELens' bridge takes the HookPoint out and puts its own module there."""
    model, ids = fresh("qwen3"), random_tokens(1)
    sae = SparseAutoencoder(24, "relu").eval()
    model.blocks[0].mlp.hook_out = sae
    with pytest.raises(UncoveredComponentError, match=r"SparseAutoencoder.*fwd_hooks=\[\("):
        clrp.attribute(model, ids, objective_of(model))


def test_reading_and_editing_inside_an_autoencoder() -> None:
    """Its own HookPoints may be read, and features changed, as SAELens' users do."""
    sae, kept = SparseAutoencoder(24, "jumprelu", "constant").to(F64), []

    def ablate(acts: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        kept.append(acts)
        return acts * (torch.arange(acts.shape[-1]) != 3)

    off_by_one = SparseAutoencoder(24, "jumprelu", "none").to(F64)
    with torch.no_grad():
        off_by_one.W_dec[3] = 0.0
    sae.hook_sae_acts_post.add_hook(ablate)
    sae.error = "none"
    compare("qwen3", OUT, sae, off_by_one.written)
    assert kept
