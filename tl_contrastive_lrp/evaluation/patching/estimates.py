"""Estimated values of patched cells, returned in the forms that TransformerLens uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.patching import PatchingResult

from ...hooks.placement import check_ready
from ...inputs.tokens import to_tokens
from ...rules.rule_sets import RuleSet, get_rule_set
from ...rules.threads import one_at_a_time
from .checks import RecordedObjective, check_cache
from .effects import Sweep, sweep_effects

Metric = Callable[[Tensor], Tensor]
Reduce = Literal["scalar", "mean", "none"]
_REDUCE = ("scalar", "mean", "none")

# A patch changes one factor of a product and leaves the other alone, so rules that split relevance
# between the factors ("attnlrp", "gim") estimate half of the patch's effect. RelP splits no product
# in attention. benchmarks/patching.py measures the slopes.
PATCHING_RULES = "relp"


@one_at_a_time
def estimate_sweeps(
    model: Any,
    tokens: object,
    clean_cache: Any,
    objective: Metric | Mapping[str, Metric],
    sweeps: Sequence[Sweep],
    rules: str | RuleSet,
    reduce: str,
) -> tuple[list[Float[Tensor, "metric layer *axes row"]], Float[Tensor, "metric row"], list[str]]:
    """Estimate each sweep's values for one or several objectives.

    Returns:
        The estimated values of each sweep, the objectives' values on the corrupted run, and the
        objectives' names. The last axis holds the examples, or a single entry where an objective
        gives one value for the whole batch.

    Raises:
        TypeError: The cache is not a cache, or an objective is not callable.
        ValueError: ``reduce`` is unknown, the mapping of objectives is empty, an objective returns
            another shape than ``reduce`` implies, or the cache does not fit the tokens.
        PromptError, ModelStateError, UncoveredComponentError: As for ``lrp``.
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
    recorded = {
        name: RecordedObjective(
            fn, batch, per_example, "objective" if name == "metric" else f"objective {name!r}"
        )
        for name, fn in metrics.items()
    }
    check_cache(model, clean_cache, sweeps, batch, pos)

    by_metric, bases = [], []
    for metric in recorded.values():
        effects = sweep_effects(model, ids, clean_cache, metric, sweeps, rule_set)
        base = metric.value.reshape(-1)
        if not per_example:
            effects = [effect.sum(-1, keepdim=True) for effect in effects]
        by_metric.append([effect + base.to(effect) for effect in effects])
        bases.append(base)
    return (
        [torch.stack(list(per_metric)) for per_metric in zip(*by_metric, strict=True)],
        torch.stack(bases),
        list(metrics),
    )


def as_result(
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
    """Return a tensor or a ``PatchingResult``, under the same conditions as TransformerLens."""
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


def select(
    values: Float[Tensor, "metric *cells row"], index_df: pd.DataFrame, axes: list[str]
) -> Float[Tensor, "metric cell row"]:
    """Select the cells that the rows of a frame of indices name, in the frame's order.

    Raises:
        ValueError: The frame's columns are not the sweep's axes, or an index is out of range.
    """
    if list(index_df.columns) != axes:
        raise ValueError(
            f"index_df has columns {list(index_df.columns)}; it needs {axes}, in that order."
        )
    for axis, size in zip(axes, values.shape[1:-1], strict=True):
        if not index_df[axis].between(0, size - 1).all():
            raise ValueError(f"index_df[{axis!r}] has entries outside 0..{size - 1}.")
    indices = [torch.tensor(index_df[axis].tolist(), device=values.device) for axis in axes]
    cells: tuple[slice | Tensor, ...] = (slice(None), *indices)
    return values[cells]
