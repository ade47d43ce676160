"""The location of each operation that needs a rule, and the components that are refused.

``find_sites`` walks the model's components and reads ``families.COMPONENTS``: what each kind of
TransformerLens component computes beyond linear maps. A component's row is that of the nearest
class in its inheritance that has one, so a family with a variant of its own needs none. Activation
functions are in ``rules/activations.py``. Components that are known to have no rule are refused
here, with one sentence that says what the component is and what to do instead.

A wrapped Hugging Face module that computes attention or experts itself, without a HookPoint there,
is left to ``by_operation``. This module does not guarantee that the list is complete. That is the
task of the audit (``audit/audit.py``), which follows the graph that relevance flows through and
refuses every operation that no rule accounts for. A new kind of component needs a row in
``COMPONENTS`` and, if its operation is new, an attachment in ``attach.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import Message, UncoveredComponentError, Wording, a_kind
from ..inputs.bridge import components, is_component, is_kind, require_bridge
from ..rules import functions as rules
from ..rules.activations import ACTIVATIONS, PARAMETRIC, ratio_of
from ..rules.threads import once_per_call, paths_under, wrapped_modules
from .families import (
    _ATTENTION,
    _BIASED_SCORES,
    COMPONENTS,
    UNCOVERED,
    UNCOVERED_PARTS,
    WRITTEN_OUT,
    Operation,
)


@dataclass(frozen=True, eq=False)
class Site:
    """One operation at one component.

    Attributes:
        path: The component's path, as in its HookPoints' names ("blocks.0.attn").
        operation: The kind of operation.
        component: The TransformerLens component (for the final soft-cap: the wrapped model; None
            for an activation module outside of any).
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
        """The component's class, and the class of the wrapped module if the site is one."""
        own = type(self.component).__name__
        if self.operation == "wrapped" and self.component is None:
            return type(self.module).__name__
        if self.operation in ("attention", "experts", "wrapped"):
            return f"{own}/{type(self.component.original_component).__name__}"
        if self.operation != "activation" or self.module is None:
            return own
        inner = type(self.module).__name__
        return inner if self.component is None else f"{own}/{inner}"


def operations_of(component: Any) -> tuple[Operation, ...]:
    """What a TransformerLens component computes beyond linear maps, by its class's row."""
    if type(component).__name__ == "GeneralizedComponent":  # all others are derived from it
        linear = isinstance(component.original_component, nn.Linear | nn.Embedding | nn.Identity)
        return () if linear else ("wrapped",)
    for base in type(component).__mro__:
        if base.__name__ in COMPONENTS:
            operations = COMPONENTS[base.__name__]
            if operations == _ATTENTION and _hides_operations(component):
                return ("attention",)
            if "activation" in operations and _is_written_out(component):
                return ("experts",)
            return operations
    return ()


def _is_written_out(mlp: Any) -> bool:
    """Whether an MLP computes more than linear maps, its activation and the one gate product."""
    wrapped = mlp.original_component
    if type(wrapped).__name__ in WRITTEN_OUT:
        return True
    if mlp.name is None:  # no container: its parts belong to the block
        return False
    return any(
        not is_component(child)
        and not isinstance(child, nn.Linear | nn.Dropout | nn.Identity)
        and ratio_of(child) is None
        for child in wrapped.children()
    )


def _hides_operations(attention: Any) -> bool:
    """Whether attention has operations that no HookPoint shows.

    A gate's product or a norm may act on pattern·v before ``hook_z``, and a clamp on queries, keys
    and values.
    """
    from transformer_lens.model_bridge.generalized_components.position_embeddings_attention import (
        PositionEmbeddingsAttentionBridge as Plain,
    )

    last = getattr(type(attention), "_pre_output_projection", Plain._pre_output_projection)
    gate = attention._modules.get("gate")
    return (
        last is not Plain._pre_output_projection
        or bool(getattr(attention.config, "gated_q_proj", False))
        or getattr(getattr(attention.original_component, "config", None), "clip_qkv", None)
        is not None
        or (gate is not None and gate.original_component is not None)
    )


def scores_are_biased(attention: Any) -> bool:
    """Whether a term that does not depend on the keys is added to query·key."""
    return any(is_kind(attention, name) for name in _BIASED_SCORES)


def delegates_attention(component: Any) -> bool:
    """Whether an attention component leaves the whole computation to the wrapped module."""
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge

    return bool(type(component).forward is AttentionBridge.forward)


def _processed_activation(path: str, mlp: Any) -> Site:
    # TransformerLens computes this MLP itself and calls a function, not the wrapped module.
    from transformer_lens.model_bridge.generalized_components.gated_mlp import (
        resolve_activation_fn,
    )

    function = resolve_activation_fn(mlp.config)
    ratio = ACTIVATIONS.get(function.__name__)
    if ratio is None:
        raise refusal(path, function, f"activation {function.__name__!r} is unknown.")
    return Site(path, "activation", mlp, None, ratio)


