"""Edges of transitions over several blocks, against the slow method (``oracle_edges.py``)."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support.computed_graphs import graph_of
from truth import families
from truth.autograd_forms import off
from truth.edge_truth import (
    CONTRAST,
    TARGET,
    TOKENS,
    VOCAB,
    assert_all_below,
    error,
    errors_of,
    truth,
)
from truth.families import FAMILIES, boot, make_tokenizer
from truth.oracle import RULE_SETS, contrast_seed
from truth.oracle_edges import EdgeTruth, pairs

DEEP = {
    "qwen3-bias": {"num_hidden_layers": 4},
    "gpt2": {"n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
    "gemma2": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


@functools.cache
def deep(name: str) -> tuple[Any, Any]:
    """(Hugging Face model, bridge), both float64, of a family with four layers."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    base, settings = families._VARIANT.get(name, (name, {}))
    made = []
    for dtype in (torch.float64, torch.float32):
        config = families._BASE[base](**{**settings, **DEEP[name]})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype)
        families._randomise(model, 3)
        made.append(model.eval())
    with tempfile.TemporaryDirectory() as directory:
        made[1].save_pretrained(directory)
        make_tokenizer().save_pretrained(directory)
        bridge = TransformerBridge.boot_transformers(
            str(Path(directory)), device="cpu", dtype=torch.float64
        )
    return made[0], bridge


class TestOverSeveralBlocks:
    """``layers=[...]``: packed backward signals."""

    @staticmethod
    def truth(name: str, rules: str) -> EdgeTruth:
        seed = contrast_seed(TOKENS, TARGET, CONTRAST, VOCAB)
        return EdgeTruth(deep(name)[0], TOKENS, seed, rules)

    @pytest.mark.parametrize("layers", [[0, 2], [0, 1, 3], [0], [0, 3, 4]])
    @pytest.mark.parametrize("rules", RULE_SETS)
    @pytest.mark.parametrize("name", DEEP)
    def test_four_layers(self, name: str, rules: str, layers: list[int]) -> None:
        true, g = self.truth(name, rules), graph_of(deep(name)[1], rules, layers=layers)
        chosen = tuple(f"blocks.{i}.hook_resid_pre" for i in layers if i < 4)
        assert g.sites == (*chosen, "blocks.3.hook_resid_post")
        assert_all_below(errors_of(g, true, pairs(g.sites)), 1e-9)
        for row, (s, t) in enumerate(pairs(g.sites)):
            assert off(g.relevance[row], true.node(s)) <= 1e-10
            assert off(g.matrix(s, t).sum(0), g.relevance[row]) <= 1e-10
            assert not g.matrix(s, t)[~true.window(s, t)].any()

    @pytest.mark.parametrize("rules", RULE_SETS)
    def test_three_layers_with_windows(self, rules: str) -> None:
        g, true = graph_of(boot("gemma3"), rules, layers=[0, 2]), truth("gemma3", rules)
        assert_all_below(errors_of(g, true, pairs(g.sites)), 1e-9)

    @pytest.mark.parametrize("name", FAMILIES)
    def test_float32(self, name: str) -> None:
        g, true = graph_of(boot(name, torch.float32), "attnlrp", layers=[0]), truth(name, "attnlrp")
        (pair,) = pairs(g.sites)
        assert off(g.matrix(*pair).double(), true.matrix(*pair)) <= 1e-5

    @pytest.mark.parametrize("name", DEEP)
    def test_all_layers_are_the_adjacent_graph(self, name: str) -> None:
        bridge = deep(name)[1]
        g, plain = graph_of(bridge, "attnlrp", layers=[0, 1, 2, 3]), graph_of(bridge, "attnlrp")
        assert g.sites == plain.sites
        for pair in pairs(g.sites):
            assert error(g.matrix(*pair), plain.matrix(*pair)) <= 1e-9

    @pytest.mark.parametrize("name", DEEP)
    def test_node_threshold(self, name: str) -> None:
        whole = graph_of(deep(name)[1], "attnlrp", layers=[0, 2])
        threshold = float(whole.relevance[1].abs().median())
        g = graph_of(deep(name)[1], "attnlrp", layers=[0, 2], node_threshold=threshold)
        for row, (s, t) in enumerate(pairs(g.sites), start=1):
            live = whole.relevance[row].abs() > threshold
            assert error(g.matrix(s, t), whole.matrix(s, t) * live[:, None]) <= 1e-12
