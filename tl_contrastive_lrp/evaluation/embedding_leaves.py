"""Embeddings as leaves of autograd: where gradients of a whole run are taken, or inputs changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..hooks.attachment import HookFn
from ..inputs.bridge import LEAVES, public_name


def leaf_hooks(
    model: Any,
    leaves: dict[str, Tensor],
    change: Callable[[Tensor], Tensor] | None = None,
    names: tuple[str, ...] = LEAVES,
) -> list[tuple[str, HookFn]]:
    """Return hooks that replace embeddings [batch, pos, d_model] by leaves that require gradients.

    Args:
        model: The bridge.
        leaves: Receives each leaf under its HookPoint's name in the forward pass.
        change: Computes a leaf's values from the detached embeddings.
        names: The HookPoints; those that the model lacks are skipped.
    """
    hook_dict = model.hook_dict

    def hook_at(name: str) -> tuple[str, HookFn]:
        def hook_fn(tensor: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            value = tensor.detach()
            leaves[name] = (value if change is None else change(value)).requires_grad_(True)
            return leaves[name]

        return public_name(hook_dict, name), hook_fn

    return [hook_at(name) for name in names if name in hook_dict]
