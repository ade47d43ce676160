"""``compare``: do estimated effects agree with what TransformerLens measures by intervention?

Correlation, rank correlation, slope, overlap of the largest and agreement of signs, over all cells
and per layer, with bootstrap intervals. Where estimates fall short is part of the answer: see
``Comparison.apart``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .agreement import MEASURES, Agreement, agreement
from .effects import Effects, read_effects

if TYPE_CHECKING:
    import pandas as pd

    from ...render.plotly_figures import OfflineFigure


@dataclass(frozen=True, eq=False)
class Comparison:
    """Measured and estimated effects of the same cells, and how well they agree.

    Attributes:
        measured: What patching each cell changed, in the objective's units.
        estimated: What the estimate says it changes.
        axes: Names of the columns that name a cell, "layer" among them.
        cells: One name for each axis, for each cell.
        overall: Agreement over all cells.
        layers: Agreement of each layer's cells, in order.
        resampled: What the bootstrap drew: "cells" or "examples".
        n_resamples, seed, confidence: Of the bootstrap.
    """

    measured: Float[Tensor, " cell"]
    estimated: Float[Tensor, " cell"]
    axes: tuple[str, ...]
    cells: tuple[tuple[int | str, ...], ...]
    overall: Agreement
    layers: tuple[Agreement, ...]
    resampled: str
    n_resamples: int
    seed: int
    confidence: float

    def __post_init__(self) -> None:
        n = len(self.cells)
        for name in ("measured", "estimated"):
            values = getattr(self, name)
            if tuple(values.shape) != (n,):
                raise ValueError(f"Comparison.{name} has shape {tuple(values.shape)}, not {(n,)}.")
            if not values.isfinite().all():
                raise ValueError(f"Comparison.{name} is not finite everywhere.")
        if any(len(cell) != len(self.axes) for cell in self.cells) or len(set(self.cells)) != n:
            raise ValueError(f"Comparison.cells must name each cell once, by {self.axes}.")
        if self.overall.n != n or sum(layer.n for layer in self.layers) != n:
            raise ValueError("Comparison.layers do not hold every cell once.")

    def to_frame(self) -> pd.DataFrame:
        """The agreement: a row for all cells, one for each layer; intervals as _low, _high."""
        import pandas as pd

        rows = []
        for group in (self.overall, *self.layers):
            row = asdict(group)
            for name in MEASURES:
                row[f"{name}_low"], row[f"{name}_high"] = row.pop(f"{name}_interval")
            rows.append(row)
        order = [c for name in MEASURES for c in (name, f"{name}_low", f"{name}_high")]
        return pd.DataFrame(rows)[["group", "n", "k", *order]].set_index("group")

    def to_cells(self) -> pd.DataFrame:
        """One row a cell: its axes, measured, estimated."""
        import pandas as pd

        frame = pd.DataFrame(list(self.cells), columns=list(self.axes))
        return frame.assign(measured=self.measured.numpy(), estimated=self.estimated.numpy())

    def apart(self, k: int = 10) -> pd.DataFrame:
        """The ``k`` cells where estimate and measurement differ most, with the difference."""
        frame = self.to_cells().assign(
            difference=(self.estimated - self.measured).numpy(),
        )
        order = frame["difference"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def plot(self) -> Any:
        """A plotly ``Figure``: scatter of the cells, and both sides as heatmaps on one scale.

        Positive is blue, as in TransformerLens' demos (RdBu, midpoint 0).

        Raises:
            ImportError: plotly is not installed; says how to install it.
        """
        from ...render.plotly_figures import agreement_figure

        return agreement_figure(self.to_cells(), self.axes, str(self))

    def show(self) -> OfflineFigure:
        """``plot`` for a notebook, with its JavaScript inside: displaying it calls no network."""
        from ...render.plotly_figures import OfflineFigure

        return OfflineFigure(self.plot())

    def save_html(self, path: str | Path) -> Path:
        """``plot`` as one file that opens from disk without network (about 5 MB of it plotly)."""
        return self.show().save(path)

    def __str__(self) -> str:
        o = self.overall
        low, high = o.pearson_interval
        return (
            f"{o.n} cells: Pearson {o.pearson:.3f} [{low:.3f}, {high:.3f}], "
            f"Spearman {o.spearman:.3f}, slope {o.slope:.2f}, "
            f"{o.overlap:.0%} of the top {o.k}, {o.same_sign:.0%} same sign"
        )

    def __repr__(self) -> str:
        return f"Comparison({self})"


def compare(
    patching_result: Any,
    relevance_result: Any,
    *,
    baseline: float | Tensor | None = None,
    axes: Sequence[str] | None = None,
    k: int | None = None,
    n_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Agreement of estimated effects with measured ones, cell by cell.

    An effect is a change: of tensors from ``get_act_patch_*`` and ``get_relevance_patch_*``, which
    hold values of the objective, ``baseline`` is subtracted first. Effects no larger than the
    rounding of those values count as 0. Cells that are exactly 0 on both sides before that (the
    padding of ``*_every`` under grouped-query attention) are left out.

    The bootstrap draws examples again where both results hold several (``reduce="none"``), and
    cells otherwise. Cells of one prompt are not independent, so such intervals tell how much the
    figure hangs on single cells, not how it would vary from prompt to prompt.

    Args:
        patching_result: Measured: a tensor or ``PatchingResult`` of ``get_act_patch_*``, an
            ``AttributionResult`` (its nodes), or a mapping of nodes or edges to effects.
        relevance_result: Estimated, of the same kind and over the same cells.
        baseline: The objective on the corrupted run, for tensors: ``objective(model(corrupted))``;
            0 if they hold effects already.
        axes: Names of a tensor's axes, "layer" among them; by default the first is the layer.
        k: How many largest |effects| are compared over all cells (a layer's share per layer); by
            default a tenth.
        n_resamples: Of the bootstrap.
        confidence: Of its intervals.
        seed: Of its random numbers: same seed, same intervals.

    Raises:
        TypeError: results of different or unknown kinds.
        ValueError: other cells, values that are not finite, no baseline, or fewer than three cells.
    """
    effects = read_effects(patching_result, relevance_result, baseline, axes)
    n = effects.measured.shape[0]
    if n < 3:
        raise ValueError(f"Only {n} cells to compare; a correlation needs at least three.")
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n):
        raise ValueError(f"k={k!r}: use an integer from 1 to {n}, the number of cells.")
    if isinstance(n_resamples, bool) or not isinstance(n_resamples, int) or n_resamples < 1:
        raise ValueError(f"n_resamples={n_resamples!r}: use an integer of at least 1.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence!r}: use a number between 0 and 1, such as 0.95.")
    k = k or max(1, round(n / 10))
    how = {"n_resamples": n_resamples, "confidence": confidence}
    by_layer = [_agree(effects, layer, k, seed, how) for layer in effects.layer_names]
    return Comparison(
        effects.measured.mean(-1),
        effects.estimated.mean(-1),
        effects.axes,
        effects.cells,
        _agree(effects, None, k, seed, how),
        tuple(by_layer),
        "examples" if effects.measured.shape[1] > 1 else "cells",
        n_resamples,
        seed,
        confidence,
    )


def _agree(
    effects: Effects, layer: str | None, k: int, seed: int, how: dict[str, Any]
) -> Agreement:
    rows = effects.rows(layer)
    x, y = effects.measured[rows], effects.estimated[rows]
    n, examples = x.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(start: int, count: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        if examples > 1:
            at = torch.randint(0, examples, (count, examples), generator=generator)
            share = torch.zeros(count, examples, dtype=x.dtype)
            share.scatter_add_(1, at, torch.full(at.shape, 1.0 / examples, dtype=x.dtype))
            return effects.rounded(share @ x.T), effects.rounded(share @ y.T)
        at = torch.randint(0, n, (count, n), generator=generator)
        return x[:, 0][at], y[:, 0][at]

    share = max(1, round(k * n / effects.measured.shape[0]))
    mean_x, mean_y = effects.rounded(x.mean(1)), effects.rounded(y.mean(1))
    return agreement(
        "all" if layer is None else layer, mean_x, mean_y, k=min(n, share), draw=draw, **how
    )
