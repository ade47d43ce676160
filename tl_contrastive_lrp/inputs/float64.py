"""Float64 where the device has it, and on the CPU where it does not, as with Apple's MPS."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def has_float64(device: torch.device) -> bool:
    """Whether tensors on the device can be float64."""
    if device.type in ("cpu", "cuda", "meta"):
        return True
    try:
        torch.zeros((), dtype=torch.float64, device=device)
    except (TypeError, RuntimeError, NotImplementedError):
        return False
    return True


def with_float64(x: Tensor) -> Tensor:
    """``x`` where arithmetic in float64 is possible: as it is, or a copy on the CPU."""
    return x if has_float64(x.device) else x.cpu()


def precise(x: Tensor) -> Tensor:
    """``x`` in float64, on its device if that has float64, else on the CPU."""
    return with_float64(x).double()
