"""Tokens replaced in runs of their own: what is otherwise predicted, measured.

Each run replaces one set of tokens together, one token or a whole segment. By causality nothing
before the first of them changes, so where the model works over a cache of keys and values, runs are
sorted by that position, and each batch begins at its first one, over the keys and values of one
clean run. Elsewhere, and where hooks of the caller's must see whole prompts, each run is whole.
Both give the same numbers up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import LrpError, is_out_of_memory
from ..hooks.user_hooks import user_hooks
from ..inputs.answers import AnswerDiff
from ..inputs.facts import PromptFacts
from ..inputs.forced import runs_of
from ..inputs.objective import logit_diff
from ..inputs.rotary import depends_on_length
from .followed import works_cached
from .passes import PrefixCache, Replaced, StreamCache, logits_at, zeroed
from .questions import Questions, used_tokens
from .streams import attention_components

_ROOM = 1 << 26  # numbers in one block's scores of a batch; one run may take more


@dataclass(frozen=True, eq=False)
class Measured:
    """What replacing sets of tokens does.

    Attributes:
        effect: Δℓ with each set replaced minus Δℓ, [objective, run].
        clean: The prompt's logits at the positions that are read, [read, vocab].
        forwards: What the runs cost, in forwards of the prompt.
    """

    effect: Float[Tensor, "objective run"]
    clean: Float[Tensor, "read vocab"]
    forwards: float


def measured(
    model: Any,
    replaced: Replaced,
    questions: Questions,
    which: Bool[Tensor, "run pos"],
    batch_size: int,
    progress: bool,
) -> Measured:
    """Measure what replacing sets of tokens does to each objective.

    Args:
        model: The bridge.
        replaced: The prompt and what replaces its tokens.
        questions: The objectives.
        which: The tokens that each run replaces; a run may replace none.
        batch_size: Runs in a batch; fewer where their scores would be large.
        progress: Whether to show a progress bar.

    Raises:
        PromptError, ModelStateError: what the model itself raises.
    """
    used = used_tokens(model, replaced, questions.read)
    cache = StreamCache(used.length) if _works_over_a_prefix(model, replaced) else None
    with torch.no_grad():
        over = {} if cache is None else {"past_key_values": cache}
        (clean,) = logits_at(model, used.tokens, questions.read, **over)
    delta = questions.values(clean[None])
    effect = torch.zeros(len(questions.objectives), len(which), dtype=torch.float64)
    positions = used.length
    for runs, start, logits in _batches(
        model, used, questions.read, which[:, : used.length], cache, clean, batch_size, progress
    ):
        effect[:, runs] = questions.values(logits) - delta
        positions += len(runs) * (used.length - start)
    return Measured(effect, clean, positions / replaced.length)


def _works_over_a_prefix(model: Any, replaced: Replaced) -> bool:
    """Whether runs can begin at the first token that they replace, see the module's docstring."""
    if user_hooks(model) or depends_on_length(model, replaced.length):
        return False
    try:
        return works_cached(model, attention_components(model), replaced.tokens)
    except (LrpError, RuntimeError, TypeError, ValueError, AttributeError, KeyError,
            IndexError) as error:  # fmt: skip
        if is_out_of_memory(error):
            raise
        return False


def _batches(
    model: Any,
    used: Replaced,
    read: tuple[int, ...],
    which: Bool[Tensor, "run used"],
    cache: StreamCache | None,
    clean: Float[Tensor, "read vocab"],
    batch_size: int,
    progress: bool,
) -> Iterator[tuple[Int[Tensor, " batch"], int, Float[Tensor, "batch read vocab"]]]:
    """Run the sets in batches.

    Yields:
        Which runs these are, the position from which on they were run, and their logits.
    """
    first = which.to(torch.int8).argmax(1)
    order = torch.argsort(first, stable=True)
    order = order[which[order].any(1)]
    bar = tqdm(total=len(order), desc="replacing tokens", leave=False, disable=not progress)
    while len(order):
        start = 0 if cache is None else int(first[order[0]])
        scores = int(model.cfg.n_heads) * (used.length - start) * used.length
        rows = max(1, min(batch_size, _ROOM // scores))
        runs, order = order[:rows], order[rows:]
        mask = which[runs].to(used.tokens.device)[:, start:]
        tokens = used.tokens[:, start:].repeat(len(runs), 1)
        if used.by is not None:
            tokens = torch.where(mask, used.by[start:], tokens)
        over = {} if cache is None else {"past_key_values": PrefixCache(cache, start)}
        later = tuple(p - start for p in read if p >= start)
        with torch.no_grad(), zeroed(model, mask if used.by is None else None):
            logits = logits_at(model, tokens, later, **over)
        before = clean[: len(read) - len(later)].expand(len(runs), -1, -1)
        bar.update(len(runs))
        yield runs, start, torch.cat([before, logits], 1)
    bar.close()


def measured_sets(
    model: Any,
    prompt: PromptFacts,
    objective: Callable[[Tensor], Tensor] | AnswerDiff,
    which: Bool[Tensor, "run pos"],
    by: Int[Tensor, " pos"] | None,
    batch_size: int,
    progress: bool,
) -> tuple[Float[Tensor, " run"], float]:
    """Measure what replacing sets of tokens does to one objective, or to a difference of answers.

    Args:
        model: The bridge.
        prompt: The prompt.
        objective: The objective; of two answers, each is measured in a run of its own.
        which: The tokens that each run replaces, of the prompt and of what both answers begin with.
        by: The token id that replaces each, [pos]; None for zero embeddings.
        batch_size: Runs in a batch.
        progress: Whether to show a progress bar.

    Returns:
        Δℓ with each set replaced minus Δℓ, and the cost in forwards of the prompt.

    Raises:
        PromptError, ModelStateError: as ``runs_of``.
    """
    runs: list[tuple[int, PromptFacts, Callable[[Tensor], Tensor]]]
    if isinstance(objective, AnswerDiff):
        prompt, of_answers = runs_of(model, prompt, objective)
        runs = [(run.sign, run.prompt, run.objective) for run in of_answers]
        if not runs:
            runs = [(1, prompt, logit_diff(model, objective.target[0], objective.contrast[0]))]
    else:
        runs = [(1, prompt, objective)]
    length, forwards = len(prompt.token_ids), 0.0
    effect = torch.zeros(len(which), dtype=torch.float64)
    for sign, facts, one in runs:
        tokens = facts.tokens
        more = tokens.shape[1] - length  # the answer's own tokens stay
        stand_ins = None if by is None else torch.cat([by.to(tokens), tokens[0, length:]])
        questions = Questions.of(model, [one], tokens)
        found = measured(
            model,
            Replaced(tokens, stand_ins),
            questions,
            torch.nn.functional.pad(which, (0, more)),
            batch_size,
            progress,
        )
        effect += sign * found.effect[0]
        forwards += (found.forwards + questions.forwards) * tokens.shape[1] / length
    return effect, forwards
