"""The plain engine: one forward under the rules, and a backward for each objective.

Relevance is read inside the backward (``reading.py``). Parameters are not differentiated: their
``.grad`` and ``requires_grad`` stay as they are, and gradients end at detached embeddings, so
frozen models work too.

The user's hooks are part of the model. What is read at a HookPoint is the value after the user's
edits, times the gradient at that value: a constant that a hook inserts has relevance there, as a
bias has, and none of it flows on to the source of the value that it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelStateError, a_kind
from ..hooks.context import plan
from ..hooks.coverage import Coverage
from ..hooks.hook_rules import HookWatch, rules_in_hooks
from ..hooks.placement import attached, check_ready, check_single, embedding_leaves, reading_hooks
from ..hooks.user_hooks import UserHook, restarted, user_hooks
from ..inputs.facts import ObjectiveFacts
from ..inputs.located import LocatedObjective
from ..rules.deferred import PatternNeededError
from ..rules.functions import writable
from ..rules.precision import first_gradient
from ..rules.rule_sets import RuleSet, get_rule_set
from ..rules.threads import frozen_parameters, mine
from .fused import AttentionKind, FusedBlocks, is_worth, saves_logits
from .reading import Reading, Slots, arranged

# Makes a context manager; called again if the forward has to be run again.
Scope = Callable[[], AbstractContextManager[None]]


def run(
    model: Any,
    tokens: Tensor,
    objective: Callable[[Tensor], Tensor],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    scopes: Iterable[Scope] = (),
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


@dataclass(frozen=True, eq=False)
class RunResult:
    """One objective's forward and backward, whichever engine ran it.

    Attributes:
        objective: The objective's value and description.
        relevance: The sums of relevance by name, in logits, on the CPU.
        coverage: Which component got which rule.
        memory: "plain", or "tiled (tile N)".
        attention: "eager", "fused", or in how many blocks it was fused.
    """

    objective: ObjectiveFacts
    relevance: dict[str, Tensor]
    coverage: Coverage
    memory: str
    attention: str = "eager"


@dataclass(eq=False)
class Forward:
    """One forward of the model under the rules, at which backwards start.

    Attributes:
        model: The bridge.
        logits: [batch, pos, vocab], on their graph; or those of the positions in ``read`` only.
        coverage: Which component got which rule.
        ends: The tensors at which gradients end: embeddings, and constants with which a user's
            hook replaced computed values.
        attention: How attention was computed, as results record it.
        read: The positions whose logits there are, rising; None for all.
        keep_graph: Whether the autograd graph is also kept after the last backward.
        slots: Where readings can be bound, if they were not given with the forward.
    """

    model: Any
    logits: Tensor
    coverage: Coverage
    ends: list[Tensor] = field(repr=False)
    keep_graph: bool = False
    attention: str = "eager"
    slots: Slots | None = None
    read: tuple[int, ...] | None = None
    length: int = 0

    def pass_over(self) -> None:
        """Count one of the planned results as done, although it did not use this forward."""
        if self.slots is not None:
            self.slots.pass_over()
            if not self.slots.uses:
                self.logits, self.ends = self.logits.detach(), []

    def value(self, objective: Callable[[Tensor], Tensor]) -> Tensor:
        """Evaluate the objective, with its autograd graph.

        Raises:
            ModelStateError: it is not one differentiable number.
        """
        logits, local = self._evaluation(objective)
        return check_value(local(logits), [self.logits])

    def facts(self, objective: Callable[[Tensor], Tensor], value: Tensor) -> ObjectiveFacts:
        """The facts about an objective whose value ``value`` returned."""
        logits, local = self._evaluation(objective)
        own = None if local is objective else local
        return ObjectiveFacts.of(objective, logits.detach(), value, self.length, own)

    def _evaluation(
        self, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The logits that an objective reads, and the objective as a function of those."""
        if self.read is None:
            return self.logits, objective
        assert isinstance(objective, LocatedObjective)
        return self.logits, objective.at(self.read, self.length)

    def backward(self, value: Tensor, *, more: bool) -> None:
        """Send the gradient of a value back to the embeddings; sinks are called on the way.

        Args:
            value: What ``value`` returned.
            more: Whether another backward follows for the same result.

        Raises:
            ModelStateError: the value does not depend on the logits.
        """
        ends = [self.logits, *self.ends] if self.logits.requires_grad else []
        begin = first_gradient(self.model, value)
        more = more or self.keep_graph or (self.slots is not None and self.slots.uses > 0)
        with frozen_parameters(self.model):
            if not ends or (
                torch.autograd.grad(value, ends, begin, allow_unused=True, retain_graph=more)[0]
                is None
            ):
                raise independent()


