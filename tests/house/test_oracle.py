"""The oracle is itself checked: against Hugging Face, automatic differentiation and accounts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from truth.autograd_forms import draw, gradients, off, stop_gradients
from truth.families import ALL, FAMILIES, boot, hf_model, left_padded, make_hf, random_tokens
from truth.float64 import true_float64
from truth.oracle import RULE_SETS, contrast_seed, forward, propagate, read_model

VOCAB = 48


# the forward pass


@pytest.mark.parametrize("name", ALL)
def test_logits_equal_hugging_face(name: str) -> None:
    model, ids = hf_model(name), random_tokens(2)
    with torch.no_grad(), true_float64(model):
        expected = model(ids).logits
    assert off(propagate(model, ids, draw(2, 9, VOCAB)).logits, expected) < 1e-13


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_logits_equal_hugging_face(name: str) -> None:
    model, ids = hf_model(name, torch.float32), random_tokens(2)
    with torch.no_grad():
        expected = model(ids).logits
    assert expected.dtype == torch.float32
    for dtype in (torch.float32, torch.float64):
        got = propagate(model, ids, draw(2, 9, VOCAB), dtype=dtype).logits
        assert got.dtype == dtype
        assert off(got, expected.to(dtype)) < 1e-5


@pytest.mark.parametrize("name", ALL)
def test_left_padded_logits_equal_the_bridge(name: str) -> None:
    """All positions, pads included: same positions, same mask, same uniform rows."""
    ids, mask = left_padded()
    bridge = boot(name)
    with torch.no_grad(), true_float64(bridge):
        expected = bridge(ids, attention_mask=mask)
    got = propagate(hf_model(name), ids, draw(3, 9, VOCAB), attention_mask=mask).logits
    assert off(got, expected) < 1e-13


def test_positions_follow_the_mask() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert forward.position_ids(mask).tolist() == expected


# the plain gradient


@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_autograd_on_hugging_face(name: str) -> None:
    """At embeddings, every block's input and every projection's input and output."""
    model, ids, seed = hf_model(name), random_tokens(2), draw(2, 9, VOCAB, seed=5)
    gpt2 = name.startswith("gpt2")
    body = model.transformer if gpt2 else model.model
    heads, kept = read_model(model), {}
    handles = []

    def keep(key: str, module: Any, take: Callable[[Any, Any], Tensor]) -> None:
        def hook(_module: Any, inputs: Any, output: Any) -> None:
            kept[key] = take(inputs, output)

        handles.append(module.register_forward_hook(hook))

    def source(inputs: Any, _output: Any) -> Tensor:
        return inputs[0]

    def result(_inputs: Any, output: Any) -> Tensor:
        return output

    keep("hook_embed", body.wte if gpt2 else body.embed_tokens, result)
    for i, layer in enumerate(body.h if gpt2 else body.layers):
        at = f"blocks.{i}."
        keep(at + "hook_resid_pre", layer, source)
        keep(at + "hook_resid_post", layer, result)
        attn, mlp = (layer.attn, layer.mlp) if gpt2 else (layer.self_attn, layer.mlp)
        keep(at + "attn.hook_z", attn.c_proj if gpt2 else attn.o_proj, source)
        keep(at + "mlp.hook_post", mlp.c_proj if gpt2 else mlp.down_proj, source)
        keep(at + "mlp.hook_pre", mlp.c_fc if gpt2 else mlp.gate_proj, result)
        if gpt2:
            keep(at + "qkv", attn.c_attn, result)
        else:
            keep(at + "mlp.hook_pre_linear", mlp.up_proj, result)
            for letter in "qkv":
                keep(at + "attn.hook_" + letter, getattr(attn, letter + "_proj"), result)
    try:
        with true_float64(model):
            logits = model(ids).logits
            found = gradients((logits * seed).sum(), list(kept.values()))
    finally:
        for handle in handles:
            handle.remove()
    expected = dict(zip(kept, found, strict=True))
    for i in range(len(heads.blocks) if gpt2 else 0):
        parts = expected.pop(f"blocks.{i}.qkv").chunk(3, dim=-1)
        for letter, part in zip("qkv", parts, strict=True):
            expected[f"blocks.{i}.attn.hook_{letter}"] = part
    ours = propagate(model, ids, seed, "gradient").gradient
    for key, value in expected.items():
        assert off(ours[key].reshape(value.shape), value) < 1e-12, key


@pytest.mark.parametrize("name", [*FAMILIES, "llama-bias", "qwen2-window"])
def test_names_shapes_and_gradients_equal_the_bridge(name: str) -> None:
    """Every name the oracle returns means what TransformerLens means by it, padding included."""
    bridge, (ids, mask), seed = boot(name), left_padded(), draw(3, 9, VOCAB, seed=6)
    ours = propagate(hf_model(name), ids, seed, "gradient", attention_mask=mask)
    # hook_resid_mid is ln2.hook_in there, which sees the branch alone; the stream's gradient is
    # the one at hook_attn_out. ln1.hook_in likewise sees the branch alone.
    names = [key for key in ours.gradient if not key.endswith("hook_resid_mid") and key != "logits"]
    if name == "gpt2":  # nothing is rotated
        names = [key for key in names if "hook_rot_" not in key]
    seen: dict[str, Tensor] = {}

    def hook_for(key: str) -> Callable[[Tensor, Any], Tensor]:
        def keep(value: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            seen[key] = value.view_as(value)  # one point of the graph per name
            return seen[key]

        return keep

    with true_float64(bridge):
        logits = bridge.run_with_hooks(
            ids, attention_mask=mask, fwd_hooks=[(key, hook_for(key)) for key in names]
        )
        found = gradients((logits * seed).sum(), list(seen.values()))
    assert set(seen) == set(names)
    for (key, value), g in zip(seen.items(), found, strict=True):
        assert off(ours.activation[key], value) < 1e-12, key
        assert off(ours.gradient[key], g) < 1e-11, key


# whole models under each rule set


@pytest.mark.parametrize("rules", [name for name in RULE_SETS if name != "gradient"])
@pytest.mark.parametrize("name", ALL)
def test_rule_set_equals_autograd_with_stop_gradients(name: str, rules: str) -> None:
    (ids, mask), seed = left_padded(), draw(3, 9, VOCAB, seed=7)
    seed = seed * mask[:, :, None]
    model = read_model(hf_model(name))
    leaf = {"embed": model.embed.clone().requires_grad_()}
    if model.pos_table is not None:
        leaf["pos_table"] = model.pos_table.clone().requires_grad_()
    model = dataclasses.replace(model, **leaf)
    with stop_gradients(rules):
        values = forward.run_forward(model, ids, mask, forward.position_ids(mask))
    ours = propagate(hf_model(name), ids, seed, rules, attention_mask=mask)
    names = [key for key in ours.gradient if not key.endswith(("ln1.hook_in", "ln2.hook_in"))]
    found = gradients((values["logits"] * seed).sum(), [values[key] for key in names])
    for key, g in zip(names, found, strict=True):
        assert off(values[key], ours.activation[key]) < 1e-12, key
        if "hook_rot_" in key and name.startswith("gpt2"):
            continue  # the same tensor as hook_q, hook_k
        assert off(ours.gradient[key], g) < 1e-10, key
        skip = key.replace("hook_resid_mid", "ln2.hook_in").replace("hook_resid_pre", "ln1.hook_in")
        if skip != key:  # the stream's gradient is skip plus branch
            after = "hook_attn_out" if "ln1" in skip else "hook_resid_post"
            stream = ours.gradient[key.rsplit("hook_", 1)[0] + after]
            assert off(ours.gradient[skip] + stream, g) < 1e-10, key


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_bit_of_relevance_is_accounted_for(name: str, rules: str) -> None:
    ids, seed = random_tokens(2), contrast_seed(random_tokens(2), 7, 30, VOCAB)
    r = propagate(hf_model(name), ids, seed, rules)
    difference = r.logits[:, -1, 7] - r.logits[:, -1, 30]
    absorbed = sum(kept.flatten(1).sum(1) for kept in r.absorbed.values())
    arrived = r.relevance["hook_embed"].sum((1, 2)) + sum(r.leak.values()) + absorbed
    assert (arrived - difference).abs().max() < 1e-11
    conserving = {
        "attnlrp": ("norm", "ln1", "ln2", "ln_final", "activation", "gate", "cap", "pattern_value",
                    "query_key"),
        "relp": ("norm", "ln1", "ln2", "ln_final", "activation", "gate", "cap"),
        "gim": ("norm", "ln1", "ln2", "ln_final", "gate", "pattern_value", "query_key"),
        "cplrp": ("",),
        "gradient": (),
    }[rules]  # fmt: skip
    for operation, leak in r.leak.items():
        if operation.endswith(conserving):
            assert leak.abs().max() < 1e-11, operation


@pytest.mark.parametrize("name", [*FAMILIES, "llama-bias", "qwen3-bias"])
def test_cplrp_conserves_without_biases(name: str) -> None:
    model = make_hf(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.zero_()
    ids = random_tokens(2)
    r = propagate(model, ids, contrast_seed(ids, 9, 21, VOCAB), "cplrp")
    arrived = sum(r.relevance[key].sum((1, 2)) for key in r.relevance if key.endswith("_embed"))
    difference = r.logits[:, -1, 9] - r.logits[:, -1, 21]
    assert difference.abs().min() > 1e-2
    assert (arrived - difference).abs().max() < 1e-10


@pytest.mark.parametrize("rules", RULE_SETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_nothing(name: str, rules: str) -> None:
    (ids, mask), model = left_padded(), hf_model(name)
    batch = propagate(model, ids, contrast_seed(ids, 5, 40, VOCAB), rules, attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = ids[row : row + 1, -length:]
        one = propagate(model, alone, contrast_seed(alone, 5, 40, VOCAB), rules)
        for key in ("hook_embed", "blocks.1.attn.hook_k", "blocks.0.mlp.hook_post"):
            assert off(batch.relevance[key][row, -length:], one.relevance[key][0]) < 1e-11, key
            assert not batch.relevance[key][row, :-length].any()


# refusals


def test_unknown_things_are_refused() -> None:
    ids = random_tokens()
    with pytest.raises(KeyError, match="lrp"):
        propagate(hf_model("llama"), ids, draw(1, 9, VOCAB), "lrp")
    with (
        pytest.raises(ValueError, match="float64 model"),
        true_float64(hf_model("llama", torch.float32)),
    ):
        pass
    other = make_hf("llama")
    other.config.model_type = "phi"
    with pytest.raises(ValueError, match="phi"):
        propagate(other, ids, draw(1, 9, VOCAB))


@pytest.mark.parametrize("name", FAMILIES)
def test_true_float64_leaves_the_model_as_it_was(name: str) -> None:
    bridge, ids = boot(name), random_tokens(2)
    softmax = torch.nn.functional.softmax
    with torch.no_grad():
        before = bridge(ids)
        with pytest.raises(RuntimeError, match="stop"), true_float64(bridge):
            raise RuntimeError("stop")
        assert torch.equal(bridge(ids), before)
    assert torch.nn.functional.softmax is softmax
