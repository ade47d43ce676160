"""The measurements behind ``verify``: each returns one ``Check`` with its figure and verdict.

None of them compares relevance with this package's own idea of it. They rest on facts that hold for
any model if its rules are right: a rule never changes a value; what conserves adds up; autograd
agrees with finite differences; every operation is linear or has a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .audit_model import audit
from .backward import Reading, frozen_parameters, relevance_of, run
from .context import plan
from .errors import UncoveredComponentError
from .placement import attached, public_name
from .precision import LOW, in_float32, is_low, underflow
from .rulesets import RuleSet
from .sites import LEAVES
from .verify_account import account_for, leaf_hooks

Verdict = Literal["ok", "attention", "failed", "skipped"]
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """One thing that was measured.

    Attributes:
        name: "audit", "forward", "conservation", "gradient", "finite" or "precision".
        verdict: "ok"; "attention": works, read why; "failed": relevance is wrong; "skipped".
        figure: What was measured, NaN if nothing was; what it is stands in ``says``.
        limit: Up to here the verdict is "ok".
        says: One sentence for people.
    """

    name: str
    verdict: Verdict
    figure: float
    limit: float
    says: str


def skipped(name: str, why: str) -> Check:
    """A check that was not made."""
    return Check(name, "skipped", float("nan"), float("nan"), why)


def _judged(name: str, figure: float, limit: float, bad: float, says: str, otherwise: str) -> Check:
    """ok up to ``limit``, failed from ``bad`` on (and where the figure is not a number)."""
    if figure <= limit:
        return Check(name, "ok", figure, limit, says)
    return Check(name, "attention" if figure < bad else "failed", figure, limit, otherwise)


def dtype_of(model: Any) -> torch.dtype:
    """The least precise floating type among the parameters."""
    dtypes = {p.dtype for p in model.original_model.parameters() if p.is_floating_point()}
    worst: torch.dtype = max(dtypes, key=lambda dtype: float(torch.finfo(dtype).eps))
    return worst


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
    return _judged(
        "audit",
        float(len(found)),
        0.0,
        1.0,
        f"each of {n} operations between logits and embeddings is linear or has its rule",
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
        model.hooks(fwd_hooks=leaf_hooks(model, {})),
        attached(model, attachments),
    ):
        ruled_logits, ruled_stream = _forward(model, tokens)
        bare_logits = model(tokens).detach()
    off = _differing({**stream, "logits": logits}, {**ruled_stream, "logits": ruled_logits})
    if not torch.equal(bare_logits, logits):
        off.append("logits without observers")
    return _judged(
        "forward",
        float(len(off)),
        0.0,
        1.0,
        f"logits and {len(stream)} residual-stream activations are the same bits with the rules on",
        f"the rules change values at {', '.join(off[:3])}",
    )


_STREAM = re.compile(r"blocks\.\d+\.(hook_in|hook_out|hook_resid_(pre|mid|post))$")


def _forward(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    kept: dict[str, Tensor] = {}
    points = {id(p): name for name, p in model.hook_dict.items() if _STREAM.search(name)}

    def keep(tensor: Tensor, hook: Any) -> None:
        kept[hook.name] = tensor.detach().clone()

    names = [public_name(model.hook_dict, name) for name in points.values()]
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
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


def check_conservation(model: Any, tokens: Tensor, objective: Objective) -> Check:
    """Under CP-LRP, is Δℓ = relevance of tokens and positions + what biases took?"""
    account = account_for(model, tokens, objective)
    limit = _CONSERVED[dtype_of(model)]
    return _judged(
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


def check_gradient(model: Any, tokens: Tensor, objective: Objective) -> Check:
    """Does the plain gradient at the embeddings see all that the model computes?

    Finite differences along a random direction, two step sizes combined to cancel the leading
    error, the best of several steps: what autograd does not see is missing at all of them.
    """
    with ExitStack() as stack:
        if is_low(model):
            why = _no_room(model)
            if why:
                return skipped("gradient", why)
            stack.enter_context(in_float32(model))
        stack.enter_context(frozen_parameters(model))
        inputs: dict[str, Tensor] = {}
        with model.hooks(fwd_hooks=leaf_hooks(model, inputs)[:1]):
            value = objective(model(tokens))
        (x,) = inputs.values()
        (g,) = torch.autograd.grad(value, [x])
        generator = torch.Generator().manual_seed(0)
        towards = (
            torch.randn(x.shape, generator=generator).to(x) * x.detach().square().mean().sqrt()
        )
        wanted = float((g.double() * towards.double()).sum())

        def moved(step: float) -> float:
            def change(embedded: Tensor) -> Tensor:
                return embedded + step * towards

            with torch.no_grad(), model.hooks(fwd_hooks=leaf_hooks(model, {}, change)[:1]):
                return float(objective(model(tokens)).double())

        def difference(step: float) -> float:
            return (moved(step) - moved(-step)) / (2 * step)

        steps = (0.02, 0.005, 0.00125)
        found = [(4 * difference(s / 2) - difference(s)) / 3 for s in steps]
    spread = float(g.double().norm() * towards.double().norm()) / max(1.0, x.numel() ** 0.5)
    scale = max(abs(wanted), spread, 1e-30)
    off = min(abs(f - wanted) for f in found) / scale
    return _judged(
        "gradient",
        off,
        _GRADIENT,
        10 * _GRADIENT,
        "the plain gradient agrees with finite differences, so the model detaches nothing that "
        "its logits depend on",
        f"the plain gradient is off finite differences by {off:.1%}: the model detaches something, "
        "or is too rough here for the comparison (experts chosen by a hair)",
    )


# ---------------------------------------------------------------- finite, and close to float32


@dataclass(frozen=True)
class Relevance:
    """What one run gave, reduced.

    Attributes:
        totals: By site, relevance by position [1, pos].
        zeros: By site, where relevance is 0 [1, pos, d_model].
        finite: Whether no number was infinite or NaN.
        at_risk: Bound on the share of relevance that the activations' underflow may have cost.
        vanished: Share of this run's relevance where ``zeros`` of the other run are.
    """

    totals: dict[str, Tensor]
    zeros: dict[str, Tensor]
    finite: bool
    at_risk: float
    vanished: float


def relevance_at_sites(
    model: Any,
    tokens: Tensor,
    objective: Objective,
    rule_set: RuleSet,
    other: Relevance | None = None,
) -> Relevance:
    """Relevance at the embeddings and along the residual stream."""
    totals: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    vanished: list[float] = [0.0]
    finite: list[bool] = []
    lost: dict[str, float] = {}
    mass: dict[str, float] = {}

    def reading(name: str) -> Reading:
        def sink(x: Tensor, g: Tensor) -> None:
            r = relevance_of(x, g)
            totals[name] = r.sum(-1).double().cpu()
            finite.append(bool(torch.isfinite(r).all()))
            zeros[name] = (r == 0).cpu()
            lost[name], mass[name] = float(underflow(x, g)), float(r.abs().sum())
            if other is not None and name in other.zeros and mass[name] > 0:
                gone = r.abs().masked_fill(~other.zeros[name].to(r.device), 0.0)
                vanished.append(float(gone.sum()) / mass[name])

        return Reading(name, sink)

    points: dict[int, str] = {}
    for name, point in model.hook_dict.items():
        if name == LEAVES[0] or (_STREAM.search(name) and not name.endswith("mid")):
            points.setdefault(id(point), name)
    run(model, tokens, objective, rule_set, [reading(name) for name in points.values()])
    largest = max(mass.values(), default=0.0)
    at_risk = max(lost.values(), default=0.0) / max(largest, 1e-30)
    return Relevance(totals, zeros, all(finite), at_risk, max(vanished))


_AT_RISK = 0.01


def overflow(model: Any, what: str = "the model's logits are") -> Check:
    """Not finite."""
    name = str(dtype_of(model)).removeprefix("torch.")
    other = "bfloat16 or float32" if name == "float16" else "float32"
    says = f"{what} infinite or not a number in {name}; load the model in {other}"
    return Check("finite", "failed", float("inf"), _AT_RISK, says)


def check_finite(model: Any, found: Relevance, exact: Relevance | None) -> Check:
    """Is all relevance finite, and does none vanish in the model's type?"""
    if not found.finite:
        return overflow(model, "relevance is")
    name = str(dtype_of(model)).removeprefix("torch.")
    worst = max(found.at_risk, exact.vanished if exact is not None else 0.0)
    return _judged(
        "finite",
        worst,
        _AT_RISK,
        float("inf"),
        f"all relevance is finite in {name}; {worst:.2%} of it may have vanished by underflow",
        f"{worst:.1%} of the relevance vanished or may have vanished by underflow in {name}; load "
        "the model in bfloat16 or float32",
    )


