"""The user's hooks and runs in tiles: hooks that only observe are set aside, others rule tiles out.

In tiles a hook would receive a few positions at a time, counted from the start of the tile. A hook
that writes to positions 1,190 to 1,240 would find an empty range in every tile and have no effect;
one that takes a mean over positions would take a different mean. So a hook that edits nothing in
any tile may still edit the prompt, and what a hook does with a tensor cannot be seen without
calling it. Each hook is therefore called as in the model's own forward: a forward of the whole
prompt is run first, without gradients, which needs a fraction of the memory of a backward, and what
each hook does there is observed.

If all of them only observe, each has now been called once, and the model computes the same without
them: they are set aside while the tiles run. If one edits, or if that forward does not fit, the run
is not done in tiles. Backward hooks would receive gradients tile by tile, from the last to the
first, and may change them, so only the plain engine runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...errors import NotTileableError
from ...hooks.user_hooks import aside, observed, require_no_new, user_hooks
from ...inputs.tokens import model_device
from ..fused import without_rules
from ..memory import fits_forward, forward_bytes, free_bytes, gib

_WORDS = {
    "in place": "writes into its tensor",
    "returned": "returns another tensor",
    "gradient": "asks for its tensor's gradient",
}


@contextmanager
def observers_set_aside(
    model: Any, tokens: Tensor, *, backward: bool = True, fusing: bool = False
) -> Iterator[None]:
    """Set the user's hooks aside inside the ``with`` block, having checked that they only observe.

    Args:
        model: The bridge, without any of this package's hooks.
        tokens: Token ids, [1, pos].
        backward: Whether a backward is run inside the block.
        fusing: Whether the hooks may be shown a forward with fused attention; those at scores and
            patterns are shown these all the same.

    Raises:
        NotTileableError: a hook edits, or is called in the backward, or this cannot be determined.
        ModelStateError: a hook adds another one to the model.
    """
    hooks = user_hooks(model)
    later = [hook for hook in hooks if not hook.is_forward]
    if later and backward:
        raise NotTileableError(
            f"The backward hook at {later[0]} would be given the gradients of a few positions at a "
            "time."
        )
    if len(later) < len(hooks):
        length = int(tokens.shape[1])
        fused = without_rules(model, "fused", length) if fusing else None
        n_fused = 0 if fused is None else len(fused.candidates)
        if not fits_forward(model, length, fused=n_fused):
            raise NotTileableError(
                f"The hook at {next(h for h in hooks if h.is_forward)} may change values, and in "
                "tiles it would be given a few positions at a time, counted from the tile's start. "
                "Finding out takes a forward of the whole prompt, which needs about "
                f"{gib(forward_bytes(model, length, fused=n_fused))}; "
                f"{gib(free_bytes(model_device(model)))} are free. Without the hook, tiles work."
            )
        try:
            with (
                torch.no_grad(),
                nullcontext() if fused is None else fused.active(),
                observed(hooks, gradients=backward) as seen,
            ):
                model(tokens)
        except RuntimeError as error:
            raise NotTileableError(
                f"A forward with the hooks on the model fails: {error}"
            ) from error
        edit = next((call for call in seen if not call.looked_only), None)
        if edit is not None:
            raise NotTileableError(
                f"The hook at {edit.hook} {_WORDS[edit.how]}; in tiles it would be given a few "
                "positions at a time, counted from the tile's start, which are not those of the "
                "model's own forward."
            )
        require_no_new(model, hooks)
        hooks = user_hooks(model)  # one may have removed itself
    with aside(hooks):
        yield
