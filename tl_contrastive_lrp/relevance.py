"""``run_with_relevance``: TransformerLens' ``run_with_cache``, with relevance in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache

from .attach_norm import uses_native_norm
from .backward import Reading, relevance_of, run
from .prompts import to_tokens
from .rules import at_least_float32
from .rulesets import DEFAULT_RULES, RuleSet, get_rule_set
from .sites import components, require_bridge
from .threads import one_at_a_time

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
        return "the statistics of a norm are no node of the relevance graph"
    if leaf == "hook_normalized" and rule_set.norm == "gradient":
        norm = components(model).get(path)
        if norm is not None and uses_native_norm(norm):
            return "the model does not compute with it when norms keep their ordinary gradient"
    return None


def _select(model: Any, names_filter: NamesFilter, rule_set: RuleSet) -> list[str]:
    known = model.hook_dict
    if names_filter is None or callable(names_filter):
        wanted = [n for n in known if names_filter is None or names_filter(n)]
        if not wanted:
            raise ValueError("names_filter matches no HookPoint of this model.")
        reasons = {name: _why_not(model, name, rule_set) for name in wanted}
        if all(reasons.values()):
            name, reason = next(iter(reasons.items()))
            raise ValueError(f"names_filter matches only HookPoints like {name!r}: {reason}.")
        return [name for name, reason in reasons.items() if reason is None]
    wanted = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not wanted:
        raise ValueError("names_filter is empty; None stands for every HookPoint.")
    for name in wanted:
        if name not in known:
            raise ValueError(f"{name!r} is no HookPoint of this model; see model.hook_dict.keys().")
        reason = _why_not(model, name, rule_set)
        if reason is not None:
            raise ValueError(f"There is no relevance at {name!r}: {reason}.")
    return wanted


@one_at_a_time
def run_with_relevance(
    model: Any,
    tokens: str | list[str] | Tensor,
    objective: Callable[[Tensor], Tensor],
    names_filter: NamesFilter = None,
    *,
    rules: str | RuleSet = DEFAULT_RULES,
    remove_batch_dim: bool = False,
    **forward_kwargs: Any,
) -> tuple[Float[Tensor, "batch pos vocab"], ActivationCache]:
    """Run the model and return its logits and the relevance of every activation.

    Relevance is activation × modified gradient, elementwise, in units of the objective (logits),
    in the shapes of ``run_with_cache``. Positive supports the target. ``hook_resid_mid`` holds the
    residual stream's relevance, skip connection included. Where rules let nothing through (queries
    and keys under "cplrp") relevance is zero. bfloat16 and float16 models give float32 relevance.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        tokens: Text, texts, or ids [pos] or [batch, pos].
        objective: logits → scalar; sum over the batch, as ``logit_diff`` does, to get each row's
            own relevance.
        names_filter: As in ``run_with_cache``: a name, names, a predicate, or None for all.
        rules: Name of a rule set, or a ``RuleSet``.
        remove_batch_dim: Drop the batch dimension of a single prompt from the cache.
        **forward_kwargs: Passed to the model, e.g. ``attention_mask`` [batch, pos].

    Raises:
        ValueError: a name that does not exist or where there is no relevance.
        PromptError, ModelStateError, UncoveredComponentError: see ``lrp``.
    """
    require_bridge(model)
    rule_set = get_rule_set(rules)
    ids = to_tokens(model, tokens)
    names = _select(model, names_filter, rule_set)
    cache: dict[str, Tensor] = {}
    logits, _, _ = run(
        model, ids, objective, rule_set, _readings(model, names, cache), **forward_kwargs
    )
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


def _readings(model: Any, names: list[str], cache: dict[str, Tensor]) -> list[Reading]:
    """One reading a HookPoint, filling ``cache`` under each of its wanted names."""
    hook_dict = model.hook_dict
    by_point: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        # hook_resid_mid is an alias of a norm's input, where only that branch would be read.
        stream = name.endswith("hook_resid_mid")
        by_point.setdefault((id(hook_dict[name]), stream), []).append(name)

    def reading(aliases: list[str], stream: bool) -> Reading:
        def sink(x: Tensor, g: Tensor) -> None:
            relevance = relevance_of(x, g)
            if not torch.isfinite(x.amin()):  # a masked score of -inf takes no part
                relevance = relevance.masked_fill(g == 0, 0.0)
            cache.update(dict.fromkeys(aliases, relevance))

        def fired(x: Tensor) -> None:
            zero = at_least_float32(x.new_zeros(())).expand(x.shape)
            cache.update(dict.fromkeys(aliases, zero))

        observed = stream or aliases[0].endswith("hook_normalized")
        return Reading(aliases[0], sink, "tensor" if observed else "branch", fired)

    return [reading(aliases, stream) for (_, stream), aliases in by_point.items()]
