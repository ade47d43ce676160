"""Devices: where a model's weights are, and where arithmetic in float64 is possible.

With ``device_map`` accelerate keeps weights on disk or on another device while their module does
not run, or spreads a model over devices. Its hooks bring weights and activations together. Some
devices have no float64 (Apple's MPS is one), so sums that need it are done on the CPU there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelStateError
from ..rules.threads import wrapped_modules, wrapped_parameters


@contextmanager
def loaded(module: Any) -> Iterator[None]:
    """Load the module's own weights for the block; they may be offloaded before and after.

    With ``device_map`` offloading, a parameter is on the "meta" device except while its module
    runs.
    """
    wrapped = getattr(module, "original_component", module)
    if not isinstance(wrapped, nn.Module) or not any(
        p.is_meta for p in wrapped._parameters.values() if p is not None
    ):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(wrapped):
        yield


def _hooks(model: Any) -> Iterator[Any]:
    """The hooks of accelerate, outermost module first."""
    for module in wrapped_modules(model):
        hook = getattr(module, "_hf_hook", None)
        if hook is not None:
            yield from getattr(hook, "hooks", (hook,))


def input_device(model: Any) -> torch.device:
    """Device that token ids must be on, even where the embeddings' weights are on disk.

    Raises:
        ModelStateError: As ``require_one_place``.
    """
    require_one_place(model)
    device: torch.device = wrapped_parameters(model)[0].device
    if device.type != "meta":
        return device
    places = (getattr(hook, "execution_device", None) for hook in _hooks(model))
    place = next(place for place in places if place is not None)
    return torch.device(place)


def require_one_place(model: Any) -> None:
    """Refuse weights on several devices, or on none, that no hook of accelerate brings together.

    Raises:
        ModelStateError: The message lists the devices and says how to load the model.
    """
    places = {p.device for p in wrapped_parameters(model)}
    devices = sorted(str(device) for device in places)
    if len(devices) < 2 and devices != ["meta"]:
        return
    if any(getattr(hook, "execution_device", None) is not None for hook in _hooks(model)):
        return
    if "meta" in devices:
        raise ModelStateError(
            "The model has weights on the meta device, which hold no numbers. Load it with its "
            "weights, or with device_map=... if they do not fit the device."
        )
    raise ModelStateError(
        f"The model's weights are on several devices ({', '.join(devices)}), and nothing moves "
        f"activations between them. Put it on one, model.to({devices[-1]!r}), or load it with "
        "device_map=... or n_devices=..., which spread it and move activations."
    )


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
    """``x`` on a device that has float64: ``x`` itself, or a copy on the CPU."""
    return x if has_float64(x.device) else x.cpu()


def precise(x: Tensor) -> Tensor:
    """``x`` in float64, on its device if that has float64, else on the CPU."""
    return with_float64(x).double()