def independent() -> ModelStateError:
    """The error for an objective's value that does not depend on the logits."""
    return ModelStateError(
        "The objective's value does not depend on the logits it was given (or the logits not on "
        "the input), so there is nothing to explain. Compute it from its argument."
    )


def forward(
    model: Any,
    tokens: Tensor,
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    scopes: Iterable[Scope] = (),
    hook_watch: HookWatch | None = None,
    attention: AttentionKind = "eager",
    read: tuple[int, ...] | None = None,
    continued: bool = False,
    **forward_kwargs: Any,
) -> Forward:
    """Run one forward, with rules and readings for the backwards that start at it.

    The rules and ``scopes`` are on during the forward only, so a sink may run the model itself.
    They act in the calling thread alone, in whatever thread autograd calls the sinks.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [batch, pos].
        rule_set: Name of a rule set, or a ``RuleSet``.
        readings: What to read in the backwards.
        scopes: Make context managers to enter around the forward.
        hook_watch: Records what the user's hook functions do. If one edits, or is called in the
            backward, the autograd graph is also kept after the last backward.
        attention: "eager", or "fused" where a block allows it.
        read: The positions whose logits are needed, rising; None for all. Where attention is fused,
            the logits of no others are computed, unless a hook of the user's could see them.
        continued: Whether ``past_key_values`` may hold tokens, whose keys and values are on an
            autograd graph that the caller follows further.
        **forward_kwargs: Passed to the model's forward.

    Raises:
        ModelStateError: training mode, gradients off, or rules already on.
        UncoveredComponentError: a component that no rule covers.
    """
    check_ready(model, "Relevance")
    check_single(model)
    if not continued:
        _refuse_cached_tokens(forward_kwargs.get("past_key_values"))
    readings, scopes = list(readings), list(scopes)
    eager: set[str] = set()
    while True:
        try:
            return _forward(
                model, tokens, rule_set, readings, scopes, hook_watch, attention, read,
                eager, forward_kwargs,
            )  # fmt: skip
        except PatternNeededError as needed:  # its code does something to it that is not known
            eager.add(needed.path)


def _forward(
    model: Any,
    tokens: Tensor,
    rule_set: str | RuleSet,
    readings: list[Reading],
    scopes: list[Scope],
    hook_watch: HookWatch | None,
    attention: AttentionKind,
    read: tuple[int, ...] | None,
    eager: set[str],
    forward_kwargs: dict[str, Any],
) -> Forward:
    """Run one forward with these attention components eager, whatever ``attention`` says."""
    attachments, coverage = plan(model, rule_set)
    leaves: dict[str, Tensor] = {}

    before, after = arranged(model, attachments, readings)
    starts = embedding_leaves(model, leaves)
    hooks = user_hooks(model)
    length = tokens.shape[-1]
    worth = is_worth(attention, length) or (
        attention == "auto" and saves_logits(model, read, length)
    )
    fused = FusedBlocks(model, attachments, readings, hooks, eager) if worth else None
    if not worth or sees_unembed(hooks):
        read = None
    with (
        frozen_parameters(model),
        ExitStack() as stack,
        rules_in_hooks(model, get_rule_set(rule_set), coverage, hooks=hooks, watch=hook_watch),
        writable(any(hook.is_forward for hook in hooks)),
        restarted(hooks) as constants,
        reading_hooks(model, [*starts, *before]),
        attached(model, attachments),
        reading_hooks(model, after),
        nullcontext() if fused is None else fused.active(),
        nullcontext() if read is None else unembedded(model, read),
    ):
        for scope in scopes:
            stack.enter_context(scope())
        logits = model(tokens, **forward_kwargs)
        _require_whole(logits, tokens)
    keep_graph = hook_watch is not None and (bool(hook_watch.edits) or hook_watch.of_backward)
    ends = [*leaves.values(), *constants]
    kind = "eager" if fused is None else fused.kind
    return Forward(model, logits, coverage, ends, keep_graph, kind, read=read, length=length)


