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

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ..hooks.attach import Attachment, HookFn
from ..inputs.bridge import hook_points
from ..rules.functions import RuleNode, at_least_float32, handed_on, is_writable
from ..rules.precision import plain
from ..rules.threads import acting_for, caller, mine

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


class Slots:
    """Readings that a forward is prepared for, and whose sinks are named before each backward.

    So one forward serves several results: each binds what it reads to the places it needs.

    Args:
        readings: What may be read; only name and way are used.
        uses: How many results will be read; the graph is kept until the last.

    Attributes:
        readings: To arrange in the forward, one for each place.
        uses: How many results are still to be read.
    """

    def __init__(self, readings: Iterable[Reading], uses: int) -> None:
        self.uses = uses
        self._bound: dict[tuple[str, str], list[Reading]] = {}
        self._seen: dict[tuple[str, str], Tensor] = {}
        self.readings = [
            self._slot(reading)
            for reading in {(reading.name, reading.how): reading for reading in readings}.values()
        ]
        self._places = {(reading.name, reading.how) for reading in self.readings}

    def _slot(self, reading: Reading) -> Reading:
        place = (reading.name, reading.how)

        def sink(x: Tensor, g: Tensor) -> None:
            for bound in self._bound.get(place, ()):
                bound.sink(x, g)

        def fired(x: Tensor) -> None:
            self._seen[place] = x

        return Reading(reading.name, sink, reading.how, fired)

    def require_left(self) -> None:
        """Refuse another result than those that were planned.

        Raises:
            ValueError: none is left.
        """
        if self.uses < 1:
            raise ValueError("The graph of this forward was used up; run another one.")

    def pass_over(self) -> None:
        """One result less to come."""
        self.uses -= 1
        if not self.uses:
            self._seen.clear()  # so that the last backward lets go of activations as it goes

    @contextmanager
    def bound(self, readings: Iterable[Reading]) -> Iterator[None]:
        """Have these sinks called by the backwards inside the block, which belong to one result.

        Args:
            readings: Their ``fired`` is called first, with what the forward had.

        Raises:
            ValueError: the forward was not prepared for one of them, or is used up.
        """
        self.require_left()
        wanted = list(readings)
        for reading in wanted:
            if (reading.name, reading.how) not in self._places:
                raise ValueError(
                    f"The forward was not prepared for reading {reading.name}; run another one."
                )
        for reading in wanted:
            place = (reading.name, reading.how)
            self._bound.setdefault(place, []).append(reading)
            if reading.fired is not None and place in self._seen:
                reading.fired(self._seen[place])
        self.pass_over()
        try:
            yield
        finally:
            self._bound.clear()


class _Tap(torch.autograd.Function):
    audit = RuleNode((0,))

    @staticmethod
    def forward(ctx: Any, x: Tensor, sink: Sink) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink, ctx.caller = sink, caller()
        return handed_on(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        acting_for(ctx.caller, ctx.sink, x.detach(), g.detach())
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
        me = caller()
        tensor.register_hook(lambda g: acting_for(me, reading.sink, value, plain(g.detach())))
        return None

    return hook_fn


def arranged(
    model: Any, attachments: Iterable[Attachment], readings: Iterable[Reading]
) -> tuple[list[tuple[str, HookFn]], list[tuple[str, HookFn]]]:
    """Hooks that do the readings: those to add before the rules', and those to add after.

    Readings at values that only a rule can reach are handed to it (``Attachment.live``).
    """
    attachments, hook_dict = tuple(attachments), hook_points(model)
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


@dataclass(eq=False)
class BlockCall:
    """The arguments a block was called with in the forward, to call it again."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    copied: bool = False

    @contextmanager
    def recorded(self, block: Any) -> Iterator[None]:
        """Record the block's arguments while the model runs inside."""

        def pre_hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG001
            self.args = tuple(map(_reusable, args))
            self.kwargs = {name: _reusable(value) for name, value in kwargs.items()}
            self.copied = is_writable()
            if self.copied:
                self.args, self.kwargs = self.again()

        handle = block.register_forward_pre_hook(mine(pre_hook), with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def again(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for a call in which a user's hook may write into them."""
        if not self.copied:
            return self.args, self.kwargs
        return tuple(map(_copied, self.args)), {k: _copied(v) for k, v in self.kwargs.items()}


def _reusable(value: Any) -> Any:
    """An argument fit for a second call: no graph, and no cache that holds this prompt's keys."""
    if hasattr(value, "get_seq_length"):
        return None
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
