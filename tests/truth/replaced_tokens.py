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
    return of_sets(model, tokens, by, torch.eye(tokens.shape[1], dtype=torch.bool), objective)


def of_sets(
    model: Any,
    tokens: Tensor,
    by: Tensor | None,
    which: Tensor,
    objective: Callable[[Tensor], Tensor],
) -> Tensor:
    """The same with the tokens of each row of ``which`` [run, pos] replaced together, [run]."""
    found = []
    for row in (torch.zeros_like(tokens[0], dtype=torch.bool), *which):
        now, silent = tokens.clone(), []
        if by is not None:
            now[0, row] = by[row]
        else:
            silent = torch.nonzero(row)[:, 0].tolist()

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