def _mlp_activation(path: str, mlp: Any) -> Iterator[Site]:
    if getattr(mlp, "_use_processed_weights", False) and is_kind(mlp, "GatedMLPBridge"):
        yield _processed_activation(path, mlp)
        return
    activations = [
        module
        for module in paths_under(mlp.original_component)
        if ratio_of(module) is not None and not is_component(module)
    ]
    if len(activations) == 1:  # otherwise it is not at this MLP's HookPoints; see _outside
        (module,) = activations
        yield Site(path, "activation", mlp, module, ratio_of(module))


def _sites_of(path: str, component: Any) -> Iterator[Site]:
    for operation in operations_of(component):
        if operation == "activation":
            yield from _mlp_activation(path, component)
        elif operation == "norm" and isinstance(component.original_component, nn.Identity):
            continue
        else:
            yield Site(path, operation, component)
    wrapped = component.original_component
    if getattr(wrapped, "attn_logit_softcapping", None) is not None:
        yield Site(path, "softcap", component, wrapped)


def _outside(model: Any, sites: list[Site]) -> Iterator[Site]:
    """Operations outside TransformerLens' components: experts' activations, heads of encoders."""
    known = {id(site.module) for site in sites}
    wrapped = {id(site.component.original_component) for site in sites}
    for site in sites:
        if site.operation == "activation" and site.module is None:  # a function in its place
            known.update(map(id, site.component.original_component.modules()))
    kinds = {*WRITTEN_OUT, *ACTIVATIONS, *PARAMETRIC}
    for module, path in wrapped_modules(model).items():
        if type(module).__name__ not in kinds:
            continue
        ratio = ratio_of(module)
        if type(module).__name__ in WRITTEN_OUT and id(module) not in wrapped:
            yield Site(_shown(path), "wrapped", None, module)
        if ratio is not None and not is_component(module) and id(module) not in known:
            known.add(id(module))
            yield Site(_shown(path), "activation", None, module, ratio)


@once_per_call
def find_sites(model: Any) -> tuple[Site, ...]:
    """Every operation of ``model`` that needs a rule, according to the tables.

    Args:
        model: A ``TransformerBridge``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        UncoveredComponentError: A component, flag or weight that no rule covers, by name.
    """
    require_bridge(model)
    by_path = components(model)
    refuse_known(model, by_path)
    sites: list[Site] = []
    for path, component in by_path.items():
        sites.extend(_sites_of(path, component))
    sites.extend(_outside(model, sites))
    config = getattr(model.original_model, "config", None)
    if getattr(config, "final_logit_softcapping", None) is not None:
        sites.append(Site("unembed", "softcap", model.original_model, config))
    return tuple(sites)


# ---------------------------------------------------------------- refusals


_ADVICE = (
    " Relevance through it would be made up. `tl-contrastive-lrp check MODEL` lists what is "
    "covered; leave this model to activation patching, or add a row to "
    "tl_contrastive_lrp.hooks.families."
)

_TWO_INPUTS = (
    "it is an encoder-decoder model: its decoder reads the prompt through cross-attention and a "
    "second sequence of tokens, and relevance is defined here for one prompt and one stack. Use a "
    "decoder-only model or an encoder, or explain this one by activation patching."
)

_POST_NORM = (
    "in OPT's post-norm blocks (opt-350m) TransformerLens gives what a hook returns at "
    "ln2.hook_out another shape, so that the model fails with any hook there that returns a value."
)

_STACKS = (
    "its layers are {} instead of one stack model.blocks, and some run several times in a forward, "
    "so a HookPoint holds no single hidden state."
)


def refusal(path: str, module: object, why: str) -> UncoveredComponentError:
    """The error for a component that no rule covers."""
    kind = type(module).__name__
    return UncoveredComponentError(f"No rule covers {path!r} ({kind}): {why}{_ADVICE}")


# Package that defines quantised modules or weights -> the common name of the library.
_QUANTISERS = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "hqq": "HQQ",
    "gptqmodel": "GPTQ",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quark": "Quark",
    "torch.ao.nn": "torch.ao.quantization",
    "torch.nn.quantized": "torch.ao.quantization",
    "transformers.integrations.aqlm": "AQLM",
    "transformers.integrations.bitnet": "BitNet",
    "transformers.integrations.bitsandbytes": "bitsandbytes",
    "transformers.integrations.eetq": "EETQ",
    "transformers.integrations.fbgemm_fp8": "FBGEMM fp8",
    "transformers.integrations.finegrained_fp8": "fp8",
    "transformers.integrations.fp_quant": "FP-Quant",
    "transformers.integrations.higgs": "HIGGS",
    "transformers.integrations.mxfp4": "MXFP4",
    "transformers.integrations.spqr": "SpQR",
    "transformers.integrations.vptq": "VPTQ",
}

# Buffers in which packed weights are kept.
_PACKED = ("qweight", "weight_packed", "qzeros")


_library_by_class: dict[type, str | None] = {}  # every call looks up every module


def _library_of(kind: type) -> str | None:
    """The quantisation library that defines a class of modules or tensors."""
    if kind not in _library_by_class:
        homes = [f"{base.__module__}." for base in kind.__mro__]
        _library_by_class[kind] = next(
            (
                library
                for home in homes
                for prefix, library in _QUANTISERS.items()
                if home.startswith(f"{prefix}.")
            ),
            None,
        )
    return _library_by_class[kind]


