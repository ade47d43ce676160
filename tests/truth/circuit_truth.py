"""A prompt and its corruption for circuits, and plain runs of a model with states put in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from truth.families import random_tokens

TOKENS = random_tokens()
CORRUPTED = TOKENS.clone()
CORRUPTED[0, 2:6] = torch.tensor([9, 20, 33, 41])
N = TOKENS.shape[1]
ASKED = {"target": 7, "contrast": 12}


def objective(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 12]).sum()


def states(
    model: Any, tokens: Tensor, edits: dict[str, Tensor], read: list[str], rows: int = 1
) -> list[Tensor]:
    """What is at ``read`` in ``rows`` plain runs of a prompt with ``edits`` put in place."""
    kept: dict[str, Tensor] = {}

    def put(name: str) -> Any:
        return lambda x, hook: edits[name].to(x).expand(x.shape)  # noqa: ARG005

    def keep(name: str) -> Any:
        def hook_fn(x: Tensor, hook: Any) -> None:  # noqa: ARG001
            kept[name] = x.clone()

        return hook_fn

    points = [name for name in read if name != "logits"]
    hooks = [(name, put(name)) for name in edits] + [(name, keep(name)) for name in points]
    with torch.no_grad():
        kept["logits"] = model.run_with_hooks(tokens.expand(rows, -1), fwd_hooks=hooks)
    return [kept[name] if rows > 1 else kept[name][0] for name in read]
