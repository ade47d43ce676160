"""``attribute``: explain one prediction with one forward and one backward.

A call goes through five phases: the question (an objective), the prompt, the plan (what is read,
and which engine runs), the run, and the result. Relevance is reduced inside the backward, summed
over hidden dimensions, so a result takes O(layers · pos) memory besides what autograd itself keeps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine.batched import check_batch_size, naming, run_prompts
from ..engine.forked import Tail, run_forked
from ..engine.fused import AttentionKind
from ..engine.memory import Memory
from ..engine.plain import RunResult
from ..engine.reading import BY_NEURON, BY_POSITION, RelevanceSums
from ..engine.run import RunOptions, run
from ..inputs.answers import AnswerDiff
from ..inputs.bridge import (
    LEAVES,
    bias_of,
    components,
    hook_points,
    require_bridge,
    residual_sites,
    without_neurons,
)
from ..inputs.devices import loaded
from ..inputs.facts import ObjectiveFacts, PromptFacts
from ..inputs.forced import AnswerRun, Side
from ..inputs.objective import positions_read, question, require_objectives
from ..rules.rule_sets import DEFAULT_RULES, RuleSet
from ..rules.threads import one_at_a_time
from .answers import Joined, attribute_answers, read_after
from .ledger import Ledger
from .result import Attribution

if TYPE_CHECKING:
    from ..engine.prefilled import Prefilled
    from ..engine.reading import Reading


@one_at_a_time
def attribute(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    rules: str | RuleSet = DEFAULT_RULES,
    neurons: bool = False,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
) -> Attribution:
    """Explain why the model preferred one token over another.

    The objective, usually Δℓ = logit(target) − logit(contrast) in logits, is attributed to the
    input tokens, hidden states, attention heads and, if requested, neurons, by Layer-wise Relevance
    Propagation (arXiv:2604.17761). Positive relevance supports the target, negative the contrast.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective: What ``logit_diff`` and its siblings return, or any differentiable function of
            the logits [1, pos, vocab] → scalar, also of several positions (``positions`` of the
            result lists them); or the difference of two answers, from ``answer_diff``. Or give
            ``target`` and ``contrast`` instead.
        target: The token the model preferred (usually the wrong one), as for ``logit_diff``.
        contrast: The token it should have preferred.
        pos: Position whose next token is explained, with ``target`` and ``contrast``; negative
            counts from the end.
        rules: Name of a rule set, or a ``RuleSet``.
        neurons: Also keep the relevance of every MLP neuron at every position.
        memory: "plain" keeps the attention of every block for one backward; "tiled" runs every
            block again, tile by tile, in memory linear in the prompt; "auto" uses tiles where the
            plain engine would not fit. The result records which one ran.
        tile: Positions per tile; chosen to fit the free memory by default.
        progress: Show a progress bar in tiles.
        checkpoint_dir: A separate folder for finished blocks, from which an interrupted run in
            tiles is resumed with the same result.
        attention: "eager" computes attention as TransformerLens does, bit for bit. "fused" uses
            torch's fused attention, whose values are the same up to rounding, in every block where
            no hook of yours and no rule needs the scores or the pattern. "auto" takes it where it
            is faster. The result records which one ran.
        prepend_bos: Whether a text begins with the BOS token, as in ``model.to_tokens``. None: the
            model's default, ``model.cfg.default_prepend_bos``, but no second one before a text that
            already begins with it, such as the output of a chat template. Ids are taken as they
            are.
        prefilled: A forward of this prompt under these rules that has already been run
            (``engine.prefilled.prefill_prompt``); it also fixes ``memory``, ``tile`` and
            ``attention``.

    Returns:
        An ``Attribution`` with relevance in logits, on the CPU: of the tokens [pos], hidden states
        [site, pos], heads [layer, head, pos] and, if requested, neurons [layer, pos, d_mlp].

    Warns:
        SpecialTokenWarning: once per model and kind, where the token ids of a text begin or end
            differently from what the model's own tokenizer produces, unless ``prepend_bos``
            requests it.

    Raises:
        TypeError: ``model`` is not a bridge; neither or both of an objective and a target with
            contrast; an objective that is not a function; a ``prepend_bos`` that is not a bool.
        ValueError: ``neurons`` for a model with experts; an unknown ``memory`` or ``attention``, or
            a wrong ``tile``; a ``prefilled`` of another prompt, rule set, state of the model or
            kind of attention, one that was not prepared for this call, or one that has served all
            of its results.
        TokenError: a target or contrast that is not one token or is ambiguous, an id out of range,
            the same token on both sides, or a position that the prompt does not have.
        PromptError: a prompt that is empty, a batch, too long, or on another device.
        ModelStateError: a model in training mode, without gradients, or spread over devices; one
            that cannot run as ``memory`` says; an objective that gives no differentiable number.
        UncoveredComponentError: no rule covers a part of the model.
        FileFormatError: ``checkpoint_dir`` holds something else.

    Example:
        >>> import tl_contrastive_lrp as clrp
        >>> model = clrp.load_demo_model()
        >>> case = clrp.load_demo_cases("code")[0]
        >>> result = clrp.attribute(model, case.prompt, target=case.target, contrast=case.contrast)
        >>> result.delta > 0  # the model preferred the wrong token
        True
        >>> result.tokens.shape == (len(result.str_tokens),)
        True
    """
    require_bridge(model)
    asked = question(model, objective, target, contrast, pos)
    options = RunOptions(memory, tile, progress, checkpoint_dir, attention)
    facts = PromptFacts.of(model, prompt, prepend_bos)
    if isinstance(asked, AnswerDiff):
        options.require_own_forward(prefilled)
        return _answers(model, facts, asked, rules, neurons, options)
    return _attributions(model, facts, [asked], rules, neurons, options, prefilled)[0]


@one_at_a_time
def attribute_each(
    model: Any,
    prompts: str | Tensor | Sequence[str | Tensor],
    objectives: Sequence[Callable[[Tensor], Tensor]],
    *,
    rules: str | RuleSet = DEFAULT_RULES,
    neurons: bool = False,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    attention: AttentionKind = "auto",
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
    batch_size: int | None = None,
) -> list[Attribution]:
    """Explain several predictions: of one prompt, or one of each prompt.

    Objectives of the same prompt share its forward and, in tiles, the second run of every block, so
    each further one costs only a backward.

    Prompts of similar length share a forward and a backward, padded on the right; each result is
    that of its prompt alone, up to rounding. Prompts run one at a time instead in models that are
    not causal, or where padding or other rows would affect a result, which is checked; where hooks
    of yours are on the model, which would see a batch; and in tiles.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompts: One prompt for all objectives, as for ``attribute``, or a list of prompts, one for
            each objective.
        objectives: One or more functions of the logits, or differences of two answers from
            ``answer_diff``, as for ``attribute``. Each difference takes forwards of its own.
        rules: Name of a rule set, or a ``RuleSet``.
        neurons: Also keep the relevance of every MLP neuron at every position.
        memory: "auto", "plain" or "tiled", as for ``attribute``.
        tile: Positions per tile, as for ``attribute``.
        progress: Show a progress bar in tiles.
        checkpoint_dir: As for ``attribute``; for one prompt only.
        attention: "auto", "fused" or "eager", as for ``attribute``.
        prepend_bos: Whether texts begin with the BOS token, as for ``attribute``.
        prefilled: As for ``attribute``; for one prompt only.
        batch_size: Prompts per forward, where they are batched at all; None for as many as fit into
            the free memory and are similar in length, 1 for one at a time.

    Returns:
        One ``Attribution`` per objective, in their order, equal to what ``attribute`` gives, up to
        rounding.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: ``objectives`` is not a list of functions.
        ValueError: no objectives; another number of prompts than of objectives; ``checkpoint_dir``
            or ``prefilled`` with a list of prompts or with ``answer_diff``; a wrong
            ``batch_size``; or as ``attribute``.
        TokenError, PromptError, ModelStateError, UncoveredComponentError, FileFormatError: as
            ``attribute``. With a list of prompts, the message begins with the place in the list of
            the prompt or objective at fault.

    Example:
        >>> second = clrp.target_logit(model, case.target)
        >>> results = clrp.attribute_each(model, case.prompt, [objective, second])
        >>> [round(r.delta - float(r.target_logit - (r.contrast_logit or 0)), 4) for r in results]
        [0.0, 0.0]
    """
    require_bridge(model)
    each = require_objectives(objectives)
    options = RunOptions(memory, tile, progress, checkpoint_dir, attention)
    check_batch_size(batch_size)
    differences = [which for which, one in enumerate(each) if isinstance(one, AnswerDiff)]
    if differences:
        options.require_no_part(prefilled, differences[0])
    if isinstance(prompts, str | Tensor):
        facts = PromptFacts.of(model, prompts, prepend_bos)
        all_facts = [facts] * len(each)
    else:
        if len(prompts) != len(each):
            raise ValueError(
                f"{len(prompts)} prompts and {len(each)} objectives were given; give one prompt "
                "for all objectives, or a list with a prompt for each."
            )
        if checkpoint_dir is not None or prefilled is not None:
            raise ValueError(
                "checkpoint_dir= and prefilled= belong to one prompt; leave them out, or call "
                "clrp.attribute for each prompt."
            )
        all_facts = []
        for which, prompt in enumerate(prompts):
            with naming(f"prompts[{which}]"):
                all_facts.append(PromptFacts.of(model, prompt, prepend_bos))
    results: dict[int, Attribution] = {}
    plain = [which for which in range(len(each)) if which not in differences]
    if plain and isinstance(prompts, str | Tensor):
        found = _attributions(
            model, all_facts[0], [each[i] for i in plain], rules, neurons, options, prefilled
        )
        results.update(zip(plain, found, strict=True))
    elif plain:
        reads = _Reads.of(model, neurons)
        runs = run_prompts(
            model, [all_facts[i].tokens for i in plain], [each[i] for i in plain], rules,
            reads.sums, options, batch_size, numbers=plain,
        )  # fmt: skip
        for which, run_result in zip(plain, runs, strict=True):
            results[which] = reads.attribution(all_facts[which], run_result)
    for which in differences:
        asked = each[which]
        assert isinstance(asked, AnswerDiff)
        with naming(f"objectives[{which}]"):
            results[which] = _answers(model, all_facts[which], asked, rules, neurons, options)
    return [results[which] for which in range(len(each))]


def _attributions(
    model: Any,
    prompt: PromptFacts,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    rules: str | RuleSet,
    neurons: bool,
    options: RunOptions,
    prefilled: Prefilled | None = None,
) -> list[Attribution]:
    """Explain the objectives of one prompt: plan, run, results."""
    reads = _Reads.of(model, neurons)
    if prefilled is not None:
        prefilled.check(model, prompt.tokens, rules)
    length = int(prompt.tokens.shape[1])
    plan = options.plan(model, length, prefilled, positions_read(objectives, length))
    results = run(
        model, prompt.tokens, objectives, rules, reads.sums, plan, options,
        settings=f"nodes {neurons}", prefilled=prefilled,
    )  # fmt: skip
    return [reads.attribution(prompt, result) for result in results]


def _answers(
    model: Any,
    prompt: PromptFacts,
    answers: AnswerDiff,
    rules: str | RuleSet,
    neurons: bool,
    options: RunOptions,
) -> Attribution:
    """Explain the difference of two answers, with one forward of the prompt where that works."""

    def run_one(
        facts: PromptFacts, objective: Callable[[Tensor], Tensor], side: Side | None
    ) -> Attribution:
        return _attributions(model, facts, [objective], rules, neurons, options.of_part(side))[0]

    def run_both(shared: PromptFacts, runs: list[AnswerRun]) -> Joined | None:
        whole = read_after(model, shared, runs)
        read = range(len(shared.token_ids) - 1, len(whole.token_ids))
        plan = options.plan(model, len(whole.token_ids), read=read)
        if plan.tile is not None:
            return None
        reads, length = _Reads.of(model, neurons), len(shared.token_ids)
        tails = [
            Tail(run.prompt.tokens[:, length:], run.sign, replace(run.objective, first=0))
            for run in runs
        ]
        found = run_forked(
            model, shared.tokens, tails, rules, lambda: _Reads.of(model, neurons).sums,
            options.attention,
        )  # fmt: skip
        if found is None:
            return None
        delta = sum(run.sign * value for run, value in zip(runs, found.values, strict=True))
        is_top = any(
            run.side == "target" and tail.objective.target_is_top(rows)
            for run, tail, rows in zip(runs, tails, found.logits, strict=True)
        )
        facts = ObjectiveFacts(delta, delta, None, "", "", "", length - 1, (), is_top)
        result = RunResult(facts, found.relevance, found.coverage, plan.memory, found.attention)
        values = zip((run.side for run in runs), found.values, strict=True)
        return Joined(reads.attribution(replace(whole, segments=()), result), dict(values), is_top)

    return attribute_answers(model, prompt, answers, run_one, run_both)


def relevance_readings(model: Any, *, neurons: bool = False) -> list[Reading]:
    """What ``attribute`` will read, for ``prefilled.prefill_prompt``.

    Raises:
        ValueError: ``neurons`` for a model with experts.
    """
    return _Reads.of(model, neurons).sums.readings


@dataclass(frozen=True, eq=False)
class _Reads:
    """What ``attribute`` reads of a model, and the names under which the sums are stored.

    Attributes:
        sums: The sums of relevance.
        n_layers: Number of blocks.
        sites: HookPoints of the residual stream, input first.
        heads, neurons: Names by block; ``neurons`` is empty if they were not requested.
        biases: The HookPoint behind each bias.
    """

    sums: RelevanceSums
    n_layers: int
    sites: tuple[str, ...]
    heads: list[str]
    neurons: list[str]
    biases: list[str]

    @classmethod
    def of(cls, model: Any, neurons: bool) -> _Reads:
        """Prepare the sums.

        Raises:
            ValueError: ``neurons`` for a model with experts.
        """
        if neurons and (missing := without_neurons(model)) is not None:
            raise ValueError(
                f"{missing} is a mixture of experts, whose neurons have no HookPoint; leave out "
                "neurons=True. Relevance of its output is at hook_mlp_out."
            )
        n_layers, sites = int(model.cfg.n_layers), residual_sites(model)
        sums, hook_dict = RelevanceSums(), hook_points(model)
        for name in (*LEAVES, *sites):
            if name in hook_dict:
                sums.add(name, BY_POSITION)
        heads = [sums.add_heads(model, layer) for layer in range(n_layers)]
        by_neuron = [f"blocks.{i}.mlp.hook_post" for i in range(n_layers if neurons else 0)]
        for name in by_neuron:
            sums.add(name, BY_NEURON)
        biases = _biases(model)
        for name, bias in biases.items():
            sums.add_bias(name, bias)
        return cls(sums, n_layers, sites, heads, by_neuron, list(biases))

    def attribution(self, prompt: PromptFacts, result: RunResult) -> Attribution:
        """The result for one objective, from its sums."""
        by_name, facts = result.relevance, result.objective
        tokens = by_name[LEAVES[0]]
        resid = torch.stack([by_name[name] for name in self.sites])
        heads = torch.stack([by_name[name] for name in self.heads])
        neurons = torch.stack([by_name[name] for name in self.neurons]) if self.neurons else None
        return Attribution(
            tokens=tokens,
            resid=resid,
            heads=heads,
            neurons=neurons,
            token_ids=prompt.token_ids,
            special=prompt.special,
            str_tokens=prompt.str_tokens,
            sites=self.sites,
            delta=facts.delta,
            target_logit=facts.target_logit,
            contrast_logit=facts.contrast_logit,
            objective=facts.objective,
            target=facts.target,
            contrast=facts.contrast,
            rules=result.coverage.rules,
            coverage=result.coverage,
            ledger=self._ledger(by_name, tokens, resid, facts.delta),
            model_name=prompt.model_name,
            pos=facts.pos,
            target_is_top=facts.target_is_top,
            memory=result.memory,
            attention=result.attention,
            prepended_bos=prompt.prepended_bos,
            segments=prompt.segments,
            earlier_pos=facts.earlier_pos,
        )

    def _ledger(
        self, by_name: dict[str, Tensor], tokens: Tensor, resid: Tensor, delta: float
    ) -> Ledger:
        """The account of Δℓ, from the embeddings to the logits."""
        at_positions = by_name.get(LEAVES[1])
        positions = 0.0 if at_positions is None else float(at_positions.double().sum())
        per_step = [0.0] * (self.n_layers + 2)
        for name in self.biases:
            per_step[self._step_of(name)] += float(by_name.get(name, torch.zeros(())))
        totals = [float(row.double().sum()) for row in (tokens, *resid)]
        return Ledger.balance(("hook_embed", *self.sites), totals, per_step, positions, delta)

    def _step_of(self, name: str) -> int:
        """The ledger row of a bias: 0 for the embedding, 1 + block, the last after the blocks."""
        if name.startswith("blocks."):
            return 1 + int(name.split(".")[1])
        return 0 if name.startswith(("embed", "pos_embed")) else self.n_layers + 1


def _biases(model: Any) -> dict[str, Tensor]:
    """Every bias that the model adds, by the HookPoint behind it."""
    hook_dict = hook_points(model)
    biases: dict[str, Tensor] = {}
    for path, component in components(model).items():
        wrapped = component.original_component
        if bias_of(wrapped) is None or f"{path}.hook_out" not in hook_dict:
            continue
        with loaded(component):
            bias = bias_of(wrapped)
            if bias is not None and bias.any():
                biases[f"{path}.hook_out"] = bias.detach()
    return biases
