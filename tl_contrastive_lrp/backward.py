"""One forward and one backward under the rules, reading relevance inside the backward pass.

``Reading``s say what to read where. A sink is called with (activation, gradient) while the
backward runs and keeps what it reduces them to, so nothing of the size of all activations has to
outlive its layer. No parameter takes part: their ``.grad`` and ``requires_grad`` stay as they are,
and the gradient starts at detached embeddings, so frozen models work too.

The user's hooks are part of the model. What is read at a HookPoint is the value after its own
edits, times the gradient at that value: what a hook replaced by constants has relevance there, as a
bias has, and none of it goes on to where the replaced value came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .attachment import Attachment, HookFn
from .context import plan
from .coverage_table import Coverage
from .errors import ModelStateError
from .handed_on import handed_on, started, writable
from .hook_rules import HookWatch, rules_in_hooks
from .placement import attached, check_ready, check_single, reading_hooks
from .precision import first_gradient, plain
from .rules import at_least_float32
from .rulesets import RuleSet, get_rule_set
from .sites import LEAVES
from .user_hooks import restarted, user_hooks

Sink = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Reading:
    """A gradient to read at one HookPoint.

    Attributes:
        name: A key of ``model.hook_dict``.
        sink: Receives (activation, gradient), both detached, in the HookPoint's public shape.
        how: "branch" reads what flows through the HookPoint itself; "tensor" reads the gradient of
            the tensor that arrives there, with whatever else consumes it (the residual stream at
            ``hook_resid_mid``), and is the only way where returning a value would be an edit.
        fired: Called in the forward with the activation, where it can have a gradient at all. The
            sink stays uncalled if the rules let nothing through to it: relevance 0.
    """

    name: str
    sink: Sink
    how: Literal["branch", "tensor"] = "branch"
    fired: Callable[[Tensor], None] | None = None


def relevance_of(x: Tensor, g: Tensor) -> Tensor:
    """Activation × gradient, elementwise, in float32 at least."""
    return at_least_float32(x) * at_least_float32(g)


@contextmanager
def frozen_parameters(model: Any) -> Iterator[None]:
    """No parameter requires a gradient inside the block (less memory, no weight gradients)."""
    parameters = {
        id(p): p
        for source in (model.original_model.parameters(), nn.Module.parameters(model))
        for p in source
        if p.requires_grad
    }
    try:
        for p in parameters.values():
            p.requires_grad_(False)
        yield
    finally:
        for p in parameters.values():
            p.requires_grad_(True)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return handed_on(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.sink(x.detach(), g.detach())
        return g, None


def tap(x: Float[Tensor, "*shape"], sink: Sink) -> Float[Tensor, "*shape"]:
    """Call ``sink(x, g)`` inside the backward pass; values and gradients pass unchanged."""
    out: Tensor = _Tap.apply(x, sink)
    return out


def _read_hook(reading: Reading) -> HookFn:
    def hook_fn(tensor: Tensor, hook: Any) -> Tensor | None:  # noqa: ARG001
        if not isinstance(tensor, Tensor) or not tensor.requires_grad:
            return None
        value = tensor.detach()
        if reading.fired is not None:
            reading.fired(value)
        if reading.how == "branch":
            return tap(tensor, lambda x, g: reading.sink(x, plain(g)))
        tensor.register_hook(lambda g: reading.sink(value, plain(g.detach())))
        return None

    return hook_fn


def arranged(
    model: Any, attachments: Iterable[Attachment], readings: Iterable[Reading]
) -> tuple[list[tuple[str, HookFn]], list[tuple[str, HookFn]]]:
    """Hooks that do the readings: those to add before the rules', and those to add after.

    Readings at values that only a rule can reach are handed to it (``Attachment.live``).
    """
    attachments, hook_dict = tuple(attachments), model.hook_dict
    captures = {name for a in attachments if a.scoped is None for name in a.captures}
    captured = {id(hook_dict[name]) for name in captures}
    before: list[tuple[str, HookFn]] = []
    after: list[tuple[str, HookFn]] = []
    live = {name: fns for a in attachments for name, fns in a.live.items()}
    for reading in sorted(readings, key=lambda r: r.how != "tensor"):
        if reading.name in live:
            live[reading.name].append(_read_hook(reading))
            continue
        first = id(hook_dict[reading.name]) in captured
        pair = (reading.name, _read_hook(reading))
        (before if first else after).append(pair)
    return before, after


def run(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    scopes: Iterable[AbstractContextManager[None]] = (),
    **forward_kwargs: Any,
) -> tuple[Tensor, Tensor, Coverage]:
    """``run_each`` with one objective.

    Returns:
        The logits [batch, pos, vocab] and the objective's value [], both detached, and the
        coverage.

    Raises:
        ModelStateError, UncoveredComponentError: as ``run_each``.
    """
    logits, (value,), coverage = run_each(
        model, tokens, [objective], rule_set, readings, scopes, **forward_kwargs
    )
    return logits, value, coverage


def run_each(
    model: Any,
    tokens: Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    scopes: Iterable[AbstractContextManager[None]] = (),
    then: Callable[[int], None] | None = None,
    hook_watch: HookWatch | None = None,
    **forward_kwargs: Any,
) -> tuple[Tensor, list[Tensor], Coverage]:
    """One forward, and for each objective a backward; sinks are called on the way back.

    The rules and ``scopes`` are on during the forward only, so a sink may run the model itself.

    Args:
        then: Called after each backward, with the number of its objective.
        hook_watch: Notes what the user's hook functions do. If one edits, the graph is kept for
            ``then``, also after the last backward.

    Returns:
        The logits [batch, pos, vocab] and the objectives' values [], all detached, and the
        coverage.

    Raises:
        ModelStateError: training mode, gradients off, rules already on, or an objective that is
            not a differentiable scalar.
        UncoveredComponentError: a component that no rule covers.
    """
    check_ready(model, "Relevance")
    check_single(model)
    _refuse_cached_tokens(forward_kwargs.get("past_key_values"))
    attachments, coverage = plan(model, rule_set)
    leaves: dict[str, Tensor] = {}

    def make_leaf(tensor: Tensor, hook: Any) -> Tensor:
        leaves[hook.name] = tensor.detach().requires_grad_(True)
        return started(leaves[hook.name])

    before, after = arranged(model, attachments, readings)
    hook_dict = model.hook_dict
    starts = [(name, make_leaf) for name in LEAVES if name in hook_dict]
    hooks = user_hooks(model)
    with frozen_parameters(model):
        with (
            ExitStack() as stack,
            rules_in_hooks(model, get_rule_set(rule_set), coverage, watch=hook_watch),
            writable(any(hook.is_forward for hook in hooks)),
            restarted(hooks) as constants,
            reading_hooks(model, [*starts, *before]),
            attached(model, attachments),
            reading_hooks(model, after),
        ):
            for scope in scopes:
                stack.enter_context(scope)
            logits = model(tokens, **forward_kwargs)
            values = [check_value(objective(logits)) for objective in objectives]
        ends = [logits, *leaves.values(), *constants] if logits.requires_grad else []
        for which, value in enumerate(values):
            begin, more = first_gradient(model, value), which + 1 < len(values)
            keep = more or (hook_watch is not None and bool(hook_watch.edits))
            if not ends or (
                torch.autograd.grad(value, ends, begin, allow_unused=True, retain_graph=keep)[0]
                is None
            ):
                raise ModelStateError(
                    "The objective's value does not depend on the logits it was given (or they "
                    "not on the input), so there is nothing to explain. Compute it from its "
                    "argument."
                )
            if then is not None:
                then(which)
    return logits.detach(), [value.detach().reshape(()) for value in values], coverage


def check_value(value: object) -> Tensor:
    """What an objective returned, if relevance can start from it.

    Raises:
        ModelStateError: it is not one differentiable number.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ModelStateError(
            "The objective must turn logits [batch, pos, vocab] into one differentiable "
            f"number; it returned {_kind(value)}. Use clrp.logit_diff(...), or a function "
            "that sums over the batch and detaches nothing."
        )
    return value


def _refuse_cached_tokens(cache: Any) -> None:
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ModelStateError(
            f"past_key_values holds {int(cache.get_seq_length())} tokens already: what they "
            "contributed could not be told and would be lost. Give the whole prompt, without it."
        )


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    detached = "" if value.requires_grad else " without a gradient"
    return f"a tensor of shape {list(value.shape)}{detached}"
