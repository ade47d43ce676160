"""A tiny Phi-3 that turns all positions otherwise once a prompt is longer than a limit."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
from truth import zoo


def stretched(limit: int) -> Any:
    """The model in float32, with positions stretched ("longrope") beyond ``limit`` tokens."""
    row, half = zoo.ROWS["phi3"], 4
    settings = {
        "rope_type": "longrope", "rope_theta": 80.0,
        "short_factor": [1.0] * half, "long_factor": [3.0 + i for i in range(half)],
    }  # fmt: skip
    kwargs = {**row.kwargs, "rope_parameters": settings, "original_max_position_embeddings": limit}
    own = dataclasses.replace(row, name=f"phi3-longrope-{limit}", kwargs=kwargs)
    with mock.patch.dict(zoo.ROWS, {own.name: own}):
        return zoo.boot(own.name, torch.float32)
