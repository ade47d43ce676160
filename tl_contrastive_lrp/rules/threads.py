"""Calls on a model: one thread at a time, no effect on other threads, one walk of the model.

TransformerLens and this package put hooks on the model itself, where they act on the forward of
every thread. Two things keep threads apart:

- a lock for each model: the functions of this package that run a model take turns;
- ``mine``: a hook function that does nothing in any thread but the one that added it, so that
  ``model(tokens)`` in another thread is computed, and differentiated, as if no rules were on.

Where a hook function cannot keep threads apart, the other thread gets an error.
``frozen_parameters`` switches off the weights' gradients for all threads, so gradients of weights
through a forward that ran meanwhile raise ``ModelStateError``. So does any forward while
``in_float32`` has the weights in another type (``refused_elsewhere``).

On a GPU, autograd runs the backward, and what is read in it, in a thread of its own. There it acts
for the thread that ran the forward (``acting_for``).

A public call is also the scope in which results computed from the whole model are cached.
``once_per_call`` caches them until the call returns, since a user may change the model afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelStateError

P = ParamSpec("P")
R = TypeVar("R")

# Seconds that a call waits for another thread to leave a block such as ``with clrp.lrp(model):``.
# The user's code inside that block may itself wait for this call.
PATIENCE = 60.0

_WAKE = 0.5  # seconds between checks of whether the other thread is still alive


# ---------------------------------------------------------------- which thread


class Caller:
    """An object for each thread, whose identity, unlike a thread's number, is never used again.

    Attributes:
        views: Results of the functions under ``once_per_call`` by the model's id, for each model
            on which a public function is running in this thread.
    """

    def __init__(self) -> None:
        self.views: dict[int, dict[Callable[..., Any], Any]] = {}


class _Threads(threading.local):
    """The ``Caller`` of each thread."""

    def __init__(self) -> None:
        self.caller = Caller()


_threads = _Threads()


def caller() -> Caller:
    """The ``Caller`` of this thread, or of the thread that it acts for."""
    return _threads.caller


def acting_for(who: Caller, function: Callable[..., R], *args: Any) -> R:
    """Return ``function(*args)``, called as in the thread of ``who``.

    Autograd's backward needs this, because on a GPU it runs in a thread of the device.
    """
    before, _threads.caller = _threads.caller, who
    try:
        return function(*args)
    finally:
        _threads.caller = before


def mine(function: Callable[..., Any]) -> Callable[..., Any]:
    """A hook function that calls ``function`` in this thread, and changes nothing in others."""
    me = caller()

    def hook(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if _threads.caller is me else None

    if marks := getattr(function, "__dict__", None):
        hook.__dict__.update(marks)
    return hook


@contextmanager
def active_in(mode: TorchFunctionMode, module: nn.Module) -> Iterator[None]:
    """Have a mode active during each call of a module, in this thread only.

    The mode is off again when the block ends, whatever ended a call: after a KeyboardInterrupt
    torch calls no hooks, and after an error in one of a module's own hooks not all of them.

    Args:
        mode: The mode.
        module: The module.
    """
    entered: list[None] = []

    def enter(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        mode.__enter__()
        entered.append(None)

    def leave(*_: Any) -> None:
        if entered:
            entered.pop()
            mode.__exit__(None, None, None)

    handles = [
        module.register_forward_pre_hook(mine(enter)),
        module.register_forward_hook(mine(leave), always_call=True),
    ]
    try:
        yield
    finally:
        while entered:
            leave()
        for handle in handles:
            handle.remove()


def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
    """The opposite: a hook function that calls ``function`` in all threads but this one."""
    me = caller()

    def hook(*args: Any, **kwargs: Any) -> Any:
        return None if _threads.caller is me else function(*args, **kwargs)

    return hook


class PerThread(threading.local):
    """Values that hook functions acting in every thread pass on to each other, per thread."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}


# ---------------------------------------------------------------- one call at a time


