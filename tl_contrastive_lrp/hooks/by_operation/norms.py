"""How a norm looks where it is a call to torch's own function, or written out in operations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rules import functions as rules

_POWERS = ("pow", "__pow__")
ROOTS = ("sqrt", "rsqrt", *_POWERS)
NORMS = ("layer_norm", "rms_norm")


def is_root(name: str, args: tuple[Any, ...], out: Any) -> bool:
    """Whether a call made the denominator of a norm: a root, one number for the last dimension."""
    if name not in ROOTS or (name in _POWERS and args[1:] not in ((0.5,), (-0.5,))):
        return False
    return isinstance(out, Tensor) and out.shape[-1:] == (1,)


class NormCall(NamedTuple):
    """The arguments of ``layer_norm`` or ``rms_norm``: y = weight ⊙ C(x)/√(mean C(x)² + eps)."""

    x: Tensor
    weight: Tensor
    eps: float
    centred: bool

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NormCall:
        """From a call as it was made."""
        names = ["input", "normalized_shape", "weight", "bias", "eps"]
        centred = name == "layer_norm"
        if not centred:
            names.remove("bias")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        x, weight, eps = given["input"], given.get("weight"), given.get("eps")
        if weight is None:
            weight = x.new_ones(1)
        if eps is None:
            eps = 1e-5 if centred else torch.finfo(x.dtype).eps
        return cls(x, weight.detach(), eps, centred)

    def moved(self, tangent: Tensor) -> Tensor:
        """How y moves with x where the denominator is held fixed, for x's ``tangent``."""
        tangent = tangent - tangent.mean(-1, keepdim=True) if self.centred else tangent
        return self.weight * tangent / rules.norm_scale(self.x, self.eps, self.centred)
