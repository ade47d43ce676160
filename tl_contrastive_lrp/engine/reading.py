"""Readings of the backward pass: where gradients are read, how, and what they are reduced to.

A ``Reading`` names a HookPoint and a sink, which receives (activation, gradient) while the backward
runs. ``RelevanceSums`` are readings that reduce relevance, activation × gradient, to sums given by
einops patterns, so that nothing of the size of all activations outlives its layer. Every sum has
the batch as its first axis, and only ``take`` and ``take_rows`` separate the rows. ``Slots`` let
one forward serve several results, whose sinks are bound before each backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from ..hooks.attach import Attachment, HookFn
from ..inputs.bridge import hook_points, is_kind
from ..rules.deferred import DeferredAttention
from ..rules.functions import RuleNode, at_least_float32, handed_on, is_writable
from ..rules.precision import NOTABLE, plain, underflow
from ..rules.threads import acting_for, caller, mine

Sink = Callable[..., None]


@dataclass(frozen=True, eq=False)
class Reading:
    """A gradient to read at one HookPoint.

    Attributes:
        name: A key of ``model.hook_dict``.
        sink: Receives (activation, gradient), both detached, in the HookPoint's public shape.
        how: "branch" reads the gradient that flows through the HookPoint itself; "tensor" reads the
            gradient of the tensor that arrives there, through all of its consumers (as for the
            residual stream at ``hook_resid_mid``). Where returning a value would count as an edit,
            only "tensor" is possible. "rows", at a ``hook_pattern``, reads the rows of an attention
            whose scores and pattern are not computed; its sink receives ``query_tiles.Rows``.
        fired: Called in the forward with the activation, if it can have a gradient at all. The sink
            is not called where the rules let no gradient through; relevance is then 0.
        eager: Of a reading of rows, the readings that replace it where scores and pattern are
            computed.
    """

    name: str
    sink: Sink
    how: Literal["branch", "tensor", "rows"] = "branch"
    fired: Callable[[Tensor], None] | None = None
    eager: tuple[Reading, ...] = ()


def relevance_of(x: Tensor, g: Tensor) -> Tensor:
    """Activation × gradient, elementwise, in float32 at least."""
    return at_least_float32(x) * at_least_float32(g)


# Relevance of one prompt at a HookPoint, and what is kept of it. Axes left out are summed over.
BY_POSITION = "pos d_model -> pos"
BY_DIMENSION = "pos d_model -> pos d_model"
BY_NEURON = "pos d_mlp -> pos d_mlp"
BY_HEAD = "pos head d_head -> head pos"
_BY_HEAD_OF_PRODUCT = "head pos d_head -> head pos"  # z as pattern · v gives it, before hook_z


def _by_row(pattern: str) -> str:
    """The einops pattern that does to each row of a batch what ``pattern`` does to one prompt."""
    before, _, after = pattern.partition("->")
    return f"batch {before.strip()} -> batch {after.strip()}"


class RelevanceSums:
    """Readings that keep sums of relevance by name, for one backward at a time.

    Attributes:
        readings: What to read, for the engine.
        axes: By name, the einops pattern of what is kept of one prompt: its right side names the
            axes. A sum without axes has none.
    """

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.axes: dict[str, str] = {}
        self._kept: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}  # of the activations, in the last forward
        self._lost: dict[str, Tensor] = {}
        self._mass: dict[str, Tensor] = {}

    def add(self, name: str, pattern: str, *, stream: bool = False) -> None:
        """Keep sums of the relevance at a HookPoint.

        Args:
            name: The HookPoint.
            pattern: An einops pattern from the relevance of one prompt, [pos, ...], to what is
                kept.
            stream: Read the whole residual stream there, not only the branch through the HookPoint.
        """
        by_row = _by_row(pattern)
        # The functions refer to these, not to ``self``: no cycle keeps the sums in memory.
        kept, shapes, lost, mass = self._kept, self._shapes, self._lost, self._mass

        def sink(x: Tensor, g: Tensor) -> None:
            relevance = relevance_of(x, g)
            total = reduce(relevance, by_row, "sum")
            # To move it from a GPU means to wait for it, so that what is small is moved at the end.
            kept[name] = total.cpu() if total.numel() == x.numel() else total
            if x.dtype == torch.float16:
                of_row = relevance.abs().flatten(1).sum(1).cpu()
                lost[name] = lost.get(name, torch.zeros(())) + underflow(x, g)
                mass[name] = mass.get(name, torch.zeros(())) + of_row

        def fired(x: Tensor) -> None:
            shapes[name] = x.shape

        self.axes[name] = pattern
        self.readings.append(Reading(name, sink, "tensor" if stream else "branch", fired))

    def add_heads(self, model: Any, layer: int) -> str:
        """Keep a block's relevance by head, [head, pos].

        Heads are read at ``hook_z``, or at the product of pattern and values where TransformerLens
        has no ``hook_z`` or splits it into heads other than those of attention (MLA).

        Returns:
            The name the sums are kept under.
        """
        path = f"blocks.{layer}.attn"
        other_heads = is_kind(model.blocks[layer].attn, "MLAAttentionBridge")
        if other_heads or f"{path}.hook_z" not in hook_points(model):
            self.add(f"{path}.z", _BY_HEAD_OF_PRODUCT)
            return f"{path}.z"
        self.add(f"{path}.hook_z", BY_HEAD)
        return f"{path}.hook_z"

    def add_bias(self, name: str, bias: Tensor) -> None:
        """Keep the relevance of a bias: the sum of bias ⊙ gradient where it is added."""
        kept = self._kept

        def sink(x: Tensor, g: Tensor) -> None:  # noqa: ARG001
            rows = len(g) if g.ndim > 2 else 1  # experts get the tokens of all rows as one list
            wide = g.to(torch.promote_types(g.dtype, torch.float32))
            total = wide.reshape(rows, -1, bias.numel()).sum(1)
            kept[name] = (total * bias.detach().to(total)).sum(1)

        self.readings.append(Reading(name, sink))

    def by_position(self, name: str) -> Float[Tensor, " pos"]:
        """One prompt's relevance kept under ``name`` so far in this backward, by position."""
        (kept,) = self._kept[name] if name in self._kept else self._zero(name)
        at = pos_axis(self.axes, name)
        by_position: Tensor = kept.movedim(at, 0).reshape(kept.shape[at], -1).sum(1)
        return by_position

    def _zero(self, name: str) -> Float[Tensor, "batch ..."]:
        """The sums at a HookPoint which no gradient has reached."""
        zero = torch.zeros((), dtype=torch.float32).expand(self._shapes[name])
        zeros: Tensor = reduce(zero, _by_row(self.axes[name]), "sum")
        return zeros

    def take(self) -> dict[str, Tensor]:
        """The sums of one prompt's last backward, by name; 0 where the rules pass no relevance."""
        return {name: one for name, (one,) in self._taken().items()}

    def take_rows(self, lengths: Sequence[int]) -> list[dict[str, Tensor]] | None:
        """The sums of each row of a batch whose prompts are padded on the right, as ``take``.

        Args:
            lengths: The number of tokens of each row, without its padding.

        Returns:
            One dictionary per row, its sums cut to the row's positions; None if they are not the
            rows' own: the model has an activation without an axis for the batch, or padding has
            relevance.
        """
        pos = torch.arange(max(lengths))
        is_padding = pos >= torch.tensor(lengths)[:, None]
        rows = [dict[str, Tensor]() for _ in lengths]
        for name, kept in self._taken().items():
            at = 1 + pos_axis(self.axes, name) if name in self.axes else None
            if len(kept) != len(lengths) or (at is not None and kept.shape[at] != len(pos)):
                return None
            if at is not None and bool(kept.movedim(at, 1)[is_padding].any()):
                return None
            for row, one, length in zip(rows, kept.unbind(), lengths, strict=True):
                row[name] = one if at is None else one.narrow(at - 1, 0, length).clone()
        return rows

    def _taken(self) -> dict[str, Float[Tensor, "batch ..."]]:
        sums = {name: kept.cpu() for name, kept in self._kept.items()}
        sums |= {name: self._zero(name) for name in self._shapes if name not in sums}
        self._kept.clear()
        return sums

    def clear(self) -> None:
        """Discard the last forward and backward."""
        self._kept.clear()
        self._shapes.clear()

    def reset(self) -> None:
        """Discard everything, also what ``warn_of_underflow`` would say."""
        self.clear()
        self._lost.clear()
        self._mass.clear()

    def warn_of_underflow(self) -> None:
        """Warn where float16 activations are so small that relevance may have been lost.

        The gradient is float32, so only the activation can have underflowed. The relevance that
        this may have lost at a HookPoint is compared with that at the HookPoint that holds most,
        for each prompt by itself.
        """
        if not self._lost:
            return
        names = list(self._lost)
        losses = torch.stack([self._lost[name] for name in names], dim=1)
        masses = torch.stack([self._mass[name] for name in names], dim=1).amax(1)
        self._lost.clear()
        self._mass.clear()
        for of_prompt, mass in zip(losses, masses.tolist(), strict=True):
            lost, worst = float(of_prompt.max()), names[int(of_prompt.argmax())]
            if lost > NOTABLE * mass:
                share = f"up to {lost / mass:.0%} of the relevance" if mass else "all relevance"
                warnings.warn(
                    f"Activations at {worst} are too small for float16: {share} may have been lost "
                    "to underflow there. Load the model in bfloat16 or float32, or explain it "
                    "inside `with clrp.in_float32(model):`.",
                    stacklevel=5,
                )


