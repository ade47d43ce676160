"""No row of the tables is idle: take one away, and a model that was covered no longer is.

Each mutation removes one thing: a row, a rule's attachment, a handler. The audit must then name
what is not covered any more, on at least one family; where it cannot see a difference (softmaxes,
whose ordinary gradient is a rule), the operation oracle must. Where another row takes over (an
unknown activation module is explained by its operations), the rule is attached elsewhere, and
relevance must be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from support.zoo_checks import TOKENS, truth
from torch import nn
from truth import zoo

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.hooks import attach, sites
from tl_contrastive_lrp.hooks.attach import gradient
from tl_contrastive_lrp.hooks.audit import audit as audit_run
from tl_contrastive_lrp.hooks.by_operation import marks as inside_marks
from tl_contrastive_lrp.hooks.by_operation import mode as inside
from tl_contrastive_lrp.rules import activations


@pytest.fixture(autouse=True)
def _no_answer_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_run, "_known", WeakKeyDictionary())


def _covered(model: Any) -> bool:
    audit_run._known.pop(model, None)
    try:
        clrp.coverage(model)
    except UncoveredComponentError:
        return False
    return True


def _refused_or_found_elsewhere(model: Any, mutate: Callable[[], None]) -> bool:
    """Whether a mutation is refused, or only moves rules and no relevance."""
    objective, site = clrp.logit_diff(model, 7, 12), "blocks.0.hook_resid_pre"

    def look() -> tuple[Any, torch.Tensor]:
        cache = clrp.run_with_relevance(model, TOKENS, objective, [site])[1]
        return clrp.coverage(model), cache[site]

    rows, relevance = look()
    mutate()
    if not _covered(model):
        return True
    other_rows, other = look()
    same = torch.allclose(other, relevance, atol=1e-5 * float(relevance.abs().max()))
    return rows != other_rows and same


def _fresh(name: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(zoo.saved(name)), device="cpu")


# ---------------------------------------------------------------- rows of components

# Row -> a family that needs it.
COMPONENTS = {
    "NormalizationBridge": "llama",
    "AttentionBridge": "gptj",
    "PositionEmbeddingsAttentionBridge": "llama",
    "JointQKVAttentionBridge": "gpt2",
    "MLAAttentionBridge": "deepseek_v3",
    "GatedMLPBridge": "llama",
    "MLPBridge": "gpt2",
    "MoEBridge": "mixtral",
    "MoERouterBridge": "mixtral",
}


@pytest.mark.parametrize("row", sorted(sites.COMPONENTS))
def test_every_row_of_components_is_needed(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.boot(COMPONENTS[row])
    assert _refused_or_found_elsewhere(
        model, lambda: monkeypatch.setitem(sites.COMPONENTS, row, ())
    )
    # What stands in: activation modules without an MLP, the experts around a router.
    assert _covered(model) == (row in ("MLPBridge", "MoERouterBridge"))


@pytest.mark.parametrize(
    ("row", "name"), [("ModernBertDecoderMLP", "modernbert_decoder"), ("RobertaLMHead", "roberta")]
)
def test_every_module_written_out_is_needed(
    row: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo.boot(name)
    assert _covered(model)
    monkeypatch.setattr(sites, "WRITTEN_OUT", sites.WRITTEN_OUT - {row})
    assert not _covered(model)


@pytest.mark.parametrize("gated", [True, False])
def test_mlps_of_native_models_are_needed(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    size = {"n_layers": 1, "d_model": 8, "n_heads": 2, "d_head": 4, "d_mlp": 12, "n_ctx": 8}
    settings = {**size, "d_vocab": 48, "act_fn": "silu" if gated else "relu", "gated_mlp": gated}
    model = TransformerBridge.boot_native(settings).eval()
    assert _covered(model)
    row = "NativeGatedMLP" if gated else "NativeMLP"
    monkeypatch.setattr(sites, "WRITTEN_OUT", sites.WRITTEN_OUT - {row})
    assert not _covered(model)


# ---------------------------------------------------------------- rows of activations


def _make(row: str) -> nn.Module | None:
    import transformers.activations as hf

    owner = getattr(hf, row, None) or getattr(nn, row, None)
    if row == "BloomGelu":
        from transformers.models.bloom.modeling_bloom import BloomGelu as owner
    return None if owner is None else owner().eval()


MODULES = sorted(row for row in activations.ACTIVATIONS if row[0].isupper())


@pytest.mark.parametrize("row", [*MODULES, *activations.PARAMETRIC])
def test_every_row_of_activations_is_needed(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _make(row)
    if module is None or type(module).__name__ != row:  # an old name of another class
        pytest.skip(f"{row} is not in this version of torch or transformers")
    model = _fresh("gpt2")
    for block in model.blocks:
        block.mlp.original_component.act = module
    table = "PARAMETRIC" if row in activations.PARAMETRIC else "ACTIVATIONS"
    assert _refused_or_found_elsewhere(
        model, lambda: monkeypatch.delitem(getattr(activations, table), row)
    )


FUNCTIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu_squared": "relu2",
}


@pytest.mark.parametrize("row", sorted(set(activations.ACTIVATIONS) - set(MODULES)))
def test_every_function_of_processed_models_is_needed(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With folded weights TransformerLens computes gated MLPs itself, by a function's name."""
    model = _fresh("llama")
    model.enable_compatibility_mode()
    for block in model.blocks:
        for name in ("activation_function", "hidden_activation", "hidden_act", "act_fn"):
            if getattr(block.mlp.config, name, None) is not None:
                setattr(block.mlp.config, name, FUNCTIONS[row])
    assert _covered(model)
    monkeypatch.delitem(activations.ACTIVATIONS, row)
    with pytest.raises(UncoveredComponentError, match=row):
        clrp.coverage(model)


