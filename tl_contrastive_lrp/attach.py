"""How each rule is put on a model: hook functions, and scoped changes where no HookPoint reaches.

An ``Attachment`` carries the rule of one site in up to two forms:

- ``hooks``: (hook_name, fn) pairs for ``model.run_with_hooks(fwd_hooks=...)`` or ``model.hooks``;
- ``scoped``: a context manager that does the same at the operation itself (a torch hook on the
  wrapped activation module, an operand in place of a soft-cap's number). ``lrp()`` prefers it: it
  sees exactly what the operation consumed, so the user's own hooks around it may edit and read
  gradients freely.

Hook functions return the values they were given. Those that must read one HookPoint to act at
another (``captures``) check at the second that nobody changed the value in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import rules
from .errors import ModelStateError
from .rulesets import RuleSet
from .sites import Operation, Site

HookFn = Callable[..., Any]
Scoped = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Attachment:
    """The rule of one site, ready to be put on.

    Attributes:
        site: Where.
        rule: What the coverage report calls the rule.
        how: Where it is attached, in words.
        hooks: (path of HookPoint, hook function) pairs.
        captures: HookPoints where a reader of gradients must go before ``hooks``: they only read
            there, or cut the gradient off.
        scoped: The same rule as a context manager, where it has that form.
        beside: Hooks that ``scoped`` needs beside it, in place of ``hooks``.
    """

    site: Site
    rule: str
    how: str
    hooks: tuple[tuple[str, HookFn], ...] = ()
    captures: tuple[str, ...] = ()
    scoped: Scoped | None = None
    beside: tuple[tuple[str, HookFn], ...] = ()


def _edit(function: Callable[[Tensor], Tensor]) -> HookFn:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return function(tensor)

    return hook_fn


def _gradient(site: Site, rule_set: RuleSet) -> Attachment:  # noqa: ARG001
    return Attachment(site, "gradient", "ordinary gradient")


# ---------------------------------------------------------------- norms


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


def _norm(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.norm == "gradient":
        return _gradient(site, rule_set)
    component, path = site.component, site.path
    if not uses_native_norm(component):
        hook = (f"{path}.hook_scale", _edit(rules.constant))
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
        return linear(output) if "normalized" in seen else None

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
            same = _is_same(centred / scale, normalized) and _is_same(expected, output)
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


# ---------------------------------------------------------------- activations and gates


def _changed(path: str) -> ModelStateError:
    return ModelStateError(
        f"Another hook changed the value at {path} after the activation's rule had read it, so "
        "the rule would explain a value the model did not use. Put that hook before the rules "
        "(enter model.hooks(...) first, or list it before clrp.lrp_hooks(model)), or use "
        "`with clrp.lrp(model):` on a model without processed weights, where the order is free."
    )


def _is_same(expected: Tensor, value: Tensor) -> bool:
    """Up to rounding: an edit too small to be seen is too small to matter."""
    slack = 0.1 if value.dtype in (torch.float16, torch.bfloat16) else 1e-3
    bound = slack * value.abs().amax() + torch.finfo(value.dtype).tiny
    return bool((expected - value).abs().amax() <= bound)


def _require_same(expected: Tensor, value: Tensor, path: str) -> None:
    if not _is_same(expected, value):
        raise _changed(path)


def _activation(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.activation == "gradient":
        return _gradient(site, rule_set)
    ratio, mlp, path = site.ratio, site.component, site.path
    assert ratio is not None
    gated = type(mlp).__name__ == "GatedMLPBridge"
    pre_name = f"{path}.{'gate' if gated else 'in'}.hook_out"
    up_name, post_name = f"{path}.in.hook_out", f"{path}.out.hook_in"
    seen: dict[str, Tensor] = {}

    def capture(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen[name] = tensor

        return hook_fn

    def at_post(post: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        pre = seen.pop(pre_name)
        up = seen.pop(up_name) if gated else None
        if not pre.requires_grad:
            return None
        with torch.no_grad():
            expected = (ratio(rules.at_least_float32(pre)) * pre).to(post.dtype)
            _require_same(expected if up is None else expected * up, post, pre_name)
        if up is None:
            return rules.identity(post, pre, ratio)
        return rules.gated_product(post, pre, up, ratio)

    captures = (pre_name, up_name) if gated else (pre_name,)
    hooks = (*((name, capture(name)) for name in captures), (post_name, at_post))
    if site.module is None:
        return Attachment(site, "identity", f"at {post_name}", hooks, captures)

    def torch_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        return rules.identity(output, args[0], ratio)

    @contextmanager
    def scoped() -> Iterator[None]:
        handle = site.module.register_forward_hook(torch_hook)
        try:
            yield
        finally:
            handle.remove()

    return Attachment(site, "identity", "at the wrapped activation", hooks, captures, scoped)


def _gate(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.gate == "gradient":
        return _gradient(site, rule_set)
    hook = (f"{site.path}.out.hook_in", _edit(rules.uniform))
    return Attachment(site, "half", "at hook_post", (hook,))


# ---------------------------------------------------------------- attention


def _qk(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.qk == "gradient":
        return _gradient(site, rule_set)
    hook = (f"{site.path}.hook_attn_scores", _edit(rules.uniform))
    return Attachment(site, "half", "at hook_attn_scores", (hook,))


def _softmax(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.softmax == "gradient":
        return _gradient(site, rule_set)
    name = f"{site.path}.hook_pattern"
    if rule_set.softmax == "constant":
        hook = (name, _edit(rules.constant))
        return Attachment(site, "constant", "pattern detached at hook_pattern", (hook,), (name,))
    temperature = rule_set.temperature

    def at_pattern(pattern: Tensor) -> Tensor:
        return rules.softmax_temperature(pattern, temperature)

    rule = f"temperature {temperature:g}"
    return Attachment(site, rule, "at hook_pattern", ((name, _edit(at_pattern)),))


def _pattern_v(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.pattern_v == "gradient":
        return _gradient(site, rule_set)
    hook = (f"{site.path}.o.hook_in", _edit(rules.uniform))
    return Attachment(site, "half", "at hook_z", (hook,))


# ---------------------------------------------------------------- soft-caps


class _CapOperand:
    """Stands in for the number c in ``c * tanh(x / c)`` and attaches the identity rule there."""

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.x: Tensor | None = None

    def __rtruediv__(self, x: Tensor) -> Tensor:
        self.x = x
        return x / self.cap

    def __rmul__(self, tanh: Tensor) -> Tensor:
        x, self.x = self.x, None
        y = tanh * self.cap
        return y if x is None or not x.requires_grad else rules.softcap(y, x, self.cap)


def _softcap(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.softcap == "gradient":
        return _gradient(site, rule_set)
    final = site.path == "unembed"
    attribute = "final_logit_softcapping" if final else "attn_logit_softcapping"
    cap = getattr(site.module, attribute)
    name = "unembed.hook_out" if final else f"{site.path}.hook_attn_scores"

    def correct(tensor: Tensor) -> Tensor:
        value = rules.at_least_float32(tensor.detach()) / cap
        if final:
            return rules.correct_softcap(tensor, value, torch.tanh(value), name, before=True)
        tanh = torch.where(value > -1.5, value, torch.zeros_like(value))  # masked: far below −cap
        v = torch.atanh(tanh.clamp(-1.0, 1.0))
        return rules.correct_softcap(tensor, v, tanh, name, before=False)

    @contextmanager
    def scoped() -> Iterator[None]:
        # Written past the config's type check; the model divides and multiplies by it, no more.
        site.module.__dict__[attribute] = _CapOperand(cap)
        try:
            yield
        finally:
            site.module.__dict__[attribute] = cap

    hooks = ((name, _edit(correct)),)
    return Attachment(site, "identity", f"at the operand {attribute}", hooks, (), scoped)


_ATTACH: dict[Operation, Callable[[Site, RuleSet], Attachment]] = {
    "norm": _norm,
    "activation": _activation,
    "gate": _gate,
    "qk": _qk,
    "softmax": _softmax,
    "pattern_v": _pattern_v,
    "softcap": _softcap,
}


def attach(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of ``rule_set``'s rule at ``site``."""
    return _ATTACH[site.operation](site, rule_set)
