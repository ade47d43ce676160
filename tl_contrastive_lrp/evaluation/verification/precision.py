"""Checks of finite relevance, and of its precision against the same weights in float32."""

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
from .checks import (
    STREAM,
    Check,
    ObjectiveFn,
    dtype_of,
    graded,
    no_room_for_float32,
    skipped,
)


@dataclass(frozen=True)
class SiteRelevance:
    """The relevance of one run at the embeddings and along the residual stream, summarised.

    Attributes:
        totals: Relevance by position, [1, pos], for each site.
        zeros: Where relevance is 0, [1, pos, d_model], for each site.
        finite: Whether no value is infinite or NaN.
        at_risk: Upper bound on the share of relevance lost by underflow of activations.
        vanished: Share of this run's relevance at entries where the other run has 0.
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
    other: SiteRelevance | None = None,
) -> SiteRelevance:
    """Measure relevance at the embeddings and along the residual stream.

    Args:
        model: The bridge.
        tokens: The prompt, [1, pos].
        objective: Maps logits to Δℓ.
        rule_set: The rules.
        other: A run in lower precision, whose zeros are compared with this run.
    """
    totals: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}
    vanished: list[float] = [0.0]
    finite: list[bool] = []
    underflows: dict[str, float] = {}
    mass: dict[str, float] = {}

    def reading(name: str) -> Reading:
        def sink(x: Tensor, g: Tensor) -> None:
            r = relevance_of(x, g)
            totals[name] = r.sum(-1).cpu().double()
            finite.append(bool(torch.isfinite(r).all()))
            zeros[name] = (r == 0).cpu()
            underflows[name], mass[name] = float(underflow(x, g).sum()), float(r.abs().sum())
            if other is not None and name in other.zeros and mass[name] > 0:
                lost = r.abs().masked_fill(~other.zeros[name].to(r.device), 0.0)
                vanished.append(float(lost.sum()) / mass[name])

        return Reading(name, sink)

    points: dict[int, str] = {}
    for name, point in hook_points(model).items():
        if name == LEAVES[0] or (STREAM.search(name) and not name.endswith("mid")):
            points.setdefault(id(point), name)
    run(model, tokens, objective, rule_set, [reading(name) for name in points.values()])
    largest = max(mass.values(), default=0.0)
    at_risk = max(underflows.values(), default=0.0) / max(largest, 1e-30)
    return SiteRelevance(totals, zeros, all(finite), at_risk, max(vanished))


_UNDERFLOW_LIMIT = 0.01


def overflow(model: Any, what: str = "the model's logits are") -> Check:
    """Return the failed result for values that are not finite.

    Args:
        model: The bridge.
        what: The values, with their verb.
    """
    name = str(dtype_of(model)).removeprefix("torch.")
    other = "bfloat16 or float32" if name == "float16" else "float32"
    says = f"{what} infinite or not a number in {name}; load the model in {other}"
    return Check("finite", "failed", float("inf"), _UNDERFLOW_LIMIT, says)


def check_finite(model: Any, relevance: SiteRelevance, exact: SiteRelevance | None) -> Check:
    """Check that all relevance is finite and none vanishes in the model's dtype."""
    if not relevance.finite:
        return overflow(model, "relevance is")
    name = str(dtype_of(model)).removeprefix("torch.")
    worst = max(relevance.at_risk, exact.vanished if exact is not None else 0.0)
    return graded(
        "finite",
        worst,
        _UNDERFLOW_LIMIT,
        float("inf"),
        f"all relevance is finite in {name}; {worst:.2%} of it may have vanished by underflow",
        f"{worst:.1%} of the relevance vanished or may have vanished by underflow in {name}; load "
        "the model in bfloat16 or float32",
    )


_PRECISION_LIMIT = 0.02


def check_precision(
    model: Any, relevance: SiteRelevance, exact: SiteRelevance | None, why: str
) -> Check:
    """Check that relevance is close to that of the same rounded weights in float32."""
    name = str(dtype_of(model)).removeprefix("torch.")
    if exact is None:
        return skipped("precision", why)
    errors = {
        site: float((relevance.totals[site] - r).abs().max() / r.abs().max().clamp_min(1e-30))
        for site, r in exact.totals.items()
        if site in relevance.totals
    }
    worst = max(errors, key=lambda site: errors[site])
    at_tokens = errors.get(LEAVES[0], errors[worst])
    summary = (
        f"{name} relevance of the prompt's tokens is within {at_tokens:.2%} of float32's on the "
        f"same weights; at the worst site, {worst}, within {errors[worst]:.2%} of the largest"
    )
    return graded("precision", errors[worst], _PRECISION_LIMIT, float("inf"), summary, summary)


def relevance_in_float32(
    model: Any, tokens: Tensor, objective: ObjectiveFn, rule_set: RuleSet, low: SiteRelevance
) -> tuple[SiteRelevance | None, str]:
    """Measure relevance with the same rounded weights in float32, or return why it cannot be."""
    if dtype_of(model) not in LOW:
        name = str(dtype_of(model)).removeprefix("torch.")
        return None, f"the model is already in {name}: there is nothing to compare with"
    why = no_room_for_float32(model)
    if why:
        return None, why
    with in_float32(model):
        return relevance_at_sites(model, tokens, objective, rule_set, low), ""
