"""``token_effects``: what replacing each token of a prompt would do to Δℓ, for all tokens at once.

A call goes through the question, the prompt, what replaces its tokens, the run and the result. The
estimator is activation patching's first-order estimate, with the streams at and shortly after the
replaced token, and at the last position, computed exactly, and attention's softmax in closed form
(``streams.py``, ``later.py``). It is no rule set, and its numbers do not add up to Δℓ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replaced_fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..engine.fused import AttentionKind, is_worth
from ..errors import ModelStateError, PromptError
from ..hooks.placement import check_ready, check_single
from ..hooks.user_hooks import user_hooks
from ..inputs.answers import AnswerDiff
from ..inputs.facts import PromptFacts
from ..inputs.forced import runs_of
from ..inputs.objective import logit_diff, question, require_objectives
from ..inputs.rotary import depends_on_length
from ..inputs.tokens import drawable_ids, to_tokens
from ..rules.threads import one_at_a_time
from .estimate import Estimate, estimated, tile_of
from .followed import works_cached
from .measured import measured
from .passes import Replaced
from .questions import Questions
from .result import TokenEffects
from .streams import attention_components

Replace = Literal["zero", "random"] | int | Sequence[int] | Tensor


@dataclass(frozen=True)
class _Options:
    """How to run; see ``token_effects``."""

    window: int | None
    tile: int | None
    batch_size: int
    attention: AttentionKind
    progress: bool

    def __post_init__(self) -> None:
        is_worth(self.attention, 0)  # refuses an unknown kind
        for name in ("window", "tile", "batch_size"):
            value, least = getattr(self, name), int(name != "window")
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number from {least}, or None.")


@one_at_a_time
def token_effects(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    replace: Replace = "zero",
    window: int | None = 2,
    seed: int = 0,
    tile: int | None = None,
    batch_size: int = 16,
    attention: AttentionKind = "auto",
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> TokenEffects:
    """Predict what replacing each token of a prompt would do to Δℓ, for all tokens at once.

    The effect of a token is Δℓ with that token replaced minus Δℓ, in logits: negative where the
    token speaks for the target, positive where it speaks for the contrast. That is the opposite
    sign of relevance. Effects are no relevance: they do not add up to Δℓ, and each is of one token
    replaced while all others stay.

    In a causal model, replacing token i changes nothing before i. The streams of positions i to
    i + ``window`` and of the last position are computed as they are in the true intervention, for
    all tokens together; in between, attention reads the changed keys and values with its softmax in
    closed form, and what that does to Δℓ is taken to first order. It costs a forward and a backward
    and about ``window`` + 3 forwards, where measuring costs a forward for each token.

    Args:
        model: A ``TransformerBridge`` in evaluation mode, causal, without hooks of yours (with
            ``window=None`` it may have some).
        prompt: Text, or token ids [pos] or [1, pos].
        objective: What ``logit_diff`` and its siblings return, or any differentiable function of
            the logits [1, pos, vocab] → scalar; or ``answer_diff``, which takes a run for each
            answer. Or give ``target`` and ``contrast`` instead.
        target: The token the model preferred (usually the wrong one), as for ``logit_diff``.
        contrast: The token it should have preferred.
        pos: Position whose next token is explained, with ``target`` and ``contrast``; negative
            counts from the end.
        replace: "zero" sets the token's embedding to zero; position embeddings stay. "random" takes
            a random token that is not special, drawn for each position. Or a token id, or one for
            each position [pos].
        window: How many positions after the replaced token are computed exactly. None measures
            instead: the model is run once for each token.
        seed: Of the random tokens.
        tile: Positions that are run at a time; chosen by default so that the scores of one block
            fit.
        batch_size: Replaced tokens in one forward of the last position, and where effects are
            measured.
        attention: Whether the forward with gradients fuses attention: "auto", "fused" or "eager",
            as for ``attribute``.
        progress: Show progress bars.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        A ``TokenEffects`` with effects in logits, on the CPU.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``model`` is not a bridge; neither or both of an objective and a target with
            contrast; an objective that is not a function.
        ValueError: an unknown ``replace`` or ``attention``; a ``window``, ``tile`` or
            ``batch_size`` out of range.
        TokenError: a target or contrast that is not one token, or a position that the prompt does
            not have.
        PromptError: a prompt, or token ids to replace its own with, that cannot be used.
        ModelStateError: a model in training mode, without gradients, spread over devices or with
            hooks; an objective that gives no differentiable number.
        UncoveredComponentError: a part of the model in which effects cannot be followed; they can
            be measured.

    Example:
        >>> effects = clrp.token_effects(model, case.prompt, objective, progress=False)
        >>> effects.effect.shape == (len(effects.str_tokens),)
        True
        >>> truth = clrp.token_effects(model, case.prompt, objective, window=None, progress=False)
        >>> bool((effects.effect - truth.effect)[effects.exact].abs().max() < 1e-3)
        True
    """
    check_ready(model, "Predicting effects")
    check_single(model)
    asked = question(model, objective, target, contrast, pos)
    options = _Options(window, tile, batch_size, attention, progress)
    facts = PromptFacts.of(model, prompt, prepend_bos)
    if isinstance(asked, AnswerDiff):
        return _of_answers(model, facts, asked, replace, seed, options)
    by, how = _stand_ins(model, facts.tokens, replace, seed)
    return _effects(model, facts, [asked], by, how, options)[0]


@one_at_a_time
def token_effects_each(
    model: Any,
    prompt: str | Tensor,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    *,
    replace: Replace = "zero",
    window: int | None = 2,
    seed: int = 0,
    tile: int | None = None,
    batch_size: int = 16,
    attention: AttentionKind = "auto",
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> list[TokenEffects]:
    """Predict what replacing each token would do to several objectives of one prompt.

    Those that read the logits at the same positions share all forwards; each further one costs a
    backward and its sums over attention.

    Args:
        model: As for ``token_effects``.
        prompt: As for ``token_effects``.
        objectives: One or more functions of the logits.
        replace: As for ``token_effects``.
        window: As for ``token_effects``.
        seed: As for ``token_effects``.
        tile: As for ``token_effects``.
        batch_size: As for ``token_effects``.
        attention: As for ``token_effects``.
        progress: As for ``token_effects``.
        prepend_bos: As for ``token_effects``.

    Returns:
        One ``TokenEffects`` for each objective, in their order.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``objectives`` is not a list of functions.
        ValueError: no objectives; or as ``token_effects``.
        TokenError, PromptError, ModelStateError, UncoveredComponentError: as ``token_effects``.

    Example:
        >>> second = clrp.target_logit(model, case.target)
        >>> both = clrp.token_effects_each(
        ...     model, case.prompt, [objective, second], progress=False
        ... )
        >>> [len(one.effect) == len(one.str_tokens) for one in both]
        [True, True]
    """
    check_ready(model, "Predicting effects")
    check_single(model)
    each = require_objectives(objectives)
    options = _Options(window, tile, batch_size, attention, progress)
    facts = PromptFacts.of(model, prompt, prepend_bos)
    by, how = _stand_ins(model, facts.tokens, replace, seed)
    # Together, the last position is exact only where all read the same one.
    logits = Questions.of(model, each, facts.tokens).logits
    by_read: dict[tuple[int, ...], list[int]] = {}
    for number, one in enumerate(each):
        read = Questions.of(model, [one], facts.tokens, logits).read
        by_read.setdefault(read, []).append(number)
    found: dict[int, TokenEffects] = {}
    for numbers in by_read.values():
        alike = _effects(model, facts, [each[n] for n in numbers], by, how, options, logits)
        found.update(zip(numbers, alike, strict=True))
    return [found[number] for number in range(len(each))]


def _stand_ins(
    model: Any, tokens: Tensor, replace: Replace, seed: int
) -> tuple[Int[Tensor, " pos"] | None, str]:
    """What replaces each token, None for zero embeddings, and the same in words.

    Raises:
        PromptError: ids that cannot be used.
        ValueError: an unknown ``replace``.
    """
    length = int(tokens.shape[1])
    if isinstance(replace, str):
        if replace == "zero":
            return None, "zero embeddings"
        if replace != "random":
            raise ValueError(
                f"replace={replace!r} is unknown; use 'zero', 'random', a token id, or token ids "
                "[pos]."
            )
        pool = drawable_ids(model)
        generator = torch.Generator().manual_seed(seed)
        drawn = pool[torch.randint(len(pool), (length,), generator=generator)]
        return drawn.to(tokens), f"random tokens (seed {seed})"
    ids = replace if isinstance(replace, Tensor) else torch.tensor(replace)
    if ids.ndim == 0:
        ids = ids.expand(length)
    ids = to_tokens(model, ids.to(tokens.device))
    if ids.shape != tokens.shape:
        raise PromptError(
            f"replace= has {ids.numel()} tokens and the prompt {length}: give one token id, or one "
            "for each position of the prompt, [pos]."
        )
    return ids[0].to(tokens), "the given tokens"


def _effects(
    model: Any,
    facts: PromptFacts,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    by: Int[Tensor, " pos"] | None,
    how: str,
    options: _Options,
    logits: Float[Tensor, "1 pos vocab"] | None = None,
) -> list[TokenEffects]:
    """Run, and make a result of each objective; ``logits`` are the prompt's, if they are known."""
    replaced = Replaced(facts.tokens, by)
    questions = Questions.of(model, objectives, facts.tokens, logits)
    found = _run(model, replaced, questions, options)
    return [
        TokenEffects(
            effect=found.effect[which],
            exact=found.exact.clone(),
            token_ids=facts.token_ids,
            special=facts.special,
            str_tokens=facts.str_tokens,
            replaced_by=None if by is None else by.cpu(),
            replaced_with=how,
            window=options.window,
            delta=described.delta,
            objective=described.objective,
            target=described.target,
            contrast=described.contrast,
            model_name=facts.model_name,
            pos=described.pos,
            earlier_pos=described.earlier_pos,
            forwards=found.forwards + questions.forwards,
            prepended_bos=facts.prepended_bos,
            segments=facts.segments,
        )
        for which, described in enumerate(questions.described(objectives, found.clean))
    ]


