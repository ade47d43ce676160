"""Several continuations of one prompt: one forward of the prompt, and one of each continuation.

The prompt runs once, over a cache whose keys and values keep their autograd graph. Each
continuation, its tail, runs after it over a copy of that cache, so that it sees the prompt and
itself and no other tail. One backward from the sum of all objectives then gives the relevance of
the prompt under that sum, and each tail keeps its own: the same as the sum of separate runs, since
relevance is linear in the objective, at about the cost of one of them.

That a model is like this is not taken for granted. A few tokens are first run in the same way,
without gradients, and the logits of the last of two tails have to be the model's own. Where a model
keeps more than keys and values, where the user's hooks would see a prompt in pieces, and where
rotary positions depend on the length of the whole prompt, there is no such run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import LrpError, is_out_of_memory
from ..hooks.coverage import Coverage
from ..hooks.placement import check_ready, check_single
from ..hooks.user_hooks import user_hooks
from ..inputs.rotary import depends_on_length
from ..inputs.spans import SpanLogit
from ..rules.precision import LOW, first_gradient
from ..rules.rule_sets import RuleSet
from ..rules.threads import frozen_parameters
from .fused import AttentionKind, is_worth
from .plain import Forward, check_value, forward
from .reading import RelevanceSums, pos_axis

# Makes the sums of relevance that one forward is prepared for.
MakeSums = Callable[[], RelevanceSums]

_PROBE, _CUT, _OTHER = 13, 7, 10  # tokens of the probe; where its tails begin, and the first's text
_SLACK, _SLACK_OF_LOW = 1e-4, 0.05
# What a model raises that cannot go on from a cache.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError)


class _NotForkableError(Exception):
    """The model does not run in a fork."""


@dataclass(frozen=True, eq=False)
class Tail:
    """One continuation of the prompt.

    Attributes:
        tokens: The tokens of it that are read, [1, pos]; there may be none.
        sign: Of its objective in the sum.
        objective: Reads the logits [1, 1 + pos, vocab] after the prompt's last token and after
            each token of the tail.
    """

    tokens: Int[Tensor, "1 _"]
    sign: int
    objective: SpanLogit


@dataclass(frozen=True, eq=False)
class ForkedResult:
    """What the forwards and the one backward gave.

    Attributes:
        values: The value of each tail's objective, without its sign.
        logits: What each objective was given, detached.
        relevance: The sums of relevance by name, over the positions of the prompt and then of each
            tail, in logits, on the CPU.
        coverage: Which component got which rule.
        attention: "eager", "fused", or in how many blocks it was fused, as the prompt ran.
    """

    values: tuple[float, ...]
    logits: tuple[Float[Tensor, "1 _ vocab"], ...]
    relevance: dict[str, Tensor]
    coverage: Coverage
    attention: str


class _ForkedCache(DynamicCache):  # type: ignore[misc]
    """Keys and values on their autograd graph, which copies share."""

    def fork(self) -> _ForkedCache:
        """A cache that goes on from here by itself.

        Raises:
            _NotForkableError: A layer keeps more than keys and values.
        """
        if any(type(x) not in (DynamicLayer, DynamicSlidingWindowLayer) for x in self.layers):
            raise _NotForkableError
        own = copy.copy(self)
        own.layers = [copy.copy(layer) for layer in self.layers]  # tensors are never written into
        return own

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Refuse a state other than keys and values.

        Raises:
            _NotForkableError: Always.
        """
        raise _NotForkableError

    update_recurrent_state = update_indexer = update_conv_state


