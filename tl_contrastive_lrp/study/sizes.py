"""The same cases under larger models and earlier checkpoints.

Δℓ keeps its sign convention: positive prefers the base model's wrong token. A larger model corrects
a case if the base prefers the wrong token clearly (Δℓ > 1) and it the right one clearly (Δℓ < −1);
it does not correct it if both exceed 1. Cases in between are neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from .analysis import CaseAnalysis
from .bootstrap import Interval, bootstrap
from .results import ModelEntry, StudyResults

# |Δℓ| in logits that counts as clear.
CLEAR = 1.0
CORRECTED, NOT_CORRECTED = "corrected", "not corrected"
# The published segments, in their order; others follow.
SEGMENTS = ("all", "instruction", "query", "answer")


@dataclass(frozen=True)
class SizePoint:
    """A case under the base and a larger model.

    Attributes:
        case_id: The case.
        benchmark: Its benchmark.
        base: Δℓ of the base model, in logits.
        other: Δℓ of the larger model.
        kind: "corrected", "not corrected" or None.
    """

    case_id: str
    benchmark: str
    base: float
    other: float
    kind: str | None


@dataclass(frozen=True)
class Checkpoints:
    """Δℓ of cases over training.

    Attributes:
        models: The checkpoints in order of steps, and the base last if its step is not among them.
        cases: The cases that every one of these models has an analysis of.
        delta: Δℓ in logits, by case, one number a model.
        mean: Mean over the cases, one interval a model.
        segments: Segment sums, one table a model.
    """

    models: tuple[ModelEntry, ...]
    cases: tuple[str, ...]
    delta: Mapping[str, tuple[float, ...]]
    mean: tuple[Interval, ...]
    segments: tuple[Mapping[str, Interval], ...]


def correction(base: float, other: float) -> str | None:
    """Whether a larger model corrects a case.

    Args:
        base: Δℓ of the base model, in logits.
        other: Δℓ of the larger one.

    Returns:
        "corrected", "not corrected", or None for neither.
    """
    if base > CLEAR and other < -CLEAR:
        return CORRECTED
    return NOT_CORRECTED if base > CLEAR and other > CLEAR else None


def size_points(results: StudyResults, model: str) -> tuple[SizePoint, ...]:
    """The scatter of Δℓ: every case that the base and a model have analyses of.

    Args:
        results: The study.
        model: Name of the other model.

    Returns:
        The points, in the order of the cases.
    """
    base, other = results.of_model(results.base.name), results.of_model(model)
    return tuple(
        SizePoint(
            case.id,
            case.benchmark,
            base[case.id].delta,
            other[case.id].delta,
            correction(base[case.id].delta, other[case.id].delta),
        )
        for case in results.cases
        if case.id in base and case.id in other
    )


def segment_values(analysis: CaseAnalysis) -> dict[str, float]:
    """Normalised segment sums of a case: "all" first, then its segments.

    They are in units of the largest |relevance| of a token that is not special; "all" are all
    tokens that are not special.

    Args:
        analysis: The analysis.

    Returns:
        The sums by name.
    """
    values = analysis.tokens[~analysis.special].double()
    largest = float(values.abs().max()) if len(values) else 0.0
    sums = {"all": float(values.sum()) / largest if largest else 0.0}
    return sums | {one.name: one.normalised for one in analysis.segments}


def segment_means(analyses: Iterable[CaseAnalysis], *, seed: int = 0) -> dict[str, Interval]:
    """Mean normalised segment sums over cases, with bootstrap intervals.

    Args:
        analyses: One analysis a case, of one model and rule set.
        seed: Seed of the bootstrap.

    Returns:
        The mean of each segment over the cases that have it, the published segments first.
    """
    columns: dict[str, list[float]] = {name: [] for name in SEGMENTS}
    for analysis in analyses:
        for name, value in segment_values(analysis).items():
            columns.setdefault(name, []).append(value)
    return {name: bootstrap(values, seed=seed) for name, values in columns.items() if values}


def checkpoints(results: StudyResults, *, seed: int = 0) -> Checkpoints | None:
    """Δℓ and segment sums of the cases over the checkpoints of training.

    Args:
        results: The study.
        seed: Seed of the bootstrap.

    Returns:
        The trajectories; None without checkpoints, or without a case that all of them share.
    """
    models = sorted(
        (model for model in results.models if model.role == "checkpoint"),
        key=lambda model: model.step or 0,
    )
    if not models:
        return None
    if results.base.step is None or results.base.step not in {m.step for m in models}:
        models.append(results.base)
    found = [results.of_model(model.name) for model in models]
    common = tuple(c.id for c in results.cases if all(c.id in analyses for analyses in found))
    if not common:
        return None
    delta = {case: tuple(analyses[case].delta for analyses in found) for case in common}
    columns = np.array(list(delta.values())).T
    return Checkpoints(
        tuple(models),
        common,
        delta,
        tuple(bootstrap(column, seed=seed) for column in columns),
        tuple(segment_means((a[case] for case in common), seed=seed) for a in found),
    )
