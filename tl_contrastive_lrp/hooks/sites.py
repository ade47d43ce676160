"""Where in a model each kind of operation is: the data behind every rule's attachment.

``find_sites`` walks the model's components and reads ``COMPONENTS``: what each kind of
TransformerLens component computes beyond linear maps. A component's row is that of the nearest
class in its inheritance that has one, so a family with a variant of its own needs none. Activation
functions are in ``activations.py``.

What no HookPoint reaches, the "inside" of a wrapped Hugging Face module that computes attention or
experts itself, is left to ``inside.py``. Nothing here vouches that the list is complete: that is
the audit's part (``audit_model.py``), which follows the graph that relevance flows through and
refuses every operation that no rule accounts for. A new kind of component is a row of
``COMPONENTS`` and, if its operation is new, an attachment in ``attach.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..inputs.bridge import components, is_component, is_kind, require_bridge
from ..rules import functions as rules
from ..rules.activations import ACTIVATIONS, ratio_of
from ..rules.threads import wrapped_modules
from .families import _ATTENTION, _BIASED_SCORES, COMPONENTS, WRITTEN_OUT, Operation
from .refusals import refusal, refuse_known


@dataclass(frozen=True, eq=False)
class Site:
    """One operation at one component.

    Attributes:
        path: The component's path, as in its HookPoints' names ("blocks.0.attn").
        operation: Which kind of operation.
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
        """The component's class, and the wrapped module's where the site is one."""
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
    """Whether attention computes what no HookPoint shows.

    Something may happen to pattern·v before ``hook_z``, a gate's product or a norm, or to queries,
    keys and values on their way, a clamp.
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
    """Whether something that depends on no key is added to query·key."""
    return any(is_kind(attention, name) for name in _BIASED_SCORES)


def delegates_attention(component: Any) -> bool:
    """Whether an attention component leaves all computing to the wrapped module."""
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
    found = [
        module
        for module in mlp.original_component.modules()
        if ratio_of(module) is not None and not is_component(module)
    ]
    if len(found) == 1:  # else it is not at this MLP's HookPoints; see _outside
        yield Site(path, "activation", mlp, found[0], ratio_of(found[0]))


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
    """What is outside TransformerLens' components: experts' activations, heads of encoders."""
    known = {id(site.module) for site in sites}
    wrapped = {id(site.component.original_component) for site in sites}
    for site in sites:
        if site.operation == "activation" and site.module is None:  # a function in its place
            known.update(map(id, site.component.original_component.modules()))
    for path, module in wrapped_modules(model):
        ratio = ratio_of(module)
        if type(module).__name__ in WRITTEN_OUT and id(module) not in wrapped:
            yield Site(path.replace("._original_component", ""), "wrapped", None, module)
        if ratio is not None and not is_component(module) and id(module) not in known:
            known.add(id(module))
            yield Site(path.replace("._original_component", ""), "activation", None, module, ratio)


def find_sites(model: Any) -> tuple[Site, ...]:
    """Every operation of ``model`` that needs a rule, as far as the tables know.

    Args:
        model: A ``TransformerBridge``.

    Raises:
        TypeError: ``model`` is not a TransformerBridge.
        UncoveredComponentError: a component, flag or weight that no rule covers, by name.
    """
    require_bridge(model)
    found = components(model)
    refuse_known(model, found)
    sites: list[Site] = []
    for path, component in found.items():
        sites.extend(_sites_of(path, component))
    sites.extend(_outside(model, sites))
    config = getattr(model.original_model, "config", None)
    if getattr(config, "final_logit_softcapping", None) is not None:
        sites.append(Site("unembed", "softcap", model.original_model, config))
    return tuple(sites)
