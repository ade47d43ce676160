"""Rules inside a wrapped module that computes attention or experts itself.

Some TransformerLens components only delegate: Hugging Face's code runs between their input and
output, and HookPoints there fire too late or not at all. Their rules are applied operation by
operation, by a ``TorchFunctionMode`` that is active while the wrapped module runs, and only in its
own code. It pauses in every TransformerLens component and activation module called from there,
which have rules of their own, so no user's hook function ever runs under it.

- matrix product of two computed tensors: query·key before the softmax, pattern·value after it;
- elementwise product of two computed tensors: the gate rule (act(gate) ⊙ up, and a router's or
  gate's weight times what it weighs);
- softmax in attention: the pattern, with the softmax rule;
- softmax elsewhere, and sigmoid everywhere (a softmax of two): weights. They are constant if the
  rule set treats patterns as constants; otherwise they keep their ordinary gradient, including
  their normalisation over the selected experts. The selection itself is a constant;
- square roots of statistics, LayerNorm and RMSNorm functions: the LN-rule;
- activation functions: the identity rule.

Values never change: an operation runs as it is, and only its gradient is replaced. Everything else
is left unchanged, and the audit refuses it if it is not linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...inputs.bridge import is_component
from ...rules import activations
from ...rules import functions as rules
from ...rules.rule_sets import RuleSet
from ...rules.softmax import sink_temperature, softmax_temperature, was_changed
from ...rules.threads import active_in, mine
from ..sites import operations_of
from . import marks
from .patterns import NORMS, ROOTS, NormCall, clamp_bounds, clamp_ratio, is_root

_Call = Callable[..., Any]


class OperationRules(TorchFunctionMode):
    """Gives each operation its rule while ``states`` ends in True (see ``around``).

    Attributes:
        live: Hook functions by "hook_attn_scores", "hook_pattern" and "z", called where the wrapped
            module really uses or makes these values; they may return another tensor. "z" is
            pattern·v itself, [batch, head, pos, d_head], before anything is done to it.
    """

    def __init__(self, rule_set: RuleSet, *, attention: bool, heads: int = 1) -> None:
        super().__init__()
        self.rule_set = rule_set
        self.attention = attention
        self.heads = heads  # where a wrapped module keeps heads and batch in one dimension
        self.live: dict[str, list[_Call]] = {"hook_attn_scores": [], "hook_pattern": [], "z": []}
        self.states: list[bool] = []
        self.after_softmax = False

    def __torch_function__(
        self, func: _Call, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.states or not self.states[-1]:
            return func(*args, **kwargs)
        handler = _HANDLERS.get(getattr(func, "__name__", ""))
        if handler is None:
            out = func(*args, **kwargs)
        else:
            out = getattr(self, handler.__name__)(func, args, kwargs)
        return marks.pass_on((*args, *kwargs.values()), out)

    # ------------------------------------------------------------ weights of routers and gates

    def weights(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A softmax or sigmoid that makes weights, as a router or gate does."""
        out = func(*args, **kwargs)
        if not marks.computed(out):
            return out
        return marks.new_weight(out, constant=self.rule_set.softmax == "constant")

    def division(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A division; one of weights by their sum keeps its ordinary gradient."""
        out = func(*args, **kwargs)
        of_weights = all(marks.is_weight(a) for a in args[:2])
        ours = len(args) > 1 and marks.computed(args[1]) and of_weights
        return rules.ordinary(out) if ours else out

    # ------------------------------------------------------------ attention

    def softmax(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """The softmax of attention, with hooks at the scores and the pattern; elsewhere weights."""
        if not self.attention:
            return self.weights(func, args, kwargs)
        scores = self._fire("hook_attn_scores", args[0])
        self.after_softmax = True
        pattern = self._fire("hook_pattern", func(scores, *args[1:], **kwargs))
        if self.rule_set.softmax == "constant":
            return pattern.detach()
        if self.rule_set.softmax == "temperature":
            if was_changed(pattern):
                return sink_temperature(pattern, self.rule_set.temperature, "hook_pattern")
            return softmax_temperature(pattern, self.rule_set.temperature)
        return pattern

    def _fire(self, name: str, tensor: Tensor) -> Tensor:
        shape = tensor.shape
        for hook_fn in self.live[name]:
            returned = hook_fn(self.by_head(tensor), None)
            tensor = tensor if returned is None else returned.reshape(shape)
        return tensor

    def by_head(self, tensor: Tensor) -> Tensor:
        """A tensor [batch, head, ...], which a module may hold as [batch · head, ...]."""
        if tensor.ndim != 3:
            return tensor
        return rearrange(tensor, "(batch head) ... -> batch head ...", head=self.heads)

    # ------------------------------------------------------------ products and functions

    def product(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A matrix product: query·key, pattern·value, or one of experts."""
        out = func(*args, **kwargs)
        if not self.attention:
            return self._shared(out, args, self.rule_set.gate)
        if not self.after_softmax:
            return self._shared(out, args, self.rule_set.qk)
        return self._fire("z", self._shared(out, args, self.rule_set.pattern_v))

    def elementwise(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """An elementwise product: a gate, or x ⊙ σ(c·x) written out."""
        swish = marks.swish(args)
        if swish is None:
            return self._shared(func(*args, **kwargs), args, self.rule_set.gate)
        i, weight = swish  # x ⊙ σ(c·x): its f(x)/x is the other factor
        weight = weight.detach() if self.rule_set.activation == "identity" else weight
        return func(*(weight if j == i else a for j, a in enumerate(args)), **kwargs)

    def clamp(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A clamp: the identity rule, or the ordinary gradient where it bounds weights."""
        if marks.computed(args[0]) and marks.is_weight(args[0]):
            # no weight, nor a sum of them, is let below a bound
            return rules.ordinary(func(*args, **kwargs))
        return self.activation(func, args, kwargs)

    def largest(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A maximum with a number so low that only masked scores are below it."""
        out = func(*args, **kwargs)
        floor = args[1] if len(args) > 1 else kwargs.get("other")
        if not isinstance(floor, Tensor) or floor.numel() != 1 or not marks.computed(out):
            return out
        if float(floor.detach()) > torch.finfo(out.dtype).min:
            return out
        return rules.ordinary(out)  # of what is hidden already: nothing else is that low

    def _shared(self, out: Tensor, args: Any, rule: str) -> Tensor:
        two = sum(marks.computed(a) for a in marks.tensors(args)) > 1
        return rules.uniform(out) if two and rule == "half" else out

    def root(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A root: the denominator of a norm is constant under the LN-rule."""
        out = func(*args, **kwargs)
        denominator = is_root(func.__name__, args, out)  # else the audit will refuse it
        return out.detach() if self.rule_set.norm == "ln" and denominator else out

    def norm(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """A norm in one call, with the LN-rule."""
        out = func(*args, **kwargs)
        if not marks.computed(out) or self.rule_set.norm != "ln":
            return out
        x, weight, eps, centred = NormCall.of(func.__name__, args, kwargs)
        normalized = rules.at_least_float32(x.detach())  # only its place on the graph matters
        normalized = rules.normalized_of(normalized, x, eps, centred=centred)
        return rules.weighted(out.detach(), normalized, weight)

    def activation(self, func: _Call, args: Any, kwargs: dict[str, Any]) -> Any:
        """An activation function, with the identity rule."""
        out = func(*args, **kwargs)
        ratio = self.ratio(func.__name__, args, kwargs)
        if not marks.computed(out) or ratio is None:
            return out
        return rules.identity(out.detach(), args[0], ratio)

    def ratio(self, name: str, args: Any, kwargs: dict[str, Any]) -> rules.Ratio | None:
        """f(x)/x of a call, where it is a function that gets the identity rule."""
        if self.rule_set.activation != "identity":
            return None
        if name in CLAMPS:
            bounds = clamp_bounds(name, args, kwargs)
            return None if bounds is None else clamp_ratio(*bounds)
        approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
        if name == "gelu" and approximate == "tanh":
            return activations.gelu_tanh_ratio
        return _FUNCTIONS.get(name)

    # ------------------------------------------------------------ where it is active

    @contextmanager
    def around(self, wrapped: Any) -> Iterator[None]:
        """Be active in the code of ``wrapped``, and pause in components and activations it calls.

        This affects this thread only.
        """

        def begin(module: Any, args: Any) -> None:  # noqa: ARG001
            self.after_softmax = False
            self.states.append(True)

        def pause(module: Any, args: Any) -> None:  # noqa: ARG001
            self.states.append(False)

        def go_on(module: Any, args: Any) -> None:  # noqa: ARG001
            self.states.append(True)

        def resume(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
            if self.states:  # a hook before this one may have failed
                self.states.pop()

        with ExitStack() as stack:
            stack.callback(self.states.clear)

            def on(module: torch.nn.Module, before: _Call, after: _Call) -> None:
                stack.callback(module.register_forward_pre_hook(mine(before)).remove)
                handle = module.register_forward_hook(mine(after), always_call=True)
                stack.callback(handle.remove)

            on(wrapped, begin, resume)
            stack.enter_context(active_in(self, wrapped))
            for module in wrapped.modules():
                if module is wrapped or not _has_rules_of_its_own(module):
                    continue
                on(module, pause, resume)
                if is_component(module) and not operations_of(module):  # it only names a module
                    on(module.original_component, go_on, resume)
            yield


def _has_rules_of_its_own(module: torch.nn.Module) -> bool:
    # A HookPoint runs its user's functions.
    known = is_component(module) or activations.ratio_of(module) is not None
    return known or type(module).__name__ == "HookPoint"


_FUNCTIONS: dict[str, rules.Ratio] = {
    "silu": activations.silu_ratio,
    "gelu": activations.gelu_ratio,
    "relu": activations.relu_ratio,
}

CLAMPS = ("clamp", "clip", "clamp_min", "clamp_max")
MATRIX_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum")

_HANDLERS: dict[str, Callable[[OperationRules, _Call, Any, dict[str, Any]], Any]] = {
    **dict.fromkeys(("softmax",), OperationRules.softmax),
    **dict.fromkeys(("sigmoid", "softplus"), OperationRules.weights),
    **dict.fromkeys(CLAMPS, OperationRules.clamp),
    **dict.fromkeys(("max", "maximum"), OperationRules.largest),
    **dict.fromkeys(MATRIX_PRODUCTS, OperationRules.product),
    **dict.fromkeys(
        ("mul", "__mul__", "__rmul__", "multiply", "mul_", "__imul__"), OperationRules.elementwise
    ),
    **dict.fromkeys(
        ("div", "__truediv__", "true_divide", "div_", "__itruediv__"), OperationRules.division
    ),
    **dict.fromkeys(ROOTS, OperationRules.root),
    **dict.fromkeys(NORMS, OperationRules.norm),
    **dict.fromkeys(_FUNCTIONS, OperationRules.activation),
}
