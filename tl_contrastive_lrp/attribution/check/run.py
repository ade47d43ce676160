"""``Attribution.check``: the strongest and some random tokens of a map replaced, and a verdict."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...effects import token_effects
from ...effects.measured import measured_sets
from ...effects.token_effects import Replace
from ...errors import ModelStateError, NonFiniteError
from ...hooks.placement import check_ready, check_single
from ...hooks.user_hooks import user_hooks
from ...inputs.objective import question
from ...inputs.segments import How
from ...rules.threads import one_at_a_time
from .question import look, objective_of, prompt_of, require_same
from .result import MapCheck
from .units import Explained, Units


@one_at_a_time
def check_map(
    model: Any,
    result: Explained,
    k: int,
    n_random: int,
    objective: Callable[[Tensor], Tensor] | None,
    by: How | None,
    replace: Replace,
    seed: int,
    window: int | None,
    batch_size: int,
    progress: bool,
) -> MapCheck:
    """See ``Attribution.check``."""
    began = time.perf_counter()
    _check_counts(k, n_random, seed)
    _check_model(model, window)
    units = Units.of(result, by)
    if not isfinite(result.delta):
        raise NonFiniteError(f"The result's Δℓ is {result.delta}, so there is nothing to check.")
    asked = objective_of(model, result) if objective is None else objective
    asked = question(model, asked, None, None, -1)
    prompt = prompt_of(model, result, asked)

    seen = look(model, prompt, asked, result)
    if seen.delta is not None:
        require_same(model, result, asked, seen.delta, seen.scale)
    predicted = token_effects(
        model, prompt.token_ids, asked, replace=replace, window=window,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    require_same(model, result, asked, predicted.delta, seen.scale)
    forwards = seen.forwards + predicted.forwards

    strongest = _strongest(units, k)
    drawn = _drawn(units, strongest, n_random, seed)
    measured_at = torch.cat([strongest, drawn]).sort().values
    if window is None and units.kind == "token":
        measured = predicted.effect[measured_at]  # they are measured
    else:
        which = units.of_token == measured_at[:, None]
        measured, more = measured_sets(
            model, prompt, asked, which, predicted.replaced_by, batch_size, progress
        )
        forwards += more
    of_units = units.summed(predicted.effect)
    _require_finite(torch.cat([of_units, measured]))
    shares = result.ledger.share_to_tokens, result.sink_share
    return MapCheck(
        relevance=units.relevance,
        predicted=of_units,
        measured=measured,
        measured_at=measured_at,
        strongest=strongest,
        drawn=drawn,
        ordinary=units.ordinary,
        starts=units.starts,
        stops=units.stops,
        names=units.names,
        unit=units.kind,
        k=k,
        n_random=n_random,
        seed=seed,
        window=window,
        replaced_with=predicted.replaced_with,
        delta=result.delta,
        objective=result.objective,
        target=result.target,
        contrast=result.contrast,
        rules=result.rules,
        model_name=result.model_name,
        share_to_tokens=shares[0] if isfinite(shares[0]) else None,
        sink_share=shares[1] if isfinite(shares[1]) else None,
        saturation=seen.saturation,
        forwards=forwards,
        seconds=time.perf_counter() - began,
    )


def _check_counts(k: int, n_random: int, seed: int) -> None:
    for name, value, least in (("k", k, 1), ("n_random", n_random, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number from {least}.")


def _check_model(model: Any, window: int | None) -> None:
    """Refuse what would make a number wrong, before anything runs.

    Raises:
        TypeError, ModelStateError: as ``token_effects``.
    """
    check_ready(model, "Checking a map")
    check_single(model)
    hooks = user_hooks(model)
    if hooks and window is not None:
        raise ModelStateError(
            f"The model has a hook of yours at {hooks[0].name!r}, which would see replaced tokens "
            "in the rows of a batch. Remove it (model.reset_hooks()), or have every token "
            "replaced in a run of its own: check(..., window=None)."
        )


def _strongest(units: Units, k: int) -> Int[Tensor, " strongest"]:
    """The ordinary units of largest |relevance|, strongest first; of equal ones the first."""
    among = torch.nonzero(units.ordinary)[:, 0]
    order = torch.argsort(units.relevance[among].abs(), descending=True, stable=True)
    return among[order[:k]]


def _drawn(
    units: Units, strongest: Int[Tensor, " strongest"], n_random: int, seed: int
) -> Int[Tensor, " drawn"]:
    """Other ordinary units, drawn without replacement, in the order of the prompt."""
    others = units.ordinary.clone()
    others[strongest] = False
    among = torch.nonzero(others)[:, 0]
    generator = torch.Generator().manual_seed(seed)
    return among[torch.randperm(len(among), generator=generator)[:n_random]].sort().values


def _require_finite(effects: Float[Tensor, " number"]) -> None:
    bad: Bool[Tensor, " number"] = ~effects.isfinite()
    if bool(bad.any()):
        raise NonFiniteError(
            f"{int(bad.sum())} of {len(bad)} effects are NaN or infinite: with tokens replaced, "
            "the model's numbers overflow. Load it in float32, or replace by tokens "
            'instead of zero embeddings: replace="random".'
        )
