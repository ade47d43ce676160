"""Where in a model each kind of operation is: the data behind every rule's attachment.

``find_sites`` walks the whole model, TransformerLens' components and the Hugging Face modules they
wrap, and knows three tables:

- ``COMPONENTS``: what each TransformerLens component computes beyond linear maps;
- ``ACTIVATIONS``: activation modules and their f(x)/x in closed form;
- ``FAMILIES``: the Hugging Face classes whose forward has been read and tested to compute nothing
  but what their components expose.

What is in none of them is refused by name: a module without a row is never silently given the
ordinary gradient. A new family is a row of ``FAMILIES``; a new kind of component a row of
``COMPONENTS`` and, if its operation is new, an attachment in ``attach.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from . import rules
from .errors import UncoveredComponentError

Operation = Literal["norm", "activation", "gate", "qk", "softmax", "pattern_v", "softcap"]

_ATTENTION: tuple[Operation, ...] = ("qk", "softmax", "pattern_v")

# TransformerLens component class -> its operations that are not linear.
COMPONENTS: dict[str, tuple[Operation, ...]] = {
    "RMSNormalizationBridge": ("norm",),
    "NormalizationBridge": ("norm",),
    "LayerNormPreBridge": ("norm",),
    "RMSNormPreBridge": ("norm",),
    "PositionEmbeddingsAttentionBridge": _ATTENTION,
    "JointQKVAttentionBridge": _ATTENTION,
    "GatedMLPBridge": ("activation", "gate"),
    "MLPBridge": ("activation",),
    "BlockBridge": (),
    "EmbeddingBridge": (),
    "PosEmbedBridge": (),
    "RotaryEmbeddingBridge": (),
    "LinearBridge": (),
    "UnembeddingBridge": (),
}

# Hugging Face activation module class, or name of the function that TransformerLens calls when it
# computes a gated MLP itself (processed weights) -> f(x)/x.
ACTIVATIONS: dict[str, rules.Ratio] = {
    "SiLUActivation": rules.silu_ratio,
    "SiLU": rules.silu_ratio,
    "silu": rules.silu_ratio,
    "GELUActivation": rules.gelu_ratio,
    "GELU": rules.gelu_ratio,
    "gelu": rules.gelu_ratio,
    "NewGELUActivation": rules.gelu_tanh_ratio,
    "GELUTanh": rules.gelu_tanh_ratio,
    "PytorchGELUTanh": rules.gelu_tanh_ratio,
    "FastGELUActivation": rules.gelu_tanh_ratio,
    "gelu_tanh": rules.gelu_tanh_ratio,
    "ReLU": rules.relu_ratio,
    "relu": rules.relu_ratio,
}

# Modules whose forward is linear in its floating-point input, or the identity in eval mode.
LINEAR: frozenset[str] = frozenset(
    {"Linear", "Conv1D", "Embedding", "Dropout", "Identity", "ModuleList", "HookPoint"}
    | {"Gemma2TextScaledWordEmbedding", "Gemma3TextScaledWordEmbedding", "LayerNorm"}
)


def _llama_like(prefix: str, *, model: str | None = None) -> frozenset[str]:
    parts = ("ForCausalLM", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
    return frozenset({f"{prefix}{part}" for part in parts} | {model or f"{prefix}Model"})


# Family name -> wrapped classes that compute only what their TransformerLens components expose.
FAMILIES: dict[str, frozenset[str]] = {
    "Qwen3": _llama_like("Qwen3"),
    "Qwen2": _llama_like("Qwen2"),
    "Llama": _llama_like("Llama"),
    "Mistral": _llama_like("Mistral"),
    "Gemma 2": _llama_like("Gemma2"),
    "Gemma 3": _llama_like("Gemma3", model="Gemma3TextModel"),
    "GPT-2": frozenset({"GPT2LMHeadModel", "GPT2Model", "GPT2Block", "GPT2Attention", "GPT2MLP"}),
}

_WRAPPED = LINEAR.union(*FAMILIES.values())
_BRIDGES = "transformer_lens."


@dataclass(frozen=True, eq=False)
class Site:
    """One operation at one component.

    Attributes:
        path: The component's path, as in its HookPoints' names ("blocks.0.attn").
        operation: Which kind of operation.
        component: The TransformerLens component (for the final soft-cap: the wrapped model).
        module: The wrapped module that carries the operation, where it is one of its own
            (an activation), or that holds its constant (a soft-cap's config).
        ratio: f(x)/x, for activations.
    """

    path: str
    operation: Operation
    component: Any
    module: Any = None
    ratio: rules.Ratio | None = None

    @property
    def class_name(self) -> str:
        """The component's class, and the wrapped module's where the site is one."""
        own = type(self.component).__name__
        return own if self.operation != "activation" or self.module is None else (
            f"{own}/{type(self.module).__name__}"
        )  # fmt: skip


def _is_component(module: object) -> bool:
    return type(module).__module__.startswith(_BRIDGES) and hasattr(module, "original_component")


def components(model: Any) -> dict[str, Any]:
    """Every TransformerLens component of the model by path, in the order of its HookPoints."""
    found: dict[str, Any] = {}
    for hook_name in model.hook_dict:
        path = hook_name.rpartition(".")[0]
        if not path or path in found:
            continue
        component: Any = model
        for part in path.split("."):
            component = component[int(part)] if part.isdigit() else getattr(component, part)
        if _is_component(component):
            found[path] = component
    return found


def _refuse(path: str, module: object, why: str) -> UncoveredComponentError:
    return UncoveredComponentError(
        f"No rule covers {path!r} ({type(module).__name__}): {why} "
        f"Covered families: {', '.join(sorted(FAMILIES))}. Relevance through it would be made up; "
        "leave this model to activation patching, or add a row to tl_contrastive_lrp.sites."
    )


def _refuse_quantised(path: str, module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            raise UncoveredComponentError(
                f"{path}.{name} holds {parameter.dtype} weights that cannot be read as numbers. "
                "Load the model unquantised, for example "
                "TransformerBridge.boot_transformers(name, dtype=torch.bfloat16)."
            )


def _check_whole_model(model: Any) -> None:
    """Refuse any module that no table knows, wherever it hides."""
    for path, module in model.original_model.named_modules():
        path = path.replace("._original_component", "") or "model"
        name = type(module).__name__
        _refuse_quantised(path, module)
        if _is_component(module):
            if name not in COMPONENTS:
                raise _refuse(path, module, "its component class is unknown.")
        elif name not in _WRAPPED and name not in ACTIVATIONS:
            raise _refuse(path, module, "its class is unknown.")
        elif name == "LayerNorm" and not path.rpartition(".")[2].startswith(("ln_", "norm")):
            raise _refuse(path, module, "it normalises outside a TransformerLens norm component.")


def _check_flags(model: Any) -> None:
    for flag in ("use_split_qkv_input", "use_attn_in"):
        if getattr(model.cfg, flag, False):
            raise UncoveredComponentError(
                f"cfg.{flag} is on: TransformerLens then normalises once per head where no "
                f"HookPoint reaches. Call model.set_{flag}(False) first."
            )
    if getattr(model, "is_encoder_decoder", False) or getattr(
        model.original_model.config, "add_cross_attention", False
    ):
        raise _refuse("model", model.original_model, "it has cross-attention.")


def _mlp_activation(path: str, mlp: Any) -> Site:
    if getattr(mlp, "_use_processed_weights", False) and type(mlp).__name__ == "GatedMLPBridge":
        # TransformerLens computes this MLP itself and calls a function, not the wrapped module.
        from transformer_lens.model_bridge.generalized_components.gated_mlp import (
            resolve_activation_fn,
        )

        function = resolve_activation_fn(mlp.config)
        ratio = ACTIVATIONS.get(function.__name__)
        if ratio is None:
            raise _refuse(path, function, f"activation {function.__name__!r} is unknown.")
        return Site(path, "activation", mlp, None, ratio)
    wrapped = mlp.original_component
    found = [
        module
        for module in wrapped.modules()
        if type(module).__name__ in ACTIVATIONS and not _is_component(module)
    ]
    if len(found) != 1:
        raise _refuse(
            path, wrapped, f"it holds {len(found)} activation modules that have a rule, not one."
        )
    return Site(path, "activation", mlp, found[0], ACTIVATIONS[type(found[0]).__name__])


def _sites_of(path: str, component: Any) -> Iterator[Site]:
    for operation in COMPONENTS[type(component).__name__]:
        if operation == "activation":
            yield _mlp_activation(path, component)
        elif operation == "norm" and isinstance(component.original_component, nn.Identity):
            continue
        else:
            yield Site(path, operation, component)
    wrapped = component.original_component
    if getattr(wrapped, "attn_logit_softcapping", None) is not None:
        yield Site(path, "softcap", component, wrapped)


def require_bridge(model: Any) -> None:
    """Refuse what is no ``TransformerBridge``.

    Raises:
        TypeError: says how to make one.
    """
    if not hasattr(model, "hook_dict") or not hasattr(model, "original_model"):
        raise TypeError(
            f"model must be a TransformerBridge, got {type(model).__name__}; make one with "
            "TransformerBridge.boot_transformers(name_or_directory)."
        )


def find_sites(model: Any) -> tuple[Site, ...]:
    """Every operation of ``model`` that needs a rule.

    Args:
        model: A ``TransformerBridge``.

    Raises:
        TypeError: ``model`` is not a TransformerBridge.
        UncoveredComponentError: a component, flag or weight that no rule covers, by name.
    """
    require_bridge(model)
    _check_flags(model)
    _check_whole_model(model)
    sites: list[Site] = []
    for path, component in components(model).items():
        if type(component).__name__ not in COMPONENTS:
            raise _refuse(path, component, "its component class is unknown.")
        sites.extend(_sites_of(path, component))
    config = model.original_model.config
    if getattr(config, "final_logit_softcapping", None) is not None:
        sites.append(Site("unembed", "softcap", model.original_model, config))
    return tuple(sites)