def pos_axis(axes: Mapping[str, str], name: str) -> int:
    """Which axis of the sums kept under ``name`` counts positions."""
    return axes[name].rpartition("->")[2].split().index("pos")


def _each(readings: Iterable[Reading]) -> Iterator[Reading]:
    """The readings, and those that may replace a reading of rows."""
    for reading in readings:
        yield reading
        yield from reading.eager


class Slots:
    """HookPoints at which a forward is prepared to be read; sinks are bound before each backward.

    One forward can then serve several results, each of which binds the readings it needs.

    Args:
        readings: What may be read; only ``name`` and ``how`` are used.
        uses: Number of results to come; the autograd graph is kept until the last.

    Attributes:
        readings: Readings to put into the forward, one per place.
        uses: Number of results still to come.
    """

    def __init__(self, readings: Iterable[Reading], uses: int) -> None:
        self.uses = uses
        self._bound: dict[tuple[str, str], list[Reading]] = {}
        self._seen: dict[tuple[str, str], Tensor] = {}
        self.readings = [
            self._slot(reading)
            for reading in {(reading.name, reading.how): reading for reading in readings}.values()
        ]
        self._places = {(reading.name, reading.how) for reading in _each(self.readings)}

    def _slot(self, reading: Reading) -> Reading:
        place = (reading.name, reading.how)

        def sink(*values: Any) -> None:
            for bound in self._bound.get(place, ()):
                bound.sink(*values)

        def fired(x: Tensor) -> None:
            self._seen[place] = x

        eager = tuple(map(self._slot, reading.eager))
        return Reading(reading.name, sink, reading.how, fired, eager)

    def require_left(self) -> None:
        """Refuse a result beyond those that were planned.

        Raises:
            ValueError: no planned result is left.
        """
        if self.uses < 1:
            raise ValueError("The graph of this forward is used up; run another forward.")

    def pass_over(self) -> None:
        """Count one result as done."""
        self.uses -= 1
        if not self.uses:
            self._seen.clear()  # so that the last backward releases activations as it goes

    @contextmanager
    def bound(self, readings: Iterable[Reading]) -> Iterator[None]:
        """Bind the sinks of one result for the backwards inside the ``with`` block.

        Args:
            readings: What the result reads. Each ``fired`` is called first, with the activation of
                the forward.

        Raises:
            ValueError: the forward was not prepared for one of them, or is used up.
        """
        self.require_left()
        readings = list(_each(readings))
        for reading in readings:
            if (reading.name, reading.how) not in self._places:
                raise ValueError(
                    f"The forward was not prepared for reading {reading.name}; run another one."
                )
        for reading in readings:
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
    def hook_fn(tensor: Any, hook: Any) -> Tensor | None:  # noqa: ARG001
        if isinstance(tensor, DeferredAttention):
            tensor.leave_to_rows()
            return None
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
    """The hooks that read: those to add before the hooks of the rules, and those to add after.

    Readings of values that only a rule's hook can reach are handed to that hook
    (``Attachment.live``).
    """
    attachments, hook_dict = tuple(attachments), hook_points(model)
    readings = [
        reading
        for given in readings
        for reading in (given.eager if given.how == "rows" else (given,))
    ]
    captures = {name for a in attachments if a.scoped is None for name in a.captures}
    captured_points = {id(hook_dict[name]) for name in captures}
    before: list[tuple[str, HookFn]] = []
    after: list[tuple[str, HookFn]] = []
    live = {name: fns for a in attachments for name, fns in a.live.items()}
    for reading in sorted(readings, key=lambda r: r.how != "tensor"):
        if reading.name in live:
            live[reading.name].append(_read_hook(reading))
            continue
        first = id(hook_dict[reading.name]) in captured_points
        pair = (reading.name, _read_hook(reading))
        (before if first else after).append(pair)
    return before, after


@dataclass(eq=False)
class BlockCall:
    """The arguments that a block was called with in the forward, for calling it again.

    Attributes:
        args, kwargs: Positional and keyword arguments, detached, without a cache.
        copied: Whether they are copies, since a user's hook may write into the originals.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    copied: bool = False

    @contextmanager
    def recorded(self, block: Any) -> Iterator[None]:
        """Record the arguments of ``block`` while the model runs inside the ``with`` block."""

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
        """The arguments for another call; copies, if a user's hook may write into them."""
        if not self.copied:
            return self.args, self.kwargs
        return tuple(map(_copied, self.args)), {k: _copied(v) for k, v in self.kwargs.items()}


def _reusable(value: Any) -> Any:
    """An argument without its autograd graph; None for a cache that holds this prompt's keys."""
    if hasattr(value, "get_seq_length"):
        return None
    return value.detach() if isinstance(value, Tensor) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
