"""The user's own hooks on a bridge, and what each call of a hook did to a value.

Hooks are part of the model that is explained. A hook that only observes (it returns None or its
argument itself, unchanged) computes nothing; every other one edits. What a hook will do cannot be
read from its code, so ``observed`` records each call in a forward of the model:

    hooks = user_hooks(model)
    with observed(hooks) as calls, torch.no_grad():
        model(tokens)
    edits = [call for call in calls if not call.looked_only]

This package's own hooks are recognised by their marks and by the module that they come from. This
file only finds, watches and suspends hooks; ``hook_rules`` applies rules to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelStateError
from ..inputs.bridge import hook_points, module_names
from ..rules.functions import constant_leaf, started
from ..rules.threads import all_modules, caller, elsewhere, modules_of
from .placement import _MARK

Kind = Literal["forward", "forward_pre", "backward", "backward_pre"]
How = Literal["looked", "in place", "returned", "gradient"]
_TABLES: dict[Kind, str] = {
    "forward": "_forward_hooks",
    "forward_pre": "_forward_pre_hooks",
    "backward": "_backward_hooks",
    "backward_pre": "_backward_pre_hooks",
}
_PACKAGE = f"{__name__.partition('.')[0]}."
_LIBRARIES = ("transformer_lens.", "transformers.", "accelerate.", "torch.")
_MISSING = object()
_OWN = "_tl_contrastive_lrp_own"
_Fn = TypeVar("_Fn", bound=Callable[..., Any])


def as_own(fn: _Fn) -> _Fn:
    """Mark a hook function as the package's own: it stays on where users' hooks are set aside."""
    setattr(fn, _OWN, True)
    return fn


@dataclass(frozen=True, eq=False)
class UserHook:
    """One of the user's hook functions.

    Attributes:
        name: The HookPoint's first name in ``model.hook_dict``, or the module's path.
        aliases: The HookPoint's other names.
        module: The HookPoint, or the module.
        kind: When it is called: after the module's forward, before it, or in the backward.
        key: Its key in torch's table of such hooks on the module.
        fn: The function as the user gave it.
        on_hook_point: False for torch hooks that were registered on another module.
    """

    name: str
    aliases: tuple[str, ...]
    module: nn.Module
    kind: Kind
    key: int
    fn: Callable[..., Any]
    on_hook_point: bool = True

    @property
    def table(self) -> MutableMapping[int, Callable[..., Any]]:
        """Torch's own table, by ``key``."""
        table: MutableMapping[int, Callable[..., Any]] = getattr(self.module, _TABLES[self.kind])
        return table

    @property
    def is_forward(self) -> bool:
        """Whether it is called in the forward."""
        return self.kind in ("forward", "forward_pre")

    def __str__(self) -> str:
        other = f" ({', '.join(self.aliases)})" if self.aliases else ""
        return f"{self.name}{other}"


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a forward hook did.

    Attributes:
        hook: The hook.
        how: "looked": it returned None or the same tensor, and wrote nothing into it; "in place":
            it wrote into it; "returned": it returned another value; "gradient": it only registered
            a torch hook on the tensor, to read or change its gradient.
        changed: Whether any value is different afterwards. An edit may change no value (it writes
            the same values again, or into an empty range) and yet change gradients.
        cut: Whether it received a tensor with a gradient and returned one without.
    """

    hook: UserHook
    how: How
    changed: bool
    cut: bool

    @property
    def looked_only(self) -> bool:
        """Whether the forward and backward are the same as without the hook."""
        return self.how == "looked"


def behind(
    module: nn.Module, key: int, registered: Callable[..., Any]
) -> Callable[..., Any] | None:
    """The user's function behind a hook in one of torch's tables; None if it is not a user's.

    This package's own hooks are not the user's, nor are those that TransformerLens put on a
    HookPoint permanently, nor torch hooks of the libraries below.
    """
    handles = (*getattr(module, "fwd_hooks", ()), *getattr(module, "bwd_hooks", ()))
    handle = next((h for h in handles if h.hook.id == key), None)
    fn = registered if handle is None else handle.user_hook or registered
    home = getattr(fn, "__module__", None) or ""
    own = getattr(fn, _MARK, False) or getattr(fn, _OWN, False) or home.startswith(_PACKAGE)
    if handle is None:
        own = own or home.startswith(_LIBRARIES)
    else:
        own = own or (bool(handle.is_permanent) and home.startswith("transformer_lens."))
    return None if own else fn


def _named(model: Any, points: dict[int, list[str]]) -> Callable[[nn.Module], list[str]]:
    """A function from a module to its names in messages."""
    paths: dict[int, str] = {}

    def names(module: nn.Module) -> list[str]:
        if id(module) in points:
            own = getattr(module, "name", None)
            return sorted(points[id(module)], key=lambda name: name != own)
        if not paths:
            for name, other in model.named_modules():
                paths.setdefault(id(other), name or "model")
            paths.update({id(other): name for other, name in module_names(model).items()})
        return [paths.get(id(module), type(module).__name__)]

    return names


def user_hooks(model: Any) -> tuple[UserHook, ...]:
    """Every hook that is neither this package's nor one of TransformerLens' permanent hooks.

    These are the hooks on HookPoints in both directions, however they were added (``add_hook``,
    ``add_perma_hook``, ``model.hooks``, ``run_with_hooks``), and torch hooks on any module.

    Args:
        model: A ``TransformerBridge``.

    Returns:
        HookPoints' hooks in the order of ``model.hook_dict``, each point's in the order in which
        they are called; torch hooks on other modules after them.
    """
    return _user_hooks(model, modules_of(model), hook_points)


def _user_hooks(
    model: Any,
    modules: Iterable[nn.Module],
    points_of: Callable[[Any], Mapping[str, Any]],
) -> tuple[UserHook, ...]:
    hooked = {
        id(m): (m, found)
        for m in modules
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        if (found := _users_on(m))
    }
    if not hooked:
        return ()
    points: dict[int, list[str]] = {}
    for name, point in points_of(model).items():
        points.setdefault(id(point), []).append(name)
    order = [hooked.pop(which) for which in points if which in hooked]
    names, hooks = _named(model, points), list[UserHook]()
    for module, found in (*order, *hooked.values()):
        first, *rest = names(module)
        on_point = id(module) in points
        for kind, key, fn in found:
            hooks.append(UserHook(first, tuple(rest), module, kind, key, fn, on_point))
    return tuple(hooks)


def _users_on(module: nn.Module) -> list[tuple[Kind, int, Callable[..., Any]]]:
    """The user's functions in torch's tables of a module, with their tables and keys."""
    return [
        (kind, key, fn)
        for kind, attribute in _TABLES.items()
        for key, registered in vars(module)[attribute].items()
        if (fn := behind(module, key, registered)) is not None
    ]


def require_no_new(model: Any, known: Iterable[UserHook]) -> None:
    """Refuse a run in which a hook was added, since what that hook did was not examined.

    Args:
        model: A ``TransformerBridge``.
        known: ``user_hooks`` before the run.

    Raises:
        ModelStateError: A hook was added; the message names it.
    """
    before = {(id(hook.module), hook.kind, hook.key) for hook in known}
    # A fresh walk: a hook may have added a module, too.
    for hook in _user_hooks(model, all_modules(model), lambda model: model.hook_dict):
        if (id(hook.module), hook.kind, hook.key) not in before:
            raise ModelStateError(
                f"A hook was put at {hook} while the model ran, by another hook or in another "
                "thread, so only part of this run had it. Add it before the call; with threads, "
                "inside `with clrp.model_lock(model):`."
            )


@contextmanager
def aside(hooks: Iterable[UserHook]) -> Iterator[None]:
    """Do not call these hooks in this thread inside the block; other threads call them."""
    originals = [(hook, hook.table[hook.key]) for hook in hooks if hook.key in hook.table]
    try:
        for hook, fn in originals:
            hook.table[hook.key] = elsewhere(fn)  # in its old place among others
        yield
    finally:
        for hook, fn in originals:
            if hook.key in hook.table:  # another thread may have removed it
                hook.table[hook.key] = fn


class _Conversion:
    """A HookPoint's conversion that records whether a hook returned its argument."""

    def __init__(self, conversion: Any) -> None:
        self.conversion = conversion
        self.given: object = _MISSING
        self.state: tuple[int | None, Tensor] | None = None
        self.same = False

    def convert(self, value: Any, *context: Any) -> Any:
        self.given = self.conversion.convert(value, *context)
        self.state = _state(self.given) if isinstance(self.given, Tensor) else None
        return self.given

    def revert(self, value: Any, *context: Any) -> Any:
        untouched = self.state is None or not _written(self.given, self.state)[0]
        self.same = value is self.given and untouched
        return self.conversion.revert(value, *context)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _state(tensor: Tensor) -> tuple[int | None, Tensor]:
    return _version(tensor), tensor.detach().clone()


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return bool(((one == other) | ((one != one) & (other != other))).all())  # NaN is NaN


