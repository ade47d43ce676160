"""``attribute`` on every covered family: heads, neurons and the ledger, by sums that must hold."""

from __future__ import annotations

import pytest
from support.zoo_expected import COVERED
from truth import zoo

import tl_contrastive_lrp as clrp

# Constants that no component shows: biases in experts and heads, embeddings of types, XGLM's
# positions. The ledger has what they take in "other".
HIDDEN_CONSTANTS = frozenset(
    {"gpt_oss", "jetmoe", "bert", "bert-decoder", "roberta", "xglm"} | {"modernbert_decoder"}
)


@pytest.mark.parametrize("name", COVERED)
def test_sums_hold(name: str) -> None:
    """Under cplrp, which conserves, every step of the ledger closes; heads make up attention."""
    model, ids = zoo.boot(name), zoo.random_tokens()
    result = clrp.attribute(model, ids, target=7, contrast=12, rules="cplrp")
    rows, scale = result.ledger.rows, max(abs(row.total) for row in result.ledger.rows)
    lost = max(abs(row.other) for row in rows)
    assert (lost > 1e-3 * scale) == (name in HIDDEN_CONSTANTS)
    points = [f"blocks.{i}.attn.o.hook_in" for i in range(model.cfg.n_layers)]
    if not all(point in model.hook_dict for point in points):
        assert name == "jetmoe"  # its output projections are experts
        return
    _, z = clrp.run_with_relevance(model, ids, clrp.logit_diff(model, 7, 12), points, rules="cplrp")
    for heads, point in zip(result.heads, points, strict=True):
        wanted = z[point][0].flatten(1).sum(-1)
        assert (heads.sum(0) - wanted).abs().max() <= 1e-5 * z[point].abs().max() + 1e-6


@pytest.mark.parametrize("name", ["qwen2_moe-mixed", "mixtral", "granitemoehybrid-attention"])
def test_experts_have_no_neurons(name: str) -> None:
    model, ids = zoo.boot(name), zoo.random_tokens()
    with pytest.raises(ValueError, match="mixture of experts"):
        clrp.attribute(model, ids, target=7, contrast=12, neurons=True)
    graph = clrp.attribution_graph(model, ids, target=7, contrast=12, details=True)
    parts = set(graph.explain_node(graph.sites[-1], 7)["part"])
    assert parts == {"dimension", "head"}
