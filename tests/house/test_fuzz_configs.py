"""No configuration is explained wrongly: random settings either match the operation oracle or are
refused.

Hypothesis draws a family and its settings: heads, groups of keys and values, head size, norm
placement, activation, biases, soft-caps, windows, tied embeddings, partial rotation. The model is
booted from disk like any other. A setting that Hugging Face or TransformerLens cannot boot at all
says nothing about this package and is drawn again.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from truth import zoo
from truth.op_oracle import OpOracle, UnknownOperationError
from truth.zoo.row import SPECIAL, Row, rope

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError

_NUMBERS = itertools.count()
_ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu",
                "mish", "tanh", "sigmoid", "leaky_relu", "gelu_10", "laplace"]  # fmt: skip

flag = st.booleans()


@st.composite
def llama_likes(draw: Any) -> Row:
    """A row of a family whose attention and MLP have these settings."""
    family = draw(st.sampled_from([
        "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Olmo2", "StableLm", "Phi", "Cohere",
        "GPTNeoX", "Starcoder2", "Granite", "Nemotron",
    ]))  # fmt: skip
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, width = groups * per_group, draw(st.sampled_from([4, 8]))
    tied = draw(flag) and family != "GPTNeoX"
    kwargs: dict[str, Any] = dict(
        SPECIAL,
        hidden_size=heads * width,
        intermediate_size=draw(st.sampled_from([12, 20])),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=64,
        hidden_act=draw(st.sampled_from(_ACTIVATIONS)),
        tie_word_embeddings=tied,
    )
    rotates_part = family in ("StableLm", "Phi", "GPTNeoX")
    partial = draw(st.sampled_from([0.5, 1.0])) if rotates_part else None
    kwargs["rope_parameters"] = rope(partial=partial)
    if family in ("Llama", "Qwen3", "Mistral", "Gemma2"):
        kwargs["head_dim"] = draw(st.sampled_from([width, 2 * width]))
    if family in ("Llama", "Qwen3", "Cohere", "Olmo2", "Granite", "Nemotron"):
        kwargs["attention_bias"] = draw(flag)
    if family in ("Llama", "Granite", "Nemotron"):
        kwargs["mlp_bias"] = draw(flag)
    if family == "Mistral":
        kwargs["sliding_window"] = draw(st.sampled_from([None, 3]))
    if family == "Gemma2":
        kwargs |= {
            "hidden_activation": kwargs["hidden_act"],
            "attn_logit_softcapping": draw(st.sampled_from([None, 2.0, 50.0])),
            "final_logit_softcapping": draw(st.sampled_from([None, 3.0])),
            "sliding_window": 4,
            "query_pre_attn_scalar": width,
        }
    if family == "StableLm":
        kwargs |= {
            "use_qkv_bias": draw(flag),
            "qk_layernorm": draw(flag),
            "use_parallel_residual": draw(flag),
        }
    if family == "Cohere":
        kwargs["use_qk_norm"] = draw(flag)
    if family == "GPTNeoX":
        kwargs |= {"use_parallel_residual": draw(flag), "attention_bias": draw(flag)}
    name = f"fuzz-{next(_NUMBERS)}-{family}"
    return Row(name, f"{family}ForCausalLM", kwargs)


@given(llama_likes(), st.sampled_from(["attnlrp", "cplrp", "relp"]))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_every_configuration_is_right_or_refused(row: Row, rules: str) -> None:
    zoo.ROWS[row.name] = row
    try:
        _check(row, rules)
    finally:
        del zoo.ROWS[row.name]


def _check(row: Row, rules: str) -> None:
    ids = zoo.random_tokens()
    try:
        model, reference = zoo.boot(row.name), zoo.hf_model(row.name)
    except Exception as unbootable:
        event(f"does not boot: {type(unbootable).__name__}")
        assume(False)
        raise
    with torch.no_grad():  # what the package explains is the bridge's forward
        assume((model(ids) - reference(ids).logits).abs().max() < 1e-3)
    objective = clrp.logit_diff(model, 7, 12)
    try:
        _, found = clrp.run_with_relevance(model, ids, objective, "hook_embed", rules=rules)
    except UncoveredComponentError:
        event("refused")
        return
    seed = torch.zeros(1, ids.shape[1], model.cfg.d_vocab, dtype=torch.float64)
    seed[0, -1, 7], seed[0, -1, 12] = 1.0, -1.0
    try:
        oracle = OpOracle(reference, ids, seed, rules)
    except UnknownOperationError as unknown:
        pytest.fail(f"the package explains {row.kwargs}, whose truth is not known: {unknown}")
    event("explained")
    wanted = oracle.relevance["hook_embed"]
    error = (found["hook_embed"].double() - wanted).abs().max() / wanted.abs().max()
    assert error <= 1e-5, row


@pytest.mark.parametrize("activation", ["laplace", "leaky_relu"])
def test_activations_without_a_closed_form_are_refused(activation: str) -> None:
    """Never a silent ordinary gradient."""
    kwargs = dict(
        SPECIAL, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, hidden_act=activation,
        rope_parameters=rope(),
    )  # fmt: skip
    row = Row(f"fuzz-act-{activation}", "LlamaForCausalLM", kwargs)
    zoo.ROWS[row.name] = row
    try:
        model = zoo.boot(row.name)
    finally:
        del zoo.ROWS[row.name]
    with pytest.raises(UncoveredComponentError, match=type(ACT2FN[activation]).__name__):
        clrp.coverage(model)
