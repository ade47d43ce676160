"""How each rule is attached: with hook functions, or scoped changes where there is no HookPoint.

An ``Attachment`` carries the rule of one site in up to two forms:

- ``hooks``: (hook_name, fn) pairs for ``model.run_with_hooks(fwd_hooks=...)`` or ``model.hooks``;
- ``scoped``: a context manager that does the same at the operation itself (a torch hook on the
  wrapped activation module, an operand in place of a soft-cap's number). ``lrp()`` prefers it: it
  sees the exact inputs of the operation, so the user's own hooks around it may edit and read
  gradients freely.

Hook functions return the values they were given. Those that must read one HookPoint to act at
another (``captures``) check at the second that no hook changed the value in between.

The file is long because it has the attachment of every kind of operation, from norms to components
that delegate, so that one file shows where a rule set puts each rule. The last table lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelStateError
from ..inputs.bridge import is_kind
from ..inputs.devices import loaded
from ..rules import functions as rules
from ..rules.deferred import DeferredAttention
from ..rules.rule_sets import RuleSet
from ..rules.softcap import correct_softcap, identity_softcap, softcap_replaced
from ..rules.softmax import sink_temperature, softmax_temperature, was_changed
from ..rules.threads import PerThread, mine
from .by_operation.mode import OperationRules
from .families import Operation
from .sites import Site, delegates_attention, operations_of, refusal

HookFn = Callable[..., Any]
Scoped = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Attachment:
    """The rule of one site, ready to be attached.

    Attributes:
        site: The operation that gets the rule.
        rule: Name of the rule in the coverage report.
        how: Where it is attached, in words.
        hooks: (path of HookPoint, hook function) pairs.
        captures: HookPoints where a hook that reads gradients must come before ``hooks``, which
            only read there, or cut the gradient off.
        scoped: The same rule as a context manager, where it has that form.
        scoped_hooks: Hooks that ``scoped`` needs in addition to itself, in place of ``hooks``.
        make_hooks: Makes ``hooks`` where they are many and ``scoped`` is there to be preferred.
        live: Lists of hook functions, by HookPoint, that the attachment calls at the value itself
            where TransformerLens' own HookPoint fires too late to be read or changed.
    """

    site: Site
    rule: str
    how: str
    hooks: tuple[tuple[str, HookFn], ...] = ()
    captures: tuple[str, ...] = ()
    scoped: Scoped | None = None
    scoped_hooks: tuple[tuple[str, HookFn], ...] = ()
    make_hooks: Callable[[], tuple[tuple[str, HookFn], ...]] | None = None
    live: Mapping[str, list[HookFn]] = field(default_factory=dict)

    @property
    def needs_scope(self) -> bool:
        """Whether no list of hooks can carry the rule."""
        return self.scoped is not None and not self.hooks and self.make_hooks is None

    def listed(self) -> tuple[tuple[str, HookFn], ...]:
        """The rule as (path of HookPoint, hook function) pairs alone, without ``scoped``."""
        return self.hooks if self.make_hooks is None else self.make_hooks()


def edit(function: Callable[[Any], Any]) -> HookFn:
    """A hook function that returns ``function`` of the value."""

    def hook_fn(tensor: Any, hook: Any) -> Any:  # noqa: ARG001
        return function(tensor)

    return hook_fn


def gradient(site: Site, rule_set: RuleSet) -> Attachment:  # noqa: ARG001
    """An empty attachment: the operation keeps its ordinary gradient."""
    return Attachment(site, "gradient", "ordinary gradient")


def is_same(expected: Tensor, value: Tensor) -> bool:
    """Whether two tensors are equal up to rounding.

    An edit that is too small to be seen is too small to matter.
    """
    slack = 0.1 if value.dtype in (torch.float16, torch.bfloat16) else 1e-3
    bound = slack * value.abs().amax() + torch.finfo(value.dtype).tiny
    return bool((expected - value).abs().amax() <= bound)


# ---------------------------------------------------------------- norms


def uses_native_norm(component: Any) -> bool:
    """Whether TransformerLens runs the wrapped norm itself and only observes its statistics."""
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
    """The number that the wrapped norm adds under the root."""
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

    scoped = partial(_at_wrapped_norm, component, path, live)
    if not uses_native_norm(component):
        hook = (f"{path}.hook_scale", edit(rules.constant))
        how = "scale detached at hook_scale"
        return Attachment(site, "LN", how, (hook,), scoped=scoped, scoped_hooks=(hook,))
    return Attachment(
        site,
        "LN",
        "linear form at the wrapped norm",
        scoped=scoped,
        make_hooks=partial(_native_hooks, component, path),
        live={f"{path}.hook_normalized": live},
    )


# ---------------------------------------------------------------- norms: at the wrapped module


class _NormAtWork:
    """One norm under the LN-rule, from when its component is entered until it is left.

    Args:
        component: The norm's component.
        path: Its path.
        live: Functions that read or change the normalised value.
    """

    __slots__ = ("_component", "_done", "_live", "_normalized", "_path")

    def __init__(self, component: Any, path: str, live: list[HookFn]) -> None:
        self._component, self._path, self._live = component, path, live
        self._normalized: Tensor | None = None
        self._done = False

    def clear(self, *_: Any) -> None:
        self._normalized, self._done = None, False

    def at_scale(self, module: Any, args: tuple[Any, ...], scale: Tensor) -> Tensor | None:  # noqa: ARG002
        if self._component.hook_scale.bwd_hooks or self._component.hook_normalized.bwd_hooks:
            self._done = True
            return rules.constant(scale)  # TransformerLens computes the norm itself then
        return None

    def at_normalized(self, module: Any, args: tuple[Any, ...], normalized: Tensor) -> None:  # noqa: ARG002
        self._normalized = normalized

    def at_output(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:  # noqa: ARG002
        self._done = True
        return _linear(self._component, self._path, output, args[0], self._normalized, self._live)

    def at_end(self, *_: Any) -> None:
        if not self._done:  # a hook edited the statistics, so the wrapped norm never ran
            raise _norm_edited(self._path)
        self.clear()


@contextmanager
def _at_wrapped_norm(component: Any, path: str, live: list[HookFn]) -> Iterator[None]:
    """The LN-rule at the module itself, wherever it is called from.

    It uses torch hooks only: hook functions on hook_scale and hook_normalized would make
    TransformerLens compute a norm's statistics with an autograd graph that is not needed.
    """
    norm = _NormAtWork(component, path, live)
    handles = [component.original_component.register_forward_hook(mine(norm.at_output))]
    if uses_native_norm(component):
        handles += [
            component.register_forward_pre_hook(mine(norm.clear)),
            component.hook_scale.register_forward_hook(mine(norm.at_scale)),
            component.register_forward_hook(mine(norm.at_end)),
        ]
        if live:  # only those who read it see the value itself
            point = component.hook_normalized
            handles.append(point.register_forward_hook(mine(norm.at_normalized)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _linear(
    component: Any,
    path: str,
    y: Tensor,
    x: Tensor,
    normalized: Tensor | None,
    live: list[HookFn],
) -> Tensor | None:
    """The rule from the module's own input, after its formula was checked on one row."""
    if not x.requires_grad:
        return None
    wrapped, centred = component.original_component, not component.uses_rms_norm
    eps, y = norm_eps(component), y.detach()  # nothing else uses the norm's own graph
    weight = norm_weight(component, rules.at_least_float32(x.detach()))
    row = rules.at_least_float32(x.detach().flatten(0, -2)[:1])
    expected = (row - row.mean(-1, keepdim=True) if centred else row) * weight
    expected = expected / rules.norm_scale(row, eps, centred)
    with loaded(component):
        bias = getattr(wrapped, "bias", None)
        expected = expected if bias is None else expected + bias.detach()
    if not is_same(expected.to(y.dtype), y.flatten(0, -2)[:1]):
        formula = f"weight · x/√(mean x² + {eps:g}){' with x centred' if centred else ''}"
        raise refusal(
            path, wrapped, f"it does not compute {formula}, as its component says it does."
        )
    # If the normalised value is not read, only its place on the graph matters.
    value = rules.at_least_float32(x.detach()) if normalized is None else normalized.detach()
    value = rules.normalized_of(value, x, eps, centred=centred)
    for hook_fn in live:
        returned = hook_fn(value, None)
        value = value if returned is None else returned
    return rules.weighted(y, value, weight)


