"""The softmax of attention with sinks: its pattern is a part of what the softmax makes.

A sink is a learned logit that joins every row of scores and is dropped after the softmax, so the
pattern's rows sum to less than 1. A rule on the pattern alone, which takes p ⊙ (g − Σ p g) for the
gradient to come, cannot see the sink's share; here the rule acts on the softmax's node itself.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from .errors import ModelStateError
from .rules import at_least_float32


def _softmax_above(pattern: Tensor) -> Any:
    """The autograd node of the softmax that the pattern was cut out of."""
    node: Any = pattern.grad_fn
    while node is not None and node.name() != "SoftmaxBackward0":
        inputs = [below for below, _ in node.next_functions if below is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return node


def sink_temperature(
    pattern: Float[Tensor, "*batch query key"], temperature: float, where: str
) -> Float[Tensor, "*batch query key"]:
    """Softmax gradient at a higher temperature (GIM, arXiv:2505.17630), sinks included.

    With s the scores and the sink's logit together, they receive pᵀ ⊙ (g − Σ pᵀ g) with
    pᵀ = softmax(s/``temperature``) and g = 0 at the sink, without the factor 1/``temperature``.

    Args:
        pattern: What is left of the softmax's result after the sink was dropped; returned as it is.
        temperature: T, above 0.
        where: The pattern's name in errors.

    Raises:
        ModelStateError: the pattern was not made from one softmax and constants.
    """
    if not pattern.requires_grad:
        return pattern
    softmax = _softmax_above(pattern)
    if softmax is None:
        raise ModelStateError(
            f"The rule for the softmax with sinks at {where} needs the softmax that made the "
            "pattern, and another hook replaced it. Remove that hook, or use rules='attnlrp'."
        )
    p = at_least_float32(softmax._saved_result.detach())  # the sinks' columns are still in it

    def tempered(_sent: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        weights = p.pow(1.0 / temperature)
        weights = weights / weights.sum(-1, keepdim=True)
        g = at_least_float32(given[0])
        wanted = weights * (g - (weights * g).sum(-1, keepdim=True))
        return (wanted.to(given[0].dtype),)

    softmax.register_hook(tempered)
    return pattern