def run_each(
    model: Any,
    tokens: Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    readings: Iterable[Reading],
    scopes: Iterable[Scope] = (),
    then: Callable[[int], None] | None = None,
    hook_watch: HookWatch | None = None,
    shared: Forward | None = None,
    **forward_kwargs: Any,
) -> tuple[Tensor, list[Tensor], Coverage]:
    """Run one forward, and a backward for each objective; sinks are called on the way back.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [batch, pos].
        objectives: Functions of the logits.
        rule_set: Name of a rule set, or a ``RuleSet``.
        readings: What to read in the backwards.
        scopes: Make context managers to enter around the forward.
        then: Called after each backward, with the number of its objective.
        hook_watch: Records what the user's hook functions do. If one edits, the autograd graph is
            kept for ``then``, also after the last backward.
        shared: A forward of these tokens under these rules that has already been run, with slots
            for these readings.
        **forward_kwargs: Passed to the model's forward.

    Returns:
        The logits [batch, pos, vocab] and the objectives' values [], all detached, and the
        coverage.

    Raises:
        ModelStateError: training mode, gradients off, rules already on, or an objective that is
            not a differentiable scalar.
        UncoveredComponentError: a component that no rule covers.
    """
    readings = list(readings)
    run = shared
    if run is None:
        run = forward(model, tokens, rule_set, readings, scopes, hook_watch, **forward_kwargs)
    if run.slots is not None:
        run.slots.require_left()
    values = [run.value(objective) for objective in objectives]
    with nullcontext() if run.slots is None else run.slots.bound(readings):
        for which, value in enumerate(values):
            run.backward(value, more=which + 1 < len(values))
            if then is not None:
                then(which)
    return run.logits.detach(), [value.detach().reshape(()) for value in values], run.coverage


def check_value(value: object, logits: Iterable[Tensor]) -> Tensor:
    """Check what an objective returned: relevance must be able to start from it.

    Args:
        value: What it returned.
        logits: What it was given, on their graph.

    Raises:
        ModelStateError: it is not one differentiable number, or depends on more than the logits.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise ModelStateError(
            "The objective must turn logits [batch, pos, vocab] into one differentiable "
            f"number; it returned {_kind(value)}. Use clrp.logit_diff(...), or a function "
            "that sums over the batch and detaches nothing."
        )
    _require_of_logits(value, logits)
    return value


def _require_of_logits(value: Tensor, logits: Iterable[Tensor]) -> None:
    """Refuse a value with a gradient that bypasses the logits, which tiles or a graph would lose.

    The user's own parameters, such as a probe's, do not depend on the prompt and are allowed.
    """
    seen = {x.grad_fn for x in logits}
    pending: list[Any] = [value.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, torch.nn.Parameter):
            raise ModelStateError(
                "The objective uses another tensor besides the logits it was given (an activation "
                "stored by a hook?), so part of its value could not be explained. Compute it from "
                "its argument, and .detach() everything else that it uses."
            )
        pending += [earlier for earlier, _ in node.next_functions]


def sees_unembed(hooks: Iterable[UserHook]) -> bool:
    """Whether one of the user's hooks would see that only some positions are unembedded."""
    return any(hook.name.startswith("unembed") for hook in hooks)


@contextmanager
def unembedded(model: Any, read: tuple[int, ...]) -> Iterator[None]:
    """Have this thread's forwards compute the logits of some positions only."""

    def cut(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        return (args[0][:, list(read)], *args[1:])

    handle = model.unembed.register_forward_pre_hook(mine(cut))
    try:
        yield
    finally:
        handle.remove()


def _require_whole(logits: object, tokens: Tensor) -> None:
    """Refuse a forward that another thread's call of TransformerLens changed.

    The bridge stores the batch size of its position embeddings and the layer to stop at on the
    model, where all threads share them.
    """
    if isinstance(logits, Tensor) and tokens.ndim == 2 and logits.ndim == 3:
        given, expected = tuple(logits.shape[:2]), tuple(tokens.shape)
        if given[0] != expected[0]:
            raise ModelStateError(
                f"The forward of tokens {list(expected)} gave logits of {list(given)}: another "
                "thread ran this model at the same time and TransformerLens mixed up the two runs. "
                "Try again, with the other run inside `with clrp.model_lock(model):`."
            )


def _refuse_cached_tokens(cache: Any) -> None:
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ModelStateError(
            f"past_key_values already holds {int(cache.get_seq_length())} tokens, whose "
            "contribution could not be traced. Give the whole prompt, without past_key_values."
        )


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return a_kind(value)
    detached = "" if value.requires_grad else " without a gradient"
    return f"a tensor of shape {list(value.shape)}{detached}"
