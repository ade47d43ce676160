"""The checks behind ``verify``: each measures one thing and returns its figure and verdict.

No check compares relevance with another result of this package. They rest on facts that hold for
any model whose rules are correct: a rule never changes a value; relevance that is conserved adds
up; autograd agrees with finite differences; every operation is linear or has a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...engine.memory import free_bytes, gib
from ...errors import UncoveredComponentError
from ...hooks.audit.audit import audit
from ...hooks.context import plan
from ...hooks.hook_rules import rules_in_hooks
from ...hooks.placement import attached, embedding_leaves, own_hooks
from ...inputs.bridge import LEAVES, hook_points, public_name
from ...inputs.devices import precise
from ...rules.precision import LOW, in_float32, is_low
from ...rules.rule_sets import RuleSet
from ...rules.threads import frozen_parameters
from .conservation import conservation_account

Verdict = Literal["ok", "warning", "failed", "skipped"]
ObjectiveFn = Callable[[Tensor], Tensor]

# The residual stream, with and without TransformerLens' short names.
STREAM = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post))$")


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: "audit", "forward", "conservation", "gradient", "finite" or "precision".
        verdict: "ok"; "warning" (relevance works, but read ``says``); "failed" (relevance is
            wrong); or "skipped".
        figure: The number that was measured, as ``says`` explains; NaN if there is none.
        limit: The largest figure for which the verdict is "ok".
        says: One sentence about the result.

    Example:
        >>> check = clrp.verify(model, case.prompt)["forward"]
        >>> check.verdict, check.figure  # no value differs
        ('ok', 0.0)
    """

    name: str
    verdict: Verdict
    figure: float
    limit: float
    says: str


def skipped(name: str, why: str) -> Check:
    """Return the result of a check that was not run."""
    return Check(name, "skipped", float("nan"), float("nan"), why)


def graded(name: str, figure: float, limit: float, bad: float, says: str, otherwise: str) -> Check:
    """Return a result with the verdict that the figure deserves.

    Args:
        name: Name of the check.
        figure: The number that was measured.
        limit: The verdict is "ok" up to here.
        bad: The verdict is "failed" from here on, and where the figure is NaN.
        says: The sentence for "ok".
        otherwise: The sentence for "warning" and "failed".
    """
    if figure <= limit:
        return Check(name, "ok", figure, limit, says)
    return Check(name, "warning" if figure < bad else "failed", figure, limit, otherwise)


def dtype_of(model: Any) -> torch.dtype:
    """Return the least precise floating-point dtype among the parameters."""
    dtypes = {p.dtype for p in model.original_model.parameters() if p.is_floating_point()}
    worst: torch.dtype = max(dtypes, key=lambda dtype: float(torch.finfo(dtype).eps))
    return worst


