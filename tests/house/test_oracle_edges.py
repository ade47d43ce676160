"""The edges' oracle is itself checked: two derivations, accounts, masks and interventions."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from support.grids import diagonal
from torch import Tensor
from truth.autograd_forms import draw, off
from truth.families import ALL, FAMILIES, hf_model, make_hf, random_tokens
from truth.oracle import RULE_SETS
from truth.oracle.read import Model
from truth.oracle_edges import EdgeTruth, contributions, interventions, pairs

VOCAB = 48


@functools.cache
def truth_of(name: str, rules: str, bias_free: bool = False) -> EdgeTruth:
    """An objective at every position, so that every row of every transition is alive."""
    model = hf_model(name)
    if bias_free:
        model = make_hf(name)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias"):
                    parameter.zero_()
    return EdgeTruth(model, random_tokens(), draw(1, 9, VOCAB, seed=11), rules)


@pytest.mark.parametrize(("name", "rules"), diagonal(ALL, RULE_SETS))
def test_columns_sum_to_the_relevance_of_the_source(name: str, rules: str) -> None:
    """Automatic differentiation of parts against the explicit propagation of the whole.

    One rule set for each family; ``test_edges.py`` holds the package's columns and nodes of every
    pair to this oracle and to the explicit propagation.
    """
    truth = truth_of(name, rules)
    for source, target in pairs(truth.sites("sublayer")) + pairs(truth.sites("block")):
        edges = truth.matrix(source, target)
        assert edges.abs().amax(1).min() > 1e-4 * edges.abs().max(), "a dead row proves nothing"
        assert off(edges.sum(0), truth.node(source)) < 1e-12, source
        assert not edges[~truth.window(source, target)].any()
    first, last = truth.sites()[0], truth.sites()[-1]
    for source in ("hook_embed", first):
        assert off(truth.matrix(source, last).sum(0), truth.node(source)) < 1e-12


@pytest.mark.parametrize(("name", "rules"), diagonal(ALL, RULE_SETS))
def test_two_derivations_agree(name: str, rules: str) -> None:
    """Stop-gradient forms against explicit rules: one block, and all of them at once."""
    truth = truth_of(name, rules)
    sites = truth.sites()
    for source, target in [*pairs(sites), (sites[0], sites[-1])]:
        assert off(truth.matrix(source, target), truth.explicit_matrix(source, target)) < 1e-11


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_sum_to_the_relevance_of_the_target_without_biases(name: str) -> None:
    truth = truth_of(name, "cplrp", bias_free=True)
    sites = truth.sites()
    for source, target in [*pairs(truth.sites("sublayer")), (sites[0], sites[-1])]:
        assert off(truth.matrix(source, target).sum(1), truth.node(target)) < 1e-12


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULE_SETS))
def test_paths_sum_to_the_edge(name: str, rules: str) -> None:
    """And are where they belong: keys and values visible, the rest on the diagonal."""
    truth = truth_of(name, rules)
    for source, target in [truth.sites("sublayer")[:2], truth.sites("block")[:2]]:
        parts = {("position", -1): truth.matrix(source, target, "position")}
        for head in range(truth.model.heads):
            for path in ("value", "key"):
                parts[path, head] = truth.matrix(source, target, path, head)
        assert off(sum(parts.values()), truth.matrix(source, target)) < 1e-12
        position = parts.pop(("position", -1))
        assert not (position - position.diag().diag()).any()
        for (path, _), part in parts.items():
            assert not part[~truth.window(source, target)].any()
            assert bool(part.any()) is not (rules == "cplrp" and path == "key")


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gpt2"])
def test_a_path_is_one_heads_own(name: str) -> None:
    """The keys and values of a head: all that is left where the other heads write nothing.

    Under the plain gradient, which takes no notice of what is cut where.
    """
    truth, head = truth_of(name, "gradient"), 2
    source, target = truth.sites("sublayer")[:2]
    mine = sum(truth.matrix(source, target, path, head) for path in ("value", "key"))
    alone = truth_of.__wrapped__(name, "gradient")
    alone.model = _with_one_head(truth.model, head)
    others = ~torch.eye(9, dtype=torch.bool)
    assert off(alone.matrix(source, target)[others], mine[others]) < 1e-12


def _with_one_head(model: Model, head: int) -> Model:
    """The model with the first block's output weights at zero but for one head."""
    first = model.blocks[0]
    keep = (torch.arange(model.heads) == head).repeat_interleave(model.d_head)
    out = dataclasses.replace(first.out, weight=first.out.weight * keep)
    first = dataclasses.replace(first, out=out)
    return dataclasses.replace(model, blocks=(first, *model.blocks[1:]))


def _moved(
    truth: EdgeTruth, source: str, target: str, forward: Callable[..., Tensor], by: float
) -> Tensor:
    """Change of every target's contribution when one source position is scaled by 1 + by."""
    h, g = truth.state(source), truth.gradient(target)
    moved = forward(source, target, interventions(h, by))
    return contributions(g, moved) - (g * truth.state(target)).sum(-1)[:, None]


@pytest.mark.parametrize("name", ALL)
def test_cplrp_edges_are_interventions_on_the_frozen_model(name: str) -> None:
    """Exact for an intervention of any size, biases or not: the frozen model is affine."""
    truth = truth_of(name, "cplrp")
    sites = truth.sites()
    for source, target in [*pairs(truth.sites("sublayer")), *pairs(sites), (sites[0], sites[-1])]:
        same = truth.frozen_forward(source, target, truth.state(source)[None])[0]
        assert off(same, truth.state(target)) < 1e-12, "frozen at this prompt it is the model"
        edges = truth.matrix(source, target)
        for by in (-1.0, 0.7):
            changed = _moved(truth, source, target, truth.frozen_forward, by)
            assert off(changed, by * edges) < 1e-11


@pytest.mark.parametrize("name", ALL)
def test_gradient_edges_are_small_interventions_on_the_real_model(name: str) -> None:
    """To first order, the limit of real interventions (central differences)."""
    truth, by = truth_of(name, "gradient"), 1e-4
    sites = truth.sites()
    for source, target in [*pairs(truth.sites("sublayer")), *pairs(sites), (sites[0], sites[-1])]:
        more, less = (_moved(truth, source, target, truth.real_forward, b) for b in (by, -by))
        assert off((more - less) / (2 * by), truth.matrix(source, target)) < 1e-5


def test_only_what_has_a_meaning_is_answered() -> None:
    truth = truth_of("qwen3", "attnlrp")
    with pytest.raises(ValueError, match="not one attention"):
        truth.matrix("blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre", "value", 0)
    with pytest.raises(ValueError, match="whole number"):
        truth.explicit_matrix("blocks.0.hook_resid_mid", "blocks.1.hook_resid_pre")
