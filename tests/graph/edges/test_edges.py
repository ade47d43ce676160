"""The attribution graph's edges against the published slow method (``oracle_edges.py``).

Every family and variant with every rule set, in float64, where a wrong formula shows; elsewhere
families and rule sets take turns. By head and path; and what an edge says about interventions on
the model.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from support.computed_graphs import graph, graph_of
from support.grids import diagonal, grid
from torch import Tensor
from truth import families, rounding
from truth.autograd_forms import draw, off
from truth.edge_truth import (
    CONTRAST,
    TARGET,
    TOKENS,
    VOCAB,
    N,
    assert_all_below,
    between,
    error,
    errors_of,
    matrix,
    truth,
)
from truth.families import ALL, FAMILIES, boot, hf_model, true_float64
from truth.oracle import RULE_SETS, contrast_seed
from truth.oracle_edges import PATHS, EdgeTruth, contributions, interventions, pairs

import tl_contrastive_lrp as clrp

LAST = "blocks.3"  # of the demo model
GRANULARITIES = ("block", "sublayer")
# Granularities, each with both ways to compute attention and its edges.
WAYS = tuple((size, kind) for kind in ("eager", "fused") for size in GRANULARITIES)
SLIDING = ("mistral", "gemma2", "gemma3", "qwen2-window")


# every family, every rule set


@pytest.mark.parametrize(("name", "rules", "way"), grid(ALL, RULE_SETS, turns=WAYS))
def test_float64(name: str, rules: str, way: tuple[str, str]) -> None:
    granularity, attention = way
    true, g = truth(name, rules), graph(name, rules, granularity, attention=attention)
    assert attention in g.attention
    sites = true.sites(granularity)
    assert g.sites == sites
    assert g.relevance.dtype == torch.float64
    errors = {}
    for row, (s, t) in enumerate(pairs(sites)):
        actual, expected = g.matrix(s, t), matrix(name, rules, s, t)
        errors[s, t] = error(actual, expected)
        assert off(actual.sum(0), g.relevance[row]) <= 1e-10, (s, t)
        assert not actual[~true.window(s, t)].any(), "an edge that no mask allows"
    assert_all_below(errors, 1e-9)
    nodes = torch.stack([true.node(site) for site in sites])
    assert off(g.relevance, nodes) <= 1e-10
    assert bool((g.target_pos >= g.source_pos).all())
    assert between(g.matrix(*pairs(sites)[0])).any(), "the first transition mixes positions"


@pytest.mark.parametrize(("name", "rules"), diagonal(ALL, RULE_SETS))
def test_float32(name: str, rules: str) -> None:
    """To 1e-5 of the graph's largest entry, and as exact as float32 can add up an edge's terms.

    An edge sums d_model terms that may cancel (at the last site of "gradient" to 1 / 84 of their
    size), so within a transition the terms are the measure. One rule set for each family:
    ``test_float64`` has all of them, and ``test_zoo.py`` has float32 on the other families.
    """
    model, true = boot(name, torch.float32), truth(name, rules)
    errors, largest, of_terms = {}, 0.0, {}
    for granularity in ("block", "sublayer"):
        g = graph_of(model, rules, granularity=granularity)
        for s, t in pairs(g.sites):
            actual, expected = g.matrix(s, t), matrix(name, rules, s, t)
            assert actual.dtype == torch.float32
            errors[s, t] = float((actual.double() - expected).abs().max())
            largest = max(largest, float(expected.abs().max()))
            terms = (true.state(s) * true.gradient(s)).abs().sum(-1).max()
            of_terms[s, t] = errors[s, t] / float(terms)
    assert_all_below({key: e / largest for key, e in errors.items()}, 1e-5)
    assert_all_below(of_terms, rounding.through(rounding.depth(model, N), torch.float32))


@pytest.mark.parametrize("name", SLIDING)
def test_windows_hide_what_a_global_layer_shows(name: str) -> None:
    """In a layer with a window of 4, no edge spans 4 positions or more; in a global layer some."""
    true, g = truth(name, "attnlrp"), graph(name, "attnlrp")
    far = torch.ones(N, N).tril(-4).bool()
    spans = [bool(g.matrix(s, t)[far].any()) for s, t in pairs(g.sites)]
    assert spans == [block.window is None for block in true.model.blocks]


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULE_SETS))
def test_objective_in_the_middle(name: str, rules: str) -> None:
    """Positions after the explained one have no edges."""
    pos, model = 5, boot(name)
    g = graph_of(model, rules, clrp.logit_diff(model, TARGET, CONTRAST, pos=pos))
    true = truth(name, rules, pos)
    assert_all_below(errors_of(g, true, pairs(true.sites())), 1e-9)
    for s, t in pairs(g.sites):
        assert not g.matrix(s, t)[pos + 1 :].any()
        assert not g.matrix(s, t)[:, pos + 1 :].any()


@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_shortest_prompts(name: str, rules: str, length: int) -> None:
    tokens = TOKENS[:, :length]
    seed = contrast_seed(tokens, TARGET, CONTRAST, VOCAB)
    true = EdgeTruth(hf_model(name), tokens, seed, rules)
    g = graph_of(boot(name), rules, tokens=tokens, granularity="sublayer", heads=True)
    assert_all_below(errors_of(g, true, pairs(true.sites("sublayer"))), 1e-9)


@pytest.mark.parametrize(("name", "rules"), grid(["qwen3-bias", "gpt2", "gemma3"], RULE_SETS))
def test_objective_at_every_position(name: str, rules: str) -> None:
    """Any function of the logits; here no row of any transition is empty."""
    seed = draw(1, N, VOCAB, seed=11)
    true = EdgeTruth(hf_model(name), TOKENS, seed, rules)
    g = graph_of(boot(name), rules, lambda logits: (logits * seed).sum(), granularity="sublayer")
    assert_all_below(errors_of(g, true, pairs(true.sites("sublayer"))), 1e-9)


@pytest.mark.parametrize(("name", "rules"), diagonal(FAMILIES, RULE_SETS))
def test_edges_are_linear_in_the_objective(name: str, rules: str) -> None:
    """Unpruned, the graph of (t, c) is the graph of t minus the graph of c."""
    model = boot(name)
    both = graph(name, rules, "sublayer")
    t, c = (
        graph_of(model, rules, clrp.target_logit(model, token), granularity="sublayer")
        for token in (TARGET, CONTRAST)
    )
    for pair in pairs(both.sites):
        difference = t.matrix(*pair) - c.matrix(*pair)
        largest = max(t.matrix(*pair).abs().max(), c.matrix(*pair).abs().max())
        assert (difference - both.matrix(*pair)).abs().max() <= 1e-11 * largest, pair


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_node_threshold_drops_whole_rows(name: str) -> None:
    """Targets at or below the threshold are not expanded; the others' edges are the same."""
    whole = graph(name, "attnlrp")
    threshold = float(whole.relevance[1].abs().median())
    g = graph_of(boot(name), "attnlrp", node_threshold=threshold)
    assert g.node_threshold == threshold
    assert torch.equal(g.relevance, whole.relevance)
    for row, (s, t) in enumerate(pairs(g.sites), start=1):
        live = whole.relevance[row].abs() > threshold
        assert torch.equal(g.matrix(s, t), whole.matrix(s, t) * live[:, None])
    assert 0 < int((whole.relevance[1].abs() > threshold).sum()) < N


