"""Marks on tensors inside a wrapped module: which depend on the prompt, and which are weights.

The weights of a router or gate (from a softmax or sigmoid) may be selected, added up and divided
before they weigh anything. Torch does not record this, so the tensors themselves are marked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...rules import functions as rules
from .patterns import is_sigmoid_of

_WEIGHT = "_tl_contrastive_lrp_weight"  # on tensors computed from weights alone
_SOURCE = "_tl_contrastive_lrp_source"  # on a weight: itself, with its ordinary gradient
_GIVEN = "_tl_contrastive_lrp_given"  # on tensors computed from parameters alone


def computed(value: Any) -> bool:
    """Whether a tensor depends on the prompt: parameters may require gradients too."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return False
    return not isinstance(value, torch.nn.Parameter) and not hasattr(value, _GIVEN)


def is_weight(value: Any) -> bool:
    """Whether it is a weight, or does not depend on the prompt."""
    return not computed(value) or hasattr(value, _WEIGHT)


def new_weight(value: Tensor, *, constant: bool) -> Tensor:
    """``value``, the result of a softmax or sigmoid, marked as a weight; ``constant`` or not."""
    weight = value.detach() if constant else _marked(rules.ordinary(value), _WEIGHT)
    return _marked(weight, _SOURCE, value)


def unsure_weight(value: Tensor, *, constant: bool) -> Tensor:
    """As ``new_weight``, for a value whose use will show whether it is a weight."""
    weight = value.detach() if constant else _marked(value, _WEIGHT)
    return _marked(weight, _SOURCE, value)


def _marked(tensor: Tensor, mark: str, value: Any = True) -> Tensor:
    setattr(tensor, mark, value)
    return tensor


def pass_on(args: Any, out: Any) -> Any:
    """``out``, marked as a weight or parameter if all its inputs are weights or parameters."""
    graded = [a for a in tensors(args) if a.requires_grad]
    of_prompt = [a for a in graded if computed(a)]
    if of_prompt and all(is_weight(a) for a in of_prompt):
        for tensor in tensors((out,)):
            _marked(tensor, _WEIGHT)
    elif graded and not of_prompt:
        for tensor in tensors((out,)):
            _marked(tensor, _GIVEN)
    return out


def tensors(values: Any) -> list[Tensor]:
    """The tensors among a call's arguments or results, those in tuples and lists included."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, tuple | list):
            flat.extend(tensors(value))
    return flat


def swish(factors: Any) -> tuple[int, Tensor] | None:
    """The factor that is the sigmoid of the other: its position, and itself with its gradient."""
    pairs = (factors[:2], factors[1::-1]) if len(factors) > 1 else ()
    for i, (s, x) in enumerate(pairs):
        sigmoid = getattr(s, _SOURCE, None)
        if sigmoid is not None and computed(x) and is_sigmoid_of(sigmoid, x):
            return i, sigmoid
    return None
