"""``audit``: did a rule miss anything? Answered on the graph that relevance flows through."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...errors import ModelStateError, UncoveredComponentError
from ...inputs.bridge import LEAVES, require_bridge
from ...rules.threads import one_at_a_time
from .. import placement
from ..user_hooks import user_hooks
from .report import Audit, Finding, not_run, refusal
from .run import examine, remember, remembered

__all__ = ["Audit", "Finding", "audit", "require_clean"]


@one_at_a_time
def audit(model: Any) -> Audit:
    """Account for every operation between the logits of ``model`` and its embeddings.

    The model runs once on four tokens with the rules of "attnlrp" on. Each node of the autograd
    graph, the one that relevance flows through, must then be linear in what is computed, one of the
    rules, or a softmax (or a sigmoid that weighs something), whose ordinary gradient is its rule;
    and each product of two computed tensors must be halved exactly once. What is not, what is not
    known, and what the model hides from autograd, is a finding. The answer is kept until the
    model's components or flags change.

    The user's hook functions, on HookPoints and other modules, are set aside, and named in
    ``hooks``: they are judged call by call where they run, under the rules of that run.

    What it cannot see: operations that a longer prompt would take another way, and whether a rule's
    closed form is that of its activation; ``verify`` measures these on a prompt.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.

    Raises:
        ModelStateError: training mode, or rules already on, if the model has to run.
        UncoveredComponentError: a component that is refused before anything runs, or a model that
            does not run on token ids alone.
    """
    report = audit_of(model)
    hooks = tuple(sorted({hook.name for hook in user_hooks(model)}))
    return replace(report, hooks=hooks) if hooks else report


def audit_of(model: Any) -> Audit:
    """``audit`` of the model by itself: the same object until the model changes.

    Raises:
        ModelStateError, UncoveredComponentError: as ``audit``.
    """
    require_bridge(model)
    known = remembered(model)
    if known is not None:
        return known
    with torch.inference_mode(False), torch.enable_grad():
        placement.check_ready(model, "audit")
        placement.check_single(model)
    attachments, _ = placement.place(model, "attnlrp")
    try:
        report = examine(model, lambda: placement.attached(model, attachments), LEAVES)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, RuntimeError) as error:
        if isinstance(error, UncoveredComponentError | ModelStateError | torch.OutOfMemoryError):
            raise
        raise not_run(model, error) from error
    return remember(model, report)


def require_clean(model: Any) -> None:
    """Refuse a model in which a rule misses something.

    Raises:
        UncoveredComponentError: names every operation that is not accounted for.
    """
    report = audit_of(model)
    if not report.clean:
        raise refusal(report)
