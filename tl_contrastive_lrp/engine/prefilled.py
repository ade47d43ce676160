"""One forward of a prompt that serves several results: candidates, relevance, a graph.

The likeliest tokens are known before the objective is, and several results of one prompt need the
same forward. ``prefill_prompt`` runs it once, under the rules, plainly or in tiles; ``attribute``
and ``attribution_graph`` take it as ``prefilled=`` and run their own backward from it. What they
read has to be named before the forward (``attribute.relevance_readings``,
``assembly.plain.graph_readings``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NotTileableError, TokenError
from ..hooks.user_hooks import user_hooks
from ..rules.rule_sets import RuleSet, get_rule_set
from ..rules.threads import one_at_a_time
from .memory import MemoryPlan, cannot, require_plain_fits
from .plain import Forward, forward
from .reading import Reading, Slots
from .tiled.run import TiledForward, forward_in_tiles

if TYPE_CHECKING:
    from .reading import BlockCall


@dataclass(eq=False)
class Prefilled:
    """A forward of one prompt under one rule set, and what the backwards need of it.

    Attributes:
        model: The bridge.
        tokens: The prompt, [1, pos].
        rule_set: The rules that were on.
        pos: The position whose logits may be explained, from 0.
        logits: After that position, [vocab], detached.
        choice: How it was run in the end, with the figures of before.
        why_plain: Why it is plain although tiles were chosen, or "".
        plain, tiled: The one or the other.
        calls: What each block was called with, for edges.
        state: See ``state_of``; as the model was then.
    """

    model: Any
    tokens: Tensor
    rule_set: RuleSet
    pos: int
    logits: Float[Tensor, " vocab"]
    choice: MemoryPlan
    why_plain: str
    plain: Forward | None
    tiled: TiledForward | None
    calls: dict[int, BlockCall]
    state: object = field(repr=False)

    def check(self, model: Any, tokens: Tensor, rules: str | RuleSet) -> None:
        """Refuse to explain something else with it.

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
    choice: MemoryPlan,
    *,
    may_fall_back: bool,
    pos: int = -1,
    calls: dict[int, BlockCall] | None = None,
    uses: int = 1,
    progress: bool = False,
) -> Prefilled:
    """Run the forward of a prompt once, for ``uses`` results.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Token ids [1, pos].
        rules: Name of a rule set, or a ``RuleSet``.
        readings: What the results will read; sinks are named by the results themselves.
        choice: Plain, or tiles of so many positions; from ``memory.choose``.
        may_fall_back: Run plainly where tiles do not work and it fits.
        pos: The position whose logits will be explained, negative from the end.
        calls: Blocks whose calls are recorded, by number, for a graph's edges.
        uses: How many results will be made. The graph is kept until the last.
        progress: Show a bar where tiles are used.

    Raises:
        TokenError: the position does not exist.
        ModelStateError, UncoveredComponentError: as ``attribute``.
    """
    length, readings, calls = int(tokens.shape[1]), list(readings), calls or {}
    if not -length <= pos < length:
        raise TokenError(f"Position {pos} does not exist in a prompt of {length} tokens.")
    at, rule_set, why, state = pos % length, get_rule_set(rules), "", state_of(model)
    if choice.tile is not None:

        try:
            tiled = forward_in_tiles(
                model, tokens, ((at, at + 1),), rule_set, readings, choice.tile,
                uses=uses, progress=progress,
            )  # fmt: skip
        except NotTileableError as error:
            if not may_fall_back:
                raise NotTileableError(cannot(choice, error)) from error
            choice, why = require_plain_fits(choice, str(error)), str(error)
        else:
            assert tiled.prefill is not None
            logits = tiled.prefill.logits()[0, 0].detach()
            done = replace(choice, tile=tiled.tile)
            return Prefilled(
                model, tokens, rule_set, at, logits, done, why, None, tiled, calls, state
            )
    slots = Slots(readings, uses)
    scopes = [call.recorded(model.blocks[block]) for block, call in calls.items()]
    plain = forward(model, tokens, rule_set, slots.readings, scopes)
    plain.slots = slots
    logits = plain.logits[0, at].detach().clone()
    return Prefilled(model, tokens, rule_set, at, logits, choice, why, plain, None, calls, state)