# ---------------------------------------------------------------- attachments

ATTACHMENTS = {
    "norm": "llama",
    "activation": "llama",
    "gate": "llama",
    "qk": "llama",
    "pattern_v": "llama",
    "softcap": "gemma2",
    "attention": "gptj",
    "experts": "bitnet",
    "wrapped": "roberta",
}


@pytest.mark.parametrize("kind", sorted(set(attach._ATTACH) - {"softmax"}))
def test_every_kind_of_attachment_is_needed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.boot(ATTACHMENTS[kind])
    assert _covered(model)
    monkeypatch.setitem(attach._ATTACH, kind, gradient)
    assert not _covered(model)


def _off(name: str, rules: str) -> float:
    """How far relevance at the first block is from the oracle's, over its largest."""
    model, site = zoo.boot(name), "blocks.0.hook_resid_pre"
    _, cache = clrp.run_with_relevance(
        model, TOKENS, clrp.logit_diff(model, 7, 12), [site], rules=rules
    )
    wanted = truth(name, rules).relevance[site]
    return float((cache[site].double() - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("rules", ["cplrp", "gim"])
def test_the_attachment_of_softmaxes_is_needed(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _off("llama", rules) < 1e-5
    monkeypatch.setitem(attach._ATTACH, "softmax", gradient)
    assert _off("llama", rules) > 1e-3


# ---------------------------------------------------------------- operations inside

# What a handler is for -> a family that needs it, and under which rules the oracle sees it where
# the audit cannot.
HANDLERS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "softmax": (("softmax",), "gptj", "cplrp"),
    "weights": (("sigmoid",), "deepseek_v3", "cplrp"),
    "clamps": (inside.CLAMPS, "olmo-clipped", ""),
    "maximum": (("max", "maximum"), "xglm", ""),
    "matrix products": (inside.MATRIX_PRODUCTS, "gptj", ""),
    "products": (("mul", "__mul__", "__rmul__"), "bitnet", ""),
    "quotients": (
        ("div", "__truediv__", "true_divide", "div_", "__itruediv__"),
        "deepseek_v3",
        "",
    ),
    "roots": (inside.ROOTS, "bitnet", ""),
    "norms": (inside.NORMS, "stablelm-qk-norm", ""),
    "functions": (("gelu",), "roberta", ""),
}


@pytest.mark.parametrize("what", HANDLERS)
def test_every_handler_inside_is_needed(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    functions, name, rules = HANDLERS[what]
    model = zoo.boot(name)
    assert _covered(model)
    assert not rules or _off(name, rules) < 1e-5
    for function in functions:
        monkeypatch.delitem(inside._HANDLERS, function, raising=False)
    if not rules:
        assert not _covered(model)
        return
    assert not _covered(model) or _off(name, rules) > 1e-3


def test_parameters_are_told_from_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without that, a norm's weight inside would be halved like a gate, in ``lrp`` alone."""
    model = zoo.boot("bitnet")
    objective = clrp.logit_diff(model, 7, 12)
    wanted = clrp.run_with_relevance(model, TOKENS, objective, ["embed.hook_out"])[1]

    def relevance() -> torch.Tensor:
        kept: dict[str, torch.Tensor] = {}

        def start(tensor: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
            kept["x"] = tensor.detach().requires_grad_(True)
            return kept["x"]

        with model.hooks(fwd_hooks=[("embed.hook_out", start)]), clrp.lrp(model):
            value = objective(model(TOKENS))
        return kept["x"].detach() * torch.autograd.grad(value, kept["x"])[0]

    assert torch.allclose(relevance(), wanted["embed.hook_out"], atol=1e-6)
    monkeypatch.setattr(
        inside_marks, "computed", lambda x: isinstance(x, torch.Tensor) and x.requires_grad
    )
    assert not torch.allclose(relevance(), wanted["embed.hook_out"], atol=1e-3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("row", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "qwen3_next",
                                 "lfm2", "deepseek_v4", "gemma4_text"])  # fmt: skip
def test_what_is_refused_by_name_would_be_refused_by_the_audit(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of refusals makes messages; nothing is right only because it is there."""
    model = zoo.boot(row)
    assert not _covered(model)
    monkeypatch.setattr(sites, "UNCOVERED", {})
    monkeypatch.setattr(sites, "UNCOVERED_PARTS", {})
    assert not _covered(model)
