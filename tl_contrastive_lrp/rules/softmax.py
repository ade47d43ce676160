"""The softmax of attention with its gradient at a higher temperature (GIM, arXiv:2505.17630).

The scores s receive pᵀ ⊙ (g − Σ pᵀ g) with pᵀ = softmax(s/T), without the factor 1/T, in place of
the same expression in the pattern p itself. Values do not change, as in ``functions``.

Attention sinks are learned logits that join every row of scores and are dropped after the softmax,
so that the pattern's rows sum to less than 1. A rule on the pattern alone, which relies on the
softmax's own backward p ⊙ (g − Σ p g), cannot see the sinks' share. There the rule acts on the
softmax's autograd node itself, and so it does where a user's hook changed the pattern before it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ModelStateError
from .functions import RuleNode, at_least_float32, handed_on, is_constant
from .precision import WideGradient

_RULED = "temperature"  # marks a softmax's autograd node that has its rule


def _to_scores(
    p: Float[Tensor, "*batch key"], g: Float[Tensor, "*batch key"], temperature: float
) -> tuple[Float[Tensor, "*batch key"], Float[Tensor, "*batch key"]]:
    """pᵀ ⊙ (g − Σ pᵀ g), from the softmax ``p`` at temperature 1; and pᵀ, as reusable memory."""
    # softmax(s/T) from softmax(s): pᵀ ∝ p^(1/T). Masked keys have p = 0 and stay 0. It is computed
    # in place, since allocating memory of a pattern's size costs more than the computation.
    tempered = p.pow(1.0 / temperature)
    tempered.div_(tempered.sum(-1, keepdim=True).clamp_min_(torch.finfo(p.dtype).tiny))
    sent = tempered * g
    return sent.addcmul_(tempered, sent.sum(-1, keepdim=True), value=-1.0), tempered


class _SoftmaxTemperature(torch.autograd.Function):
    audit = RuleNode((0,))

    @staticmethod
    def forward(ctx: Any, pattern: Tensor, unrounded: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(pattern, unrounded)
        ctx.temperature = temperature
        return handed_on(pattern)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        pattern, unrounded = ctx.saved_tensors
        # g' may leave float16's range where p does.
        p = at_least_float32(unrounded if isinstance(g, WideGradient) else pattern)
        to_scores, spare = _to_scores(p, at_least_float32(g), ctx.temperature)
        # The softmax's own backward p ⊙ (g' − Σ p g') turns g' = to_scores/p into `to_scores`,
        # because Σ to_scores = 0. Where p is 0, so is to_scores. Below the least normal number,
        # where the tempered weight is at most 1e-19, what is lost is too small to matter.
        least = torch.finfo(p.dtype).tiny
        return to_scores.div_(spare.copy_(p).clamp_min_(least)).to(g.dtype), None, None


def _before_rounding(pattern: Tensor) -> Tensor:
    """The float32 softmax that ``pattern`` was rounded from, which autograd holds; else itself.

    A float16 pattern is 0 below 6e-8, where its square root, at temperature 2, still counts.
    """
    softmax = _own_softmax(pattern)
    if softmax is None or softmax is pattern.grad_fn:
        return pattern
    unrounded: Tensor = softmax._saved_result
    return unrounded.detach()


def _own_softmax(pattern: Tensor) -> Any:
    """The autograd node of the softmax that gave the pattern, perhaps rounded; else None."""
    node: Any = pattern.grad_fn
    if type(node).__name__ == "ToCopyBackward0":
        node = node.next_functions[0][0]
    return node if type(node).__name__ == "SoftmaxBackward0" else None


def was_changed(pattern: Tensor) -> bool:
    """Whether more than rounding lies between a softmax and ``pattern``: a sink, or an edit."""
    return pattern.grad_fn is not None and _own_softmax(pattern) is None


def softmax_temperature(
    pattern: Float[Tensor, "*batch key"], temperature: float
) -> Float[Tensor, "*batch key"]:
    """Apply the rule to a pattern whose rows are a whole softmax; its values do not change.

    Args:
        pattern: softmax(scores), perhaps rounded to the model's type.
        temperature: T, above 0.
    """
    softmax = _own_softmax(pattern)
    if softmax is not None:
        softmax.metadata[_RULED] = True
    out: Tensor = _SoftmaxTemperature.apply(pattern, _before_rounding(pattern), temperature)
    return out


def _softmax_above(pattern: Tensor) -> Any:
    """The autograd node of the only softmax without a rule from which the pattern was computed."""
    softmaxes, seen, pending = set(), set(), [pattern.grad_fn]
    while pending:
        node: Any = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "SoftmaxBackward0":
            softmaxes.add(node)
        else:
            pending += [earlier for earlier, _ in node.next_functions]
    softmax = softmaxes.pop() if len(softmaxes) == 1 else None
    return None if softmax is None or _RULED in softmax.metadata else softmax


def sink_temperature(
    pattern: Float[Tensor, "*batch key"], temperature: float, where: str
) -> Float[Tensor, "*batch key"]:
    """Apply the rule at the softmax itself, for a pattern that was changed after the softmax.

    With sinks, s are the scores and the sinks' logits together, and g is 0 at the sinks. Under a
    user's edit, g is what the edit passes on.

    Args:
        pattern: The softmax's result without the sinks' columns, or an edit of it; returned
            unchanged.
        temperature: T, above 0.
        where: The pattern's name in errors.

    Raises:
        ModelStateError: The pattern was not computed from a single softmax without a rule.
    """
    if pattern.grad_fn is None:  # a constant or a leaf: nothing goes further back
        return pattern
    softmax = _softmax_above(pattern)
    if softmax is None and is_constant(pattern):  # a user's hook put it there
        return pattern
    if softmax is None:
        raise ModelStateError(
            f"The rule for the softmax at {where} needs the softmax that made the pattern, and "
            "another hook replaced it. Remove that hook, or use rules='attnlrp'."
        )
    softmax.metadata[_RULED] = True
    p = at_least_float32(softmax._saved_result.detach())  # the sinks' columns are still in it

    def tempered(_sent: Any, gradients: tuple[Tensor, ...]) -> tuple[Tensor]:
        to_scores, _ = _to_scores(p, at_least_float32(gradients[0]), temperature)
        return (to_scores.to(gradients[0].dtype),)

    softmax.register_hook(tempered)
    return pattern
