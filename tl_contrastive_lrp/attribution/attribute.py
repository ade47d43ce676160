"""``attribute``: explain one prediction, from one forward and one backward.

What is read is reduced inside the backward (summed over hidden dimensions), so the result needs
O(layers · pos) memory beside what autograd itself keeps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..engine.memory import Memory, choose
from ..engine.relevance_sums import RelevanceSums, add_heads
from ..engine.run import RunResult, run
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
from ..inputs.objective import Objective, positions_of, questions
from ..inputs.tokens import model_name, single_prompt, special_ids, special_mask, str_tokens
from ..rules.rule_sets import DEFAULT_RULES, RuleSet
from ..rules.threads import one_at_a_time
from .ledger import Ledger
from .result import Attribution

if TYPE_CHECKING:
    from ..engine.prefilled import Prefilled
    from ..engine.reading import Reading


def _biases(model: Any) -> dict[str, Tensor]:
    """Every bias that the model adds, by the HookPoint behind it."""
    hook_dict = hook_points(model)
    found: dict[str, Tensor] = {}
    for path, component in components(model).items():
        with loaded(component):
            bias = bias_of(component.original_component)
            if bias is not None and f"{path}.hook_out" in hook_dict and bias.any():
                found[f"{path}.hook_out"] = bias.detach()
    return found


def _step_of(name: str, n_layers: int) -> int:
    """Index of the ledger row a bias belongs to: 0 embedding, 1 + block, last: after the blocks."""
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    if name.startswith(("embed", "pos_embed")):
        return 0
    return n_layers + 1


@dataclass(frozen=True, eq=False)
class _Reads:
    """What ``attribute`` reads: the sums, and under which names they are kept."""

    sums: RelevanceSums
    heads: list[str]
    neurons: list[str]
    biases: list[str]


def _reads(model: Any, neurons: bool) -> _Reads:
    """The sums of ``attribute``.

    Raises:
        ValueError: ``neurons`` of a model with experts.
    """
    n_layers = int(model.cfg.n_layers)
    sums, biases, hook_dict = RelevanceSums(), _biases(model), hook_points(model)
    for name in (*LEAVES, *residual_sites(model)):
        if name in hook_dict:
            sums.add(name, lambda r: r.sum(-1)[0])
    heads = [add_heads(sums, model, layer) for layer in range(n_layers)]
    if neurons and (missing := without_neurons(model)) is not None:
        raise ValueError(
            f"{missing} is a mixture of experts, whose neurons have no HookPoint; leave out "
            "neurons=True. Relevance of its output is at hook_mlp_out."
        )
    by_neuron = [f"blocks.{i}.mlp.hook_post" for i in range(n_layers if neurons else 0)]
    for name in by_neuron:
        sums.add(name, lambda r: r[0])
    for name, bias in biases.items():
        sums.add_bias(name, bias)
    return _Reads(sums, heads, by_neuron, list(biases))


def relevance_readings(model: Any, *, neurons: bool = False) -> list[Reading]:
    """What ``attribute`` will read, for ``prefilled.prefill_prompt``.

    Raises:
        ValueError: ``neurons`` of a model with experts.
    """
    return _reads(model, neurons).sums.readings


class Settings(TypedDict, total=False):
    """What ``attribute`` takes by name, for type checkers."""

    target: object
    contrast: object
    pos: int
    rules: str | RuleSet
    neurons: bool
    memory: Memory
    tile: int | None
    progress: bool
    checkpoint_dir: str | os.PathLike[str] | None
    prepend_bos: bool | None
    prefilled: Prefilled | None


@overload
def attribute(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    objectives: None = None,
    **settings: Unpack[Settings],
) -> Attribution: ...


@overload
def attribute(
    model: Any,
    prompt: str | Tensor,
    objective: None = None,
    *,
    objectives: Sequence[Callable[[Tensor], Tensor]],
    **settings: Unpack[Settings],
) -> list[Attribution]: ...


@one_at_a_time
def attribute(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    objectives: Sequence[Callable[[Tensor], Tensor]] | None = None,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    rules: str | RuleSet = DEFAULT_RULES,
    neurons: bool = False,
    memory: Memory = "auto",
    tile: int | None = None,
    progress: bool = True,
    checkpoint_dir: str | os.PathLike[str] | None = None,
    prepend_bos: bool | None = None,
    prefilled: Prefilled | None = None,
) -> Attribution | list[Attribution]:
    """Why did the model prefer one token over another?

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        prompt: Text, or token ids [pos] or [1, pos].
        objective: As from ``logit_diff``, or any differentiable function of the logits
            [1, pos, vocab] → scalar, also of several positions (``positions`` of the result says
            which); or give ``target`` and ``contrast`` instead.
        objectives: Several, as a list; they share the forward, and in tiles every block's second
            run, so each further one costs a backward only.
        target: The token the model preferred (usually wrong), as for ``logit_diff``.
        contrast: The token it should have preferred.
        pos: Position whose next token is explained, with ``target`` and ``contrast``; negative
            counts from the end.
        rules: Name of a rule set, or a ``RuleSet``.
        neurons: Also keep every MLP neuron's relevance at every position.
        memory: "plain" keeps every block's attention for one backward; "tiled" goes block by
            block and tile by tile, in memory linear in the prompt; "auto" takes tiles where the
            plain way would not fit. The result says what was done.
        tile: Positions a tile; chosen if None.
        progress: Show a bar where tiles are used.
        checkpoint_dir: A folder of its own for what is finished, so that a run in tiles that was
            stopped goes on from there with the same result.
        prepend_bos: Whether a text begins with the BOS token, as in ``model.to_tokens``. None: the
            model's default, ``model.cfg.default_prepend_bos``, but no second one before a text that
            begins with it, as a chat template's output does. Ids are taken as they are.
        prefilled: A forward of this prompt under these rules that was run before
            (``prefilled.prefill_prompt``); ``memory`` and ``tile`` are those of it then.

    Returns:
        An ``Attribution``: relevance in logits, positive for the target, of the tokens [pos],
        hidden states [site, pos], heads [layer, head, pos] and, if asked for, neurons [layer, pos,
        d_mlp], all on the CPU. With ``objectives``, a list of one for each.

    Warns:
        SpecialTokenWarning: once a model and kind, where a text's ids begin or end otherwise than
            the model's own tokenizer has it and ``prepend_bos`` does not say so.

    Raises:
        TypeError: ``model`` is no bridge; neither or both of an objective and a target with
            contrast, or an objective that is no function; ``prepend_bos`` is no bool.
        ValueError: ``neurons`` of a model with experts; an unknown ``memory`` or a wrong ``tile``;
            no objectives; ``prefilled`` of another prompt, rules or hooks, not prepared for what is
            asked, or used up.
        TokenError: a target or contrast that is not one token or may be several, an id out of
            range, the same token on both sides, or a position that the prompt does not have.
        PromptError: a prompt that is empty, not one, too long, or on another device.
        ModelStateError: a model in training mode, without gradients, on several devices; one that
            cannot run as ``memory`` says; an objective that gives no differentiable number.
        UncoveredComponentError: no rule covers a part of the model.
        FileFormatError: ``checkpoint_dir`` holds something else.
    """
    require_bridge(model)
    asked = questions(model, objective, objectives, target, contrast, pos)
    given = single_prompt(model, prompt, prepend_bos)
    tokens = given.tokens
    reads = _reads(model, neurons)
    if prefilled is not None:
        prefilled.check(model, tokens, rules)
        choice = prefilled.choice
    else:
        choice = choose(model, tokens.shape[1], memory, tile)
    ran = run(
        model, tokens, asked, rules, reads.sums, choice, may_fall_back=memory == "auto",
        progress=progress, checkpoint_dir=checkpoint_dir, settings=f"nodes {neurons}",
        prefilled=prefilled,
    )  # fmt: skip
    reads.sums.warn_of_underflow()
    ids = tokens[0].cpu()
    prompt_facts: dict[str, Any] = {
        "token_ids": ids,
        "special": special_mask(ids, special_ids(model)),
        "str_tokens": str_tokens(model, ids.tolist()),
        "model_name": model_name(model),
        "prepended_bos": given.prepended_bos,
    }
    made = [
        Attribution(
            **prompt_facts, **_facts(model, *pair, reads.heads, reads.neurons, reads.biases)
        )
        for pair in zip(ran, asked, strict=True)
    ]
    return made if objectives is not None else made[0]


def _facts(
    model: Any,
    ran: RunResult,
    objective: Callable[[Tensor], Tensor],
    heads: list[str],
    by_neuron: list[str],
    biases: list[str],
) -> dict[str, Any]:
    """What an ``Attribution`` says of one objective."""
    kept, sites, n_layers = ran.kept, residual_sites(model), int(model.cfg.n_layers)
    resid = torch.stack([kept[name] for name in sites])
    embedded = kept[LEAVES[0]]
    positions = float(kept[LEAVES[1]].double().sum()) if LEAVES[1] in kept else 0.0
    per_step = [0.0] * (n_layers + 2)
    for name in biases:
        per_step[_step_of(name, n_layers)] += float(kept.get(name, torch.zeros(())))
    ledger = Ledger.balance(
        ("hook_embed", *sites),
        [float(row.double().sum()) for row in (embedded, *resid)],
        per_step,
        positions,
        float(ran.value),
    )
    *earlier, at = positions_of(objective, ran.logits, len(embedded))
    target = objective.target if isinstance(objective, Objective) else ()
    top = int(ran.logits[0, ran.row(at)].argmax())
    return {
        "tokens": embedded,
        "resid": resid,
        "heads": torch.stack([kept[name] for name in heads]),
        "neurons": torch.stack([kept[name] for name in by_neuron]) if by_neuron else None,
        "sites": sites,
        "rules": ran.coverage.rules,
        "coverage": ran.coverage,
        "ledger": ledger,
        "pos": at,
        "earlier_pos": tuple(earlier),
        "target_is_top": top in target,
        "memory": ran.memory,
        **ran.described(objective),
    }
