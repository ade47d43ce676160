"""``get_relevance_patch_*``: the sweeps of ``transformer_lens.patching``, from one backward pass.

``get_act_patch_*`` returns the metric's *value* with a cell patched, not the change. So do these:
the metric on the corrupted run plus the estimated change. Linear from the cell to the metric, as
the rules see the model, estimate and measurement agree; elsewhere the estimate is of first order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, overload

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.patching import PatchingResult, make_df_from_ranges

from ..placement import check_ready
from ..prompts import to_tokens
from ..rulesets import RuleSet, get_rule_set
from .checks import Watched, check_cache
from .effects import Sweep, heads_of, sweep_effects

Metric = Callable[[Tensor], Tensor]
Reduce = Literal["scalar", "mean", "none"]
_REDUCE = ("scalar", "mean", "none")

# Rules for estimating what a patch does, where nothing is to be shared out: RelP leaves attention's
# products their gradient, and halves the gate's alone. See the table in docs or compare yourself.
DEFAULT_RULES = "relp"


class RelevancePatch(Protocol):
    """A sweep's signature: that of ``get_act_patch_*``, and ``rules``."""

    @overload
    def __call__(
        self,
        model: Any,
        corrupted_tokens: Int[Tensor, "batch pos"],
        clean_cache: Any,
        objective: Metric,
        index_df: pd.DataFrame | None = None,
        return_index_df: Literal[False] = False,
        *,
        rules: str | RuleSet = ...,
        reduce: Literal["scalar", "mean"] = "scalar",
        baseline: Literal[False] = False,
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        model: Any,
        corrupted_tokens: Int[Tensor, "batch pos"],
        clean_cache: Any,
        objective: Metric | Mapping[str, Metric],
        index_df: pd.DataFrame | None = None,
        return_index_df: bool = False,
        *,
        rules: str | RuleSet = ...,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any: ...


class RelevancePatchEvery(Protocol):
    """The signature of ``get_act_patch_*_every``, and ``rules``."""

    def __call__(
        self,
        model: Any,
        corrupted_tokens: Int[Tensor, "batch pos"],
        clean_cache: Any,
        objective: Metric | Mapping[str, Metric],
        *,
        rules: str | RuleSet = ...,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any: ...


def _estimates(
    model: Any,
    tokens: object,
    clean_cache: Any,
    objective: Metric | Mapping[str, Metric],
    sweeps: Sequence[Sweep],
    rules: str | RuleSet,
    reduce: str,
) -> tuple[list[Float[Tensor, "metric layer *axes row"]], Float[Tensor, "metric row"], list[str]]:
    """Estimated values of each sweep, values on the corrupted run, and the metrics' names.

    The last axis holds the examples, or one entry where the metric gives one value for all.
    """
    check_ready(model, "Relevance patching")
    rule_set = get_rule_set(rules)
    if reduce not in _REDUCE:
        raise ValueError(f"reduce={reduce!r}: use one of {', '.join(map(repr, _REDUCE))}.")
    metrics = dict(objective) if isinstance(objective, Mapping) else {"metric": objective}
    if not metrics:
        raise ValueError("The mapping of objectives is empty; give at least one.")
    ids = to_tokens(model, tokens)  # type: ignore[arg-type]
    batch, pos = ids.shape
    per_example = reduce != "scalar"
    watched = {
        name: Watched(
            fn, batch, per_example, "objective" if name == "metric" else f"objective {name!r}"
        )
        for name, fn in metrics.items()
    }
    check_cache(model, clean_cache, sweeps, batch, pos)

    by_metric, bases = [], []
    for metric in watched.values():
        effects = sweep_effects(model, ids, clean_cache, metric, sweeps, rule_set)
        base = metric.value.reshape(-1)
        if not per_example:
            effects = [effect.sum(-1, keepdim=True) for effect in effects]
        by_metric.append([effect + base.to(effect) for effect in effects])
        bases.append(base)
    return (
        [torch.stack(list(same)) for same in zip(*by_metric, strict=True)],
        torch.stack(bases),
        list(metrics),
    )


def _result(
    values: Float[Tensor, "metric *cells row"],
    base: Float[Tensor, "metric row"],
    metric_names: list[str],
    axis_names: list[str],
    index_df: pd.DataFrame,
    *,
    mapping: bool,
    reduce: str,
    baseline: bool,
    patch_type_names: list[str] | None = None,
) -> Tensor | PatchingResult:
    """A tensor or a ``PatchingResult``, by the same conditions as in TransformerLens."""
    if reduce != "none":
        values, base = values.mean(-1), base.mean(-1)
    if not (mapping or baseline or reduce == "none"):
        return values[0]
    return PatchingResult(
        values=values if mapping else values[0],
        axis_names=axis_names,
        index_df=index_df,
        metric_names=metric_names,
        reduced=reduce != "none",
        baseline=(base if mapping else base[0]) if baseline else None,
        has_metric_axis=mapping,
        patch_type_names=patch_type_names,
    )


def _select(
    values: Float[Tensor, "metric *cells row"], index_df: pd.DataFrame, axes: list[str]
) -> Float[Tensor, "metric cell row"]:
    """The cells that a frame of indices names, in its order.

    Raises:
        ValueError: the frame's columns are not the sweep's axes, or an index is out of range.
    """
    if list(index_df.columns) != axes:
        raise ValueError(
            f"index_df has columns {list(index_df.columns)}; it needs {axes}, in that order."
        )
    for axis, size in zip(axes, values.shape[1:-1], strict=True):
        if not index_df[axis].between(0, size - 1).all():
            raise ValueError(f"index_df[{axis!r}] has entries outside 0..{size - 1}.")
    at = [torch.tensor(index_df[axis].tolist(), device=values.device) for axis in axes]
    cells: tuple[slice | Tensor, ...] = (slice(None), *at)
    return values[cells]


def _sweep(name: str, sweep: Sweep, what: str) -> RelevancePatch:
    """Make one ``get_relevance_patch_*`` function."""
    axis_names = ["layer", *sweep.axes]

    def get_relevance_patch(
        model: Any,
        corrupted_tokens: Int[Tensor, "batch pos"],
        clean_cache: Any,
        objective: Metric | Mapping[str, Metric],
        index_df: pd.DataFrame | None = None,
        return_index_df: bool = False,
        *,
        rules: str | RuleSet = DEFAULT_RULES,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any:
        mapping = isinstance(objective, Mapping)
        if return_index_df and (mapping or baseline or reduce == "none"):
            raise ValueError(
                "return_index_df goes with a tensor; a PatchingResult carries its index_df."
            )
        (values,), base, names = _estimates(
            model, corrupted_tokens, clean_cache, objective, [sweep], rules, reduce
        )
        frame = index_df
        if frame is None:
            frame = make_df_from_ranges(list(values.shape[1:-1]), axis_names)
        else:
            values = _select(values, frame, axis_names)
        result = _result(
            values,
            base,
            names,
            [] if index_df is not None else axis_names,
            frame,
            mapping=mapping,
            reduce=reduce,
            baseline=baseline,
        )
        return (result, frame) if return_index_df else result

    get_relevance_patch.__name__ = get_relevance_patch.__qualname__ = f"get_relevance_patch_{name}"
    get_relevance_patch.__doc__ = f"""What get_act_patch_{name} would measure, estimated at once.

    {what}. Same arguments, order, shapes and sign as
    ``transformer_lens.patching.get_act_patch_{name}``: values of the objective with one cell of the
    corrupted run replaced by the clean run's, here objective(corrupted) + Σ (clean − corrupted) ⊙
    modified gradient, from one forward and one backward pass (RelP, arXiv:2508.21258).

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        corrupted_tokens: [batch, pos].
        clean_cache: ``model.run_with_cache(clean_tokens)[1]``, of the same shape.
        objective: logits → scalar, as from ``logit_diff``; or [batch] with ``reduce``, where each
            entry depends on its own example; or a mapping of names to such functions (a forward
            and backward pass for each).
        index_df: Cells to return, one row each, columns {axis_names}; None for all.
        return_index_df: Return the frame of cells too.
        rules: Name of a rule set, or a ``RuleSet``. Rule sets that share relevance between the
            factors of a product ("attnlrp", "gim") understate what patching one of them does.
        reduce: "scalar", "mean" or "none", as in TransformerLens.
        baseline: Also return the objective on the corrupted run.

    Returns:
        {axis_names}, float32 at least, in the objective's units; a ``PatchingResult`` with
        ``reduce="none"``, ``baseline=True`` or several objectives.

    Raises:
        ValueError: the cache lacks entries or does not fit the tokens; an objective of another
            shape; wrong ``reduce`` or ``index_df``.
        PromptError, ModelStateError, UncoveredComponentError: see ``lrp``.
    """
    return get_relevance_patch


def _every(
    name: str, sweeps: dict[str, Sweep], axes: tuple[str, ...], what: str
) -> RelevancePatchEvery:
    """Make one ``get_relevance_patch_*_every`` function; one backward pass for all its sweeps."""
    axis_names = ["patch_type", "layer", *axes]

    def get_relevance_patch(
        model: Any,
        corrupted_tokens: Int[Tensor, "batch pos"],
        clean_cache: Any,
        objective: Metric | Mapping[str, Metric],
        *,
        rules: str | RuleSet = DEFAULT_RULES,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any:
        found, base, names = _estimates(
            model, corrupted_tokens, clean_cache, objective, list(sweeps.values()), rules, reduce
        )
        for i, sweep in enumerate(sweeps.values()):
            if sweep.axes == ("head_index", "dest_pos"):
                found[i] = found[i].movedim(2, 3)  # [metric, layer, pos, head, row]
            lacking = int(model.cfg.n_heads) - heads_of(model, sweep.activation)
            if lacking and axes[-1] == "head":  # as TransformerLens: zero, not the baseline
                found[i] = torch.nn.functional.pad(found[i], (0, 0, 0, lacking))
        values = torch.stack(found, 1)
        return _result(
            values,
            base,
            names,
            axis_names,
            make_df_from_ranges(list(values.shape[1:-1]), axis_names),
            mapping=isinstance(objective, Mapping),
            reduce=reduce,
            baseline=baseline,
            patch_type_names=list(sweeps),
        )

    get_relevance_patch.__name__ = get_relevance_patch.__qualname__ = f"get_relevance_patch_{name}"
    get_relevance_patch.__doc__ = f"""What get_act_patch_{name} would measure, estimated at once.

    {what}, stacked in the order {", ".join(sweeps)}, all from one forward and one backward pass.
    Arguments, sign, rules and errors as for the single sweeps. With grouped-query attention, k and
    v fill the first heads and the others are 0, as in TransformerLens.

    Returns:
        {axis_names}, float32 at least, in the objective's units; a ``PatchingResult`` with
        ``reduce="none"``, ``baseline=True`` or several objectives.
    """
    return get_relevance_patch


_BY_POS = {kind: Sweep(act, ("pos", "head")) for kind, act in zip(
    ("out", "q", "k", "v"), ("z", "q", "k", "v"), strict=True)}  # fmt: skip
_BY_POS["pattern"] = Sweep("pattern", ("head_index", "dest_pos"))
_ALL_POS = {kind: Sweep(s.activation, s.axes[:1] if kind == "pattern" else s.axes[1:])
            for kind, s in _BY_POS.items()}  # fmt: skip
_BLOCK = {act: Sweep(act, ("pos",)) for act in ("resid_pre", "attn_out", "mlp_out")}

get_relevance_patch_resid_pre = _sweep(
    "resid_pre", _BLOCK["resid_pre"], "The residual stream at the start of each block, by position"
)
get_relevance_patch_resid_mid = _sweep(
    "resid_mid",
    Sweep("resid_mid", ("pos",)),
    "The residual stream between attention and MLP, by position: the whole stream, as\n    "
    "TransformerLens patches it under ``torch.no_grad()``; with gradients on, it patches what the\n"
    "    MLP reads alone",
)
get_relevance_patch_attn_out = _sweep(
    "attn_out", _BLOCK["attn_out"], "Each attention layer's output, by position"
)
get_relevance_patch_mlp_out = _sweep("mlp_out", _BLOCK["mlp_out"], "Each MLP's output, by position")
get_relevance_patch_attn_head_out_by_pos = _sweep(
    "attn_head_out_by_pos", _BY_POS["out"], "Each head's output, by position"
)
get_relevance_patch_attn_head_q_by_pos = _sweep(
    "attn_head_q_by_pos", _BY_POS["q"], "Each head's queries, by position"
)
get_relevance_patch_attn_head_k_by_pos = _sweep(
    "attn_head_k_by_pos", _BY_POS["k"], "Each key head's keys, by position"
)
get_relevance_patch_attn_head_v_by_pos = _sweep(
    "attn_head_v_by_pos", _BY_POS["v"], "Each value head's values, by position"
)
get_relevance_patch_attn_head_pattern_by_pos = _sweep(
    "attn_head_pattern_by_pos", _BY_POS["pattern"], "Each row of each head's attention pattern"
)
get_relevance_patch_attn_head_pattern_dest_src_pos = _sweep(
    "attn_head_pattern_dest_src_pos",
    Sweep("pattern", ("head_index", "dest_pos", "src_pos")),
    "Each entry of each head's attention pattern",
)
get_relevance_patch_attn_head_out_all_pos = _sweep(
    "attn_head_out_all_pos", _ALL_POS["out"], "Each head's output at all positions"
)
get_relevance_patch_attn_head_q_all_pos = _sweep(
    "attn_head_q_all_pos", _ALL_POS["q"], "Each head's queries at all positions"
)
get_relevance_patch_attn_head_k_all_pos = _sweep(
    "attn_head_k_all_pos", _ALL_POS["k"], "Each key head's keys at all positions"
)
get_relevance_patch_attn_head_v_all_pos = _sweep(
    "attn_head_v_all_pos", _ALL_POS["v"], "Each value head's values at all positions"
)
get_relevance_patch_attn_head_pattern_all_pos = _sweep(
    "attn_head_pattern_all_pos", _ALL_POS["pattern"], "Each head's whole attention pattern"
)
get_relevance_patch_attn_head_all_pos_every = _every(
    "attn_head_all_pos_every", _ALL_POS, ("head",), "Every head at all positions"
)
get_relevance_patch_attn_head_by_pos_every = _every(
    "attn_head_by_pos_every", _BY_POS, ("pos", "head"), "Every head by position"
)
get_relevance_patch_block_every = _every(
    "block_every", _BLOCK, ("pos",), "Residual stream, attention and MLP outputs by position"
)
