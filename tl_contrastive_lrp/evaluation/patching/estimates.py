"""Estimated values of patched cells, and the forms in which TransformerLens returns such values."""

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
from .checks import Watched, check_cache
from .effects import Sweep, sweep_effects

Metric = Callable[[Tensor], Tensor]
Reduce = Literal["scalar", "mean", "none"]
_REDUCE = ("scalar", "mean", "none")

# A patch changes one factor of a product and leaves the other, so rules that share a product's
# relevance between its factors ("attnlrp", "gim") estimate half of what it does. RelP halves none
# in attention; benchmarks/patching.py measures the slopes.
PATCHING_RULES = "relp"


@one_at_a_time
def estimates(
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


def select(
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