# ---------------------------------------------------------------- norms: as a list of hooks


def _native_hooks(component: Any, path: str) -> tuple[tuple[str, HookFn], ...]:
    """The rule from the values at the four HookPoints of a native norm, checked for edits."""
    per_thread = PerThread()

    def observe_scale(scale: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        per_thread.seen.pop("normalized", None)
        if component.hook_scale.bwd_hooks or component.hook_normalized.bwd_hooks:
            per_thread.seen.clear()
            return rules.constant(scale)  # TransformerLens computes the norm itself then
        per_thread.seen["scale"] = (
            scale  # returning it would make TransformerLens leave its native path
        )
        return None

    def observe_normalized(normalized: Tensor, hook: Any) -> None:  # noqa: ARG001
        if "scale" in per_thread.seen:
            per_thread.seen["normalized"] = normalized

    def observe_input(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        per_thread.seen["x"] = x.detach()

    def at_output(output: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        x = per_thread.seen.pop("x", None)
        if x is None or "normalized" not in per_thread.seen:
            return None
        normalized, scale = per_thread.seen.pop("normalized"), per_thread.seen.pop("scale")
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
    ratio = site.ratio
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

    if site.component is None:
        return Attachment(site, "identity", "at the activation module", scoped=scoped)
    post_name, captures, make = _hooks_around(site, ratio)
    if site.module is None:
        return Attachment(site, "identity", f"at {post_name}", make(), captures)
    how = "at the wrapped activation"
    return Attachment(site, "identity", how, captures=captures, scoped=scoped, make_hooks=make)


def _hooks_around(
    site: Site, ratio: rules.Ratio
) -> tuple[str, tuple[str, ...], Callable[[], tuple[tuple[str, HookFn], ...]]]:
    """The rule from the values at HookPoints before and after an activation, checked for edits.

    Returns:
        The HookPoint after it, those before it, and a function that makes the hooks.
    """
    mlp, path = site.component, site.path
    gated = is_kind(mlp, "GatedMLPBridge")
    pre_name = f"{path}.{'gate' if gated else 'in'}.hook_out"
    up_name, post_name = f"{path}.in.hook_out", f"{path}.out.hook_in"
    captures = (pre_name, up_name) if gated else (pre_name,)

    def make() -> tuple[tuple[str, HookFn], ...]:
        per_thread = PerThread()

        def capture(name: str) -> HookFn:
            def hook_fn(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
                per_thread.seen[name] = tensor

            return hook_fn

        def at_post(post: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
            pre = per_thread.seen.pop(pre_name)
            up = per_thread.seen.pop(up_name) if gated else None
            if not pre.requires_grad:
                return None
            with torch.no_grad():
                expected = (ratio(rules.at_least_float32(pre)) * pre).to(post.dtype)
                _require_same(expected if up is None else expected * up, post, pre_name)
            if up is None:
                return rules.identity(post, pre, ratio)
            return rules.gated_product(post, pre, up, ratio)

        return (*((name, capture(name)) for name in captures), (post_name, at_post))

    return post_name, captures, make


def _gate(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.gate == "gradient":
        return gradient(site, rule_set)
    hook = (f"{site.path}.out.hook_in", edit(rules.uniform))
    return Attachment(site, "half", "at hook_post", (hook,))


# ---------------------------------------------------------------- attention


def _qk(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.qk == "gradient":
        return gradient(site, rule_set)

    def at_scores(scores: Tensor | DeferredAttention) -> Tensor | DeferredAttention:
        if isinstance(scores, DeferredAttention):
            return scores.uniform(rules.uniform)
        return rules.uniform(scores)

    hook = (f"{site.path}.hook_attn_scores", edit(at_scores))
    return Attachment(site, "half", "at hook_attn_scores", (hook,))


def _softmax(site: Site, rule_set: RuleSet) -> Attachment:
    if rule_set.softmax == "gradient":
        return gradient(site, rule_set)
    name = f"{site.path}.hook_pattern"
    if rule_set.softmax == "constant":

        def detached(pattern: Tensor | DeferredAttention) -> Tensor | DeferredAttention:
            if isinstance(pattern, DeferredAttention):
                return pattern.constant(rules.constant)
            return rules.constant(pattern)

        hook = (name, edit(detached))
        return Attachment(site, "constant", "pattern detached at hook_pattern", (hook,), (name,))
    temperature = rule_set.temperature

    sinks = getattr(site.component.original_component, "sinks", None) is not None

    def at_pattern(pattern: Tensor | DeferredAttention) -> Tensor | DeferredAttention:
        if isinstance(pattern, DeferredAttention):
            return pattern.tempered(temperature, actual)
        return actual(pattern)

    def actual(pattern: Tensor) -> Tensor:
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

    hooks = ((name, edit(correct)),)
    return Attachment(
        site,
        "identity",
        f"at the operand {attribute}",
        hooks,
        scoped=lambda: softcap_replaced(site.module, attribute, identity_softcap),
    )


# ---------------------------------------------------------------- components that delegate


def _summary(rule_set: RuleSet, attention: bool) -> str:
    if not attention:
        weights = "constant" if rule_set.softmax == "constant" else "gradient"
        return f"products {rule_set.gate}, router weights {weights}"
    return f"q·k {rule_set.qk}, softmax {rule_set.softmax}, pattern·v {rule_set.pattern_v}"


def attach_by_operation(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of all rules inside a component that delegates."""
    attention = site.operation == "attention"
    others = (rule_set.norm, rule_set.activation, rule_set.gate, rule_set.qk, rule_set.pattern_v)
    if not attention and {*others, rule_set.softmax} == {"gradient"}:
        return gradient(site, rule_set)
    heads = getattr(site.component.config, "n_heads", 1) if attention else 1
    mode = OperationRules(rule_set, attention=attention, heads=heads)
    live = {f"{site.path}.{name}": fns for name, fns in mode.live.items()} if attention else {}
    code = site.module if site.component is None else where_computed(site.component)
    own = code is site.component
    return Attachment(
        site,
        _summary(rule_set, attention),
        f"by operation inside {'it' if own else 'the wrapped module'}",
        scoped=lambda: mode.around(code),
        live=live,
    )


def where_computed(component: Any) -> torch.nn.Module:
    """The module whose code computes: the component itself, or the module it delegates to."""
    delegates = operations_of(component) != ("attention",) or delegates_attention(component)
    code: torch.nn.Module = component.original_component if delegates else component
    return code


# ---------------------------------------------------------------- all operations


_ATTACH: dict[Operation, Callable[[Site, RuleSet], Attachment]] = {
    "norm": attach_norm,
    "activation": _activation,
    "gate": _gate,
    "qk": _qk,
    "softmax": _softmax,
    "pattern_v": _pattern_v,
    "softcap": _softcap,
    "attention": attach_by_operation,
    "experts": attach_by_operation,
    "wrapped": attach_by_operation,
}


def attach(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of ``rule_set``'s rule at ``site``."""
    return _ATTACH[site.operation](site, rule_set)
