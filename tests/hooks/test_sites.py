"""Coverage: every nonlinear operation of every family is found, once, by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from support.grids import grid
from torch import nn
from truth.families import ALL, boot, make_config

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.hooks.families import COMPONENTS
from tl_contrastive_lrp.hooks.sites import find_sites
from tl_contrastive_lrp.rules.activations import ACTIVATIONS


def _expected(name: str) -> dict[tuple[str, str], int]:
    """(component, operation) from the Hugging Face configuration alone."""
    c = make_config(name)
    n = c.n_layer if c.model_type == "gpt2" else c.num_hidden_layers
    gemma = c.model_type.startswith("gemma")
    rows: list[tuple[str, str]] = []
    for i in range(n):
        norms = ["ln1", "ln2", *(["ln1_post", "ln2_post"] if gemma else [])]
        if c.model_type in ("qwen3", "gemma3_text"):
            norms += ["attn.q_norm", "attn.k_norm"]
        rows += [(f"blocks.{i}.{norm}", "norm") for norm in norms]
        rows += [(f"blocks.{i}.attn", op) for op in ("qk", "softmax", "pattern_v")]
        rows += [(f"blocks.{i}.mlp", "activation")]
        if c.model_type != "gpt2":
            rows += [(f"blocks.{i}.mlp", "gate")]
        if c.model_type == "gemma2" and c.attn_logit_softcapping is not None:
            rows += [(f"blocks.{i}.attn", "softcap")]
    rows += [("ln_final", "norm")]
    if getattr(c, "final_logit_softcapping", None) is not None:
        rows += [("unembed", "softcap")]
    return {row: rows.count(row) for row in rows}


@pytest.mark.parametrize("name", ALL)
def test_every_operation_is_found_once(name: str) -> None:
    found = [(s.path, s.operation) for s in find_sites(boot(name, torch.float32))]
    assert {row: found.count(row) for row in found} == _expected(name)


@pytest.mark.parametrize("name", ALL)
def test_activations_have_the_ratio_of_their_function(name: str) -> None:
    x = torch.linspace(-4.0, 4.0, 81, dtype=torch.float64)
    for site in find_sites(boot(name, torch.float32)):
        if site.operation == "activation":
            assert site.ratio is not None
            assert torch.allclose(site.ratio(x) * x, site.module(x), atol=1e-12)


@pytest.mark.parametrize(("name", "rules"), grid(ALL, tuple(clrp.RULE_SETS)))
def test_coverage_reports_every_operation_and_its_rule(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    coverage = clrp.coverage(model, rules)
    rows = [(row.component, row.operation) for row in coverage.rows]
    assert {row: rows.count(row) for row in rows} == _expected(name)
    names = {"ln": "LN", "temperature": "temperature 2"}
    for row in coverage.rows:
        wanted = getattr(clrp.RULE_SETS[rules], row.operation)
        assert row.rule == names.get(wanted, wanted), row
    with clrp.lrp(model, rules) as yielded:
        assert yielded == coverage
    assert model.list_hooks() == {}
    frame = coverage.to_frame()
    assert len(frame) == len(coverage.rows)
    text = str(coverage)
    assert rules in text
    assert re.search(r"blocks\.0-[12]\.mlp ", text)
    assert "ln_final" in text


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_listed_activation_is_the_function_of_its_row(activation: str) -> None:
    """A wrong row would explain another function: check each against the real thing."""
    import transformers.activations as hf
    from transformer_lens.model_bridge.generalized_components.gated_mlp import resolve_activation_fn

    x = torch.linspace(-5.0, 5.0, 101, dtype=torch.float64)
    functions = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "relu": nn.functional.relu,
        "gelu_tanh": resolve_activation_fn(type("C", (), {"hidden_act": "gelu_new"})()),
    }
    owner: Any = getattr(hf, activation, None) or getattr(nn, activation, None)
    function = functions.get(activation) or (owner() if owner is not None else None)
    if function is None:
        pytest.skip(f"{activation} is not in this version of torch or transformers")
    got = ACTIVATIONS[activation](x) * x
    # FastGELU writes √(2/π) with ten digits
    assert torch.allclose(got, function(x), atol=1e-9 if activation.startswith("Fast") else 1e-12)


def test_tables_do_not_contradict_each_other() -> None:
    assert not set(ACTIVATIONS) & set(COMPONENTS)
    for operations in COMPONENTS.values():
        assert len(operations) == len(set(operations))


def test_two_activations_in_one_mlp_get_a_rule_each() -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from truth.families import saved

    model = TransformerBridge.boot_transformers(str(saved("qwen3")), device="cpu")
    model.blocks[0].mlp.original_component.second = nn.SiLU().eval()
    found = [s.module for s in find_sites(model) if s.operation == "activation"]
    wrapped = model.blocks[0].mlp.original_component
    assert {id(wrapped.second), id(wrapped.act_fn)} <= set(map(id, found))
    assert len(found) == model.cfg.n_layers + 1


def test_dropout_inside_is_no_obstacle() -> None:
    sites = find_sites(boot("gpt2", torch.float32))
    assert any(
        isinstance(m, nn.Dropout) for m in boot("gpt2", torch.float32).original_model.modules()
    )
    assert sites
