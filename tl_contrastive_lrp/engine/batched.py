"""Many prompts, each with an objective of its own, in few forwards and backwards.

Prompts of similar length are the rows of a batch, padded on the right. In a causal model no
position sees those after it, so that padding changes nothing before it and needs no mask; and no
row sees another, so that the sum of all objectives, sent backward once, gives each row its own
gradients. Each objective is evaluated on the logits of its row alone, cut to the prompt's length.

That a model is like this is not taken for granted. Of every batch, the shortest prompt is also run
alone, without gradients, and its logits have to be the same; and relevance at padding has to be
exactly 0 wherever it is read. Where either fails, where the model is not causal, where the user's
hooks would see a batch instead of one prompt, and where a prompt is long enough for tiles, prompts
run one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import LrpError, UncoveredComponentError, is_out_of_memory
from ..hooks.placement import check_ready, check_single
from ..hooks.user_hooks import user_hooks
from ..inputs.facts import ObjectiveFacts
from ..inputs.tokens import model_device
from ..rules.precision import LOW, first_gradient
from ..rules.rule_sets import RuleSet
from ..rules.threads import frozen_parameters
from .fused import is_worth
from .memory import MemoryPlan
from .plain import Forward, RunResult, check_value, forward, independent
from .reading import RelevanceSums
from .run import RunOptions, run

# Share of a batch and of one of its rows that may be padding. Padding costs what tokens cost, and a
# batch saves the fixed time of a forward and a backward for every further row.
_PADDING, _PADDING_OF_ROW = 0.25, 0.5
# What a batch may need: a share of the free memory, and on a CPU, where larger batches are not
# faster, so many bytes.
_SHARE = 0.5
_BYTES_ON_CPU = 1 << 30
# How far the logits of a prompt alone may be from those in the batch, as a share of the largest.
# Rounding is far below; relevance at padding shows exactly what this might miss.
_SLACK, _SLACK_OF_LOW = 1e-4, 0.05


class _NotItsOwnError(Exception):
    """The rows of a batch are not what the prompts are alone."""


def check_batch_size(size: int | None) -> None:
    """Check the number of prompts per batch that the user chose.

    Raises:
        ValueError: It is neither None nor a number from 1.
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(
            f"batch_size={size!r} must be a number of prompts, 1 or more, or None for as many as "
            "fit."
        )


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Let the message of an error in the block begin with the item of a list that it is about.

    Args:
        what: The item, such as "prompts[3]".
    """
    try:
        yield
    except UncoveredComponentError:  # is about the model
        raise
    except Exception as error:
        if error.args and isinstance(error.args[0], str):
            error.args = (f"{what}: {error.args[0]}", *error.args[1:])
        raise


def run_prompts(
    model: Any,
    prompts: Sequence[Int[Tensor, "1 _"]],
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    sums: RelevanceSums,
    options: RunOptions,
    batch_size: int | None = None,
    numbers: Sequence[int] | None = None,
) -> list[RunResult]:
    """Run each prompt with its objective, in batches where these give the same.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompts: The token ids of each.
        objectives: One for each prompt.
        rule_set: Name of a rule set, or a ``RuleSet``.
        sums: What to keep of the relevance.
        options: Memory, progress and attention, as for one prompt.
        batch_size: Prompts per batch; None for as many as fit and are similar in length, 1 for one
            at a time.
        numbers: The place of each prompt in the user's list, for messages.

    Returns:
        One result per prompt, in the order given.

    Raises:
        ModelStateError, UncoveredComponentError, TokenError: as ``run`` with one prompt. If one
            prompt or objective is at fault, the message begins with its place in the list.
    """
    check_ready(model, "Relevance")
    check_single(model)
    plans = [options.plan(model, tokens.shape[1]) for tokens in prompts]
    places = range(len(prompts)) if numbers is None else numbers
    results: dict[int, RunResult] = {}

    def run_alone(which: int) -> None:
        with naming(f"prompts[{places[which]}] with objectives[{places[which]}]"):
            (results[which],) = run(
                model, prompts[which], [objectives[which]], rule_set, sums, plans[which], options,
                settings="",
            )  # fmt: skip

    size = batch_size if _may_be_rows(model) else 1
    lengths = [tokens.shape[1] for tokens in prompts]
    todo = _batches(model, lengths, plans, options, size)
    todo.reverse()
    while todo:
        batch, too_large = todo.pop(), False
        sums.reset()  # of a batch that failed
        if len(batch) == 1:
            run_alone(batch[0])
            continue
        try:
            rows = _run_batch(
                model, [places[i] for i in batch], [prompts[i] for i in batch],
                [objectives[i] for i in batch],
                rule_set, sums, plans[batch[0]].memory, options,
            )  # fmt: skip
            results.update(zip(batch, rows, strict=True))
        except _NotItsOwnError:  # nor will those of other batches be
            todo = [[which] for which in (*batch, *(i for rest in reversed(todo) for i in rest))]
            todo.reverse()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            too_large = True
        if too_large:  # after the handler, when the error has released its tensors
            half = len(batch) // 2
            todo += [batch[half:], batch[:half]]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return [results[which] for which in range(len(prompts))]


def _may_be_rows(model: Any) -> bool:
    """Whether prompts of this model may be rows of a batch, as far as that is known beforehand."""
    return getattr(model.cfg, "attention_dir", "causal") == "causal" and not user_hooks(model)


def _batches(
    model: Any,
    lengths: Sequence[int],
    plans: Sequence[MemoryPlan],
    options: RunOptions,
    size: int | None,
) -> list[list[int]]:
    """Which prompts run together: lists of their numbers, each from the longest to the shortest.

    Prompts planned in tiles are alone, and those whose attention would be computed in different
    ways are not put together. One at a time, prompts keep their order.
    """
    if size == 1:
        return [[which] for which in range(len(lengths))]
    in_tiles = [which for which, plan in enumerate(plans) if plan.tile is not None]
    by_kind: dict[bool, list[int]] = {}
    for which, length in enumerate(lengths):
        if plans[which].tile is None:
            by_kind.setdefault(is_worth(options.attention, length), []).append(which)
    vocab, on_cpu = int(model.cfg.d_vocab), model_device(model).type == "cpu"
    most_bytes = _BYTES_ON_CPU if on_cpu else math.inf
    batches: list[list[int]] = []
    for numbers in by_kind.values():
        batch: list[int] = []
        for which in sorted(numbers, key=lambda i: lengths[i], reverse=True):
            if not batch:
                is_full = True
            elif size is not None:
                is_full = len(batch) == size
            else:
                is_full = not _has_room(
                    [lengths[i] for i in (*batch, which)], plans[batch[0]], vocab, most_bytes
                )
            if not is_full:
                batch.append(which)
            else:
                batch = [which]
                batches.append(batch)
    return [*batches, *([which] for which in in_tiles)]


def _has_room(lengths: Sequence[int], plan: MemoryPlan, vocab: int, most_bytes: float) -> bool:
    """Whether a batch fits into memory and its last prompt is similar in length to the others.

    Args:
        lengths: The number of tokens of each prompt, the longest first.
        plan: That of the longest alone.
        vocab: Number of logits per position.
        most_bytes: How much a batch may need, however much is free.
    """
    rows, longest, last = len(lengths), lengths[0], lengths[-1]
    if last < (1 - _PADDING_OF_ROW) * longest or sum(lengths) < (1 - _PADDING) * rows * longest:
        return False
    # Besides what one prompt needs, each row keeps the gradient of its logits until the backward.
    need = rows * (plan.plain_bytes + 4 * longest * vocab)
    return need <= min(_SHARE * plan.free_bytes, most_bytes)


def _run_batch(
    model: Any,
    numbers: Sequence[int],
    prompts: Sequence[Int[Tensor, "1 _"]],
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rule_set: str | RuleSet,
    sums: RelevanceSums,
    memory: str,
    options: RunOptions,
) -> list[RunResult]:
    """Run prompts, the shortest last, as the rows of one batch.

    Raises:
        _NotItsOwnError: the rows are not what the prompts are alone.
    """
    lengths = [tokens.shape[1] for tokens in prompts]
    with _failing_as_a_batch():
        batch = forward(
            model, _padded(prompts), rule_set, sums.readings, attention=options.attention
        )
        _require_same_logits(model, batch, prompts[-1])
    # Split once: a slice for each row would have a gradient of the size of all logits for each.
    parts = torch.split(batch.logits, 1)
    rows = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
    values, gradients = list[Tensor](), list[Tensor]()
    for which, objective, row in zip(numbers, objectives, rows, strict=True):
        with naming(f"objectives[{which}]"):
            value = check_value(objective(row), [row])
            begin = first_gradient(model, value)
            (g,) = torch.autograd.grad(value, row, begin, allow_unused=True)
            if g is None:
                raise independent()
            gradients.append(g)
            values.append(value.detach().reshape(()))
    with _failing_as_a_batch(), frozen_parameters(model):
        torch.autograd.grad(rows, batch.ends, gradients, allow_unused=True)
    relevance = sums.take_rows(lengths)
    if relevance is None:
        raise _NotItsOwnError
    results = []
    for which, objective, row, value, by_name in zip(
        numbers, objectives, rows, values, relevance, strict=True
    ):
        with naming(f"objectives[{which}]"):
            facts = ObjectiveFacts.of(objective, row.detach(), value, row.shape[1])
        results.append(RunResult(facts, by_name, batch.coverage, memory, batch.attention))
    sums.warn_of_underflow()
    return results


@contextmanager
def _failing_as_a_batch() -> Iterator[None]:
    """Turn the errors of a model that takes no batches into one; a prompt alone shows all others.

    Raises:
        _NotItsOwnError: something failed in the block for another reason than memory.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, LrpError) or is_out_of_memory(error):
            raise
        raise _NotItsOwnError from error


def _padded(prompts: Sequence[Int[Tensor, "1 _"]]) -> Int[Tensor, "batch pos"]:
    """Prompts as one tensor; a shorter one repeats its last token, which every model takes."""
    longest = max(tokens.shape[1] for tokens in prompts)
    return torch.cat(
        [
            torch.cat([tokens, tokens[:, -1:].expand(1, longest - tokens.shape[1])], dim=1)
            for tokens in prompts
        ]
    )


def _require_same_logits(model: Any, batch: Forward, tokens: Int[Tensor, "1 pos"]) -> None:
    """Compare the last row's logits with those of its prompt alone.

    The last row is the shortest, which has the most padding, and which tokens of all other rows
    come before, if a model gives each of a number of places to the first that asks.

    Raises:
        _NotItsOwnError: They differ by more than rounding.
    """
    with torch.no_grad():
        alone: Float[Tensor, "1 pos vocab"] = model(tokens)
    found = batch.logits[-1:, : tokens.shape[1]].detach()
    slack = _SLACK_OF_LOW if alone.dtype in LOW else _SLACK
    if not float((found - alone).abs().max()) <= slack * float(alone.abs().max()):
        raise _NotItsOwnError
