"""What running circuits found: one circuit, and the curve of circuits that grow."""

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
    """What one circuit carries.

    Attributes:
        edges_kept, edges_all: Edges of the circuit, and all that are possible at this prompt.
        delta: Δℓ with all other edges ablated, logits.
        delta_full, delta_empty: Δℓ with every edge and with none.
        ablation: Where ablated states came from: "corrupted" or "mean".
    """

    edges_kept: int
    edges_all: int
    delta: float
    delta_full: float
    delta_empty: float
    ablation: str

    @property
    def share(self) -> float:
        """Kept share of the possible edges."""
        return self.edges_kept / self.edges_all

    @property
    def recovered(self) -> float:
        """Share of Δℓ's gap that the circuit carries: 0 none, 1 all; may be outside."""
        return (self.delta - self.delta_empty) / (self.delta_full - self.delta_empty)

    def __str__(self) -> str:
        return (
            f"{self.edges_kept:,} of {self.edges_all:,} edges ({self.share:.2%}) recover "
            f"{self.recovered:.1%} of Δℓ: {self.delta:+.3f} logits, from {self.delta_empty:+.3f} "
            f"(none, {self.ablation} states) to {self.delta_full:+.3f} (all)"
        )


@dataclass(frozen=True)
class CircuitCurve:
    """The recovered share over the kept share of edges.

    Attributes:
        name: What ranked the edges.
        points: One circuit a point, from no edge to all.
    """

    name: str
    points: tuple[CircuitFaithfulness, ...]

    @property
    def cpr(self) -> float:
        """∫ recovered d(share), by the trapezoid rule over the points."""
        return _area([(p.share, p.recovered) for p in self.points])

    @property
    def cmd(self) -> float:
        """∫ |1 − recovered| d(share), by the trapezoid rule over the points."""
        return _area([(p.share, abs(1.0 - p.recovered)) for p in self.points])

    def to_frame(self) -> pd.DataFrame:
        """A row a circuit: name, edges, share, delta (logits), recovered."""
        import pandas as pd

        rows = [(self.name, p.edges_kept, p.share, p.delta, p.recovered) for p in self.points]
        return pd.DataFrame(rows, columns=["name", "edges", "share", "delta", "recovered"])

    def plot(self) -> Any:
        """A plotly figure: recovered share over kept share of edges, logarithmic.

        Raises:
            ImportError: plotly is not installed.
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
        return f"{self.name}: CPR {self.cpr:.3f}, CMD {self.cmd:.3f} ({len(self.points)} circuits)"


def _area(points: Sequence[tuple[float, float]]) -> float:
    steps = pairwise(points)
    return math.fsum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in steps)
