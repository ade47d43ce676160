"""``audit``: whether the rules miss anything, judged by the graph that relevance flows through.

The model runs once, on four tokens, to record its autograd graph. The model's state is unchanged:
the user's hooks are set aside during the run, and random numbers, gradients and ``requires_grad``
stay as they are. The result is cached until something about the model changes, so calling it again
costs almost nothing.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ...errors import ModelStateError, UncoveredComponentError
from ...inputs.bridge import module_names, require_bridge
from ...inputs.devices import input_device
from ...rules.threads import (
    frozen_parameters,
    mine,
    one_at_a_time,
    wrapped_modules,
    wrapped_parameters,
)
from ..coverage import ranges
from ..placement import (
    attached,
    check_ready,
    check_single,
    embedding_leaves,
    own_hooks,
    place,
)
from ..user_hooks import aside, next_sequence, user_hooks
from .detached import DetachedValues
from .walk import Unaccounted, walk_graph

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Audit", "Finding", "audit", "require_clean"]


_SHOWN = 8  # findings listed in a refusal; the others are only counted


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Finding:
    """One operation between the logits and the input that no rule accounts for.

    Attributes:
        component: The module whose forward ran it, by TransformerLens' path ("blocks.0.mlp", or
            "blocks.0.mlp.act_fn" for a module inside the one that a component wraps).
        module_class: Class of that module; for a component, the class of the wrapped module.
        operation: Autograd's name for the operation ("Mul", "Exp", "Softplus"); "halving" for a
            rule in the wrong place.
        why: What is wrong with the operation.
    """

    component: str
    module_class: str
    operation: str
    why: str


@dataclass(frozen=True)
class Audit:
    """Whether every operation that relevance flows through is linear or has a rule.

    Attributes:
        findings: The operations that are neither, from the logits down; empty if there are none.
        counts: How many operations of each kind were examined, by autograd's name.
        ordinary: (component, operation) of nonlinear operations that keep their ordinary gradient
            because that is their rule: softmaxes, and sigmoids and quotients that make weights.
        hooks: HookPoints that carry hook functions of the user. They are not part of this audit:
            in every run under rules, each is examined once it has computed something.

    Example:
        >>> print(clrp.audit(model))
        audit: clean; each of ... operations is linear or has its rule
    """

    findings: tuple[Finding, ...]
    counts: dict[str, int]
    ordinary: tuple[tuple[str, str], ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def of_hooks(self) -> str:
        """A sentence about ``hooks``; empty if there are none.

        Example:
            >>> with model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda x, hook: None)]):
            ...     print(clrp.audit(model).of_hooks)
            the hooks that you put at blocks.0.hook_in are not part of this audit; ...
        """
        if not self.hooks:
            return ""
        points = ", ".join(self.hooks[:4]) + (", ..." if len(self.hooks) > 4 else "")
        return (
            f"the hooks that you put at {points} are not part of this audit; what they compute is "
            "checked in every run, and listed in its coverage"
        )

    @property
    def clean(self) -> bool:
        """Whether there are no findings.

        Example:
            >>> clrp.audit(model).clean
            True
        """
        return not self.findings

    def summary(self) -> tuple[Finding, ...]:
        """The findings, with equal ones of different blocks merged into one (``blocks.0-27.mlp``).

        Example:
            >>> clrp.audit(model).summary()
            ()
        """
        blocks: dict[Finding, list[int]] = {}
        for f in self.findings:
            layer = re.search(r"(?:^|\.)blocks\.(\d+)(?=\.|$)", f.component)
            number = int(layer[1]) if layer else -1
            general = f.component
            if layer:
                general = f"{general[: layer.start(1)]}{{}}{general[layer.end(1) :]}"
            key = Finding(general, f.module_class, f.operation, f.why)
            blocks.setdefault(key, []).append(number)
        return tuple(
            Finding(
                key.component.replace("{}", ranges(sorted(set(numbers)))),
                key.module_class,
                key.operation,
                key.why,
            )
            for key, numbers in blocks.items()
        )

    def to_frame(self) -> pd.DataFrame:
        """The findings as a DataFrame: component, module_class, operation, why.

        Example:
            >>> clrp.audit(model).to_frame().columns.tolist()
            ['component', 'module_class', 'operation', 'why']
        """
        import pandas as pd

        columns = ("component", "module_class", "operation", "why")
        return pd.DataFrame([vars(f) for f in self.findings], columns=list(columns))

    def __str__(self) -> str:
        n = sum(self.counts.values())
        note = [f"note: {self.of_hooks}."] if self.hooks else []
        if self.clean:
            clean = f"audit: clean; each of {n} operations is linear or has its rule"
            return "\n".join([clean, *note])
        lines = [_line(f) for f in self.summary()]
        counted = f"{len(lines)} finding{'' if len(lines) == 1 else 's'}"
        return "\n".join([f"audit: {counted} among {n} operations", *lines, *note])


def _line(f: Finding) -> str:
    kind = f" ({f.module_class})" if f.module_class else ""
    return f"  {f.component}{kind}: {f.operation}: {f.why}."


# ---------------------------------------------------------------- the audit


@one_at_a_time
def audit(model: Any) -> Audit:
    """Account for every operation between the logits of ``model`` and its embeddings.

    The model runs once on four tokens under the rules of "attnlrp". Each node of the autograd
    graph, which is the graph that relevance flows through, must then be linear in its computed
    inputs, one of the rules, or a softmax (or a sigmoid that makes weights), whose ordinary
    gradient is its rule. Each product of two computed tensors must be halved exactly once. Every
    other operation is a finding, including unknown ones and those that the model hides from
    autograd. The result is cached until the model's components or flags change.

    The user's hook functions, on HookPoints and other modules, are set aside, and named in
    ``hooks``: they are examined call by call when they run, under the rules of that run.

    The audit cannot see operations that the model uses for longer prompts only, nor whether a
    rule's closed form is that of its activation; ``verify`` measures these on a prompt.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.

    Returns:
        The findings, and how many operations were examined.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ModelStateError: Training mode, or rules already on, if the model has to run.
        UncoveredComponentError: A component that is refused before anything runs, or a model that
            does not run on token ids alone.

    Example:
        >>> report = clrp.audit(model)
        >>> report.clean, sum(report.counts.values()) > 100
        (True, True)
    """
    report = audit_of(model)
    hooks = tuple(sorted({hook.name for hook in user_hooks(model)}))
    return replace(report, hooks=hooks) if hooks else report


def audit_of(model: Any) -> Audit:
    """``audit`` without the user's hooks; the same object until the model changes.

    Raises:
        ModelStateError, UncoveredComponentError: As ``audit``.
    """
    require_bridge(model)
    known = remembered(model)
    if known is not None:
        return known
    with torch.inference_mode(False), torch.enable_grad():
        check_ready(model, "audit")
        check_single(model)
    attachments, _ = place(model, "attnlrp")
    try:
        report = examine(model, lambda: attached(model, attachments))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        if isinstance(error, UncoveredComponentError | ModelStateError | torch.OutOfMemoryError):
            raise
        raise not_run(model, error) from error
    return remember(model, report)


def require_clean(model: Any) -> None:
    """Refuse a model with an operation that no rule accounts for.

    Raises:
        UncoveredComponentError: There is one; the message names every such operation.
    """
    report = audit_of(model)
    if not report.clean:
        raise refusal(report)


def not_run(model: Any, error: Exception) -> UncoveredComponentError:
    """The error for a model that the audit could not run."""
    kind, what = type(model.original_model).__name__, type(error).__name__
    return UncoveredComponentError(
        f"No rule was checked on this model ({kind}): it does not run on a few token ids alone "
        f"({what}: {str(error)[:200]}). Relevance is defined here for models that read one prompt "
        "of tokens; leave one that needs images, audio or a second sequence to activation patching."
    )


def refusal(audit: Audit) -> UncoveredComponentError:
    """The error for an audit that is not clean."""
    lines = [_line(f) for f in audit.summary()]
    if len(lines) > _SHOWN:
        lines = [*lines[:_SHOWN], f"  and {len(lines) - _SHOWN} more (clrp.audit(model))."]
    return UncoveredComponentError(
        "The rules do not cover all that this model computes, so relevance through it would be "
        "made up. Between the logits and the input:\n"
        + "\n".join(lines)
        + "\nUse activation patching on this model, or name these operations when asking for "
        "the family to be covered."
    )


# ---------------------------------------------------------------- the one run


_TOKENS = 4
_NO_INPUT = "no gradient reaches the embeddings from the logits, so there is nothing to explain"
_CUT = "the model cuts its result off from the gradient and goes on computing with it"
_SECOND_INPUT = (
    "the prompt's tokens enter the model here as well, and the relevance that ends here would be "
    "lost"
)

_known: WeakKeyDictionary[Any, tuple[object, Audit]] = WeakKeyDictionary()


def remembered(model: Any) -> Audit | None:
    """The last audit of ``model``, unless something that it depends on has changed since."""
    known = _known.get(model)
    return known[1] if known is not None and known[0] == _signature(model) else None


def remember(model: Any, report: Audit) -> Audit:
    """Cache ``report`` for ``remembered``, as long as the model exists."""
    _known[model] = (_signature(model), report)
    return report


def _signature(model: Any) -> object:
    """The parts of a model's state on which an audit depends and that can change."""
    flags = tuple(
        (name, value)
        for name, value in sorted(vars(model.cfg).items())
        if name.startswith("use_") and isinstance(value, bool)
    )
    modules = [
        (id(type(module)), own.get("_use_processed_weights"), "forward" in own)
        for module in wrapped_modules(model)
        for own in (module.__dict__,)
    ]
    config = getattr(model.original_model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    return flags, getattr(model, "compatibility_mode", None), attention, modules


def examine(model: Any, attach: Callable[[], AbstractContextManager[None]]) -> Audit:
    """The audit of ``model`` under the rules that ``attach`` attaches.

    Args:
        model: A ``TransformerBridge`` in evaluation mode, with no rules on it.
        attach: Returns the context manager inside which all rules of "attnlrp" are on.
    """
    names = module_names(model)
    owners = _Owners(names)
    inputs: dict[str, Tensor] = {}
    tokens = some_tokens(model)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(same_random_numbers(model))
        stack.enter_context(frozen_parameters(model))
        stack.enter_context(hooks_aside(model))
        others = stack.enter_context(_other_lookups(names, tokens))
        stack.enter_context(own_hooks(model, embedding_leaves(model, inputs)))
        stack.enter_context(attach())
        stack.enter_context(owners.watch())
        detached = stack.enter_context(DetachedValues(owners.at_work))
        repeated = stack.enter_context(repeated_blocks(model))
        logits = model(tokens)
    walk = walk_graph(logits, inputs.values())
    findings = [_finding(operation, owners, others) for operation in walk.findings]
    findings += [owners.finding(cut.module, cut.operation, _CUT) for cut in detached.cuts]
    findings += repeated
    if walk.leaves == 0:
        kind = type(model.original_model).__name__
        findings.insert(0, Finding("model", kind, "no gradient", _NO_INPUT))
    ordinary = [_finding(operation, owners, others) for operation in walk.ordinary]
    return Audit(
        tuple(dict.fromkeys(findings)),
        walk.counts,
        tuple(dict.fromkeys((f.component, f.operation) for f in ordinary)),
    )


def _finding(unruled: Unaccounted, owners: _Owners, others: dict[int, nn.Module]) -> Finding:
    node, operation, why = unruled
    module = owners.of(node)
    if hasattr(node, "variable"):
        module, operation = others.get(id(node.variable)), "input"
        why = why if module is None else _SECOND_INPUT
    return owners.finding(module, operation, why)


def some_tokens(model: Any) -> Tensor:
    """Distinct token ids that are not positions either, so that their lookups are recognised."""
    device = input_device(model)
    return ((torch.arange(_TOKENS, device=device) * 4 + 9) % int(model.cfg.d_vocab))[None]


# ---------------------------------------------------------------- leaving no trace


@contextmanager
def same_random_numbers(model: Any) -> Iterator[None]:
    """Restore torch's random number generators after the block."""
    devices = {p.device for p in wrapped_parameters(model) if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        yield


@contextmanager
def hooks_aside(model: Any) -> Iterator[None]:
    """Call none of the user's hooks in this thread inside the block."""
    with aside(user_hooks(model)):
        yield


@contextmanager
def _other_lookups(
    names: Mapping[nn.Module, str], tokens: Tensor
) -> Iterator[dict[int, nn.Module]]:
    """Lookups of the prompt's tokens, to see whether one reaches the logits bypassing the leaves.

    The graph of all others ends at the leaves, which come later.
    """
    modules: dict[int, nn.Module] = {}
    leaves: list[Tensor] = []  # kept alive, so that their ids are not reused

    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        ids = args[0] if args else None
        if not isinstance(ids, Tensor) or int(torch.isin(ids, tokens).sum()) < 2:
            return None  # positions, types, layers
        leaf = output.detach().requires_grad_(True)
        leaves.append(leaf)
        modules[id(leaf)] = module
        return leaf

    with ExitStack() as stack:
        for module in names:
            if isinstance(module, nn.Embedding):
                stack.callback(module.register_forward_hook(mine(note)).remove)
        yield modules
    leaves.clear()


@contextmanager
def repeated_blocks(model: Any) -> Iterator[list[Finding]]:
    """Findings, at the end of the block, for every transformer block that ran more than once.

    A HookPoint then fires once per pass, and holds no single hidden state.
    """
    findings: list[Finding] = []
    calls = [0] * len(getattr(model, "blocks", ()))

    def counting(index: int) -> Callable[..., None]:
        def pre_hook(*_: Any) -> None:
            calls[index] += 1

        return pre_hook

    handles = [
        model.blocks[i].register_forward_pre_hook(mine(counting(i))) for i in range(len(calls))
    ]
    try:
        yield findings
    finally:
        for handle in handles:
            handle.remove()
    for i, times in enumerate(calls):
        if times > 1:
            kind = type(model.blocks[i].original_component).__name__
            why = (
                f"it runs {times} times in one forward, so a HookPoint holds no single hidden state"
            )
            findings.append(Finding(f"blocks.{i}", kind, "repetition", why))


# ---------------------------------------------------------------- which module made a node


class _Owners:
    """Finds the module whose forward created a node, by autograd's sequence numbers.

    The numbers grow in order of creation. So the current number, recorded whenever a module is
    entered or left, determines the innermost running module for every node.
    """

    def __init__(self, names: Mapping[nn.Module, str]) -> None:
        self.names = names
        self.starts: list[int] = []
        self.at: list[nn.Module | None] = []
        self.inside: list[nn.Module] = []

    def _note(self) -> None:
        self.starts.append(next_sequence())
        self.at.append(self.inside[-1] if self.inside else None)

    def _enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        self.inside.append(module)
        self._note()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        while self.inside and self.inside.pop() is not module:
            pass
        self._note()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record when modules are entered and left while the block runs."""
        with ExitStack() as stack:
            for module in self.names:
                if type(module).__name__ == "HookPoint":
                    continue
                before = module.register_forward_pre_hook(mine(self._enter), prepend=True)
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(mine(self._leave)).remove)
            yield

    def of(self, node: Any) -> nn.Module | None:
        """The innermost module that was running when ``node`` was created."""
        at = bisect_right(self.starts, node._sequence_nr()) - 1
        return self.at[at] if at >= 0 else None

    def at_work(self) -> nn.Module | None:
        """The innermost module that is running now."""
        return self.inside[-1] if self.inside else None

    def finding(self, module: nn.Module | None, operation: str, why: str) -> Finding:
        """A finding with the module's name and class."""
        if module is None:
            return Finding("model", "", operation, why)
        wrapped = getattr(module, "original_component", None)
        kind = type(module if wrapped is None else wrapped).__name__
        return Finding(self.names[module], kind, operation, why)
