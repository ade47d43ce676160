"""What a prefill's fused attention gave, kept so that a replay need not compute it again.

The backward of fused attention needs z, the pattern times the values, and the logarithm of each
query's sum of exponentials, besides the queries, keys and values that the replay computes anyway.
Both are linear in the prompt, and with them the forward of attention, the part of a replay that
grows with the square of the prompt, is left out. Attention at the tile's last position is computed
all the same: if it is another than in the prefill, nothing kept is used, and the replay finds out
that the block gives another output. Torch gives the second number on CPUs only through the
operation that its fused attention calls; elsewhere nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...inputs.bridge import components
from ...rules.deferred import DeferredAttention
from ...rules.precision import LOW
from ...rules.threads import active_in

_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION, as torch chooses it
_SLACK = 1e-3  # as for a block's output
_SLACK_LOW = 2e-2  # a few roundings of bfloat16
_ARGUMENTS = {"attn_mask", "is_causal", "scale"}  # what deferred attention gives by name

# z [1, head, tile, d_head], the logarithms [1, head, tile], and the scale of the scores.
_Attended = tuple[Tensor, Tensor, float]


class KeptAttention:
    """The fused attention of each component on each tile.

    Attributes:
        tile: The number of the tile that is run.
    """

    def __init__(self) -> None:
        self.tile = 0
        self._kept: dict[tuple[str, int], tuple[_Attended, int]] = {}

    @contextmanager
    def kept(self, model: Any, paths: Iterable[str]) -> Iterator[None]:
        """Keep what these components' attention gives, in this thread only."""
        with self._on(model, paths, again=False):
            yield

    @contextmanager
    def used(self, model: Any, paths: Iterable[str]) -> Iterator[None]:
        """Give these components what was kept, with the gradient of attention."""
        with self._on(model, paths, again=True):
            yield

    @contextmanager
    def _on(self, model: Any, paths: Iterable[str], *, again: bool) -> Iterator[None]:
        parts = components(model)
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(active_in(_Mode(self, path, again=again), parts[path]))
            yield

    def attend(
        self,
        path: str,
        q: Float[Tensor, "1 head query d_head"],
        k: Float[Tensor, "1 head key d_head"],
        v: Float[Tensor, "1 head key d_head"],
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> Float[Tensor, "1 head query d_head"]:
        """Compute fused attention, and keep it."""
        z, sums = _ATTEND(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        self._kept[path, self.tile] = (z, sums, scale), z._version
        return z  # type: ignore[no-any-return]

    def attended(self, path: str, scale: float) -> _Attended | None:
        """What was kept for a component on the current tile, if it was computed at this scale."""
        found, version = self._kept.get((path, self.tile), (None, 0))
        if found is None or found[2] != scale or found[0]._version != version:  # written into since
            return None
        return found


class _Mode(TorchFunctionMode):
    """Keeps, or gives back, what fused attention gives."""

    def __init__(self, kept: KeptAttention, path: str, *, again: bool) -> None:
        super().__init__()
        self.kept, self.path, self.again = kept, path, again

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.matmul and isinstance(args[0], DeferredAttention):
            with (
                self
            ):  # inside a mode's own handler the mode is off, and attention is computed here
                return DeferredAttention.__torch_function__(func, types, args, kwargs)
        attends = func is F.scaled_dot_product_attention and len(args) == 3
        if attends and kwargs.keys() == _ARGUMENTS:
            (q, k, v), scale = args, kwargs["scale"]
            mask, causal = kwargs["attn_mask"], kwargs["is_causal"]
            if self.again:
                found = self.kept.attended(self.path, scale)
                if found is not None and _agrees(found[0], q, k, v, mask, scale):
                    z: Tensor = _Again.apply(q, k, v, *found, mask, causal)
                    return z
            elif _is_flash(q, k, v, mask, causal, scale):
                return self.kept.attend(self.path, q, k, v, mask, causal, scale)
        return func(*args, **kwargs)


def _is_flash(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> bool:
    """Whether torch computes this attention by the operation that is called here."""
    if q.device.type != "cpu" or (mask is not None and mask.dtype != q.dtype):
        return False
    chosen: int = torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, scale=scale)
    return chosen == _FLASH


@torch.no_grad()
def _agrees(z: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> bool:
    """Whether attention at the last position, which sees all keys but masked ones, is as in z."""
    last = None if mask is None else mask[..., -1:, :]
    again = F.scaled_dot_product_attention(q[..., -1:, :], k, v, attn_mask=last, scale=scale)
    expected = z[..., -1:, :]
    slack = _SLACK_LOW if z.dtype in LOW else _SLACK
    return bool((again - expected).abs().max() <= slack * expected.abs().max())


class _Again(torch.autograd.Function):
    """Fused attention whose value is known; its backward is that of torch."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        z: Tensor,
        sums: Tensor,
        scale: float,
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, z, sums, mask)
        ctx.scale, ctx.causal = scale, causal
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, z, sums, mask = ctx.saved_tensors
        gradients = _BACKWARD(g, q, k, v, z, sums, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        return *gradients, None, None, None, None, None