def run_forked(
    model: Any,
    prompt: Int[Tensor, "1 pos"],
    tails: Sequence[Tail],
    rule_set: str | RuleSet,
    make_sums: MakeSums,
    attention: AttentionKind,
) -> ForkedResult | None:
    """Run the prompt once, each tail after it, and one backward of all objectives.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Token ids.
        tails: The continuations and their objectives.
        rule_set: Name of a rule set, or a ``RuleSet``.
        make_sums: Makes the sums of one forward.
        attention: "auto", "fused" or "eager"; the longest of all decides what "auto" is.

    Returns:
        The result, or None where the model has to run each continuation with the whole prompt.

    Raises:
        ModelStateError, UncoveredComponentError: as ``plain.run``.
    """
    check_ready(model, "Relevance")
    check_single(model)
    length = prompt.shape[1] + max(tail.tokens.shape[1] for tail in tails)
    if user_hooks(model) or depends_on_length(model, length):
        return None
    kind: AttentionKind = "fused" if is_worth(attention, length) else "eager"
    kinds = (attention if attention == "auto" and kind == "eager" else kind, kind)
    try:
        _require_own_logits(model, prompt)
        return _run(model, prompt, tails, rule_set, make_sums, kinds)
    except _NotForkableError:
        return None


def _run(
    model: Any,
    prompt: Int[Tensor, "1 pos"],
    tails: Sequence[Tail],
    rule_set: str | RuleSet,
    make_sums: MakeSums,
    kinds: tuple[AttentionKind, AttentionKind],
) -> ForkedResult:
    cache = _ForkedCache(config=model.original_model.config)
    sums = [make_sums()]
    first = forward(
        model, prompt, rule_set, sums[0].readings, attention=kinds[0],
        read=(prompt.shape[1] - 1,), continued=True, past_key_values=cache,
    )  # fmt: skip
    forwards, read = [first], list[Tensor]()
    for tail in tails:
        logits = [first.logits[:, -1:]]
        if tail.tokens.shape[1]:
            sums.append(make_sums())
            after = forward(
                model, tail.tokens, rule_set, sums[-1].readings, attention=kinds[1],
                continued=True, past_key_values=cache.fork(),
            )  # fmt: skip
            forwards.append(after)
            logits.append(after.logits)
        read.append(torch.cat(logits, dim=1))
    values = [
        check_value(tail.objective(rows), [one.logits for one in forwards])
        for tail, rows in zip(tails, read, strict=True)
    ]
    total = torch.stack([t.sign * value for t, value in zip(tails, values, strict=True)]).sum()
    with frozen_parameters(model):
        _backward(model, total, forwards)
    relevance = _joined([one.take() for one in sums], sums[0].axes)
    for one in sums:
        one.warn_of_underflow()
    return ForkedResult(
        tuple(float(value.detach()) for value in values),
        tuple(rows.detach() for rows in read),
        relevance, first.coverage, first.attention,
    )  # fmt: skip


def _backward(model: Any, value: Float[Tensor, ""], forwards: Sequence[Forward]) -> None:
    """Send the gradient of a value back to the embeddings of all forwards."""
    ends = [end for one in forwards for end in one.ends]
    torch.autograd.grad(value, ends, first_gradient(model, value), allow_unused=True)


def _joined(parts: Sequence[dict[str, Tensor]], axes: dict[str, str]) -> dict[str, Tensor]:
    """Sums of the prompt and of each tail, one after the other; those without axes added up."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {
        name: torch.cat([part[name] for part in parts], dim=pos_axis(axes, name))
        if name in axes
        else torch.stack([part[name] for part in parts if name in part]).sum(0)
        for name in names
    }


def _require_own_logits(model: Any, prompt: Int[Tensor, "1 pos"]) -> None:
    """Compare the second of two tails of a few of the prompt's tokens with the model's own logits.

    Raises:
        _NotForkableError: They differ by more than rounding, or the model takes no cache.
    """
    short = prompt.repeat(1, -(-_PROBE // prompt.shape[1]))[:, :_PROBE]
    with torch.no_grad():
        expected = model(short)[:, _CUT:]
        try:
            cache = _ForkedCache(config=model.original_model.config)
            model(short[:, :_CUT], past_key_values=cache)
            model(short[:, _OTHER:], past_key_values=cache.fork())
            found = model(short[:, _CUT:], past_key_values=cache.fork())
        except _REFUSALS as error:
            if isinstance(error, LrpError) or is_out_of_memory(error):
                raise
            raise _NotForkableError from error
    slack = _SLACK_OF_LOW if expected.dtype in LOW else _SLACK
    if not float((found - expected).abs().max()) <= slack * float(expected.abs().max()):
        raise _NotForkableError
