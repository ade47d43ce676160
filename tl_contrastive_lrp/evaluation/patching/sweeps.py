"""``get_relevance_patch_*``: the sweeps of ``transformer_lens.patching``, from one backward pass.

``get_act_patch_*`` returns the metric's *value* with a cell patched, not the change. So do these
functions: they return the metric on the corrupted run plus the estimated change. Estimate and
measurement agree where the model, as the rules see it, is linear from the cell to the metric;
elsewhere the estimate is of first order.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any, Literal, Protocol, overload

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor
from transformer_lens.patching import make_df_from_ranges

from ...rules.rule_sets import RuleSet
from .effects import Sweep, n_heads_of
from .estimates import PATCHING_RULES, Metric, Reduce, as_result, estimate_sweeps, select


class RelevancePatch(Protocol):
    """The signature of ``get_act_patch_*``, extended by ``rules``."""

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
    """The signature of ``get_act_patch_*_every``, extended by ``rules``."""

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
    ) -> Any:
        """See the functions of this type."""
        ...


# Sizes of the axes in the examples, on the demo model's first prompt.
_EXAMPLE_SIZES = {
    "layer": 4,
    "pos": 44,
    "dest_pos": 44,
    "src_pos": 44,
    "head": 4,
    "head_index": 4,
    "key_value_head": 2,
}

_DOCSTRING = """Estimate the result of get_act_patch_{name} from one backward pass.

