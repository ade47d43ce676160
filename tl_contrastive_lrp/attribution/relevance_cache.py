"""``run_with_relevance``: TransformerLens' ``run_with_cache``, with relevance in the cache."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache

from ..engine.fused import AttentionKind
from ..engine.plain import run
from ..engine.reading import Reading, relevance_of
from ..errors import TokenError
from ..hooks.attach import uses_native_norm
from ..inputs.bridge import components, hook_points, require_bridge
from ..inputs.objective import Objective, read_rows
from ..inputs.tokens import to_tokens
from ..rules.functions import at_least_float32
from ..rules.rule_sets import DEFAULT_RULES, RuleSet, get_rule_set
from ..rules.threads import one_at_a_time

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

# HookPoints that TransformerLens fires only when a flag of the config is on.
_GATED = {
    "hook_result": "use_attn_result",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}


def _why_not(model: Any, name: str, rule_set: RuleSet) -> str | None:
    """Why a HookPoint can have no relevance, or None."""
    path, _, leaf = name.rpartition(".")
    flag = _GATED.get(leaf)
    if flag is not None and not getattr(model.cfg, flag, False):
        return f"it fires only with cfg.{flag} on (model.set_{flag}(True))"
    if leaf == "hook_scale":
        return "the statistics of a norm are not a node of the relevance graph"
    if leaf == "hook_normalized" and rule_set.norm == "gradient":
        norm = components(model).get(path)
        if norm is not None and uses_native_norm(norm):
            return "the model does not compute with it when norms keep their ordinary gradient"
    return None


def _select(model: Any, names_filter: NamesFilter, rule_set: RuleSet) -> list[str]:
    known = hook_points(model)
    if names_filter is None or callable(names_filter):
        selected = [n for n in known if names_filter is None or names_filter(n)]
        if not selected:
            raise ValueError("names_filter matches no HookPoint of this model.")
        reasons = {name: _why_not(model, name, rule_set) for name in selected}
        if all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"names_filter matches only HookPoints like {name!r}: {reason}.")
        return [name for name, reason in reasons.items() if reason is None]
    selected = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not selected:
        raise ValueError("names_filter is empty; None stands for every HookPoint.")
    for name in selected:
        if name not in known:
            raise ValueError(f"{name!r} is no HookPoint of this model; see model.hook_dict.keys().")
        reason = _why_not(model, name, rule_set)
        if reason is not None:
            raise ValueError(f"There is no relevance at {name!r}: {reason}.")
    return selected


# Keywords of TransformerLens' forward and run_with_cache that run_with_relevance cannot honour.
_REFUSED = {
    "input": "the tokens are given already",
    "input_ids": "the tokens are given already",
    "inputs_embeds": "the tokens are already given; edit embeddings with a hook at hook_embed",
    "return_type": "the model's logits are returned; the objective turns them into a number",
    "loss_per_token": "the model's logits are returned; the objective turns them into a number",
    "padding_side": "texts of one length need no padding; pad ids yourself and give attention_mask",
    "start_at_layer": "relevance starts at the embeddings of these tokens",
    "stop_at_layer": "relevance needs the logits; select activations with names_filter",
    "pos_slice": "all positions are returned; slice the cache",
    "incl_bwd": "the cache holds relevance, which takes one backward pass anyway",
    "return_cache_object": "an ActivationCache is returned; its cache_dict is the dictionary",
    "reset_hooks_end": "your hooks stay, and the package's own are always removed",
    "clear_contexts": "no hook's context is touched",
    "device": "the cache is on the model's device; move it with cache.to(device)",
}


# Keywords that the forwards of transformers accept without naming them; none changes a logit.
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


def _keywords(model: Any) -> set[str]:
    """The keywords that the forwards of the bridge and of the wrapped model name."""
    forwards = (type(model).forward, model.original_model.forward)
    named = [p for f in forwards for p in inspect.signature(f).parameters.values()]
    loose = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {p.name for p in named if p.kind not in loose}.union(_OUTPUTS) - {"self", *_REFUSED}


def _check_keywords(model: Any, given: dict[str, Any]) -> None:
    """Refuse keywords that the model's forward would ignore silently.

    Raises:
        TypeError: names the keyword, and what was probably meant.
    """
    if not given:
        return
    known = _keywords(model)
    for name, value in given.items():
        if name in known or (name == "return_type" and value == "logits"):
            continue
        if name in _REFUSED:
            raise TypeError(f"run_with_relevance cannot honour {name}=: {_REFUSED[name]}.")
        own = set(inspect.signature(run_with_relevance).parameters) - {"forward_kwargs"}
        near = difflib.get_close_matches(name, sorted(known | own), n=1)
        meant = f" Did you mean {near[0]}=?" if near else ""
        raise TypeError(
            f"Neither run_with_relevance nor this model's forward names a keyword {name!r}.{meant}"
        )


@one_at_a_time
def run_with_relevance(
    model: Any,
    tokens: str | list[str] | Tensor,
    objective: Callable[[Tensor], Tensor],
    names_filter: NamesFilter = None,
    *,
    rules: str | RuleSet = DEFAULT_RULES,
    remove_batch_dim: bool = False,
    prepend_bos: bool | None = None,
    attention: AttentionKind = "auto",
    **forward_kwargs: Any,
) -> tuple[Float[Tensor, "batch pos vocab"], ActivationCache]:
    """Run the model and return its logits and the relevance of every activation.

    Relevance is activation × modified gradient, elementwise, in units of the objective (logits), in
    the shapes of ``run_with_cache`` (arXiv:2604.17761). Positive supports the target.
    ``hook_resid_mid`` holds the relevance of the residual stream, skip connection included. Where
    rules let nothing through (queries and keys under "cplrp") relevance is 0. bfloat16 and float16
    models give float32 relevance.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Text, texts, or ids [pos] or [batch, pos].
        objective: A function logits → scalar. Summing over the batch, as ``logit_diff`` does, gives
            each row its own relevance. With an ``attention_mask``, negative positions of an
            ``Objective`` count from each row's last real token, whichever side is padded.
        names_filter: As in ``run_with_cache``: a name, names, a predicate, or None for all.
        rules: Name of a rule set, or a ``RuleSet``.
        remove_batch_dim: Drop the batch dimension of a single prompt from the cache.
        prepend_bos: Whether texts begin with the BOS token, as for ``attribute``.
        attention: "auto", "fused" or "eager", as for ``attribute``. Blocks whose scores or pattern
            are in the cache, by default all, are eager.
        **forward_kwargs: Passed to the model's forward, such as ``attention_mask`` [batch, pos].

    Returns:
        The logits [batch, pos, vocab], and an ``ActivationCache`` of relevance, in logits.

    Warns:
        SpecialTokenWarning: as ``attribute``.

    Raises:
        TypeError: a keyword that the model's forward does not name, or that would make it return
            something other than the logits of these tokens.
        ValueError: a name that does not exist, or at which there is no relevance; an unknown
            ``attention``.
        TokenError: the objective reads the logits of a padding token.
        PromptError, ModelStateError, UncoveredComponentError: as ``attribute``.

    Example:
        >>> logits, relevance = clrp.run_with_relevance(model, case.prompt, objective)
        >>> relevance["blocks.0.hook_resid_pre"].shape == (*logits.shape[:2], model.cfg.d_model)
        True
    """
    require_bridge(model)
    rule_set = get_rule_set(rules)
    _check_keywords(model, forward_kwargs)
    ids = to_tokens(model, tokens, prepend_bos)
    names = _select(model, names_filter, rule_set)
    padded = _padding(forward_kwargs.get("attention_mask"), ids)
    if padded is not None and isinstance(objective, Objective):
        objective = objective.with_mask(padded)
    cache: dict[str, Tensor] = {}
    logits, _, _ = run(
        model, ids, objective, rule_set, _readings(model, names, cache), attention=attention,
        **forward_kwargs,
    )  # fmt: skip
    if padded is not None:
        _refuse_padding(objective, logits, padded)
    ordered = {name: cache[name].contiguous() for name in names if name in cache}
    if isinstance(names_filter, str | Sequence) and len(ordered) < len(names):
        silent = next(name for name in names if name not in cache)
        raise ValueError(
            f"There is no relevance at {silent!r}: no gradient can reach it (it did not fire in "
            "this model's forward, or holds token ids or constants)."
        )
    result = ActivationCache(ordered, model)
    if remove_batch_dim:
        result = result.remove_batch_dim()
    return logits, result


def _padding(mask: object, ids: Tensor) -> Int[Tensor, "batch pos"] | None:
    """The attention mask, if it is one of tokens and marks some of them as padding."""
    by_token = isinstance(mask, Tensor) and mask.shape == ids.shape
    return mask if by_token and isinstance(mask, Tensor) and not bool(mask.all()) else None


def _refuse_padding(
    objective: Callable[[Tensor], Tensor],
    logits: Float[Tensor, "batch pos vocab"],
    mask: Int[Tensor, "batch pos"],
) -> None:
    if isinstance(objective, Objective):  # handles padding itself
        return
    at = torch.nonzero(read_rows(objective, logits) & (mask == 0).cpu()).tolist()
    if at:
        row, pos = at[0]
        raise TokenError(
            f"The objective reads logits at padding: position {pos} of row {row}, where "
            "attention_mask is 0. Use clrp.logit_diff(model, target, contrast), whose pos=-1 is "
            "each row's last real token here, or index the real tokens, as in "
            "logits[torch.arange(len(logits)), last_real_token_of_each_row]."
        )


def _readings(model: Any, names: list[str], cache: dict[str, Tensor]) -> list[Reading]:
    """One reading per HookPoint, which fills ``cache`` under each of its names."""
    hook_dict = hook_points(model)
    by_point: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        # hook_resid_mid is an alias of a norm's input, where only that branch would be read.
        stream = name.endswith("hook_resid_mid")
        by_point.setdefault((id(hook_dict[name]), stream), []).append(name)

    def reading(aliases: list[str], stream: bool) -> Reading:
        def sink(x: Tensor, g: Tensor) -> None:
            relevance = relevance_of(x, g)
            if not torch.isfinite(x.amin()):  # a masked score of -inf has no relevance
                relevance = relevance.masked_fill(g == 0, 0.0)
            cache.update(dict.fromkeys(aliases, relevance))

        def fired(x: Tensor) -> None:
            zero = at_least_float32(x.new_zeros(())).expand(x.shape)
            cache.update(dict.fromkeys(aliases, zero))

        observed = stream or aliases[0].endswith("hook_normalized")
        return Reading(aliases[0], sink, "tensor" if observed else "branch", fired)

    return [reading(aliases, stream) for (_, stream), aliases in by_point.items()]
