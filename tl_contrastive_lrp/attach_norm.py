"""How the LN-rule is put on a norm.

TransformerLens computes a norm in one of two ways. On its own path the denominator is an editable
value at ``hook_scale``, and detaching it there is the whole rule. On its native path the wrapped
module computes, ``hook_scale`` and ``hook_normalized`` only observe, and the linear form is put in
at the module's output from what they saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import rules
from .attachment import Attachment, edit, gradient, is_same
from .errors import ModelStateError
from .rulesets import RuleSet
from .sites import Site


def uses_native_norm(component: Any) -> bool:
    """Whether TransformerLens lets the wrapped norm compute (its statistics then only observed)."""
    folded = getattr(component.config, "layer_norm_folding", False)
    return bool(component.use_native_layernorm_autograd or folded)


def norm_weight(norm: Any, normalized: Tensor) -> Tensor:
    """The factor on ``normalized``, as TransformerLens applies it."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return torch.ones_like(normalized[..., 0, :])
    factor: Tensor = weight.detach().to(normalized.dtype)
    return 1.0 + factor if norm.uses_weight_offset else factor


def attach_norm(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of a norm's rule."""
    if rule_set.norm == "gradient":
        return gradient(site, rule_set)
    component, path = site.component, site.path
    if not uses_native_norm(component):
        hook = (f"{path}.hook_scale", edit(rules.constant))
        return Attachment(site, "LN", "scale detached at hook_scale", (hook,))

    seen: dict[str, Tensor] = {}

    def observe_scale(scale: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        seen.pop("normalized", None)
        if component.hook_scale.bwd_hooks or component.hook_normalized.bwd_hooks:
            seen.clear()
            return rules.constant(scale)  # TransformerLens computes the norm itself then
        seen["scale"] = scale  # returning it would make TransformerLens leave its native path
        return None

    def observe_normalized(normalized: Tensor, hook: Any) -> None:  # noqa: ARG001
        if "scale" in seen:
            seen["normalized"] = normalized

    def linear(output: Tensor) -> Tensor | None:
        normalized, scale = seen.pop("normalized"), seen.pop("scale")
        if not normalized.requires_grad:
            return None
        return rules.linear_norm(output, normalized, scale, norm_weight(component, normalized))

    def torch_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
        # Detached: nothing else hangs on the norm's own graph here, and it need not be kept.
        return linear(output.detach()) if "normalized" in seen else None

    def refuse_edits(output: Tensor, hook: Any) -> None:  # noqa: ARG001
        if seen:  # the wrapped norm was never called
            seen.clear()
            raise _norm_edited(path)

    @contextmanager
    def scoped() -> Iterator[None]:
        handle = component.original_component.register_forward_hook(torch_hook)
        try:
            yield
        finally:
            handle.remove()

    def observe_input(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["x"] = x.detach()

    def at_output(output: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        x = seen.pop("x", None)
        if x is None or "normalized" not in seen:
            return None
        with torch.no_grad():
            normalized, scale = seen["normalized"], seen["scale"]
            centred = x.to(normalized.dtype)
            if not component.uses_rms_norm:
                centred = centred - centred.mean(-1, keepdim=True)
            expected = normalized * norm_weight(component, normalized)
            bias = getattr(component.original_component, "bias", None)
            expected = expected if bias is None or component.uses_rms_norm else expected + bias
            same = is_same(centred / scale, normalized) and is_same(expected, output)
        if not same:
            seen.clear()
            raise _norm_edited(path)
        return linear(output)

    observers = (
        (f"{path}.hook_scale", observe_scale),
        (f"{path}.hook_normalized", observe_normalized),
    )
    return Attachment(
        site,
        "LN",
        "linear form at the wrapped norm",
        ((f"{path}.hook_in", observe_input), *observers, (f"{path}.hook_out", at_output)),
        scoped=scoped,
        beside=(*observers, (f"{path}.hook_out", refuse_edits)),
    )


def _norm_edited(path: str) -> ModelStateError:
    return ModelStateError(
        f"Another hook changed the value at {path}.hook_scale, {path}.hook_normalized or, with "
        "clrp.lrp_hooks, around the norm; its rule would explain a value the model did not use. "
        f"Use `with clrp.lrp(model):` and edit {path}.hook_in or {path}.hook_out instead."
    )
