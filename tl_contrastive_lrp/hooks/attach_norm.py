"""How the LN-rule is put on a norm.

TransformerLens computes a norm in one of two ways. On its own path the denominator is an editable
value at ``hook_scale``, and detaching it there is the whole rule. On its native path the wrapped
module computes, ``hook_scale`` and ``hook_normalized`` only observe, and the rule is put in at the
module's output, from its input. So it is where attention calls the wrapped norm itself, on one
copy of the stream a head (``use_split_qkv_input``, ``use_attn_in``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..inputs.devices import loaded
from ..rules import functions as rules
from ..rules.rule_sets import RuleSet
from ..rules.threads import PerThread, mine
from .attachment import Attachment, HookFn, edit, gradient, is_same
from .refusals import refusal
from .sites import Site


def uses_native_norm(component: Any) -> bool:
    """Whether TransformerLens lets the wrapped norm compute (its statistics then only observed)."""
    folded = getattr(component.config, "layer_norm_folding", False)
    return bool(component.use_native_layernorm_autograd or folded)


def norm_weight(norm: Any, normalized: Tensor) -> Tensor:
    """The factor on ``normalized``, as TransformerLens applies it."""
    with loaded(norm):
        weight = getattr(norm, "weight", None)
        if weight is None:
            return normalized.new_ones(1)
        factor: Tensor = weight.detach().to(normalized)
    offset = getattr(norm, "uses_weight_offset", None)
    if offset is None:  # TransformerLens before 4.3
        offset = norm.uses_rms_norm and getattr(norm.config, "rmsnorm_uses_offset", False)
    return 1.0 + factor if offset else factor


def norm_eps(component: Any) -> float:
    """What the wrapped norm adds under the root."""
    for name in ("eps", "variance_epsilon"):
        eps = getattr(component.original_component, name, None)
        if eps is not None:
            return float(eps)
    return float(getattr(component.config, "eps", 1e-5))


def attach_norm(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of a norm's rule."""
    if rule_set.norm == "gradient":
        return gradient(site, rule_set)
    component, path = site.component, site.path
    live: list[HookFn] = []

    def scoped() -> AbstractContextManager[None]:
        return _at_wrapped_norm(component, path, live)

    if not uses_native_norm(component):
        hook = (f"{path}.hook_scale", edit(rules.constant))
        how = "scale detached at hook_scale"
        return Attachment(site, "LN", how, (hook,), scoped=scoped, beside=(hook,))
    hooks = _native_hooks(component, path)
    return Attachment(
        site,
        "LN",
        "linear form at the wrapped norm",
        hooks,
        scoped=scoped,
        live={f"{path}.hook_normalized": live},
    )


# ---------------------------------------------------------------- at the wrapped module


