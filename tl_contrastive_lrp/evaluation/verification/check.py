"""What one check of ``verify`` returns, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ...engine.memory import free_bytes, gib
from ...rules.precision import LOW

Verdict = Literal["ok", "warning", "failed", "skipped"]
ObjectiveFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """One thing that was measured.

    Attributes:
        name: "audit", "forward", "conservation", "gradient", "finite" or "precision".
        verdict: "ok"; "warning": works, read why; "failed": relevance is wrong; "skipped".
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


def judged(name: str, figure: float, limit: float, bad: float, says: str, otherwise: str) -> Check:
    """ok up to ``limit``, failed from ``bad`` on (and where the figure is not a number)."""
    if figure <= limit:
        return Check(name, "ok", figure, limit, says)
    return Check(name, "warning" if figure < bad else "failed", figure, limit, otherwise)


def dtype_of(model: Any) -> torch.dtype:
    """The least precise floating type among the parameters."""
    dtypes = {p.dtype for p in model.original_model.parameters() if p.is_floating_point()}
    worst: torch.dtype = max(dtypes, key=lambda dtype: float(torch.finfo(dtype).eps))
    return worst


def no_room(model: Any) -> str:
    """Why a float32 copy of the weights cannot be made, or nothing."""
    parameters = list(model.original_model.parameters())
    if any(p.device.type == "meta" for p in parameters):
        return "some weights are not in memory (offloaded), so no float32 copy can be made of them"
    wanted: dict[torch.device, int] = {}
    for p in parameters:
        wanted[p.device] = wanted.get(p.device, 0) + (4 * p.numel() if p.dtype in LOW else 0)
    for device, size in wanted.items():
        room = free_bytes(device)
        if size > 0.8 * room:
            need, free = gib(size), gib(room)
            return f"a float32 copy of the weights takes {need}, and {device} has {free} free"
    return ""
