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
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..inputs.bridge import is_kind
from ..rules import functions as rules
from ..rules.rule_sets import RuleSet
from ..rules.softcap import correct_softcap, softcap
from ..rules.softmax import sink_temperature, softmax_temperature, was_changed
from ..rules.threads import PerThread, caller, mine
from .attach_norm import attach_norm
from .attachment import Attachment, HookFn, edit, gradient, is_same
from .by_operation.attach import attach_inside
from .families import Operation
from .sites import Site

# ---------------------------------------------------------------- activations and gates


def _changed(path: str) -> ModelStateError:
    return ModelStateError(
        f"Another hook changed the value at {path} after the activation's rule had read it, so "
        "the rule would explain a value the model did not use. Put that hook before the rules "
        "(enter model.hooks(...) first, or list it before clrp.lrp_hooks(model)), or use "
        "`with clrp.lrp(model):` on a model without processed weights, where the order is free."
    )


def _require_same(expected: Tensor, value: Tensor, path: str) -> None:
    if not is_same(expected, value):
        raise _changed(path)


def _activation(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.activation == "gradient":
        return gradient(site, rule_set)
    ratio, mlp, path = site.ratio, site.component, site.path
    assert ratio is not None

    def torch_hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:  # noqa: ARG001
        return rules.identity(output.detach(), args[0], ratio)

    @contextmanager
    def scoped() -> Iterator[None]:
        handle = site.module.register_forward_hook(mine(torch_hook))
        try:
            yield
        finally:
            handle.remove()

    if mlp is None:
        return Attachment(site, "identity", "at the activation module", scoped=scoped)
    gated = is_kind(mlp, "GatedMLPBridge")
    pre_name = f"{path}.{'gate' if gated else 'in'}.hook_out"
    up_name, post_name = f"{path}.in.hook_out", f"{path}.out.hook_in"
    kept = PerThread()

    def capture(name: str) -> HookFn:
        def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept.seen[name] = tensor

        return hook_fn

    def at_post(post: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        pre = kept.seen.pop(pre_name)
        up = kept.seen.pop(up_name) if gated else None
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

    return Attachment(site, "identity", "at the wrapped activation", hooks, captures, scoped)


def _gate(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.gate == "gradient":
        return gradient(site, rule_set)
    hook = (f"{site.path}.out.hook_in", edit(rules.uniform))
    return Attachment(site, "half", "at hook_post", (hook,))


# ---------------------------------------------------------------- attention


def _qk(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.qk == "gradient":
        return gradient(site, rule_set)
    hook = (f"{site.path}.hook_attn_scores", edit(rules.uniform))
    return Attachment(site, "half", "at hook_attn_scores", (hook,))


def _softmax(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.softmax == "gradient":
        return gradient(site, rule_set)
    name = f"{site.path}.hook_pattern"
    if rule_set.softmax == "constant":
        hook = (name, edit(rules.constant))
        return Attachment(site, "constant", "pattern detached at hook_pattern", (hook,), (name,))
    temperature = rule_set.temperature

    sinks = getattr(site.component.original_component, "sinks", None) is not None

    def at_pattern(pattern: Tensor) -> Tensor:
        if sinks or was_changed(pattern):
            return sink_temperature(pattern, temperature, name)
        return softmax_temperature(pattern, temperature)

    rule = f"temperature {temperature:g}"
    return Attachment(site, rule, "at hook_pattern", ((name, edit(at_pattern)),))


def _pattern_v(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.pattern_v == "gradient":
        return gradient(site, rule_set)
    hook = (f"{site.path}.o.hook_in", edit(rules.uniform))
    return Attachment(site, "half", "at hook_z", (hook,))


# ---------------------------------------------------------------- soft-caps


class _CapOperand:
    """Stands in for the number c in ``c * tanh(x / c)`` and attaches the identity rule there.

    In other threads it is the number.
    """

    def __init__(self, cap: float) -> None:
        self.cap = cap
        self.owner = caller()
        self.x: Tensor | None = None

    def __rtruediv__(self, x: Tensor) -> Tensor:
        if caller() is self.owner:
            self.x = x
        return x / self.cap

    def __rmul__(self, tanh: Tensor) -> Tensor:
        if caller() is not self.owner:
            return tanh * self.cap
        x, self.x = self.x, None
        y = tanh * self.cap
        return y if x is None or not x.requires_grad else softcap(y, x, self.cap)


def _softcap(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.softcap == "gradient":
        return gradient(site, rule_set)
    final = site.path == "unembed"
    attribute = "final_logit_softcapping" if final else "attn_logit_softcapping"
    cap = getattr(site.module, attribute)
    name = "unembed.hook_out" if final else f"{site.path}.hook_attn_scores"

    def correct(tensor: Tensor) -> Tensor:
        value = rules.at_least_float32(tensor.detach()) / cap
        if final:
            return correct_softcap(tensor, value, torch.tanh(value), name, before=True)
        tanh = torch.where(value > -1.5, value, torch.zeros_like(value))  # masked: far below −cap
        v = torch.atanh(tanh.clamp(-1.0, 1.0))
        return correct_softcap(tensor, v, tanh, name, before=False)

    @contextmanager
    def scoped() -> Iterator[None]:
        # Written past the config's type check; the model divides and multiplies by it, no more.
        site.module.__dict__[attribute] = _CapOperand(cap)
        try:
            yield
        finally:
            site.module.__dict__[attribute] = cap

    hooks = ((name, edit(correct)),)
    return Attachment(site, "identity", f"at the operand {attribute}", hooks, (), scoped)


_ATTACH: dict[Operation, Callable[[Site, RuleSet], Attachment]] = {
    "norm": attach_norm,
    "activation": _activation,
    "gate": _gate,
    "qk": _qk,
    "softmax": _softmax,
    "pattern_v": _pattern_v,
    "softcap": _softcap,
    "attention": attach_inside,
    "experts": attach_inside,
    "wrapped": attach_inside,
}


def attach(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of ``rule_set``'s rule at ``site``."""
    return _ATTACH[site.operation](site, rule_set)