def quantised(module: nn.Module) -> tuple[str, str] | None:
    """The quantised part of a module, and the library that quantised it ("" if unknown)."""
    if (library := _library_of(type(module))) is not None:
        return f"is {a_kind(module)}", library
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if (
            library := _library_of(type(parameter)) or _library_of(type(parameter.data))
        ) is not None:
            kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
            return f"holds its {name} as {kind}", library
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
            return f"holds its {name} as {parameter.dtype}", ""
    for name, buffer in module._buffers.items():
        if buffer is not None and name in _PACKED and not buffer.dtype.is_floating_point:
            return f"holds packed weights ({name}, {buffer.dtype})", ""
    return None


def _refuse_quantised(path: str, module: nn.Module, config: object) -> None:
    quantisation = quantised(module)
    if quantisation is None:
        return
    path, (what, library) = _shown(path) or "model", quantisation
    method = getattr(getattr(config, "quantization_config", None), "quant_method", "")
    by = library or str(getattr(method, "value", method))
    remedy = (
        " Of a checkpoint that exists only quantised: hf = AutoModelForCausalLM.from_pretrained("
        "name).dequantize(dtype=torch.float32), and then "
        "TransformerBridge.boot_transformers(name, hf_model=hf)."
        if by == "bitsandbytes"
        else ""
    )
    raise UncoveredComponentError(
        Message(
            f"The model is quantised{f' by {by}' if by else ''}: {path} {what}, which cannot be "
            "read as numbers. ",
            Wording(
                "Load the model unquantised, for example "
                "TransformerBridge.boot_transformers(name, dtype=torch.bfloat16).",
                elsewhere="Give the unquantised model.",
            ),
            remedy,
        )
    )


def _refuse_shape(model: Any, by_path: Mapping[str, Any]) -> None:
    config = getattr(model.original_model, "config", None)
    two = any(
        getattr(config, flag, False) for flag in ("is_encoder_decoder", "add_cross_attention")
    )
    if two:
        kind = type(model.original_model).__name__
        raise UncoveredComponentError(f"No rule covers this model ({kind}): {_TWO_INPUTS}")
    if getattr(config, "do_layer_norm_before", True) is False:
        raise refusal("model", model.original_model, _POST_NORM)
    heads = dict.fromkeys(path.split(".")[0] for path in by_path)
    stacks = [head for head in heads if head.endswith("blocks") and head != "blocks"]
    if stacks and "blocks" not in heads:
        raise refusal("model", model.original_model, _STACKS.format(" and ".join(stacks)))


def _refuse_replaced(path: str, component: nn.Module) -> None:
    """Refuse a module that replaces a HookPoint, such as the autoencoders of SAELens' bridge."""
    for name, module in component._modules.items():
        if module is None or "fwd_hooks" in module.__dict__ or not name.startswith("hook_"):
            continue
        if not hasattr(module, "fwd_hooks"):
            raise UncoveredComponentError(
                f"{path}.{name} is no HookPoint: {a_kind(module)} has replaced it, so "
                "nothing can be read and no rule applied there. Put the HookPoint back (SAELens: "
                "model.reset_saes()) and run the module in a hook function instead: with "
                f"model.hooks(fwd_hooks=[({f'{path}.{name}'!r}, lambda x, hook: sae(x))]): ..."
            )


_UNCOVERED_PARTS = tuple(UNCOVERED_PARTS)


def _shown(path: str) -> str:
    """A path in the wrapped model, without what the bridge inserts."""
    return path.replace("._original_component", "")


_why_by_classes: dict[tuple[type, type], str | None] = {}  # every call asks of every component


def _why(component: Any) -> str | None:
    classes = type(component), type(component.original_component)
    if classes not in _why_by_classes:
        bridges, wrapped = [base.__name__ for base in classes[0].__mro__], classes[1].__name__
        reasons = (w for n, w in UNCOVERED.items() if n in bridges or wrapped.endswith(n))
        _why_by_classes[classes] = next(reasons, None)
    return _why_by_classes[classes]


def refuse_known(model: Any, by_path: Mapping[str, Any]) -> None:
    """Refuse a model that has a component which is known to have no rule.

    Args:
        model: A ``TransformerBridge``.
        by_path: Its components by path.

    Raises:
        UncoveredComponentError: The message names the component and says what to do instead.
    """
    _refuse_shape(model, by_path)
    config = getattr(model.original_model, "config", None)
    for module, path in wrapped_modules(model).items():
        if module._parameters or module._buffers or _library_of(type(module)) is not None:
            _refuse_quantised(path, module, config)
        if path.endswith(_UNCOVERED_PARTS):
            why = UNCOVERED_PARTS.get(_shown(path).rpartition(".")[2])
            if why is not None:
                raise refusal(_shown(path), module, why)
    for path, component in by_path.items():
        _refuse_replaced(path, component)
        why = _why(component)
        if why is not None:
            raise refusal(path, component.original_component, why)
