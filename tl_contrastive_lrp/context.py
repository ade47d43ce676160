"""Rules on a model: ``lrp`` is the context manager, ``lrp_hooks`` the same rules as a hook list.

Both come only where the audit finds that every operation is linear or has its rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .attachment import Attachment, HookFn, edit
from .audit_model import require_clean
from .coverage_table import Coverage
from .errors import ModelStateError
from .placement import attached, check_ready, check_single, marked, place, public_name
from .precision import is_low, watch
from .rulesets import DEFAULT_RULES, RuleSet
from .sites import LEAVES
from .threads import one_at_a_time, own_hooks, turn


def plan(model: Any, rules: str | RuleSet) -> tuple[tuple[Attachment, ...], Coverage]:
    """Where each rule of ``rules`` goes on ``model``; attaches nothing.

    Raises:
        UncoveredComponentError: an operation that no rule covers.
    """
    placed = place(model, rules)
    require_clean(model)
    return placed


@one_at_a_time
def coverage(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> Coverage:
    """Which component of ``model`` would get which rule, without attaching anything.

    Raises:
        UncoveredComponentError: a component that no rule covers.
    """
    return plan(model, rules)[1]


@one_at_a_time
def lrp_hooks(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> list[tuple[str, HookFn]]:
    """The rules as hooks for ``model.run_with_hooks(fwd_hooks=...)`` or ``model.hooks(...)``.

    List your own hooks that edit values before these. The forward is unchanged by one bit; only
    gradients differ. ``lrp`` is the more robust form: prefer it where a context manager fits, and
    where other threads run the model: as TransformerLens' own, these hooks act in every thread.

    Returns:
        (hook_name, hook_function) pairs.

    Raises:
        UncoveredComponentError: a component that no rule covers.
        ModelStateError: training mode, gradients off, or rules already on.
    """
    check_ready(model, "lrp_hooks")
    check_single(model)
    attachments, _ = plan(model, rules)
    for a in attachments:
        if a.needs_scope:
            raise ModelStateError(
                f"The rule at {a.site.path} ({a.site.class_name}) is put on {a.how}, which no list "
                "of hooks can do. Use `with clrp.lrp(model):` around your run instead."
            )

    def refuse_forks(tensor: Any, hook: Any) -> None:  # noqa: ARG001
        for flag in ("use_split_qkv_input", "use_attn_in"):
            if getattr(model.cfg, flag, False):
                raise ModelStateError(
                    f"cfg.{flag} is on: attention then normalises once per head, where no hook of "
                    "clrp.lrp_hooks reaches. Use `with clrp.lrp(model):`, or call "
                    f"model.set_{flag}(False) first."
                )

    hook_dict = model.hook_dict
    hooks = [("embed.hook_out", refuse_forks), *(pair for a in attachments for pair in a.hooks)]
    return [(public_name(hook_dict, name), marked(fn)) for name, fn in hooks]


@contextmanager
def lrp(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> Iterator[Coverage]:
    """Rules on ``model`` for the block: every gradient taken inside is a relevance coefficient.

    Activation × gradient at any HookPoint is then its relevance; sums of it over a residual
    stream's dimensions are the relevance of a token there. Everything of TransformerLens that uses
    gradients works on relevance inside, ``attribution_patch`` for one (relevance patching,
    arXiv:2508.21258).

    The rules act in this thread alone. This package's calls on the model in other threads wait
    until the block is left; do not wait for one inside.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        rules: "attnlrp", "cplrp", "relp", "gim", "gradient", or a ``RuleSet``.

    Yields:
        Coverage: which component got which rule.

    Raises:
        UncoveredComponentError: a component that no rule covers.
        ModelStateError: training mode, gradients off, or rules already on; another thread stays
            inside such a block for more than a minute.
    """
    with turn(model, "clrp.lrp(model)"):
        check_ready(model, "lrp")
        check_single(model)
        attachments, report = plan(model, rules)
        hook_dict = model.hook_dict
        inputs = LEAVES if is_low(model, (torch.float16,)) else ()
        watched = [(public_name(hook_dict, n), edit(watch)) for n in inputs if n in hook_dict]
        with attached(model, attachments), own_hooks(model, watched):
            yield report
