"""Results of running circuits: one circuit, and the curve over circuits of growing size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CircuitFaithfulness:
    """How much of Δℓ one circuit carries.

    Attributes:
        edges_kept: Number of edges in the circuit.
        edges_all: Number of edges that are possible at this prompt.
        delta: Δℓ with all other edges ablated, in logits; positive values favour the target.
        delta_full: Δℓ with every edge.
        delta_empty: Δℓ with no edge.
        ablation: Where ablated states came from, "corrupted" or "mean".

    Example:
        >>> print(clrp.CircuitFaithfulness(88, 3014, 3.5, 5.8, 2.2, "corrupted"))
        88 of 3,014 edges (2.92%) recover 36.1% of Δℓ: +3.500 logits, from +2.200 ...
    """

    edges_kept: int
    edges_all: int
    delta: float
    delta_full: float
    delta_empty: float
    ablation: str

    @property
    def share(self) -> float:
        """Share of the possible edges that the circuit keeps, from 0 to 1.

        Example:
            >>> clrp.CircuitFaithfulness(88, 3014, 3.5, 5.8, 2.2, "corrupted").share == 88 / 3014
            True
        """
        return self.edges_kept / self.edges_all

    @property
    def recovered(self) -> float:
        """Share of the gap in Δℓ that the circuit recovers: 0 for none, 1 for all of it.

        It may be below 0 or above 1: other edges may work against the circuit.

        Example:
            >>> clrp.CircuitFaithfulness(10, 100, 3.0, 5.0, 1.0, "mean").recovered
            0.5
        """
        return (self.delta - self.delta_empty) / (self.delta_full - self.delta_empty)

    def __str__(self) -> str:
        return (
            f"{self.edges_kept:,} of {self.edges_all:,} edges ({self.share:.2%}) recover "
            f"{self.recovered:.1%} of Δℓ: {self.delta:+.3f} logits, from {self.delta_empty:+.3f} "
            f"(none, {self.ablation} states) to {self.delta_full:+.3f} (all)"
        )


@dataclass(frozen=True)
class CircuitCurve:
    """The recovered share of Δℓ over the share of edges kept (arXiv:2504.13151).

    Attributes:
        name: The ranking of the edges.
        points: One circuit per point, from no edge to all edges.

    Example:
        >>> circuits = [clrp.CircuitFaithfulness(k, 2, 1.0 * k, 2.0, 0.0, "mean") for k in range(3)]
        >>> print(clrp.CircuitCurve("gim", tuple(circuits)))
        gim: CPR 0.500, CMD 0.500 (3 circuits, Δℓ +2.000 from no edge to all)
    """

    name: str
    points: tuple[CircuitFaithfulness, ...]

    @property
    def cpr(self) -> float:
        """Area under the recovered share, ∫ f dk by the trapezoid rule; higher is better.

        Example:
            >>> how = {"corrupted": graph.token_ids.flip(0), "fractions": [0.1], "progress": False}
            >>> curve = clrp.circuit_curve(model, graph, objective, **how)
            >>> curve.cpr > 0.5
            True
        """
        return _area([(p.share, p.recovered) for p in self.points])

    @property
    def cmd(self) -> float:
        """Area between the recovered share and 1, ∫ |1 − f| dk by the trapezoid rule; 0 is best.

        Example:
            >>> how = {"corrupted": graph.token_ids.flip(0), "fractions": [0.1], "progress": False}
            >>> curve = clrp.circuit_curve(model, graph, objective, **how)
            >>> 0 < curve.cmd < 0.5
            True
        """
        return _area([(p.share, abs(1.0 - p.recovered)) for p in self.points])

    @property
    def gap(self) -> float:
        """Δℓ with every edge minus Δℓ with none, in logits; all shares are divided by it.

        Where it is near 0, shares, ``cpr`` and ``cmd`` mean little, and ``circuit_curve`` warns.

        Example:
            >>> circuits = [
            ...     clrp.CircuitFaithfulness(k, 2, 1.0 * k, 2.0, 0.5, "mean") for k in range(3)
            ... ]
            >>> clrp.CircuitCurve("attnlrp", tuple(circuits)).gap
            1.5
        """
        return self.points[0].delta_full - self.points[0].delta_empty

    def to_frame(self) -> pd.DataFrame:
        """Return one row per circuit: name, edges, share, delta (logits), recovered.

        Example:
            >>> how = {"corrupted": graph.token_ids.flip(0), "fractions": [0.1], "progress": False}
            >>> curve = clrp.circuit_curve(model, graph, objective, **how)
            >>> list(curve.to_frame().columns)
            ['name', 'edges', 'share', 'delta', 'recovered']
        """
        import pandas as pd

        rows = [(self.name, p.edges_kept, p.share, p.delta, p.recovered) for p in self.points]
        return pd.DataFrame(rows, columns=["name", "edges", "share", "delta", "recovered"])

    def plot(self) -> Any:
        """Plot the recovered share over the share of edges kept, as a plotly ``Figure``.

        The share of edges is on a logarithmic axis, so the circuit without edges is left out.

        Raises:
            ImportError: plotly is not installed.

        Example:
            >>> how = {"corrupted": graph.token_ids.flip(0), "fractions": [0.1], "progress": False}
            >>> curve = clrp.circuit_curve(model, graph, objective, **how)
            >>> curve.plot().layout.xaxis.type
            'log'
        """
        from ...render.plotly_figures import line_figure

        frame = self.to_frame()
        return line_figure(
            [(self.name, frame["share"].tolist()[1:], frame["recovered"].tolist()[1:])],
            x="share of edges kept",
            y="share of Δℓ recovered",
            log_x=True,
        )

    def __str__(self) -> str:
        return (
            f"{self.name}: CPR {self.cpr:.3f}, CMD {self.cmd:.3f} ({len(self.points)} circuits, "
            f"Δℓ {self.gap:+.3f} from no edge to all)"
        )


def _area(points: Sequence[tuple[float, float]]) -> float:
    return math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(points))
