"""A user's edits inside the rules, against the computation written out (``written.py``)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.grids import grid
from support.hooking import delta, leaf, off, reader
from support.written import PLACES, Written, patch
from torch import Tensor
from truth.families import boot, make_hf, random_tokens, true_float64

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "patch": patch,
    "steer": lambda t: t + 0.3,
    "scale": lambda t: 1.7 * t,
    # no rule is known for a sine: its ordinary gradient has to be asked for
    "bend": lambda t: t + 0.2 * clrp.rules.ordinary(torch.sin(3.0 * t)),
}
RULES = ("attnlrp", "gim")


def _compare(
    name: str, point: str, edit: Callable[[Tensor], Tensor], order: str, rules: str
) -> None:
    """Logits, and the gradient at every node downstream and upstream of the edit."""
    model, ids = boot(name), random_tokens(2)
    written = Written(make_hf(name), {point: edit} if point else {}, rules)
    logits = written.run(ids)
    delta(logits).backward()
    assert written.edits == {}

    kept: dict[str, Tensor] = {}
    read = [n for n in written.nodes if not n.endswith(("hook_scale", "hook_normalized"))]
    user = (point, lambda tensor, hook: edit(tensor))  # noqa: ARG005
    edits = [user] if point else []
    readers = [reader(kept, n) for n in read if n != "embed.hook_out"]
    with true_float64(model):
        plain = model.run_with_hooks(ids, fwd_hooks=edits)
        if order == "user inside":
            with clrp.lrp(model, rules), model.hooks(fwd_hooks=[leaf(kept), *edits, *readers]):
                got = model(ids)
        else:
            hooks = model.hooks(fwd_hooks=[leaf(kept), *edits])
            with hooks, clrp.lrp(model, rules), model.hooks(fwd_hooks=readers):
                got = model(ids)
        assert torch.equal(got, plain)
        assert off(got, logits) < 1e-10
        wanted = {n: kept.get(n, kept["leaf"]) for n in read if n in kept or "embed" in n}
        gradients = torch.autograd.grad(delta(got), list(wanted.values()), allow_unused=True)
    reached = [x.grad for x in written.nodes.values() if x.grad is not None]
    largest = max(float(g.abs().max()) for g in reached)
    assert wanted.keys() >= {"embed.hook_out", "blocks.1.hook_in", "blocks.0.attn.o.hook_in"}
    for node, g in zip(wanted, gradients, strict=True):
        truth = written.nodes[node].grad
        truth = torch.zeros_like(written.nodes[node]) if truth is None else truth
        error = float((truth if g is None else g - truth).detach().abs().max())
        assert error < 1e-9 * largest, (node, error / largest)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", PLACES)
def test_the_written_computation_is_the_rule_sets(name: str, rules: str) -> None:
    _compare(name, "", lambda t: t, "user inside", rules)


@pytest.mark.parametrize(
    ("name", "point", "order", "rules"),
    grid(
        tuple(PLACES),
        sorted({p for places in PLACES.values() for p in places}),
        ("user inside", "user outside"),
        turns=RULES,
    ),
)
def test_edits_of_activations(name: str, point: str, order: str, rules: str) -> None:
    if point not in PLACES[name]:
        pytest.skip(f"{name} has no {point}")
    for kind, edit in EDITS.items():
        try:
            _compare(name, f"blocks.0.{point}", edit, order, rules)
        except AssertionError as error:
            raise AssertionError(f"edit {kind!r} of {point}: {error}") from error


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("order", ["user inside", "user outside"])
@pytest.mark.parametrize("point", ["hook_normalized", "hook_scale"])
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale/hook_normalized")
def test_edits_of_a_norms_statistics(name: str, point: str, order: str, rules: str) -> None:
    """TransformerLens leaves its native norm for these: relevance is right, or it is refused."""
    for kind, edit in EDITS.items():
        try:
            _compare(name, f"blocks.0.ln2.{point}", edit, order, rules)
        except ModelStateError as error:
            # the norm of gpt2 is not native: nothing to refuse
            if name == "gpt2" or point not in str(error):
                raise
        except AssertionError as error:
            raise AssertionError(f"edit {kind!r} of {point}: {error}") from error