def no_room_for_float32(model: Any) -> str:
    """Return why a float32 copy of the weights cannot be made, or an empty string."""
    parameters = list(model.original_model.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return "some weights are not in memory (offloaded), so no float32 copy can be made of them"
    bytes_by_device: dict[torch.device, int] = {}
    for p in parameters:
        copied = 4 * p.numel() if p.dtype in LOW else 0
        bytes_by_device[p.device] = bytes_by_device.get(p.device, 0) + copied
    for device, size in bytes_by_device.items():
        room = free_bytes(device)
        if size > 0.8 * room:
            need, free = gib(size), gib(room)
            return f"a float32 copy of the weights takes {need}, and {device} has {free} free"
    return ""


# ---------------------------------------------------------------- every operation has a rule


def check_audit(model: Any) -> Check:
    """Check that every operation between logits and embeddings is linear or has its rule."""
    try:
        report = audit(model)
    except UncoveredComponentError as error:
        return Check("audit", "failed", 1.0, 0.0, str(error))
    n = sum(report.counts.values())
    findings = report.summary()
    shown = "; ".join(f"{f.component}: {f.operation}: {f.why}" for f in findings[:3])
    more = f"; and {len(findings) - 3} more" if len(findings) > 3 else ""
    of_hooks = f"; {report.of_hooks}" if report.hooks else ""
    return graded(
        "audit",
        float(len(findings)),
        0.0,
        1.0,
        f"each of {n} operations between logits and embeddings is linear or has its rule{of_hooks}",
        f"operations without a rule: {shown}{more}",
    )


# ---------------------------------------------------------------- the forward, bit for bit


def check_forward(model: Any, tokens: Tensor, rule_set: RuleSet) -> Check:
    """Check that the rules leave logits and residual stream as they are, bit for bit."""
    attachments, _ = plan(model, rule_set)
    logits, stream = _forward(model, tokens)
    second_logits, second_stream = _forward(model, tokens)
    if not (torch.equal(logits, second_logits) and not _differing(stream, second_stream)):
        return Check(
            "forward",
            "warning",
            float("nan"),
            0.0,
            "the model's own results differ in bits from run to run, so whether the rules change "
            "them cannot be determined",
        )
    with (
        frozen_parameters(model),
        rules_in_hooks(model, rule_set),
        own_hooks(model, embedding_leaves(model, {})),
        attached(model, attachments),
    ):
        ruled_logits, ruled_stream = _forward(model, tokens)
        bare_logits = model(tokens).detach()
    changed = _differing({**stream, "logits": logits}, {**ruled_stream, "logits": ruled_logits})
    if not torch.equal(bare_logits, logits):
        changed.append("logits without observers")
    return graded(
        "forward",
        float(len(changed)),
        0.0,
        1.0,
        f"logits and {len(stream)} residual-stream activations are the same bits with the rules on",
        f"the rules change values at {', '.join(changed[:3])}",
    )


def _forward(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Run the model and record its logits and residual stream."""
    stream: dict[str, Tensor] = {}
    points = {id(p): name for name, p in hook_points(model).items() if STREAM.search(name)}

    def record(tensor: Tensor, hook: Any) -> None:
        stream[hook.name] = tensor.detach().clone()

    names = [public_name(hook_points(model), name) for name in points.values()]
    with own_hooks(model, [(name, record) for name in names]):
        logits = model(tokens).detach()
    return logits, stream


def _differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Return the names under which two runs hold different values."""
    return [
        name
        for name in one.keys() | other.keys()
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]


# ---------------------------------------------------------------- relevance adds up


# Limits on the share of relevance that is unaccounted for: above what tiny and trained models show.
_CONSERVATION_LIMITS: dict[torch.dtype, float] = {
    torch.float64: 1e-4,  # softmax and norms compute in float32
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


def check_conservation(model: Any, tokens: Tensor, objective: ObjectiveFn) -> Check:
    """Check that under CP-LRP, Δℓ is the relevance of tokens, positions, biases and constants."""
    account = conservation_account(model, tokens, objective)
    limit = _CONSERVATION_LIMITS[dtype_of(model)]
    return graded(
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


_GRADIENT_LIMIT = 2e-2


def check_gradient(model: Any, tokens: Tensor, objective: ObjectiveFn) -> Check:
    """Check that the plain gradient at the embeddings includes all that the model computes.

    It is compared with finite differences along a random direction. Two step sizes are combined to
    cancel the leading error, and the best of several steps counts, since a part that autograd
    misses is missing at every step.
    """
    with ExitStack() as stack:
        if is_low(model):
            why = no_room_for_float32(model)
            if why:
                return skipped("gradient", why)
            stack.enter_context(in_float32(model))
        stack.enter_context(frozen_parameters(model))
        leaves: dict[str, Tensor] = {}
        with own_hooks(model, embedding_leaves(model, leaves, names=LEAVES[:1])):
            value = objective(model(tokens))
        (x,) = leaves.values()
        (g,) = torch.autograd.grad(value, [x])
        generator = torch.Generator().manual_seed(0)
        size = x.detach().square().mean().sqrt()
        direction = torch.randn(x.shape, generator=generator).to(x) * size
        slope = float((precise(g) * precise(direction)).sum())

        def value_at(step: float) -> float:
            def change(embedding: Tensor) -> Tensor:
                return embedding + step * direction

            with torch.no_grad(), own_hooks(model, embedding_leaves(model, {}, change, LEAVES[:1])):
                return float(objective(model(tokens)))

        def difference(step: float) -> float:
            return (value_at(step) - value_at(-step)) / (2 * step)

        steps = (1e-2, 2e-3, 4e-4, 1e-4)  # small ones do not change which experts are chosen
        slopes = [(4 * difference(s / 2) - difference(s)) / 3 for s in steps]
    typical = float(precise(g).norm() * precise(direction).norm()) / max(1.0, x.numel() ** 0.5)
    scale = max(abs(slope), typical, 1e-30)
    error = min(abs(s - slope) for s in slopes) / scale
    return graded(
        "gradient",
        error,
        _GRADIENT_LIMIT,
        10 * _GRADIENT_LIMIT,
        "the plain gradient agrees with finite differences, so the model detaches nothing that "
        "its logits depend on",
        f"the plain gradient differs from finite differences by {error:.1%}: the model detaches "
        "something, or is not smooth enough here for the comparison (nearly tied experts)",
    )
