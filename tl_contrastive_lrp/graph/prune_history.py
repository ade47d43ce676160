"""What pruning did: the account of a mask over a graph's edges, transition by transition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TransitionKept:
    """What a pruning step kept of one transition.

    Attributes:
        source: Index of the source site.
        target: Index of the target site.
        edges_before: Number of edges before the step.
        edges_kept: Number of edges that the step kept.
        mass_before: Σ|weight| before the step, in logits.
        mass_kept: Σ|weight| of the edges kept, in logits.

    Example:
        >>> row = graph.prune(top_k=7).history[0].transitions[0]
        >>> (row.source, row.target, row.edges_kept)
        (0, 1, 7)
    """

    source: int
    target: int
    edges_before: int
    edges_kept: int
    mass_before: float
    mass_kept: float


@dataclass(frozen=True)
class PruneStep:
    """What one pruning step did, so that nothing is dropped silently.

    Attributes:
        name: Which criterion: "mass", "threshold", "top_k", "node threshold", "connected",
            "subgraph" or "chosen edges".
        parameters: Its settings as (name, value) pairs. A threshold appears in logits and as
            ``relative``, its ratio to |Δℓ| (None if Δℓ is 0).
        transitions: What it kept of each transition.

    Example:
        >>> (step,) = graph.prune(mass=0.85).history
        >>> print(step)
        mass (share 0.85): kept ... of ... edges, ...% of their mass
    """

    name: str
    parameters: tuple[tuple[str, float | int | str | None], ...]
    transitions: tuple[TransitionKept, ...]

    @property
    def edges_before(self) -> int:
        """Number of edges before the step.

        Example:
            >>> graph.prune().history[0].edges_before == len(graph.weight)
            True
        """
        return sum(row.edges_before for row in self.transitions)

    @property
    def edges_kept(self) -> int:
        """Number of edges that the step kept.

        Example:
            >>> graph.prune(top_k=7).history[0].edges_kept
            28
        """
        return sum(row.edges_kept for row in self.transitions)

    @property
    def mass_before(self) -> float:
        """Σ|weight| before the step, in logits.

        Example:
            >>> round(graph.prune().history[0].mass_before / graph.mass, 3)
            1.0
        """
        return math.fsum(row.mass_before for row in self.transitions)

    @property
    def mass_kept(self) -> float:
        """Σ|weight| of the edges kept, in logits.

        Example:
            >>> pruned = graph.prune()
            >>> round(pruned.history[0].mass_kept / pruned.mass, 3)
            1.0
        """
        return math.fsum(row.mass_kept for row in self.transitions)

    @property
    def share_kept(self) -> float:
        """Share of the mass that the step kept; 1 if there was none.

        Example:
            >>> graph.prune(mass=0.6).history[0].share_kept >= 0.6
            True
        """
        return self.mass_kept / self.mass_before if self.mass_before else 1.0

    def to_frame(self) -> pd.DataFrame:
        """The account as a table, one transition per row.

        Returns:
            Columns source, target, edges_before, edges_kept, mass_before, mass_kept (logits) and
            share_kept (1 if there was no mass).

        Example:
            >>> graph.prune(top_k=7).history[0].to_frame()["edges_kept"].tolist()
            [7, 7, 7, 7]
        """
        import pandas as pd

        columns = list(TransitionKept.__dataclass_fields__)
        frame = pd.DataFrame([vars(row) for row in self.transitions], columns=columns)
        share = frame["mass_kept"] / frame["mass_before"]
        return frame.assign(share_kept=share.where(frame["mass_before"] > 0, 1.0))

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_formatted(value)}" for name, value in self.parameters)
        return (
            f"{self.name}{f' ({settings})' if settings else ''}: "
            f"kept {self.edges_kept:,} of {self.edges_before:,} edges, "
            f"{self.share_kept:.1%} of their mass"
        )


def _formatted(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