class _Turns:
    """A reentrant lock; waiting for a block that holds it has a time limit."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.holder: object = None
        self.thread: threading.Thread | None = None
        self.tickets: list[object] = []
        self.blocks: list[str] = []

    def take(self, ticket: object, block: str | None) -> None:
        me, since = caller(), time.monotonic()
        with self.changed:
            while self.tickets and self.holder is not me:
                if self.thread is not None and not self.thread.is_alive():
                    self.tickets, self.blocks = [], []  # it can never return them
                    break
                if not self.blocks:
                    since = time.monotonic()  # a call ends without help
                elif time.monotonic() - since > PATIENCE:
                    raise self._refusal()
                self.changed.wait(min(_WAKE, PATIENCE))
            self.holder, self.thread = me, threading.current_thread()
            self.tickets.append(ticket)
            if block is not None:
                self.blocks.append(block)

    def give(self, ticket: object, block: str | None) -> None:
        with self.changed:
            if ticket not in self.tickets:
                return
            self.tickets.remove(ticket)
            if block is not None:
                self.blocks.remove(block)
            if not self.tickets:
                self.holder = self.thread = None
                self.changed.notify_all()

    def _refusal(self) -> ModelStateError:
        where = f"thread {self.thread.name!r}" if self.thread is not None else "another thread"
        return ModelStateError(
            f"The model has been in use in {where}, inside `with {self.blocks[0]}:`, for "
            f"{PATIENCE:.0f} seconds. Leave that block first. If it waits for this thread, do the "
            "work in one of the two: calls on one model take turns."
        )


_turns: WeakKeyDictionary[Any, _Turns] = WeakKeyDictionary()
_turns_lock = threading.Lock()


def _turns_of(model: Any) -> _Turns | None:
    """The lock of the wrapped model, which several bridges may share; None without a bridge."""
    wrapped = getattr(model, "original_model", None)
    if not isinstance(wrapped, nn.Module):
        return None
    with _turns_lock:
        return _turns.setdefault(wrapped, _Turns())


@contextmanager
def turn(model: Any, block: str | None = None) -> Iterator[None]:
    """Keep this package's calls in other threads off the model for the block.

    Args:
        model: A ``TransformerBridge``; any other object has no effect.
        block: Name of the block in messages, if a user's code runs inside it.

    Raises:
        ModelStateError: Another thread does not leave such a block.
    """
    turns, ticket = _turns_of(model), object()
    if turns is None:
        yield
        return
    try:
        turns.take(ticket, block)
        yield
    finally:
        turns.give(ticket, block)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """A function of a model (its first argument, or ``model=``) that waits for its turn."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        model = args[0] if args else kwargs.get("model")
        with turn(model), shared_views(model):
            return function(*args, **kwargs)

    return waiting


@contextmanager
def model_lock(model: Any) -> Iterator[None]:
    """Keep this package's calls in other threads off ``model`` for the block.

    ``attribute`` and the other functions of this package take turns automatically, and
    ``model(tokens)`` in another thread is always safe. Other parts of TransformerLens are not: its
    hooks (``run_with_cache``, ``run_with_hooks``, ``model.hooks``), ``generate`` and
    ``start_at_layer`` store state on the model that affects the forwards of every thread, including
    those of this package. If you use threads, run those inside the block, so that other threads'
    calls wait. The same thread may enter the block again, and may call this package inside.

    Args:
        model: A ``TransformerBridge``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ModelStateError: Another thread stays inside such a block, or inside ``lrp`` or
            ``in_float32``, for more than a minute.

    Example:
        >>> with clrp.model_lock(model):
        ...     logits, cache = model.run_with_cache(model.to_tokens(case.prompt))
        >>> logits.ndim
        3
    """
    if _turns_of(model) is None:
        raise TypeError(
            f"model must be a TransformerBridge, got {type(model).__name__}; make one with "
            "TransformerBridge.boot_transformers(name_or_directory)."
        )
    with turn(model, "clrp.model_lock(model)"):
        yield


# ---------------------------------------------------------------- walks of the model


def once_per_call(function: Callable[[Any], R]) -> Callable[[Any], R]:
    """A function of a model that is computed once while a public function runs on that model.

    The next public call computes it again, since a user may change modules in between. Outside of
    public calls it is computed each time. Its result is shared, so callers must not change it.
    """

    @wraps(function)
    def shared(model: Any) -> R:
        results = _threads.caller.views.get(id(model))
        if results is None:
            return function(model)
        if function not in results:
            results[function] = function(model)
        value: R = results[function]
        return value

    return shared


@contextmanager
def shared_views(model: Any) -> Iterator[None]:
    """Compute functions under ``once_per_call`` once for this model and thread in the block."""
    views = _threads.caller.views
    if id(model) in views:
        yield
        return
    views[id(model)] = {}
    try:
        yield
    finally:
        del views[id(model)]