def _written(tensor: Any, state: tuple[int | None, Tensor]) -> tuple[bool, bool]:
    """Whether a tensor was written into since, and whether its values changed."""
    version, values = state
    changed = not _equal(tensor.detach(), values)  # also writes past autograd, as through .data
    return changed or _version(tensor) != version, changed


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a module's arguments or output, in their order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [x for part in value for x in tensors_in(part)]
    return []


def _as_in_backward(value: Any) -> Any:
    """A copy of a tensor that requires a gradient, as the tensor would before a backward."""
    if type(value) in (tuple, list):
        return type(value)(map(_as_in_backward, value))
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
        return value
    return value.detach().requires_grad_(True).clone()


def _asks_for_gradient(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (bool(tensor._backward_hooks) or tensor.retains_grad)


def _watched(
    hook: UserHook, fn: Callable[..., Any], seen: list[Call], gradients: bool
) -> Callable[..., Any]:
    at = -1 if hook.kind == "forward" else 0  # among the arguments: its output, or its input
    me = caller()

    def watching(module: Any, *args: Any) -> Any:
        if caller() is not me:
            return fn(module, *args)
        shown = list(args)
        with torch.set_grad_enabled(gradients or torch.is_grad_enabled()):
            if gradients:
                shown[at] = _as_in_backward(shown[at])
            given = shown[at]
            tensors = tensors_in(given)
            states = [_state(x) for x in tensors]
            others = args[:-1] if at else args[1:]
            other_versions = [(x, _version(x)) for x in tensors_in(others)]
            conversion = getattr(module, "hook_conversion", None)
            looking = _Conversion(conversion) if conversion is not None else None
            if looking is not None:
                module.hook_conversion = looking
            try:
                returned = fn(module, *shown)
            finally:
                if looking is not None:
                    module.hook_conversion = conversion
        written = [_written(x, state) for x, state in zip(tensors, states, strict=True)]
        changed, cut = any(now for _, now in written), False
        how: How = "looked"
        if any(touched for touched, _ in written) or any(
            _version(x) != v for x, v in other_versions
        ):
            how = "in place"
        if returned is not None and returned is not given and not (looking and looking.same):
            after = tensors_in(returned)
            how = "returned" if how == "looked" else how
            changed = len(after) != len(states) or not all(
                _equal(x.detach(), state[1]) for x, state in zip(after, states, strict=True)
            )
            cut = any(x.requires_grad for x in tensors) and not any(x.requires_grad for x in after)
        elif how == "looked" and any(
            _asks_for_gradient(x) for x in (*tensors, looking and looking.given)
        ):
            how = "gradient"
        seen.append(Call(hook, how, changed, cut))
        if how == "looked":
            return None if gradients else returned
        if given is args[at]:
            return returned
        return given if returned is None else returned

    return watching


@contextmanager
def observed(hooks: Iterable[UserHook], *, gradients: bool = False) -> Iterator[list[Call]]:
    """Record what forward hooks do while the block runs the model; no value changes.

    This costs a copy and a comparison of each value that is passed to a hook.

    Args:
        hooks: From ``user_hooks``; backward ones are left alone.
        gradients: In a forward without gradients, show each hook a tensor that requires one, as it
            would see before a backward.

    Yields:
        A list to which each call of a hook is added, in the order of the forward.
    """
    seen: list[Call] = []
    watched = [(hook, hook.table[hook.key]) for hook in hooks if hook.is_forward]
    try:
        for hook, fn in watched:
            # The key is the same, so the hook keeps its place among the others.
            hook.table[hook.key] = _watched(hook, fn, seen, gradients)
        yield seen
    finally:
        for hook, fn in watched:
            if hook.key in hook.table:  # it may have removed itself
                hook.table[hook.key] = fn


def next_sequence() -> int:
    """The sequence number that autograd gives the next node; it grows in order of creation."""
    number: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
    return number


def _descends(value: Tensor, since: int, until: int) -> bool:
    """Whether a value was computed from a node that was made between two numbers.

    A tensor cached in an earlier forward has a graph too, but not of this one.
    """
    seen, pending = set(), [value.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen or hasattr(node, "variable"):
            continue
        seen.add(node)
        number = node._sequence_nr()
        if since <= number < until:
            return True
        if number >= until:
            pending += [earlier for earlier, _ in node.next_functions]
    return False


def _restarting(
    hook: UserHook, fn: Callable[..., Any], constants: list[Tensor], since: int
) -> Callable[..., Any]:
    at, me = -1, caller()

    def restarting(module: Any, *args: Any) -> Any:
        if caller() is not me:
            return fn(module, *args)
        given = args[at] if hook.kind == "forward" else args
        had, before = any(x.requires_grad for x in tensors_in(given)), next_sequence()
        returned = fn(module, *args)
        if not had or not torch.is_grad_enabled():
            return returned
        if any(x.requires_grad and _descends(x, since, before) for x in tensors_in(returned)):
            return returned

        def of(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                constants.append(constant_leaf(value))
                return started(constants[-1])
            if type(value) is dict:
                return {name: of(part) for name, part in value.items()}
            return type(value)(map(of, value)) if type(value) in (tuple, list) else value

        return of(returned)

    return restarting


@contextmanager
def restarted(hooks: Iterable[UserHook]) -> Iterator[list[Tensor]]:
    """Make a constant with which a hook replaces a computed value a leaf with its own gradient.

    Relevance can then be read at the constant and at values computed from it, as at any other
    value. No relevance reaches the value that the hook replaced.

    Args:
        hooks: From ``user_hooks``.

    Yields:
        The constants of the forward inside the block, as leaves.
    """
    constants: list[Tensor] = []
    since = next_sequence()
    wrapped = [(hook, hook.table[hook.key]) for hook in hooks if hook.is_forward]
    try:
        for hook, fn in wrapped:
            hook.table[hook.key] = _restarting(hook, fn, constants, since)
        yield constants
    finally:
        for hook, fn in wrapped:
            if hook.key in hook.table:
                hook.table[hook.key] = fn