{description}

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        corrupted_tokens: Token ids, [batch, pos].
        clean_cache: ``model.run_with_cache(clean_tokens)[1]``, of the same shape.
        objective: Maps logits to a scalar, as ``logit_diff`` does, or, with ``reduce``, to [batch],
            where each entry depends on its own example only. A mapping of names to such functions
            costs one forward and one backward pass for each of them.{index_args}
        rules: A rule set or its name. Rule sets that split relevance between the factors of a
            product ("attnlrp", "gim") underestimate the effect of patching one factor.
        reduce: "scalar", "mean" or "none", as in TransformerLens.
        baseline: Also return the objective's value on the corrupted run.

    Returns:
        Float[Tensor, "{axes}"], in float32 or wider; with ``reduce="none"``,
        ``baseline=True`` or several objectives, a ``PatchingResult``.

    Raises:
        TypeError: The cache is not a cache, or an objective is not callable.
        ValueError: The cache lacks entries or does not fit the tokens, an objective returns another
            shape than ``reduce`` implies, or an argument is invalid.
        PromptError, ModelStateError, UncoveredComponentError: As for ``lrp``.

    Example:
        >>> clean = model.to_tokens(case.prompt)
        >>> cache = model.run_with_cache(clean)[1]
        >>> patch = clrp.patching.get_relevance_patch_{name}
        >>> list(patch(model, clean.flip(1), cache, objective).shape)  # {axes}
        {sizes}
    """

_DESCRIPTION = """
{patched}. Arguments, order, shape and sign are those of
``transformer_lens.patching.get_act_patch_{name}``: an entry is the objective's value when one cell
of the corrupted run is replaced by the clean run's. It is estimated as objective(corrupted) +
Σ (clean − corrupted) ⊙ modified gradient (RelP, arXiv:2508.21258), in the objective's units: logits
for ``logit_diff``, where higher values favour the target. {cost}"""


def _docstring(
    name: str, patched: str, cost: str, axes: list[str], sizes: list[int], index_args: str
) -> str:
    description = _DESCRIPTION.format(name=name, patched=patched, cost=cost)
    wrapped = textwrap.fill(
        " ".join(description.split()), 100, initial_indent=" " * 4, subsequent_indent=" " * 4
    )
    return _DOCSTRING.format(
        name=name, description=wrapped, axes=" ".join(axes), sizes=sizes, index_args=index_args
    )


def _sweep(name: str, sweep: Sweep, patched: str) -> RelevancePatch:
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
        (values,), base, names = estimate_sweeps(
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

    sizes = [_EXAMPLE_SIZES[axis] for axis in axis_names]
    if sweep.activation in ("k", "v"):
        sizes[-1] = _EXAMPLE_SIZES["key_value_head"]
    get_relevance_patch.__name__ = get_relevance_patch.__qualname__ = f"get_relevance_patch_{name}"
    get_relevance_patch.__doc__ = _docstring(
        name,
        patched,
        "All cells together cost one forward and one backward pass.",
        axis_names,
        sizes,
        f"""
        index_df: The cells to estimate, one per row, in the columns {", ".join(axis_names)}.
            By default, all cells are estimated.
        return_index_df: Also return the frame of cells.""",
    )
    return get_relevance_patch


def _every(
    name: str, sweeps: dict[str, Sweep], axes: tuple[str, ...], patched: str
) -> RelevancePatchEvery:
    """Make one ``get_relevance_patch_*_every`` function, with one backward pass for all sweeps."""
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
        estimates, base, names = estimate_sweeps(
            model, corrupted_tokens, clean_cache, objective, list(sweeps.values()), rules, reduce
        )
        for i, sweep in enumerate(sweeps.values()):
            n_missing = int(model.cfg.n_heads) - n_heads_of(model, sweep.activation)
            if n_missing and axes[-1] == "head":  # TransformerLens leaves 0 here, not the baseline
                estimates[i] = torch.nn.functional.pad(estimates[i], (0, 0, 0, n_missing))
        values = rearrange(estimates, "patch_type metric ... -> metric patch_type ...")
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
    get_relevance_patch.__doc__ = _docstring(
        name,
        f"{patched}, and stacked in the order {', '.join(sweeps)}",
        "Together they cost one forward and one backward pass. With grouped-query attention, "
        "k and v fill the first heads and the other heads are 0, as in TransformerLens.",
        axis_names,
        [len(sweeps), *(_EXAMPLE_SIZES[axis] for axis in axis_names[1:])],
        "",
    )
    return get_relevance_patch


_HEAD_ACTIVATIONS = {"out": "z", "q": "q", "k": "k", "v": "v"}
_BY_POS = {patch_type: Sweep(act, ("pos", "head")) for patch_type, act in _HEAD_ACTIVATIONS.items()}
_ALL_POS = {patch_type: Sweep(act, ("head",)) for patch_type, act in _HEAD_ACTIVATIONS.items()}
_ALL_POS["pattern"] = Sweep("pattern", ("head_index",))
# Position before head, like the other sweeps that it is stacked with; on its own, head is first.
_BY_POS["pattern"] = Sweep("pattern", ("dest_pos", "head_index"))
_BLOCK = {act: Sweep(act, ("pos",)) for act in ("resid_pre", "attn_out", "mlp_out")}

get_relevance_patch_resid_pre = _sweep(
    "resid_pre",
    _BLOCK["resid_pre"],
    "The residual stream at the start of each block is patched by position",
)
get_relevance_patch_resid_mid = _sweep(
    "resid_mid",
    Sweep("resid_mid", ("pos",)),
    "The residual stream between attention and MLP is patched by position: the whole stream, as "
    "TransformerLens patches it under ``torch.no_grad()``. With gradients enabled, TransformerLens "
    "patches only what the MLP reads",
)
get_relevance_patch_attn_out = _sweep(
    "attn_out", _BLOCK["attn_out"], "Each attention layer's output is patched by position"
)
get_relevance_patch_mlp_out = _sweep(
    "mlp_out", _BLOCK["mlp_out"], "Each MLP's output is patched by position"
)
get_relevance_patch_attn_head_out_by_pos = _sweep(
    "attn_head_out_by_pos", _BY_POS["out"], "Each head's output is patched by position"
)
get_relevance_patch_attn_head_q_by_pos = _sweep(
    "attn_head_q_by_pos", _BY_POS["q"], "Each head's queries are patched by position"
)
get_relevance_patch_attn_head_k_by_pos = _sweep(
    "attn_head_k_by_pos", _BY_POS["k"], "Each key head's keys are patched by position"
)
get_relevance_patch_attn_head_v_by_pos = _sweep(
    "attn_head_v_by_pos", _BY_POS["v"], "Each value head's values are patched by position"
)
get_relevance_patch_attn_head_pattern_by_pos = _sweep(
    "attn_head_pattern_by_pos",
    Sweep("pattern", ("head_index", "dest_pos")),
    "Each row of each head's attention pattern is patched",
)
get_relevance_patch_attn_head_pattern_dest_src_pos = _sweep(
    "attn_head_pattern_dest_src_pos",
    Sweep("pattern", ("head_index", "dest_pos", "src_pos")),
    "Each entry of each head's attention pattern is patched",
)
get_relevance_patch_attn_head_out_all_pos = _sweep(
    "attn_head_out_all_pos",
    _ALL_POS["out"],
    "Each head's output is patched at all positions at once",
)
get_relevance_patch_attn_head_q_all_pos = _sweep(
    "attn_head_q_all_pos", _ALL_POS["q"], "Each head's queries are patched at all positions at once"
)
get_relevance_patch_attn_head_k_all_pos = _sweep(
    "attn_head_k_all_pos",
    _ALL_POS["k"],
    "Each key head's keys are patched at all positions at once",
)
get_relevance_patch_attn_head_v_all_pos = _sweep(
    "attn_head_v_all_pos",
    _ALL_POS["v"],
    "Each value head's values are patched at all positions at once",
)
get_relevance_patch_attn_head_pattern_all_pos = _sweep(
    "attn_head_pattern_all_pos",
    _ALL_POS["pattern"],
    "Each head's whole attention pattern is patched",
)
get_relevance_patch_attn_head_all_pos_every = _every(
    "attn_head_all_pos_every", _ALL_POS, ("head",), "Every head is patched at all positions at once"
)
get_relevance_patch_attn_head_by_pos_every = _every(
    "attn_head_by_pos_every", _BY_POS, ("pos", "head"), "Every head is patched by position"
)
get_relevance_patch_block_every = _every(
    "block_every",
    _BLOCK,
    ("pos",),
    "The residual stream, attention outputs and MLP outputs are patched by position",
)