def all_modules(model: Any) -> tuple[nn.Module, ...]:
    """Every module of the bridge and of the wrapped model, once."""
    modules: dict[int, nn.Module] = {}
    stack = [m for m in (getattr(model, "original_model", None), model) if isinstance(m, nn.Module)]
    while stack:
        module = stack.pop()
        if id(module) not in modules:
            modules[id(module)] = module
            if module._modules:
                stack += [m for m in reversed(module._modules.values()) if m is not None]
    return tuple(modules.values())


@once_per_call
def modules_of(model: Any) -> tuple[nn.Module, ...]:
    """``all_modules``, computed once per public call."""
    return all_modules(model)


@once_per_call
def wrapped_modules(model: Any) -> Mapping[nn.Module, str]:
    """Every module of the wrapped model with its path there, computed once per public call."""
    return paths_under(model.original_model)


def paths_under(root: nn.Module) -> Mapping[nn.Module, str]:
    """The modules and paths of ``root.named_modules()``, in the same order.

    It is a loop, since nested generators take twice as long, and returns one mapping instead of
    thousands of pairs, which Python's garbage collector would look through.
    """
    found: dict[nn.Module, str] = {}
    stack: list[tuple[str, nn.Module]] = [("", root)]
    while stack:
        path, module = stack.pop()
        if module in found:
            continue
        found[module] = path
        if module._modules:
            above = f"{path}." if path else ""
            below = reversed(module._modules.items())
            stack += [(above + name, child) for name, child in below if child is not None]
    return found


def wrapped_parameters(model: Any) -> list[nn.Parameter]:
    """The wrapped model's parameters as they are now; one that is shared may come twice.

    The walk over modules is shared within a public call, but the parameters are not, because
    accelerate replaces them while a module runs.
    """
    own = [m._parameters for m in wrapped_modules(model) if m._parameters]
    return [p for parameters in own for p in parameters.values() if p is not None]


# ---------------------------------------------------------------- effects on all threads


def _watched(model: Any) -> list[Any]:
    """The blocks and the wrapped model, all of which every forward runs."""
    return [*getattr(model, "blocks", ()), model.original_model]


@contextmanager
def refused_elsewhere(model: Any, why: str) -> Iterator[None]:
    """Make forwards in other threads raise ``ModelStateError`` with this message."""

    def refuse(*_: Any) -> None:
        raise ModelStateError(why)

    refuse = elsewhere(refuse)
    with ExitStack() as stack:
        for module in _watched(model):
            stack.callback(module.register_forward_pre_hook(refuse).remove)
        stack.callback(model.original_model.register_forward_hook(refuse).remove)
        yield


_INCOMPLETE = (
    "Another thread explained this model (clrp.attribute or the like) during this forward and held "
    "its weights fixed meanwhile, so gradients through it would be incomplete. Run forward and "
    "backward inside `with clrp.model_lock(model):`, or the forward under torch.no_grad() if no "
    "gradients are needed."
)


class _Incomplete(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ARG004
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # noqa: ARG004
        raise ModelStateError(_INCOMPLETE)


def _without_gradient(x: Any) -> Any:
    """The same values; a gradient through them raises."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not torch.is_grad_enabled():
        return x
    out: Tensor = _Incomplete.apply(x if x.requires_grad else x.detach().requires_grad_(True))
    return out


def _before(module: Any, args: Any, kwargs: Any = None) -> Any:  # noqa: ARG001
    if args:
        args = (_without_gradient(args[0]), *args[1:])
    elif kwargs and "hidden_states" in kwargs:
        kwargs = {**kwargs, "hidden_states": _without_gradient(kwargs["hidden_states"])}
    return args if kwargs is None else (args, kwargs)


def _after(module: Any, args: Any, output: Any) -> None:  # noqa: ARG001
    logits = getattr(output, "logits", None)
    if logits is not None:
        output.logits = _without_gradient(logits)


@contextmanager
def frozen_parameters(model: Any) -> Iterator[None]:
    """Let no parameter require a gradient inside the block, which saves memory.

    This affects all threads. In another thread, a gradient through a forward that ran meanwhile
    raises ``ModelStateError``; the values of that forward are correct.
    """
    parameters = {
        id(p): p
        for module in modules_of(model)
        if module._parameters
        for p in module._parameters.values()
        if p is not None and p.requires_grad
    }
    if not parameters:
        yield
        return
    *blocks, whole = _watched(model)
    before, after = elsewhere(_before), elsewhere(_after)
    with ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(whole.register_forward_hook(after).remove)
        try:
            for p in parameters.values():
                p.requires_grad_(False)
            yield
        finally:
            for p in parameters.values():
                p.requires_grad_(True)