_CLOSE = 0.02


def check_precision(model: Any, found: Relevance, exact: Relevance | None, why: str) -> Check:
    """How far is relevance from that of the same rounded weights in float32?"""
    name = str(dtype_of(model)).removeprefix("torch.")
    if exact is None:
        return skipped("precision", why)
    off = {
        site: float((found.totals[site] - r).abs().max() / r.abs().max().clamp_min(1e-30))
        for site, r in exact.totals.items()
        if site in found.totals
    }
    worst = max(off, key=lambda site: off[site])
    at_tokens = off.get(LEAVES[0], off[worst])
    account = (
        f"{name} relevance of the prompt's tokens is within {at_tokens:.2%} of float32's on the "
        f"same weights; at the worst site, {worst}, within {off[worst]:.2%} of the largest"
    )
    return _judged("precision", off[worst], _CLOSE, float("inf"), account, account)


def in_float32_too(
    model: Any, tokens: Tensor, objective: Objective, rule_set: RuleSet, found: Relevance
) -> tuple[Relevance | None, str]:
    """The same relevance with the same rounded weights in float32, or why not."""
    if dtype_of(model) not in LOW:
        name = str(dtype_of(model)).removeprefix("torch.")
        return None, f"the model is in {name} already: there is nothing to compare with"
    why = _no_room(model)
    if why:
        return None, why
    with in_float32(model):
        return relevance_at_sites(model, tokens, objective, rule_set, found), ""


def _no_room(model: Any) -> str:
    """Why a float32 copy of the weights cannot be made, or nothing."""
    parameters = list(model.original_model.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return "some weights are not in memory (offloaded), so no float32 copy can be made of them"
    wanted: dict[torch.device, int] = {}
    for p in parameters:
        wanted[p.device] = wanted.get(p.device, 0) + (4 * p.numel() if p.dtype in LOW else 0)
    for device, size in wanted.items():
        room = _free(device)
        if room is not None and size > 0.8 * room:
            return (
                f"a float32 copy of the weights takes {size / 2**30:.1f} GiB, and {device} has "
                f"{room / 2**30:.1f} GiB free"
            )
    return ""


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return None
