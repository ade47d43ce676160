"""What replacing a token does, by replacing it: Hugging Face's model, run once for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def effects(
    model: Any, tokens: Tensor, by: Tensor | None, objective: Callable[[Tensor], Tensor]
) -> Tensor:
    """Δℓ with each token replaced minus Δℓ, [pos], in float64.

    Args:
        model: A Hugging Face model in evaluation mode.
        tokens: The prompt, [1, pos].
        by: What replaces each token, [pos]; None sets its embedding to zero.
        objective: Logits [1, pos, vocab] → scalar.
    """
    found = []
    for i in range(-1, tokens.shape[1]):  # -1: none
        now, silent = tokens.clone(), []
        if i >= 0 and by is not None:
            now[0, i] = by[i]
        if i >= 0 and by is None:
            silent = [i]

        def silenced(_: Any, __: Any, output: Tensor, at: list[int] = silent) -> Tensor:
            output = output.clone()
            output[:, at] = 0.0
            return output

        handle = model.get_input_embeddings().register_forward_hook(silenced)
        config, name = model.config, "_experts_implementation_internal"
        experts = getattr(config, name, None)
        try:
            if hasattr(config, name):  # grouped products are there for float32 and less alone
                setattr(config, name, "eager")
            with torch.no_grad():
                found.append(objective(model(now).logits).double())
        finally:
            handle.remove()
            if hasattr(config, name):
                setattr(config, name, experts)
    clean, *changed = torch.stack([x.reshape(()) for x in found])
    return torch.stack(changed) - clean
