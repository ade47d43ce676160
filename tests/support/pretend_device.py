"""A device "other" beside the CPU, for machines without a GPU: real numbers, and CUDA's refusals.

A tensor there holds its numbers in one on the CPU. Operations that mix it with tensors elsewhere
fail as they do on a GPU; autograd runs its backward in a thread of the device, as on a GPU.
On request it has no float64, as Apple's MPS has none. ``set_up`` changes torch for the whole
process: call it in a process of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "other"
aten = torch.ops.aten
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
# TypeErrors name MPS as torch's own do.
_WIDE = (torch.float64, torch.complex128)
_NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
_COPIES = (aten._to_copy.default, aten.copy_.default)
# What lies lazily on a tensor is not seen below where operations arrive here.
_EAGER = {
    aten._efficientzerotensor.default: aten.zeros.default,
    aten._conj.default: aten._conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}


class There(Tensor):
    """A tensor on the device, with its numbers in ``held``."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> There:
        if _without_float64 and held.dtype in _WIDE:
            raise TypeError(_NO_FLOAT64)
        made: There = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=device,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()  # torch has none for subclasses

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.held}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _is_there(device: torch.device) -> bool:
    return device.type == NAME


def _refuse_mixing(func: Any, tensors: list[Tensor]) -> None:
    """As CUDA does: single numbers may be on the CPU, and so may indices."""
    if func in _COPIES:
        return
    if func in _INDEXING and _is_there(tensors[0].device):
        return
    devices = {str(x.device) for x in tensors if _is_there(x.device) or x.dim() > 0}
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(devices))}, in {func}"
        )


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    mine = [x for x in tensors if isinstance(x, There)]
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not mine and (asked is None or not _is_there(asked)):
        return func(*args, **kwargs)
    _refuse_mixing(func, tensors)
    if _without_float64 and mine and kwargs.get("dtype") in _WIDE:
        raise TypeError(_NO_FLOAT64)  # on the way to the CPU too: it is converted before it moves
    to = asked or (tensors[0] if func in _COPIES else mine[0]).device
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}

    def held(x: Any) -> Any:
        return x.held if isinstance(x, There) else x

    args, kwargs = tree_map(held, args), tree_map(held, kwargs)
    if func is aten.histc.default and not args[0].is_floating_point():
        args = (args[0].float(), *args[1:])  # a GPU counts integers, the CPU does not
    out = _EAGER.get(func, func)(*args, **kwargs)
    known = {id(x.held): x for x in mine}

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not _is_there(to):
            return x.clone() if func is aten._to_copy.default else x
        return known[id(x)] if id(x) in known else There(x, to)

    return tree_map(back, out)


class _Everywhere(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations without a tensor of the device, which may make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _empty_strided(size: Any, stride: Any, **how: Any) -> Tensor:
    return There(torch.empty_strided(size, stride, dtype=how.get("dtype")), torch.device(NAME, 0))


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001
    held = [x.held if isinstance(x, There) else x for x in (to, source)]
    held[0].copy_(held[1])
    return to


_library: list[Any] = []  # its registrations last as long as it does
_without_float64 = False


def set_up(*, float64: bool = True) -> None:
    """Make the device known to torch, from here on and for good; with float64 or without."""
    global _without_float64
    _without_float64 = not float64
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch._C._set_only_lift_cpu_tensors(True)
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("empty_strided", _empty_strided, "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    _library.append(library)
    everywhere: Any = _Everywhere()  # type: ignore[no-untyped-call]
    everywhere.__enter__()
