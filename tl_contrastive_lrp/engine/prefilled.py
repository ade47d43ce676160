"""A forward that has already been run, for several results of one prompt.

``prefill_prompt`` runs the forward once. ``attribute`` and ``attribution_graph`` take it as
``prefilled=`` and run their own backward from it. What they will read has to be known before the
forward (``attribution.attribute.relevance_readings``, ``graph.assembly.plain.graph_readings``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TokenError
from ..hooks.user_hooks import user_hooks
from ..rules.rule_sets import RuleSet, get_rule_set
from ..rules.threads import one_at_a_time
from .fused import AttentionKind, is_worth
from .memory import MemoryPlan, run_as_planned
from .plain import Forward
from .plain import forward as plain_forward
from .reading import Reading, Slots
from .tiled.run import TiledForward, forward_in_tiles
from .tiled.tiles import runs

if TYPE_CHECKING:
    from .reading import BlockCall


@dataclass(eq=False)
class Prefilled:
    """A forward of one prompt under one rule set, and what backwards from it need.

    Attributes:
        model: The bridge.
        tokens: The prompt, [1, pos].
        rule_set: The rules that were on.
        pos: The position whose logits may be explained, from 0; the last one if those of all
            positions may.
        logits: After that position, [vocab], detached.
        plan: How it was actually run, with the memory figures from before the run.
        plain, tiled: The forward of the engine that ran it; the other is None.
        calls: The arguments of each block, for edges.
        state: The state of the model at that time, see ``state_of``.
        fusing: Whether attention is fused where it can be, in this forward and, in tiles, in the
            second run of the blocks.
    """

    model: Any
    tokens: Tensor
    rule_set: RuleSet
    pos: int
    logits: Float[Tensor, " vocab"]
    plan: MemoryPlan
    plain: Forward | None
    tiled: TiledForward | None
    calls: dict[int, BlockCall]
    state: object = field(repr=False)
    fusing: bool = False

    def logits_around(self, positions: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The logits of some positions and perhaps others, with their graph, and whose they are.

        Args:
            positions: Rising positions whose logits this forward has.
        """
        if self.plain is not None:
            everywhere = tuple(range(int(self.tokens.shape[1])))
            return self.plain.logits, self.plain.read or everywhere
        assert self.tiled is not None
        assert self.tiled.prefill is not None
        return self.tiled.prefill.logits_around(positions)

    def check_attention(self, attention: AttentionKind) -> None:
        """Refuse a kind of attention that this forward does not have; "auto" takes what it has.

        Raises:
            ValueError: "fused" for an eager forward, or "eager" for a fused one.
        """
        length = int(self.tokens.shape[1])
        if attention != "auto" and is_worth(attention, length) != self.fusing:
            ran = "fused" if self.fusing else "eager"
            raise ValueError(
                f"prefilled= is a forward with {ran} attention, and attention={attention!r} was "
                "given; leave attention= out, or run prefill_prompt again with it."
            )

    def check(self, model: Any, tokens: Tensor, rules: str | RuleSet) -> None:
        """Refuse another model, prompt or rule set than the forward was run for.

        Raises:
            ValueError: another model, prompt or rule set, or the model has changed since.
        """
        same = (
            ("model", model is self.model),
            ("prompt", torch.equal(tokens, self.tokens)),
            ("rules", get_rule_set(rules) == self.rule_set),
            (
                "state of the model (its weights or your hooks have changed since)",
                state_of(model) == self.state,
            ),
        )
        other = next((what for what, equal in same if not equal), None)
        if other is not None:
            raise ValueError(
                f"prefilled= is a forward of another {other}; leave it out, or run "
                "prefill_prompt again."
            )


def state_of(model: Any) -> object:
    """What a forward depends on, as far as it can change on a living model: weights and hooks."""
    weights = (p for p in model.original_model.parameters() if not p.is_meta)  # those come and go
    return (
        tuple((id(p), p.dtype, None if p.is_inference() else p._version) for p in weights),
        tuple((id(hook.module), hook.kind, hook.key, hook.fn) for hook in user_hooks(model)),
    )


@one_at_a_time
def prefill_prompt(
    model: Any,
    tokens: Tensor,
    rules: str | RuleSet,
    readings: Iterable[Reading],
    plan: MemoryPlan,
    *,
    pos: int | None = -1,
    read: tuple[int, ...] | None = None,
    calls: dict[int, BlockCall] | None = None,
    uses: int = 1,
    progress: bool = False,
    attention: AttentionKind = "auto",
) -> Prefilled:
    """Run the forward of a prompt once, for ``uses`` results.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids, [1, pos].
        rules: Name of a rule set, or a ``RuleSet``.
        readings: What the results will read. Their sinks are bound by the results themselves.
        plan: Which engine to use, from ``memory.plan_memory``.
        pos: The position whose logits will be explained; negative counts from the end. None for
            objectives of several positions.
        read: With ``pos=None``, the positions whose logits may be explained, rising; None for all.
        calls: By number, the blocks whose arguments are recorded, for the edges of a graph.
        uses: Number of results to come. The autograd graph is kept until the last.
        progress: Show a progress bar in tiles.
        attention: "auto", "fused" or "eager", as for ``attribute``. A block whose scores or pattern
            one of the readings needs stays eager.

    Raises:
        ValueError: an unknown kind of attention.
        TokenError: the prompt has no such position.
        ModelStateError, UncoveredComponentError: as ``attribute``.
    """
    length, readings, calls = int(tokens.shape[1]), list(readings), calls or {}
    last = pos if pos is not None else -1 if read is None else read[-1]
    if not -length <= last < length:
        raise TokenError(f"Position {last} does not exist in a prompt of {length} tokens.")
    at, rule_set, state = last % length, get_rule_set(rules), state_of(model)
    if pos is not None:
        read, ranges = None, runs((at,))
    else:
        ranges = ((0, length),) if read is None else runs(read)
    fusing = is_worth(attention, length)

    def in_tiles(plan: MemoryPlan) -> Prefilled:
        assert plan.tile is not None
        forward = forward_in_tiles(
            model, tokens, ranges, rule_set, readings, plan.tile,
            uses=uses, progress=progress, attention=attention,
        )  # fmt: skip
        assert forward.prefill is not None
        logits = forward.prefill.parts[-1][0, -1].detach()
        actual_plan = replace(plan, tile=forward.tile)
        return Prefilled(
            model, tokens, rule_set, at, logits, actual_plan, None, forward, calls, state, fusing
        )

    def without_tiles(plan: MemoryPlan) -> Prefilled:
        slots = Slots(readings, uses)
        scopes = [partial(call.recorded, model.blocks[block]) for block, call in calls.items()]
        forward = plain_forward(
            model, tokens, rule_set, slots.readings, scopes, attention=attention, read=read
        )
        forward.slots = slots
        row = at if forward.read is None else forward.read.index(at)
        logits = forward.logits[0, row].detach().clone()
        return Prefilled(
            model, tokens, rule_set, at, logits, plan, forward, None, calls, state, fusing
        )

    return run_as_planned(plan, in_tiles, without_tiles)
