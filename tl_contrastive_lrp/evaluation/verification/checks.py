"""The measurements behind ``verify``: each returns one ``Check`` with its figure and verdict.

None of them compares relevance with this package's own idea of it. They rest on facts that hold for
any model if its rules are right: a rule never changes a value; what conserves adds up; autograd
agrees with finite differences; every operation is linear or has a rule.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ...errors import UncoveredComponentError
from ...hooks.audit.audit import audit
from ...hooks.context import plan
from ...hooks.hook_rules import rules_in_hooks
from ...hooks.placement import attached, own_hooks
from ...inputs.bridge import hook_points, public_name
from ...inputs.devices import precise
from ...rules.precision import in_float32, is_low
from ...rules.rule_sets import RuleSet
from ...rules.threads import frozen_parameters
from .check import Check, ObjectiveFn, dtype_of, judged, no_room, skipped
from .conservation import account_for, leaf_hooks

# ---------------------------------------------------------------- every operation accounted for


def check_audit(model: Any) -> Check:
    """Is every operation between logits and embeddings linear or a rule?"""
    try:
        report = audit(model)
    except UncoveredComponentError as error:
        return Check("audit", "failed", 1.0, 0.0, str(error))
    n = sum(report.counts.values())
    found = report.summary()
    shown = "; ".join(f"{f.component}: {f.operation}: {f.why}" for f in found[:3])
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    aside = f"; {report.of_hooks}" if report.hooks else ""
    return judged(
        "audit",
        float(len(found)),
        0.0,
        1.0,
        f"each of {n} operations between logits and embeddings is linear or has its rule{aside}",
        f"operations without a rule: {shown}{more}",
    )


# ---------------------------------------------------------------- the forward, bit for bit


def check_forward(model: Any, tokens: Tensor, rule_set: RuleSet) -> Check:
    """Do the rules leave logits and residual stream as they are, bit for bit?"""
    attachments, _ = plan(model, rule_set)
    logits, stream = _forward(model, tokens)
    same_logits, same_stream = _forward(model, tokens)
    if not (torch.equal(logits, same_logits) and _differing(stream, same_stream) == []):
        return Check(
            "forward",
            "attention",
            float("nan"),
            0.0,
            "the model by itself gives other bits from run to run, so the rules' effect on them "
            "cannot be told",
        )
    with (
        frozen_parameters(model),
        rules_in_hooks(model, rule_set),
        own_hooks(model, leaf_hooks(model, {})),
        attached(model, attachments),
    ):
        ruled_logits, ruled_stream = _forward(model, tokens)
        bare_logits = model(tokens).detach()
    off = _differing({**stream, "logits": logits}, {**ruled_stream, "logits": ruled_logits})
    if not torch.equal(bare_logits, logits):
        off.append("logits without observers")
    return judged(
        "forward",
        float(len(off)),
        0.0,
        1.0,
        f"logits and {len(stream)} residual-stream activations are the same bits with the rules on",
        f"the rules change values at {', '.join(off[:3])}",
    )


STREAM = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post))$")


def _forward(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    points = {id(p): name for name, p in hook_points(model).items() if STREAM.search(name)}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept[hook.name] = tensor.detach().clone()

    names = [public_name(hook_points(model), name) for name in points.values()]
    with own_hooks(model, [(name, keep) for name in names]):
        logits = model(tokens).detach()
    return logits, kept


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


# ---------------------------------------------------------------- what conserves adds up


# Measured on tiny and on trained models, and then some.
_CONSERVED: dict[torch.dtype, float] = {
    torch.float64: 1e-4,  # softmax and norms compute in float32
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


def check_conservation(model: Any, tokens: Tensor, objective: ObjectiveFn) -> Check:
    """Under CP-LRP, is Δℓ = relevance of tokens and positions + what biases took?"""
    account = account_for(model, tokens, objective)
    limit = _CONSERVED[dtype_of(model)]
    return judged(
        "conservation",
        account.missing,
        limit,
        10 * limit,
        f"CP-LRP conserves: {account}. (How a product's relevance is split between its factors, no "
        "sum can show)",
        f"under CP-LRP {account} leaves {account.missing:.1%} of the relevance unaccounted for: "
        "some rule is not that of its operation",
    )


# ---------------------------------------------------------------- nothing is detached


_GRADIENT = 2e-2


def check_gradient(model: Any, tokens: Tensor, objective: ObjectiveFn) -> Check:
    """Does the plain gradient at the embeddings see all that the model computes?

    Finite differences along a random direction, two step sizes combined to cancel the leading
    error, the best of several steps: what autograd does not see is missing at all of them.
    """
    with ExitStack() as stack:
        if is_low(model):
            why = no_room(model)
            if why:
                return skipped("gradient", why)
            stack.enter_context(in_float32(model))
        stack.enter_context(frozen_parameters(model))
        inputs: dict[str, Tensor] = {}
        with own_hooks(model, leaf_hooks(model, inputs)[:1]):
            value = objective(model(tokens))
        (x,) = inputs.values()
        (g,) = torch.autograd.grad(value, [x])
        generator = torch.Generator().manual_seed(0)
        towards = (
            torch.randn(x.shape, generator=generator).to(x) * x.detach().square().mean().sqrt()
        )
        wanted = float((precise(g) * precise(towards)).sum())

        def moved(step: float) -> float:
            def change(embedded: Tensor) -> Tensor:
                return embedded + step * towards

            with torch.no_grad(), own_hooks(model, leaf_hooks(model, {}, change)[:1]):
                return float(objective(model(tokens)))

        def difference(step: float) -> float:
            return (moved(step) - moved(-step)) / (2 * step)

        steps = (1e-2, 2e-3, 4e-4, 1e-4)  # the small ones keep the choice of experts
        found = [(4 * difference(s / 2) - difference(s)) / 3 for s in steps]
    spread = float(precise(g).norm() * precise(towards).norm()) / max(1.0, x.numel() ** 0.5)
    scale = max(abs(wanted), spread, 1e-30)
    off = min(abs(f - wanted) for f in found) / scale
    return judged(
        "gradient",
        off,
        _GRADIENT,
        10 * _GRADIENT,
        "the plain gradient agrees with finite differences, so the model detaches nothing that "
        "its logits depend on",
        f"the plain gradient is off finite differences by {off:.1%}: the model detaches something, "
        "or is too rough here for the comparison (experts chosen by a hair)",
    )
