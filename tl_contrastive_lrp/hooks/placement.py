"""Where each rule goes on a model, and how rules are attached to it and removed again.

``place`` attaches nothing; ``attached`` attaches the rules for a block. Both leave the forward
bit-identical. On exit, also after an exception, every hook and operand is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelStateError
from ..inputs.bridge import (
    LEAVES,
    components,
    hook_points,
    module_names,
    public_name,
    require_bridge,
)
from ..rules.functions import started
from ..rules.rule_sets import RuleSet, get_rule_set
from ..rules.threads import mine, modules_of, wrapped_parameters
from .attach import Attachment, HookFn, attach
from .coverage import Coverage, CoverageRow
from .sites import find_sites

_MARK = "_tl_contrastive_lrp_rule"
_COUNTS = "_relevance_rule_refcounts"


def check_ready(model: Any, what: str) -> None:
    """Refuse a model or a torch state in which relevance would be wrong.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ModelStateError: A module is in training mode, gradients are off, or autocast is on.
    """
    require_bridge(model)
    for module in modules_of(model):
        if module.training:
            raise ModelStateError(
                f"{what} needs the model in evaluation mode, but {_path_of(model, module)} is in "
                "training mode (dropout would be explained too). Call model.eval() first."
            )
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise ModelStateError(
            f"{what} needs gradients, which are switched off here. Leave torch.no_grad() or "
            "torch.inference_mode(), or call torch.set_grad_enabled(True) "
            "(torch.enable_grad() also works as a block)."
        )
    _refuse_autocast(model, what)


def _path_of(model: Any, module: nn.Module) -> str:
    """The module's path in the bridge or the wrapped model, its class's name for either itself."""
    named = (*model.named_modules(), *model.original_model.named_modules())
    path = next((name for name, other in named if other is module), "")
    return path.replace("._original_component", "") or type(module).__name__


def _refuse_autocast(model: Any, what: str) -> None:
    """Refuse to run under autocast, which changes the forward and rounds the backward."""
    kinds = {p.device.type for p in wrapped_parameters(model)} - {"meta"}
    for kind in sorted(kinds):
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            raise ModelStateError(
                f"{what} cannot run inside torch.autocast({kind!r}): it computes some operations "
                f"in {dtype} and rounds gradients on their way. Leave that block, or put the call "
                f'into `with torch.autocast("{kind}", enabled=False):`; for another precision '
                f"boot the model in it, boot_transformers(name, dtype={dtype})."
            )


def check_single(model: Any) -> None:
    """Refuse a model that has rules on it already, from this package or another tool.

    Raises:
        ModelStateError: There are such rules; the message says which and how to remove them.
    """
    for path, component in components(model).items():
        # TransformerLens' development version counts its own rules on a component there. Only its
        # own attributes count, and asking the module that it wraps as well would be slow.
        own = _COUNTS in vars(component) or hasattr(type(component), _COUNTS)
        if own and any(getattr(component, _COUNTS) or ()):
            raise ModelStateError(
                f"TransformerLens' own relevance rules are on at {path}; together with these they "
                "would apply twice. Leave its context first."
            )
    for name, hook_point in hook_points(model).items():
        for handle in hook_point.fwd_hooks:
            if is_rule(handle.user_hook):
                raise ModelStateError(
                    f"Rules are already on this model (at {name}); a second set on top would "
                    "apply them twice. Leave the other clrp.lrp(...) block first, or reset "
                    "leftover hooks with model.reset_hooks()."
                )


def _mark_only(tensor: Any, hook: Any) -> None:
    """A hook function that marks the model as having rules, if none of the rules is a hook."""


def is_rule(fn: Any) -> bool:
    """Whether a hook function is one of the rules."""
    return bool(getattr(fn, _MARK, False))


def marked(fn: HookFn) -> HookFn:
    """The hook function, marked as one of the rules."""
    setattr(fn, _MARK, True)
    return fn


def place(model: Any, rules: str | RuleSet) -> tuple[tuple[Attachment, ...], Coverage]:
    """Where each rule of ``rules`` goes on ``model``, according to the tables.

    Returns:
        The attachments, one per operation, and the coverage that describes them.

    Raises:
        UncoveredComponentError: A component that is known to have no rule.
    """
    rule_set = get_rule_set(rules)
    attachments = tuple(attach(site, rule_set) for site in find_sites(model))
    names = module_names(model) if any(a.site.component is None for a in attachments) else {}
    rows = tuple(
        CoverageRow(
            names.get(a.site.module, a.site.path) if a.site.component is None else a.site.path,
            a.site.class_name,
            a.site.operation,
            a.rule,
            a.how,
        )
        for a in attachments
    )
    return attachments, Coverage(rule_set.name, rows)


@contextmanager
def own_hooks(model: Any, pairs: Iterable[tuple[str, HookFn]]) -> Iterator[None]:
    """Add hook functions to HookPoints for the block, called in this thread only.

    It does what ``model.hooks(fwd_hooks=pairs)`` does, without rebuilding the table of HookPoints.

    Args:
        model: The bridge.
        pairs: (hook_name, hook_function), each name as from ``public_name``.

    Raises:
        KeyError: There is no such HookPoint.
        ValueError: A flag of ``model.cfg`` is off without which the HookPoint is never called.
    """
    points = hook_points(model)
    disabling_flag = getattr(model, "_gated_hook_reason", None)
    level = getattr(model, "context_level", 0) + 1
    added: list[tuple[Any, Any]] = []
    model.context_level = level
    try:
        for name, fn in pairs:
            point = points[name]
            flag = disabling_flag and disabling_flag(point.name or name)
            if flag is not None:
                raise ValueError(
                    f"No hook at {name} is called while cfg.{flag} is False. Call "
                    f"model.set_{flag}(True) first."
                )
            handle = point.add_hook(mine(fn), level=level)
            # TransformerLens before 4.3 does not return it.
            added.append((point, point.fwd_hooks[-1] if handle is None else handle))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
        model.context_level -= 1


def embedding_leaves(
    model: Any,
    leaves: dict[str, Tensor],
    change: Callable[[Tensor], Tensor] | None = None,
    names: tuple[str, ...] = LEAVES,
) -> list[tuple[str, HookFn]]:
    """Hook functions at which the graph starts: embeddings [batch, pos, d_model] become leaves.

    Args:
        model: The bridge.
        leaves: Each forward puts its leaves here, by their names in ``bridge.LEAVES``.
        change: Applied to the embeddings before the model uses them.
        names: The embeddings to replace; those that the model lacks are left out.
    """
    points = hook_points(model)

    def starting_at(name: str) -> HookFn:
        def start(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            value = tensor.detach()
            leaves[name] = (value if change is None else change(value)).requires_grad_(True)
            return started(leaves[name])

        return start

    return [(public_name(points, name), starting_at(name)) for name in names if name in points]


@contextmanager
def reading_hooks(model: Any, pairs: list[tuple[str, HookFn]]) -> Iterator[None]:
    """Hook functions that change no value, for the block and in this thread only.

    They are also called at outputs for which TransformerLens calls no hook: a block that returns a
    list, like those of the first GPT, has a ``hook_out`` that never fires.

    Args:
        model: The bridge.
        pairs: (hook_name, hook_function).
    """
    hook_dict = hook_points(model)
    by_point: dict[int, list[HookFn]] = {}
    for name, fn in pairs:
        by_point.setdefault(id(hook_dict[name]), []).append(fn)

    def at_end(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
        if not isinstance(output, list) or not output or not isinstance(output[0], torch.Tensor):
            return None
        first = output[0]
        for fn in by_point[id(module.hook_out)]:
            returned = fn(first, module.hook_out)
            first = first if returned is None else returned
        return [first, *output[1:]]

    with ExitStack() as stack:
        for block in getattr(model, "blocks", ()):
            if id(block.hook_out) in by_point:
                stack.callback(block.register_forward_hook(mine(at_end)).remove)
        named = [(public_name(hook_dict, name), fn) for name, fn in pairs]
        stack.enter_context(own_hooks(model, named))
        yield


@contextmanager
def attached(model: Any, attachments: tuple[Attachment, ...]) -> Iterator[None]:
    """Attach rules to the model for the block; they act in this thread only.

    Raises:
        ModelStateError: At the end of the block, if something in it removed them.
    """
    hook_dict = hook_points(model)
    with ExitStack() as stack:
        hooks = [
            (public_name(hook_dict, name), marked(fn))
            for a in attachments
            for name, fn in (a.hooks if a.scoped is None else a.scoped_hooks)
        ]
        if not hooks and any(a.scoped is not None for a in attachments):
            hooks = [(public_name(hook_dict, "embed.hook_out"), marked(_mark_only))]
        stack.enter_context(own_hooks(model, hooks))
        for a in attachments:
            if a.scoped is not None:
                stack.enter_context(a.scoped())
        yield
        for name, _ in hooks:
            if not any(is_rule(handle.user_hook) for handle in hook_dict[name].fwd_hooks):
                raise ModelStateError(
                    f"The rule at {name} was removed from the model while rules were on (one of "
                    "your hooks, or your code inside `with clrp.lrp(...)`, called "
                    "model.reset_hooks() or remove_hooks()), so later operations had ordinary "
                    "gradients. Remove only your own hooks: with the handle that add_hook returns, "
                    "or with model.hooks(...)."
                )