@contextmanager
def _at_wrapped_norm(component: Any, path: str, live: list[HookFn]) -> Iterator[None]:
    """The LN-rule at the module itself, wherever it is called from.

    Torch hooks only: hook functions on hook_scale and hook_normalized would make TransformerLens
    compute a norm's statistics with a graph, for nothing.
    """
    wrapped, seen = component.original_component, dict[str, Tensor]()
    native = uses_native_norm(component)

    def clear(*_: Any) -> None:
        seen.clear()

    def at_scale(module: Any, args: tuple[Any, ...], scale: Tensor) -> Tensor | None:  # noqa: ARG001
        if component.hook_scale.bwd_hooks or component.hook_normalized.bwd_hooks:
            seen["done"] = scale
            return rules.constant(scale)  # TransformerLens computes the norm itself then
        return None

    def at_normalized(module: Any, args: tuple[Any, ...], normalized: Tensor) -> None:  # noqa: ARG001
        seen["normalized"] = normalized

    def at_output(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG001
        seen["done"] = output
        return _linear(component, path, output, args[0], seen.get("normalized"), live)

    def at_end(*_: Any) -> None:
        if "done" not in seen:  # somebody edited the statistics: the wrapped norm was never called
            raise _norm_edited(path)
        seen.clear()

    with ExitStack() as stack:
        handles = [wrapped.register_forward_hook(mine(at_output))]
        if native:
            handles += [
                component.register_forward_pre_hook(mine(clear)),
                component.hook_scale.register_forward_hook(mine(at_scale)),
                component.hook_normalized.register_forward_hook(mine(at_normalized)),
                component.register_forward_hook(mine(at_end)),
            ]
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _linear(
    component: Any,
    path: str,
    y: Tensor,
    x: Tensor,
    normalized: Tensor | None,
    live: list[HookFn],
) -> Tensor | None:
    """The rule from the module's own input, once one row shows that its formula is what it says."""
    if not x.requires_grad:
        return None
    wrapped, centred = component.original_component, not component.uses_rms_norm
    eps, y = norm_eps(component), y.detach()  # nothing else hangs on the norm's own graph
    weight = norm_weight(component, rules.at_least_float32(x.detach()))
    with torch.no_grad():
        row = rules.at_least_float32(x.flatten(0, -2)[:1])
        expected = (row - row.mean(-1, keepdim=True) if centred else row) * weight
        expected = expected / rules.norm_scale(row, eps, centred)
        with loaded(component):
            bias = getattr(wrapped, "bias", None)
            expected = expected if bias is None else expected + bias
        same = is_same(expected.to(y.dtype), y.flatten(0, -2)[:1])
    if not same:
        formula = f"weight · x/√(mean x² + {eps:g}){' with x centred' if centred else ''}"
        raise refusal(
            path, wrapped, f"it does not compute {formula}, as its component says it does."
        )
    # Where nobody reads the normalised value, only its place on the graph matters.
    value = rules.at_least_float32(x.detach()) if normalized is None else normalized.detach()
    value = rules.normalized_of(value, x, eps, centred=centred)
    for hook_fn in live:
        returned = hook_fn(value, None)
        value = value if returned is None else returned
    return rules.weighted(y, value, weight)


# ---------------------------------------------------------------- as a list of hooks


def _native_hooks(component: Any, path: str) -> tuple[tuple[str, HookFn], ...]:
    """The rule from what the four HookPoints of a native norm see, with a check between them."""
    kept = PerThread()

    def observe_scale(scale: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        kept.seen.pop("normalized", None)
        if component.hook_scale.bwd_hooks or component.hook_normalized.bwd_hooks:
            kept.seen.clear()
            return rules.constant(scale)  # TransformerLens computes the norm itself then
        kept.seen["scale"] = scale  # returning it would make TransformerLens leave its native path
        return None

    def observe_normalized(normalized: Tensor, hook: Any) -> None:  # noqa: ARG001
        if "scale" in kept.seen:
            kept.seen["normalized"] = normalized

    def observe_input(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        kept.seen["x"] = x.detach()

    def at_output(output: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        x = kept.seen.pop("x", None)
        if x is None or "normalized" not in kept.seen:
            return None
        normalized, scale = kept.seen.pop("normalized"), kept.seen.pop("scale")
        factor = norm_weight(component, normalized)
        with torch.no_grad():
            centred = x.to(normalized.dtype)
            if not component.uses_rms_norm:
                centred = centred - centred.mean(-1, keepdim=True)
            expected = normalized * factor
            bias = getattr(component.original_component, "bias", None)
            expected = expected if bias is None or component.uses_rms_norm else expected + bias
            if not (is_same(centred / scale, normalized) and is_same(expected, output)):
                raise _norm_edited(path)
        if not normalized.requires_grad:
            return None
        return rules.linear_norm(output, normalized, scale, factor)

    return (
        (f"{path}.hook_in", observe_input),
        (f"{path}.hook_scale", observe_scale),
        (f"{path}.hook_normalized", observe_normalized),
        (f"{path}.hook_out", at_output),
    )


def _norm_edited(path: str) -> ModelStateError:
    return ModelStateError(
        f"Another hook changed the value at {path}.hook_scale, {path}.hook_normalized or, with "
        "clrp.lrp_hooks, around the norm; its rule would explain a value the model did not use. "
        f"Use `with clrp.lrp(model):` and edit {path}.hook_in or {path}.hook_out instead."
    )