def _run(model: Any, replaced: Replaced, questions: Questions, options: _Options) -> Estimate:
    window = options.window
    if window is None:
        each = torch.eye(replaced.length, dtype=torch.bool)
        found = measured(model, replaced, questions, each, options.batch_size, options.progress)
        return Estimate(found.effect, each.any(1), found.clean, found.forwards)
    hooks = user_hooks(model)
    if hooks:
        raise ModelStateError(
            f"The model has a hook of yours at {hooks[0].name!r}, which would see replaced tokens "
            "in the rows of a batch. Remove it (model.reset_hooks()), or measure with window=None."
        )
    parts = attention_components(model)
    tile = None
    cached = works_cached(model, parts, replaced.tokens)
    if cached and not depends_on_length(model, replaced.length):
        tile = options.tile or tile_of(model, replaced.tokens, window)
    return estimated(
        model, parts, replaced, questions, window, tile,
        options.batch_size, options.attention, options.progress,
    )  # fmt: skip


def _of_answers(
    model: Any,
    facts: PromptFacts,
    answers: AnswerDiff,
    replace: Replace,
    seed: int,
    options: _Options,
) -> TokenEffects:
    """Effects on the difference of two answers: those on each answer, subtracted."""
    shared, runs = runs_of(model, facts, answers)
    by, how = _stand_ins(model, shared.tokens, replace, seed)
    if not runs:
        objective = logit_diff(model, answers.target[0], answers.contrast[0])
        return _effects(model, shared, [objective], by, how, options)[0]
    length, of_runs = len(shared.token_ids), []
    for run in runs:
        whole = by
        if by is not None:  # the answers' own tokens stay
            whole = torch.cat([by, run.prompt.tokens[0, length:]])
        of_runs.append(_effects(model, run.prompt, [run.objective], whole, how, options)[0])
    signs = [run.sign for run in runs]
    both = list(zip(signs, of_runs, strict=True))
    return replaced_fields(
        of_runs[0],
        effect=torch.stack([sign * one.effect[:length] for sign, one in both]).sum(0),
        exact=torch.stack([one.exact[:length] for one in of_runs]).all(0),
        token_ids=shared.token_ids,
        special=shared.special,
        str_tokens=shared.str_tokens,
        replaced_by=None if by is None else by.cpu(),
        delta=sum(sign * one.delta for sign, one in both),
        objective=str(answers),
        target=answers.texts[0],
        contrast=answers.texts[1],
        pos=length - 1,
        earlier_pos=(),
        forwards=sum(one.forwards * len(one.str_tokens) / length for one in of_runs),
        segments=shared.segments,
    )
