"""``compare``: agreement of estimated effects with those that TransformerLens measures.

The measures are correlation, rank correlation, slope, overlap of the largest effects and agreement
of signs, over all cells and per layer, with bootstrap intervals. ``Comparison.apart`` shows where
estimates fall short.
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
        measured: The measured effect of patching each cell, in the objective's units (logits for
            ``logit_diff``, positive where the patch favours the target).
        estimated: The estimated effect of patching each cell.
        axes: Names of the axes that locate a cell, one of them "layer".
        cells: The location of each cell, one entry per axis.
        overall: Agreement over all cells.
        layers: Agreement of each layer's cells, in order.
        resampled: The units that the bootstrap resampled, "cells" or "examples".
        n_resamples: Number of resamples of the bootstrap.
        seed: Seed of the bootstrap.
        confidence: Confidence level of the intervals.

    Example:
        >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
        >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
        >>> round(agreement.overall.slope, 3), agreement.overall.same_sign
        (0.5, 1.0)
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
        """Return the agreement: one row for all cells, then one per layer.

        Each measure has its interval in two more columns, ``_low`` and ``_high``.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> list(agreement.to_frame().index)
            ['all', '0', '1']
        """
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
        """Return one row per cell: its axes, measured and estimated.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> list(agreement.to_cells().columns)
            ['layer', 'axis_1', 'measured', 'estimated']
        """
        import pandas as pd

        frame = pd.DataFrame(list(self.cells), columns=list(self.axes))
        return frame.assign(measured=self.measured.numpy(), estimated=self.estimated.numpy())

    def apart(self, k: int = 10) -> pd.DataFrame:
        """Return the ``k`` cells where estimate and measurement differ most, with the difference.

        Args:
            k: Number of cells.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> agreement.apart(k=1)["difference"].tolist()
            [-0.5]
        """
        frame = self.to_cells().assign(
            difference=(self.estimated - self.measured).numpy(),
        )
        order = frame["difference"].abs().sort_values(ascending=False, kind="stable").index
        return frame.loc[order[:k]].reset_index(drop=True)

    def plot(self) -> Any:
        """Plot the effects as a plotly ``Figure``.

        It has a scatter plot of the cells, and both sides as heatmaps on one scale. Positive
        is blue, as in TransformerLens' demos (RdBu, midpoint 0).

        Raises:
            ImportError: plotly is not installed; the message says how to install it.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> [trace.type for trace in agreement.plot().data]
            ['scatter', ...]
        """
        from ...render.plotly_figures import agreement_figure

        return agreement_figure(self.to_cells(), self.axes, str(self))

    def show(self) -> OfflineFigure:
        """Show ``plot`` in a notebook; its JavaScript is included, so no network is needed.

        Raises:
            ImportError: plotly is not installed.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> figure = agreement.show()  # displayed where a cell ends with it
            >>> hasattr(figure, "_repr_html_")
            True
        """
        from ...render.plotly_figures import OfflineFigure

        return OfflineFigure(self.plot())

    def save_html(self, path: str | Path) -> Path:
        """Save ``plot`` as one file that opens without a network (about 5 MB of it are plotly).

        Args:
            path: Where to write the page.

        Returns:
            The path that was written.

        Raises:
            ImportError: plotly is not installed.

        Example:
            >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
            >>> agreement = clrp.compare(measured, 0.5 * measured, baseline=0.0)
            >>> agreement.save_html("agreement.html").name
            'agreement.html'
        """
        return self.show().save(path)

    def __str__(self) -> str:
        overall = self.overall
        low, high = overall.pearson_interval
        return (
            f"{overall.n} cells: Pearson {overall.pearson:.3f} [{low:.3f}, {high:.3f}], "
            f"Spearman {overall.spearman:.3f}, slope {overall.slope:.2f}, "
            f"{overall.overlap:.0%} of the top {overall.k}, {overall.same_sign:.0%} same sign"
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
    """Compare estimated effects with measured ones, cell by cell.

    An effect is a change of the objective, positive where the patch raises it. The tensors of
    ``get_act_patch_*`` and ``get_relevance_patch_*`` hold values of the objective, so ``baseline``
    is subtracted first. Effects no larger than the rounding of those values count as 0. Cells that
    are exactly 0 on both sides before the subtraction (the padding of ``*_every`` with
    grouped-query attention) are left out.

    The bootstrap resamples examples where both results hold several (``reduce="none"``), and cells
    otherwise. Cells of one prompt are not independent, so intervals from cells say how much the
    result depends on single cells, not how it would vary from prompt to prompt.

    Args:
        patching_result: Measured effects: a tensor or ``PatchingResult`` of ``get_act_patch_*``, an
            ``AttributionResult`` (its nodes), or a mapping of nodes or edges to effects.
        relevance_result: Estimated effects, of the same kind and over the same cells.
        baseline: For tensors, the objective on the corrupted run, ``objective(model(corrupted))``,
            or 0 if they hold effects already.
        axes: Names of a tensor's axes, one of them "layer". By default, the first is the layer.
        k: How many of the largest |effects| to compare over all cells; each layer gets its share.
            By default, a tenth of the cells.
        n_resamples: Number of resamples of the bootstrap.
        confidence: Confidence level of its intervals.
        seed: Seed of its random numbers; the same seed gives the same intervals.

    Returns:
        The effects, and their agreement over all cells and per layer.

    Raises:
        TypeError: The results are of different or unknown kinds.
        ValueError: The results have different cells, values that are not finite, fewer than three
            cells or no baseline, or an argument is out of range.

    Example:
        >>> measured = torch.tensor([[1.0, 0.2], [-0.5, 0.1]])
        >>> print(clrp.compare(measured, 0.5 * measured, baseline=0.0))
        4 cells: Pearson 1.000 [1.000, 1.000], Spearman 1.000, slope 0.50, ...
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
    bootstrap = {"n_resamples": n_resamples, "confidence": confidence}
    by_layer = [_agree(effects, layer, k, seed, bootstrap) for layer in effects.layer_names]
    return Comparison(
        effects.measured.mean(-1),
        effects.estimated.mean(-1),
        effects.axes,
        effects.cells,
        _agree(effects, None, k, seed, bootstrap),
        tuple(by_layer),
        "examples" if effects.measured.shape[1] > 1 else "cells",
        n_resamples,
        seed,
        confidence,
    )


def _agree(
    effects: Effects, layer: str | None, k: int, seed: int, bootstrap: dict[str, Any]
) -> Agreement:
    """Return the agreement of a layer's cells, or of all cells if ``layer`` is None."""
    rows = effects.rows(layer)
    x, y = effects.measured[rows], effects.estimated[rows]
    n, examples = x.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(start: int, count: int) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        if examples > 1:
            drawn = torch.randint(0, examples, (count, examples), generator=generator)
            weights = torch.zeros(count, examples, dtype=x.dtype)
            weights.scatter_add_(1, drawn, torch.full(drawn.shape, 1.0 / examples, dtype=x.dtype))
            return effects.rounded(weights @ x.T), effects.rounded(weights @ y.T)
        drawn = torch.randint(0, n, (count, n), generator=generator)
        return x[:, 0][drawn], y[:, 0][drawn]

    k_of_layer = max(1, round(k * n / effects.measured.shape[0]))
    mean_x, mean_y = effects.rounded(x.mean(1)), effects.rounded(y.mean(1))
    return agreement(
        "all" if layer is None else layer,
        mean_x,
        mean_y,
        k=min(n, k_of_layer),
        draw=draw,
        **bootstrap,
    )
