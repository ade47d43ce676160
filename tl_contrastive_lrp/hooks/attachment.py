"""What it takes to put one rule on a model, and the small parts that every attachment uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rules.rule_sets import RuleSet
from .sites import Site

HookFn = Callable[..., Any]
Scoped = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Attachment:
    """The rule of one site, ready to be put on.

    Attributes:
        site: Where.
        rule: What the coverage report calls the rule.
        how: Where it is attached, in words.
        hooks: (path of HookPoint, hook function) pairs.
        captures: HookPoints where a reader of gradients must go before ``hooks``: they only read
            there, or cut the gradient off.
        scoped: The same rule as a context manager, where it has that form.
        beside: Hooks that ``scoped`` needs beside it, in place of ``hooks``.
        live: Lists of hook functions, by HookPoint, that the attachment calls at the value itself
            where TransformerLens' own HookPoint fires too late to be read or changed.
    """

    site: Site
    rule: str
    how: str
    hooks: tuple[tuple[str, HookFn], ...] = ()
    captures: tuple[str, ...] = ()
    scoped: Scoped | None = None
    beside: tuple[tuple[str, HookFn], ...] = ()
    live: Mapping[str, list[HookFn]] = field(default_factory=dict)

    @property
    def needs_scope(self) -> bool:
        """Whether no list of hooks can carry the rule."""
        return self.scoped is not None and not self.hooks


def edit(function: Callable[[Tensor], Tensor]) -> HookFn:
    """A hook function that returns ``function`` of the value."""

    def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return function(tensor)

    return hook_fn


def gradient(site: Site, rule_set: RuleSet) -> Attachment:  # noqa: ARG001
    """Nothing attached: the operation keeps its ordinary gradient."""
    return Attachment(site, "gradient", "ordinary gradient")


def is_same(expected: Tensor, value: Tensor) -> bool:
    """Up to rounding: an edit too small to be seen is too small to matter."""
    slack = 0.1 if value.dtype in (torch.float16, torch.bfloat16) else 1e-3
    bound = slack * value.abs().amax() + torch.finfo(value.dtype).tiny
    return bool((expected - value).abs().amax() <= bound)
