"""Is relevance finite in the model's type, and how far is it from float32's?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine.plain import run
from ...engine.reading import Reading, relevance_of
from ...inputs.bridge import LEAVES, hook_points
from ...rules.precision import LOW, in_float32, underflow
from ...rules.rule_sets import RuleSet
from .check import Check, ObjectiveFn, dtype_of, judged, no_room, skipped
from .checks import STREAM


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
    objective: ObjectiveFn,
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
            totals[name] = r.sum(-1).cpu().double()
            finite.append(bool(torch.isfinite(r).all()))
            zeros[name] = (r == 0).cpu()
            lost[name], mass[name] = float(underflow(x, g)), float(r.abs().sum())
            if other is not None and name in other.zeros and mass[name] > 0:
                gone = r.abs().masked_fill(~other.zeros[name].to(r.device), 0.0)
                vanished.append(float(gone.sum()) / mass[name])

        return Reading(name, sink)

    points: dict[int, str] = {}
    for name, point in hook_points(model).items():
        if name == LEAVES[0] or (STREAM.search(name) and not name.endswith("mid")):
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
    return judged(
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
    return judged("precision", off[worst], _CLOSE, float("inf"), account, account)


def in_float32_too(
    model: Any, tokens: Tensor, objective: ObjectiveFn, rule_set: RuleSet, found: Relevance
) -> tuple[Relevance | None, str]:
    """The same relevance with the same rounded weights in float32, or why not."""
    if dtype_of(model) not in LOW:
        name = str(dtype_of(model)).removeprefix("torch.")
        return None, f"the model is in {name} already: there is nothing to compare with"
    why = no_room(model)
    if why:
        return None, why
    with in_float32(model):
        return relevance_at_sites(model, tokens, objective, rule_set, found), ""
