"""What is refused before anything runs, and why: kinds of component that no rule covers.

The audit (``audit/audit.py``) would refuse each of them too, operation by operation; a row here
says in one sentence what the component is, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import UncoveredComponentError
from ..rules.threads import wrapped_modules
from .families import UNCOVERED, UNCOVERED_PARTS

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


# Where classes of quantised modules and weights are defined -> the library, as people call it.
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


_library_by_class: dict[type, str | None] = {}  # asked of every module at every call


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
    """What in a module is quantised, and by which library ("" if that cannot be seen)."""
    if (library := _library_of(type(module))) is not None:
        return f"is a {type(module).__name__}", library
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
    found = quantised(module)
    if found is None:
        return
    what, library = found
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
        f"The model is quantised{f' by {by}' if by else ''}: {path} {what}, which cannot be read "
        "as numbers. Load the model unquantised, for example "
        f"TransformerBridge.boot_transformers(name, dtype=torch.bfloat16).{remedy}"
    )


def _refuse_shape(model: Any, found: Mapping[str, Any]) -> None:
    config = getattr(model.original_model, "config", None)
    two = any(
        getattr(config, flag, False) for flag in ("is_encoder_decoder", "add_cross_attention")
    )
    if two:
        kind = type(model.original_model).__name__
        raise UncoveredComponentError(f"No rule covers this model ({kind}): {_TWO_INPUTS}")
    if getattr(config, "do_layer_norm_before", True) is False:
        raise refusal("model", model.original_model, _POST_NORM)
    heads = dict.fromkeys(path.split(".")[0] for path in found)
    stacks = [head for head in heads if head.endswith("blocks") and head != "blocks"]
    if stacks and "blocks" not in heads:
        raise refusal("model", model.original_model, _STACKS.format(" and ".join(stacks)))


def _refuse_replaced(path: str, component: nn.Module) -> None:
    """Refuse a module in a HookPoint's place, as SAELens' bridge puts autoencoders there."""
    for name, module in component._modules.items():
        point = name.startswith("hook_") and isinstance(module, nn.Module)
        if point and not hasattr(module, "fwd_hooks"):
            raise UncoveredComponentError(
                f"{path}.{name} is no HookPoint: a {type(module).__name__} stands in its place, so "
                "nothing can be read or ruled there. Put the HookPoint back (SAELens: "
                "model.reset_saes()) and run the module in a hook function instead: with "
                f"model.hooks(fwd_hooks=[({f'{path}.{name}'!r}, lambda x, hook: sae(x))]): ..."
            )


def _why(component: Any) -> str | None:
    bridges = [base.__name__ for base in type(component).__mro__]
    wrapped = type(component.original_component).__name__
    for name, why in UNCOVERED.items():
        if name in bridges or wrapped.endswith(name):
            return why
    return None


def refuse_known(model: Any, found: Mapping[str, Any]) -> None:
    """Refuse a model that has a component which is known to have no rule.

    Args:
        model: A ``TransformerBridge``.
        found: Its components by path.

    Raises:
        UncoveredComponentError: what it is, where, and what to do instead.
    """
    _refuse_shape(model, found)
    for path, module in wrapped_modules(model):
        path = path.replace("._original_component", "")
        _refuse_quantised(path or "model", module, getattr(model.original_model, "config", None))
        why = UNCOVERED_PARTS.get(path.rpartition(".")[2])
        if why is not None:
            raise refusal(path, module, why)
    for path, component in found.items():
        _refuse_replaced(path, component)
        why = _why(component)
        if why is not None:
            raise refusal(path, component.original_component, why)
