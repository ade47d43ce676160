"""Facts about a ``TransformerBridge`` as a whole.

These are its HookPoints, components and modules by name, the sites of its residual stream, and
whether it is a bridge at all. Walks of the whole model are done once per public call
(``once_per_call``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..rules.threads import once_per_call, wrapped_modules


def residual_sites(model: Any) -> tuple[str, ...]:
    """HookPoints of the residual stream: each block's input, and the last block's output."""
    n = int(model.cfg.n_layers)
    return (*(f"blocks.{i}.hook_resid_pre" for i in range(n)), f"blocks.{n - 1}.hook_resid_post")


def without_neurons(model: Any) -> str | None:
    """Name of an MLP that has no neurons at ``hook_post`` (experts have no HookPoints), or None."""
    for layer in range(int(model.cfg.n_layers)):
        mlp = getattr(model.blocks[layer], "mlp", None)
        experts = is_kind(mlp, "MoEBridge") and not getattr(mlp, "bound_dense", False)
        if experts or f"blocks.{layer}.mlp.hook_post" not in hook_points(model):
            return f"blocks.{layer}.mlp"
    return None


@once_per_call
def hook_points(model: Any) -> Mapping[str, Any]:
    """Every HookPoint by each of its names: ``model.hook_dict``, built once per public call.

    TransformerLens builds that mapping anew at each access.
    """
    points: Mapping[str, Any] = model.hook_dict
    return points


def public_name(hook_dict: Mapping[str, Any], name: str) -> str:
    """The name of a HookPoint under which TransformerLens calls an added hook exactly once.

    In compatibility mode a HookPoint is renamed, and a hook added under its other name is called
    once per name, so a rule would apply twice.
    """
    hook_point = hook_dict[name]
    own: str | None = hook_point.name
    return own if own and hook_dict.get(own) is hook_point else name


# HookPoints at which the input enters; upstream of them there are only token ids.
LEAVES = ("embed.hook_out", "pos_embed.hook_out")

_BRIDGES = "transformer_lens."


def is_component(module: object) -> bool:
    """Whether a module is one of TransformerLens' components around a Hugging Face module."""
    return type(module).__module__.startswith(_BRIDGES) and hasattr(module, "original_component")


@once_per_call
def components(model: Any) -> Mapping[str, Any]:
    """Every TransformerLens component of the model by path, in the order of its HookPoints."""
    at: dict[str, Any] = {"": model}

    def found(path: str) -> Any:
        if path not in at:
            above, _, part = path.rpartition(".")
            holder = found(above)
            at[path] = holder[int(part)] if part.isdigit() else getattr(holder, part)
        return at[path]

    paths = dict.fromkeys(hook_name.rpartition(".")[0] for hook_name in hook_points(model))
    return {path: found(path) for path in paths if path and is_component(found(path))}


@once_per_call
def module_names(model: Any) -> Mapping[nn.Module, str]:
    """Every module of the wrapped model by its path as TransformerLens names it.

    "blocks.0.mlp" names a component, "blocks.0.mlp.act_fn" a module inside the one it wraps.
    """
    paths = {id(component): path for path, component in components(model).items()}
    names: dict[nn.Module, str] = {}
    translated: dict[str, str] = {"": ""}
    for module, raw in wrapped_modules(model).items():
        head, _, last = raw.rpartition(".")
        above = translated.get(head, head)
        if id(module) in paths:
            name = paths[id(module)]
        elif last == "_original_component":
            name = above
        else:
            name = f"{above}.{last}" if above else last
        translated[raw] = name
        names[module] = name or "model"
    return names


def bias_of(module: object) -> Tensor | None:
    """The vector [features] that a module adds: its own ``bias``, whether it is a parameter or not.

    ``getattr`` is not used because a component also has the attributes of the module it wraps.
    Other things named "bias", like the causal mask of the first GPT, are not vectors.
    """
    if not isinstance(module, nn.Module):
        return None
    for own in (module._parameters, module._buffers, vars(module)):
        bias = own.get("bias")
        if isinstance(bias, Tensor) and bias.is_floating_point() and bias.ndim == 1:
            return bias
    return None


def is_kind(component: Any, class_name: str) -> bool:
    """Whether the component is of that TransformerLens class or of one derived from it."""
    return any(base.__name__ == class_name for base in type(component).__mro__)


def require_bridge(model: Any) -> None:
    """Refuse a model that is not a ``TransformerBridge``.

    Raises:
        TypeError: It is not a bridge; the message says how to make one.
    """
    # The class is checked first, because the instance would build its table of HookPoints.
    has_hook_points = hasattr(type(model), "hook_dict") or hasattr(model, "hook_dict")
    if not has_hook_points or not hasattr(model, "original_model"):
        if any(base.__module__.split(".")[0] == "peft" for base in type(model).__mro__):
            raise TypeError(
                f"model must be a TransformerBridge, got {type(model).__name__}, a model with an "
                "adapter. Merge the adapter into the weights and boot the result: "
                "TransformerBridge.boot_transformers(base_name, hf_model=model.merge_and_unload())."
            )
        raise TypeError(
            f"model must be a TransformerBridge, got {type(model).__name__}; make one with "
            "TransformerBridge.boot_transformers(name_or_directory)."
        )
