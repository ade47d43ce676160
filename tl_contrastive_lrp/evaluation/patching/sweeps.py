"""``get_relevance_patch_*``: the sweeps of ``transformer_lens.patching``, from one backward pass.

``get_act_patch_*`` returns the metric's *value* with a cell patched, not the change. So do these:
the metric on the corrupted run plus the estimated change. Linear from the cell to the metric, as
the rules see the model, estimate and measurement agree; elsewhere the estimate is of first order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, overload

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.patching import make_df_from_ranges

from ...rules.rule_sets import RuleSet
from .effects import Sweep, heads_of
from .estimates import PATCHING_RULES, Metric, Reduce, as_result, estimates, select


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
        rules: str | RuleSet = PATCHING_RULES,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any:
        mapping = isinstance(objective, Mapping)
        if return_index_df and (mapping or baseline or reduce == "none"):
            raise ValueError(
                "return_index_df goes with a tensor; a PatchingResult carries its index_df."
            )
        (values,), base, names = estimates(
            model, corrupted_tokens, clean_cache, objective, [sweep], rules, reduce
        )
        frame = index_df
        if frame is None:
            frame = make_df_from_ranges(list(values.shape[1:-1]), axis_names)
        else:
            values = select(values, frame, axis_names)
        result = as_result(
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
        rules: str | RuleSet = PATCHING_RULES,
        reduce: Reduce = "scalar",
        baseline: bool = False,
    ) -> Any:
        found, base, names = estimates(
            model, corrupted_tokens, clean_cache, objective, list(sweeps.values()), rules, reduce
        )
        for i, sweep in enumerate(sweeps.values()):
            if sweep.axes == ("head_index", "dest_pos"):
                found[i] = found[i].movedim(2, 3)  # [metric, layer, pos, head, row]
            lacking = int(model.cfg.n_heads) - heads_of(model, sweep.activation)
            if lacking and axes[-1] == "head":  # as TransformerLens: zero, not the baseline
                found[i] = torch.nn.functional.pad(found[i], (0, 0, 0, lacking))
        values = torch.stack(found, 1)
        return as_result(
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
