"""Fused attention for the scope of a forward, wherever nobody needs the scores or the pattern.

In each block whose attention TransformerLens writes out, the product of queries and keys is
deferred (``rules/deferred.py``), so that z is computed without them. A block keeps its eager
attention if a hook of the user's or a reading is at its scores or its pattern, or if its component
computes attention without HookPoints.

What is planned (``fused_blocks``) is what memory is planned by; what was fused is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import UncoveredComponentError
from ..hooks.attach import Attachment
from ..hooks.families import COMPUTED_SCORES
from ..hooks.placement import place
from ..hooks.user_hooks import UserHook, user_hooks
from ..inputs.bridge import components, hook_points
from ..rules.deferred import DeferredAttention, DeferringMode
from ..rules.query_tiles import Attend, Attention
from ..rules.query_tiles import attend as plain_attend
from ..rules.rule_sets import DEFAULT_RULES
from ..rules.threads import active_in, mine
from ..rules.visible import MaskMemory
from .masks import lazy_masks
from .reading import Reading

AttentionKind = Literal["auto", "fused", "eager"]

# The cost of fusing one block, as numbers of logits times the model's width: what is left out where
# only a few logits are read. Measured at 128 tokens of a model of 135M parameters and of one of 8M.
_WORTH_LOGITS = 1 << 23

_NEEDED = ("hook_attn_scores", "hook_pattern")
# Below so many tokens eager attention is a small share of a forward, and as fast.
_WORTH_FROM = 256


def is_worth(attention: AttentionKind, length: int) -> bool:
    """Whether attention is to be fused where it can be.

    Args:
        attention: What the caller asked for.
        length: Number of tokens in the prompt.

    Raises:
        ValueError: an unknown kind of attention.
    """
    if attention not in get_args(AttentionKind):
        raise ValueError(f"attention={attention!r} is unknown; use 'auto', 'fused' or 'eager'.")
    return attention == "fused" or (attention == "auto" and length >= _WORTH_FROM)


def saves_logits(model: Any, read: tuple[int, ...] | None, length: int) -> bool:
    """Whether leaving out the logits that are not read pays for fused attention by itself."""
    if read is None:
        return False
    cfg = model.cfg
    left_out = (length - len(read)) * int(cfg.d_vocab) * int(cfg.d_model)
    return left_out >= _WORTH_LOGITS * int(cfg.n_layers)


class FusedBlocks:
    """Which attentions may be computed fused in a forward, and which were.

    Attributes:
        candidates: Paths of the attention components that may.
        hooked: Those among them inside which a hook of the user's might write into z.
        rows: By path, what is called in the backward with the rows of the attention.
        done: Those whose attention was computed fused in the last forward.
    """

    def __init__(
        self,
        model: Any,
        attachments: Iterable[Attachment],
        readings: Collection[Reading],
        hooks: Iterable[UserHook],
        without: Collection[str] = (),
    ) -> None:
        self.model = model
        self.done: set[str] = set()
        operations: dict[str, set[str]] = {}
        for attachment in attachments:
            operations.setdefault(attachment.site.path, set()).add(attachment.site.operation)
        points = hook_points(model)
        names = {reading.name for reading in readings if reading.how != "rows"}
        read = {id(points[name]) for name in names if name in points}  # one may have several names
        hooked = {id(hook.module) for hook in hooks}
        parts = components(model)
        self.candidates = [
            path
            for path, of_path in operations.items()
            if "softmax" in of_path
            and path not in without
            and type(parts[path]).__name__ not in COMPUTED_SCORES
            and not any(f"{path}.{name}" in names for name in _NEEDED)
            and not any(id(getattr(parts[path], name, None)) in read for name in _NEEDED)
            and not any(id(part) in hooked for part in _watched(parts[path]))
        ]
        self.hooked = {
            path
            for path in self.candidates
            if hooked and any(id(part) in hooked for part in parts[path].modules())
        }
        self.rows = {
            reading.name.rpartition(".")[0]: reading.sink
            for reading in readings
            if reading.how == "rows"
        }

    @contextmanager
    def active(
        self, memory: MaskMemory | None = None, attend: Callable[[str], Attend] | None = None
    ) -> Iterator[None]:
        """Defer the candidates' attention inside the ``with`` block, in this thread only.

        Args:
            memory: Remembers masks, if several forwards are given the same ones.
            attend: By path, what computes the attention; by default ``query_tiles.attend``.
        """
        parts, memory = components(self.model), memory or MaskMemory()
        with ExitStack() as stack:
            stack.enter_context(lazy_masks())
            for path in self.candidates:
                attention = plain_attend if attend is None else attend(path)
                mode = DeferringMode(
                    memory,
                    partial(self.done.add, path),
                    self.rows.get(path),
                    path,
                    _copied(attention) if path in self.hooked else attention,
                )
                stack.enter_context(active_in(mode, parts[path]))
                handle = parts[path].register_forward_hook(mine(_without_pattern))
                stack.callback(handle.remove)
            yield

    @property
    def kind(self) -> str:
        """What results record: "eager", "fused", or how many blocks were fused."""
        return kind_of(self.model, self.done)


def kind_of(model: Any, done: Collection[str]) -> str:
    """What results record, if the attention of the components in ``done`` was fused."""
    if not done:
        return "eager"
    n = int(model.cfg.n_layers)
    return "fused" if len(done) == n else f"fused in {len(done)} of {n} blocks"


def without_rules(model: Any, attention: AttentionKind, length: int) -> FusedBlocks | None:
    """The attentions that may be fused in a forward without rules or readings.

    Args:
        model: The bridge; one that no rule covers computes attention as it does.
        attention: What the caller asked for.
        length: Number of tokens in the prompt.

    Raises:
        ValueError: an unknown kind of attention.
    """
    if not is_worth(attention, length):
        return None
    try:
        attachments, _ = place(model, DEFAULT_RULES)
    except UncoveredComponentError:
        return None
    return FusedBlocks(model, attachments, (), user_hooks(model))


def fused_blocks(model: Any, attention: AttentionKind, length: int) -> int:
    """In how many blocks attention would be fused, for a plan of the memory."""
    fused = without_rules(model, attention, length)
    return 0 if fused is None else len(fused.candidates)


def _watched(component: Any) -> list[Any]:
    """The modules at which a user's hook sees the scores, the pattern, or what is returned."""
    return [component, *(getattr(component, name, None) for name in _NEEDED)]


def _copied(attend: Attend) -> Attend:
    """Attention whose result may be written into: torch's own keeps it for its backward."""

    def copied(q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        return attend(q, k, v, attention).clone()

    return copied


def _without_pattern(module: torch.nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
    """A component's output, with None for a pattern that was not computed."""
    if not isinstance(output, tuple):
        return None
    return tuple(None if isinstance(part, DeferredAttention) else part for part in output)
