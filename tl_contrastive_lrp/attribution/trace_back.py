"""``trace_back``: through the model's own reasoning, back to the prompt.

An answer written after a chain of reasoning is predicted mostly from that reasoning, so that its
relevance lies on tokens which the model wrote itself. Here it is handed on, hop by hop, to what
those tokens were predicted from.

**Definition.** Let x_t be the token at position t, and

    f_t = logit(x_t) − mean of all logits,     both read at position t − 1:

how strongly the model predicted what stands at t. A[t, i] is the relevance of token i for f_t under
the rules; by causality it is 0 for i ≥ t. The rules distribute f_t: Σ_i A[t, i] = f_t, less what
ends in biases, in position embeddings and in rules that do not conserve relevance. Hop 0 is R_0[i],
the relevance of token i for the objective, as ``attribute`` gives it. Each further hop replaces the
relevance on the reasoning tokens T by shares of their own predictions:

    R_(h+1)[i] = Σ_(t in T) R_h[t] · A[t, i] / f_t

and the trace is the sum over hops of what lies outside of T, plus what the last hop left on T:

    trace[i] = Σ_h R_h[i]  for i outside of T,         trace[i] = R_last[i]  for i in T.

**One backward a hop.** With fixed numbers w_t = R_h[t] / f_t, R_(h+1) is the relevance for the one
objective Σ_t w_t f_t, since relevance is linear in the objective. Its value is Σ_t R_h[t]: exactly
what is handed on. One forward serves all hops.

**By hand.** Prompt P, reasoning a and b, answer c; f_c = 6 is made of P 1, a 2, b 3; f_b = 4 of P 3
and a 1; f_a = 5 of P 5. Hop 0 is (P 1, a 2, b 3). Hop 1 hands on 2 and 3, with weights 2/5 and 3/4:
P gets 2/5 · 5 + 3/4 · 3 = 4.25 and a gets 3/4 · 1 = 0.75. Hop 2 hands on 0.75 with the weight
0.75/5: P gets 0.75. The trace of P is 1 + 4.25 + 0.75 = 6.

**What follows.** The trace is signed, and linear in the objective: the trace of a difference is the
difference of the traces, that of −Δℓ the negative. Relevance only moves to earlier tokens, so that
after as many hops as T has tokens nothing is left on it. T and f do not depend on the objective.

**Why the mean.** Shares need an f_t that is positive and not small. A logit alone can be anything,
as adding a number to all logits changes no prediction; a log-probability is 0 where the model is
certain; a difference to the best other tokens is small or negative where it is not. A token that
the model chose lies far above the mean of the logits, certain or not. Where it does not (text that
the model did not write: a tool's result, a forced word), there is no prediction to hand relevance
on to: tokens less than ``least`` standard deviations of the logits above the mean are not in T.
They keep what lands on them, and the account lists it as ``held``.

**Why f_t and not Σ_i A[t, i].** Dividing by f_t lets biases and position embeddings keep their
part, as LRP does; the account lists what is lost so. The sum over tokens would hand on everything,
but is known only after one backward for each token, and can be 0.

**Why CP-LRP.** Shares of one hop multiply with those of the next, so a rule set that creates a
fifth of f_t in the softmax's gradient makes 2.5 times as much relevance in five hops, and one that
loses half leaves a thirtieth. CP-LRP does neither. Other sets may be given; the account shows it.

**Where it fails.** Where contributions to f_t cancel, Σ_i |A[t, i]| / f_t is large and a hop
multiplies absolute relevance; the account has that factor as ``growth``. Relevance often moves by a
token or two a hop, so that long reasoning takes many (``hops=None``). It follows why the model
predicted the reasoning, not whether the answer would change with it; that takes an intervention.

FlashTrace (arXiv:2602.01914) has the same recursion over spans, with contributions that are not
negative: hops weighted by the share of importance that lies on the reasoning. A sign, a contrast
and an account of what is lost need the definition above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..engine.fused import AttentionKind
from ..engine.memory import Memory
from ..engine.prefilled import Prefilled, prefill_prompt
from ..engine.run import RunOptions
from ..errors import ModelStateError, TokenError
from ..inputs.answers import AnswerDiff
from ..inputs.bridge import require_bridge
from ..inputs.facts import PromptFacts
from ..inputs.objective import for_one_prompt, positions_read
from ..inputs.tokens import vocab_size
from ..inputs.weighted_span import WeightedSpan
from ..rules.rule_sets import RuleSet
from ..rules.threads import one_at_a_time
from .attribute import attribute, relevance_readings
from .result import Attribution
from .trace import Trace

Span = tuple[int, int]
Against = tuple[Literal["tokens", "mean", "none"], tuple[int, ...]]

# The only set that distributes f_t in full, apart from biases, position embeddings and soft-caps.
CONSERVING_RULES = "cplrp"
# With hops=None: the share of hop 0's absolute relevance below which no further hop is made.
_ENOUGH = 0.01


@one_at_a_time
def trace_back(
    model: Any,
    tokens: str | Tensor,
    span: Span | Callable[[Tensor], Tensor],
    through: Span,
    hops: int | None = 2,
    *,
    against: Literal["mean", "none"] | Sequence[int] | Tensor | None = None,
    least: float = 1.0,
    rules: str | RuleSet = CONSERVING_RULES,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
) -> Trace:
    """Explain an answer through the model's own reasoning, back to the prompt.

    Relevance that lands on reasoning tokens is handed on to what those tokens were predicted from:
    token t's share by its own prediction f_t, its logit minus the mean of all logits. Each hop is
    one backward, however long the reasoning is, and all share one forward. The trace is in logits,
    signed and linear in the objective. Its account says what each hop kept and lost.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Prompt, reasoning and answer: text, or token ids [pos] or [1, pos].
        span: The tokens to explain, as positions (start, stop), ``stop`` excluded: the sum of
            their logits, each held against ``against``. Or any objective, such as
            ``logit_diff(model, target, contrast)``: why this answer and not that one?
        through: The reasoning, as positions (start, stop). It may include the span.
        hops: How often relevance is handed on; 0 for ``attribute``'s own answer, None until at most
            1 % of hop 0's absolute relevance is left on the reasoning.
        against: What is subtracted from each logit of the span: the "mean" of all logits (the
            default), "none", or one token id for each token of the span; where that is the token
            itself, its term is 0. Reasoning tokens are always held against the mean.
        least: By how many standard deviations of the logits a token must lie above their mean to
            hand on its relevance, from 0. Others keep what lands on them.
        rules: Name of a rule set, or a ``RuleSet``. The default, CP-LRP, conserves relevance, so
            that shares add up to 1. Others lose or create some in each hop, which multiplies.
        memory: "auto", "plain" or "tiled", as for ``attribute``.
        tile: Positions per tile, as for ``attribute``.
        progress: Show a progress bar in tiles.
        attention: "auto", "fused" or "eager", as for ``attribute``.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Returns:
        A ``Trace``: the relevance of every token after all hops, each hop's ``Attribution``, and
        the account.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``model`` is not a bridge; ``against`` beside an objective; the difference of two
            answers.
        ValueError: ``hops`` or ``least`` is negative; or as ``attribute``.
        TokenError: ``span`` or ``through`` is no pair of positions that the prompt has, or is
            empty; reasoning on which the objective cannot depend; ``against`` is unknown, repeats
            every token of the span, or has an id out of range.
        ModelStateError: the model is not causal, or as ``attribute``.
        PromptError, UncoveredComponentError: as ``attribute``.

    Example:
        >>> tokens = model.to_tokens(case.prompt)
        >>> n = tokens.shape[1]
        >>> trace = clrp.trace_back(model, tokens, objective, through=(n - 20, n), hops=2)
        >>> trace.account["received"].round(4).tolist()[0] == round(trace.delta, 4)
        True
        >>> once = clrp.attribute(model, tokens, objective, rules="cplrp")
        >>> bool(torch.allclose(trace.hops[0].tokens, once.tokens, atol=1e-4))
        True
    """
    require_bridge(model)
    _check_numbers(hops, least)
    options = RunOptions(memory, tile, progress, None, attention)
    facts = PromptFacts.of(model, tokens, prepend_bos)
    ids, length = facts.tokens[0], int(facts.tokens.shape[1])
    where = _positions("through", through, length)
    if isinstance(span, AnswerDiff):
        raise TypeError(
            "trace_back explains one answer that is part of the tokens, not the difference of two "
            "from clrp.answer_diff. Give the answer's positions (start, stop) as span, or "
            "clrp.logit_diff at the first token where the answers differ."
        )
    if callable(span):
        if against is not None:
            raise TypeError(
                "against= belongs to a span of positions; an objective has its own contrast, so "
                "leave it out."
            )
        objective, explained = for_one_prompt(span), None
    else:
        explained = _positions("span", span, length)
        _check_order(where, explained[1], f"span={explained}")
        objective = _written(facts, explained, _reference(model, against, ids, explained))
    most = where[1] - where[0] if hops is None else hops
    written = _written(facts, where, ("mean", ()))
    read = positions_read([objective, written], length)
    plan = options.plan(model, length, read=read)
    prefilled = prefill_prompt(
        model, facts.tokens, rules, relevance_readings(model), plan,
        pos=None, read=read, uses=most + 1, progress=progress, attention=attention,
    )  # fmt: skip

    def run(objective: Callable[[Tensor], Tensor]) -> Attribution:
        result = attribute(
            model, facts.tokens, objective, rules=rules, memory=memory, tile=tile,
            progress=progress, attention=attention, prefilled=prefilled,
        )  # fmt: skip
        _require_causal(result)
        return replace(result, prepended_bos=facts.prepended_bos, segments=facts.segments)

    predicted, handing = _predictions(prefilled, written, length, least)
    results = [run(objective)]
    if explained is None:
        last = results[0].pos + 2  # behind the token that is explained
        _check_order(where, last, f"the objective at position {results[0].pos}")
    enough = _ENOUGH * float(results[0].tokens.double().abs().sum())
    while len(results) <= most:
        landed = results[-1].tokens[slice(*where)].to(predicted) * handing
        left = float(landed.double().abs().sum())
        if left == 0 or (hops is None and left <= enough):
            break
        weights = torch.where(handing, landed / predicted, 0.0)
        results.append(run(replace(written, weights=tuple(weights.tolist()))))
    everywhere = torch.zeros(length, dtype=torch.bool)
    everywhere[slice(*where)] = handing.cpu()
    return Trace(tuple(results), where, everywhere, explained, float(least))


def _written(facts: PromptFacts, span: Span, against: Against) -> WeightedSpan:
    """The sum over the tokens at these positions, each with the weight 1."""
    held, contrast = against
    start, stop = span
    text = "".join(facts.str_tokens[start:stop])
    return WeightedSpan(
        tuple(facts.token_ids[start:stop].tolist()), start - 1, held, contrast, text=text,
        contrast_text="another's" if contrast else "",
    )  # fmt: skip


def _predictions(
    prefilled: Prefilled, written: WeightedSpan, length: int, least: float
) -> tuple[Float[Tensor, " token"], Bool[Tensor, " token"]]:
    """f_t of the reasoning tokens, and which of them hand on their relevance."""
    logits, read = prefilled.logits_around(written.positions(length))
    local = replace(written, first=read.index(written.first))
    (target,), held = local.terms(logits.detach())
    assert held is not None
    predicted, spread = target - held[0], local.spread(logits.detach())
    return predicted, (predicted > 0) & (predicted >= least * spread)


def _require_causal(result: Attribution) -> None:
    """Refuse a model in which later tokens take part in a prediction.

    Raises:
        ModelStateError: a token behind the last position that was read has relevance.
    """
    if bool(result.tokens[result.pos + 1 :].any()):
        raise ModelStateError(
            f"{result.model_name} is not causal: tokens behind position {result.pos} have "
            "relevance for what it predicts there, so that relevance could not be handed back to "
            "what came before. Use clrp.attribute."
        )


def _check_numbers(hops: object, least: object) -> None:
    whole = isinstance(hops, Integral) and not isinstance(hops, bool) and int(hops) >= 0
    if hops is not None and not whole:
        raise ValueError(
            f"hops={hops!r} must be a whole number, 0 or more, or None to go on until nothing is "
            "left on the reasoning."
        )
    if isinstance(least, bool) or not isinstance(least, Real) or not 0 <= float(least) < math.inf:
        raise ValueError(
            f"least={least!r} must be a number of standard deviations, 0 or more, such as "
            "least=1.0."
        )


def _positions(name: str, span: object, length: int) -> Span:
    """A range of tokens that were predicted, as (start, stop).

    Raises:
        TokenError: It is no pair of whole numbers, is empty, or lies outside of the prompt.
    """
    given: Any = span.tolist() if hasattr(span, "tolist") else span
    pair = isinstance(given, list | tuple) and len(given) == 2
    if not pair or any(isinstance(p, bool) or not isinstance(p, Integral) for p in given):
        raise TokenError(
            f"{name}={span!r} is no range of positions; use two whole numbers (start, stop), such "
            f"as {name}=(5, {length})."
        )
    start, stop = (int(p) for p in given)
    if not 0 <= start < length or stop > length:
        raise TokenError(
            f"{name}=({start}, {stop}) is outside these {length} tokens; positions count from 0 "
            f"and the stop is excluded, so the last token alone is ({length - 1}, {length})."
        )
    if stop <= start:
        raise TokenError(
            f"{name}=({start}, {stop}) is empty; the stop is excluded, so the token at {start} "
            f"alone is ({start}, {start + 1})."
        )
    if start == 0:
        raise TokenError(
            f"{name}=({start}, {stop}) includes the first token, which nothing predicts; start at "
            "1."
        )
    return start, stop


def _check_order(through: Span, stop: int, what: str) -> None:
    """Refuse reasoning on which the explained predictions cannot depend.

    Args:
        through: The reasoning.
        stop: Behind the last token that is explained.
        what: The objective, for the message.

    Raises:
        TokenError: It begins too late, or reaches further than what is explained.
    """
    if through[0] >= stop - 1:
        raise TokenError(
            f"through={through} begins at or behind the last token explained by {what}, so no "
            f"relevance can land on it; begin it before position {stop - 1}."
        )
    if through[1] > stop:
        raise TokenError(
            f"through={through} goes on behind {what}; a prediction depends on nothing that comes "
            f"after it. End it at {stop} or before."
        )


def _reference(model: Any, against: object, ids: Tensor, span: Span) -> Against:
    """What the logits of the span are held against: the keyword of it, and the ids.

    Raises:
        TokenError: An unknown word, another number of ids than of tokens, an id out of range, or
            each token itself.
    """
    if against is None or (isinstance(against, str) and against == "mean"):
        return "mean", ()
    if isinstance(against, str) and against == "none":
        return "none", ()
    given: Any = against.tolist() if hasattr(against, "tolist") else against
    written = ids[slice(*span)]
    whole = isinstance(given, list | tuple) and all(
        isinstance(i, Integral) and not isinstance(i, bool) for i in given
    )
    if not whole or len(given) != len(written):
        raise TokenError(
            f"against={against!r} is unknown; use 'mean', 'none', or a list of {len(written)} "
            "token ids, one for each token of the span. Any other contrast is an objective, given "
            "in place of the span."
        )
    others = torch.tensor(given, dtype=torch.long)
    vocab = vocab_size(model)
    if bool(((others < 0) | (others >= vocab)).any()):
        raise TokenError(f"against={given} has ids outside the vocabulary, 0 to {vocab - 1}.")
    if torch.equal(others, written.cpu()):
        raise TokenError(
            f"against={given} holds every token of the span against itself, which leaves nothing "
            "to explain; give another id where the answers differ."
        )
    return "tokens", tuple(others.tolist())