def test_the_model_is_left_as_found(snapshot: Any) -> None:
    for name in ("gemma2", "gpt2"):
        model = boot(name)
        before = snapshot(model)
        graph_of(model, "attnlrp", granularity="sublayer", heads=True)
        graph_of(model, "gim", layers=[0])
        assert snapshot(model) == before


# by head, by path


@pytest.mark.parametrize(
    ("name", "way", "rules"),
    grid([*FAMILIES, "qwen3-bias", "llama-mha"], WAYS, turns=tuple(RULE_SETS)),
)
def test_heads_and_paths(name: str, rules: str, way: tuple[str, str]) -> None:
    """Each head's values and keys, and what stays in place, against gradients cut to it."""
    granularity, attention = way
    true, g = truth(name, rules), graph(name, rules, granularity, heads=True, attention=attention)
    plain = graph(name, rules, granularity, attention=attention)
    errors = {}
    for s, t in pairs(true.sites(granularity)):
        whole, actual = matrix(name, rules, s, t), g.matrix(s, t)
        assert off(actual, plain.matrix(s, t)) <= 1e-12, "without a choice, the sum of all parts"
        if true.step(s) % 2:
            assert torch.equal(g.matrix(s, t, path="position"), actual), "no attention here"
            assert not g.matrix(s, t, path="value").any()
            continue
        total = g.matrix(s, t, path="position")
        errors[s, t, "position"] = error(total, true.matrix(s, t, "position"), whole)
        assert not between(total).any()
        for path in PATHS[1:]:
            for head in range(true.model.heads):
                part = g.matrix(s, t, head=head, path=path)
                cut = true.matrix(s, t, path, head)
                errors[s, t, path, head] = error(part, cut, whole)
                total = total + part
        small = 1e-12 * float(whole.abs().max())
        assert (total - actual).abs().max() <= small, "the parts add up to the edge"
        both = g.matrix(s, t, path="value") + g.matrix(s, t, path="key")
        assert between(both - actual).abs().max() <= small
        one = sum(g.matrix(s, t, head=1, path=path) for path in PATHS[1:])
        assert (g.matrix(s, t, head=1) - one).abs().max() <= small
    assert_all_below(errors, 1e-9)


# compatibility mode


