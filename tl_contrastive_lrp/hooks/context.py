"""Rules on a model: ``lrp`` is the context manager, ``lrp_hooks`` the same rules as a hook list.

Both require a clean audit: every operation is linear or has its rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ModelStateError
from ..inputs.bridge import LEAVES, hook_points, public_name
from ..rules.precision import is_low, watch
from ..rules.rule_sets import DEFAULT_RULES, RuleSet, get_rule_set
from ..rules.threads import one_at_a_time, shared_views, turn
from .attach import Attachment, HookFn, edit
from .audit.audit import require_clean
from .coverage import Coverage
from .hook_rules import rows_to_come, rules_in_hooks
from .placement import attached, check_ready, check_single, marked, own_hooks, place


def plan(model: Any, rules: str | RuleSet) -> tuple[tuple[Attachment, ...], Coverage]:
    """Where each rule of ``rules`` goes on ``model``; attaches nothing.

    Raises:
        UncoveredComponentError: An operation that no rule covers.
    """
    placed = place(model, rules)
    require_clean(model)
    return placed


@one_at_a_time
def coverage(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> Coverage:
    """Which component of ``model`` would get which rule, without attaching anything.

    What your own hooks compute is known only when they run. Here each of them has a row that says
    so; their rules are in the coverage that ``lrp`` yields and that results contain.

    Args:
        model: A ``TransformerBridge``.
        rules: Name of a rule set, or a ``RuleSet``.

    Returns:
        A table with one row per operation that is not linear.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ValueError: ``rules`` is no known name.
        UncoveredComponentError: A component that no rule covers.

    Example:
        >>> clrp.coverage(model, "attnlrp").summary()[0].rule
        'LN'
    """
    report = plan(model, rules)[1]
    report.add(rows_to_come(model))
    return report


@one_at_a_time
def lrp_hooks(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> list[tuple[str, HookFn]]:
    """The rules as hooks for ``model.run_with_hooks(fwd_hooks=...)`` or ``model.hooks(...)``.

    The forward is unchanged, bit for bit; only gradients differ. List your own hooks that edit
    values before these; their computations are not examined here, and keep their ordinary gradient.

    ``lrp`` is the more robust form. Prefer it wherever a context manager fits, and where other
    threads run the model: like TransformerLens' own, these hooks act in every thread.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        rules: Name of a rule set, or a ``RuleSet``.

    Returns:
        (hook_name, hook_function) pairs.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ValueError: ``rules`` is no known name.
        UncoveredComponentError: A component that no rule covers.
        ModelStateError: Training mode, gradients off, rules already on, or a rule that no list of
            hooks can carry.

    Example:
        >>> tokens = model.to_tokens(case.prompt)
        >>> logits = model.run_with_hooks(tokens, fwd_hooks=clrp.lrp_hooks(model))
        >>> torch.equal(logits, model(tokens))
        True
    """
    check_ready(model, "lrp_hooks")
    check_single(model)
    attachments, _ = plan(model, rules)
    for a in attachments:
        if a.needs_scope:
            raise ModelStateError(
                f"The rule at {a.site.path} ({a.site.class_name}) is attached {a.how}, which no "
                "list of hooks can do. Use `with clrp.lrp(model):` around your run instead."
            )

    def refuse_forks(tensor: Any, hook: Any) -> None:  # noqa: ARG001
        for flag in ("use_split_qkv_input", "use_attn_in"):
            if getattr(model.cfg, flag, False):
                raise ModelStateError(
                    f"cfg.{flag} is on: attention then normalises once per head, where no hook of "
                    "clrp.lrp_hooks reaches. Use `with clrp.lrp(model):`, or call "
                    f"model.set_{flag}(False) first."
                )

    hook_dict = hook_points(model)
    hooks = [("embed.hook_out", refuse_forks), *(pair for a in attachments for pair in a.listed())]
    return [(public_name(hook_dict, name), marked(fn)) for name, fn in hooks]


@contextmanager
def lrp(model: Any, rules: str | RuleSet = DEFAULT_RULES) -> Iterator[Coverage]:
    """Rules on ``model`` for the block: every gradient taken inside is a relevance coefficient.

    Activation × gradient at any HookPoint is then its relevance, in units of the objective (logits)
    and positive where it supports the target. Its sum over a residual stream's dimensions is the
    relevance of a token there. Everything in TransformerLens that uses gradients works on relevance
    inside, such as ``attribution_patch`` (relevance patching, arXiv:2508.21258).

    Your own hook functions, added before or inside, are part of the model: their operations get the
    rules too, or are refused once they have run. An operation without a rule can be given one in
    the hook (``clrp.rules``), or made a constant with ``.detach()``.

    The rules act in this thread alone. This package's calls on the model in other threads wait
    until the block is left; do not wait for one inside.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        rules: "attnlrp", "cplrp", "relp", "gim", "gradient", or a ``RuleSet``.

    Yields:
        Coverage: Which component got which rule. Rows for your hooks are added as they run.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        ValueError: ``rules`` is no known name.
        UncoveredComponentError: A component that no rule covers; inside the block, an operation in
            one of your hooks.
        ModelStateError: Training mode, gradients off, or rules already on; another thread stays
            inside such a block for more than a minute.

    Example:
        >>> resid = []
        >>> keep = lambda x, hook: resid.append(x)  # returns None, so it only looks
        >>> with clrp.lrp(model, rules="attnlrp"), model.hooks([("blocks.2.hook_in", keep)]):
        ...     (gradient,) = torch.autograd.grad(objective(model(case.prompt)), resid)
        >>> (resid[0] * gradient).sum(-1).shape  # the relevance of each token there
        torch.Size([1, 44])
    """
    with turn(model, "clrp.lrp(model)"):
        with shared_views(model):
            check_ready(model, "lrp")
            check_single(model)
            attachments, report = plan(model, rules)
            hook_dict = hook_points(model)
        inputs = LEAVES if is_low(model, (torch.float16,)) else ()
        watched = [(public_name(hook_dict, n), edit(watch)) for n in inputs if n in hook_dict]
        with (
            rules_in_hooks(model, get_rule_set(rules), report, later=True),
            attached(model, attachments),
            own_hooks(model, watched),
        ):
            yield report