@pytest.mark.parametrize(
    ("name", "how", "rules"),
    grid(
        [*FAMILIES, "qwen3-bias", "llama-bias"],
        ["no processing", "folded"],
        turns=["attnlrp", "gim", "gradient"],
    ),
)
def test_compatibility_mode_has_the_same_edges(name: str, rules: str, how: str) -> None:
    model, exact = _compatible(name, how), how == "no processing"
    g, expected = graph_of(model, rules, granularity="sublayer"), graph(name, rules, "sublayer")
    for pair in pairs(expected.sites):
        limit = rounding.PROMISED[torch.float64] if exact else rounding.FOLDING
        assert off(g.matrix(*pair), expected.matrix(*pair)) <= limit, pair


@functools.cache
def _compatible(name: str, how: str) -> Any:
    model = families._boot.__wrapped__(name, torch.float64, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        processing = {"no_processing": True} if how == "no processing" else {}
        model.enable_compatibility_mode(disable_warnings=True, **processing)
    return model.eval()


# an edge means something


@pytest.mark.parametrize("name", ALL)
def test_cplrp_edges_are_interventions_with_norms_and_patterns_frozen(name: str) -> None:
    """Scale a source node by 1 + e: what each target contributes changes by e * edge, exactly.

    For any e (-1 knocks the node out) and with biases too: the frozen model is affine.
    """
    true = truth(name, "cplrp")
    for granularity in ("block", "sublayer"):
        g = graph(name, "cplrp", granularity)
        for s, t in pairs(g.sites):
            h, grad = true.state(s), true.gradient(t)
            before = (grad * true.state(t)).sum(-1)[:, None]
            for by in (-1.0, 0.3):
                after = contributions(grad, true.frozen_forward(s, t, interventions(h, by)))
                assert off((after - before) / by, g.matrix(s, t)) <= 1e-9, (s, t, by)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_edges_are_small_interventions_on_the_model_itself(name: str) -> None:
    """With nothing frozen only the plain gradient's edges are, and only to first order."""
    model, true, g = boot(name), truth(name, "gradient"), graph(name, "gradient")
    e = 1e-4
    copies = TOKENS.repeat(2 * N, 1)
    by = torch.cat([e * torch.eye(N), -e * torch.eye(N)]).double()[:, :, None]
    kept: dict[str, Tensor] = {}

    def scale(h: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return h * (1.0 + by)

    def keep(h: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept["h"] = h

    for s, t in pairs(g.sites):
        with torch.no_grad(), true_float64(model):
            model.run_with_hooks(copies, fwd_hooks=[(s, scale), (t, keep)])
        more, less = contributions(true.gradient(t), kept["h"]).split(N, dim=1)
        assert off((more - less) / (2 * e), g.matrix(s, t)) <= 1e-6, (s, t)


def test_a_target_whose_relevance_adds_up_to_zero_still_passes_it_on() -> None:
    """A norm's ordinary gradient is orthogonal to its input, so the last site's relevance is 0.

    On some prompts it is 0 to the last bit, on others rounding leaves something, which ones hangs
    on the processor: d_model terms h·g cancel, and in g what came from d_model logits' weights.
    """
    model = clrp.load_demo_model()
    for case in clrp.load_demo_cases("arithmetic")[:4]:
        g = clrp.attribution_graph(
            model, case.prompt, target=case.target, contrast=case.contrast, rules="gradient"
        )
        left, terms = _last(model, case)
        slack = rounding.through(4 * int(model.cfg.d_model), torch.float32) * terms
        assert abs(float(g.relevance[-1, -1]) - left) <= slack
        assert not g.relevance[-1, :-1].any()
        asked = clrp.logit_diff(model, case.target, case.contrast)
        _, r = clrp.run_with_relevance(model, case.prompt, asked, list(g.sites), rules="gradient")
        share = rounding.through(rounding.depth(model, len(g.str_tokens)), torch.float32)
        for row, pair in enumerate(pairs(g.sites)):
            slack = share * float(r[pair[0]].abs().sum(-1).max())  # its terms, as in test_float32
            matrix = g.matrix(*pair)
            assert (matrix.sum(0) - g.relevance[row]).abs().max() <= slack, pair
        assert matrix[-1].abs().max() > 100 * slack, "what it passes on would be missed"


def _last(model: Any, case: Any) -> tuple[float, float]:
    """The last site's relevance at the last position, and what cancels in it.

    With h there, s² = mean h² + ε, and v the difference of two rows of the unembedding times the
    norm's weight, it is Σ h·(v/s − h·mean(h·v)/s³) = ε/s³ · Σ h·v: not quite 0.
    """
    kept = model.run_with_cache(case.prompt, names_filter=f"{LAST}.hook_resid_post")[1]
    h = kept[f"{LAST}.hook_resid_post"][0, -1].detach().double()
    norm, rows = model.ln_final.original_component, model.unembed.original_component.weight
    v = (norm.weight * (rows[case.target_id] - rows[case.contrast_id])).detach().double()
    s = (h.square().mean() + norm.variance_epsilon).sqrt()
    terms = h.abs() * (v.abs() / s + h.abs() * (h * v).abs().mean() / s**3)
    return float(norm.variance_epsilon / s**3 * (h * v).sum()), float(terms.sum())
