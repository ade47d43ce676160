"""What pruning did: the account of a mask over a graph's edges, transition by transition."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class TransitionKept:
    """What a step kept of one transition. Masses are Σ|weight| in logits.

    Attributes:
        source, target: Indices of the sites.
        edges_before, edges_kept: Numbers of edges.
        mass_before, mass_kept: Σ|weight| in logits.
    """

    source: int
    target: int
    edges_before: int
    edges_kept: int
    mass_before: float
    mass_kept: float


@dataclass(frozen=True)
class PruneStep:
    """What one pruning step did: nothing is dropped without a word.

    Attributes:
        name: Which rule.
        parameters: Its settings, as (name, value) pairs; a threshold appears in logits and as
            ``relative``, its ratio to |Δℓ| (None where Δℓ is 0).
        transitions: What it kept of each transition.
    """

    name: str
    parameters: tuple[tuple[str, float | int | str | None], ...]
    transitions: tuple[TransitionKept, ...]

    @property
    def edges_before(self) -> int:
        return sum(row.edges_before for row in self.transitions)

    @property
    def edges_kept(self) -> int:
        return sum(row.edges_kept for row in self.transitions)

    @property
    def mass_before(self) -> float:
        """Σ|weight| in logits before the step."""
        return math.fsum(row.mass_before for row in self.transitions)

    @property
    def mass_kept(self) -> float:
        """Σ|weight| in logits of what stayed."""
        return math.fsum(row.mass_kept for row in self.transitions)

    @property
    def share_kept(self) -> float:
        """Share of the mass that stayed; 1 where there was none."""
        return self.mass_kept / self.mass_before if self.mass_before else 1.0

    def to_frame(self) -> pd.DataFrame:
        """A row a transition: source, target, edges and mass before and kept, share_kept (1 where
        there was no mass)."""
        import pandas as pd

        columns = list(TransitionKept.__dataclass_fields__)
        frame = pd.DataFrame([vars(row) for row in self.transitions], columns=columns)
        share = frame["mass_kept"] / frame["mass_before"]
        return frame.assign(share_kept=share.where(frame["mass_before"] > 0, 1.0))

    def __str__(self) -> str:
        settings = ", ".join(f"{name} {_said(value)}" for name, value in self.parameters)
        return (
            f"{self.name}{f' ({settings})' if settings else ''}: "
            f"kept {self.edges_kept:,} of {self.edges_before:,} edges, "
            f"{self.share_kept:.1%} of their mass"
        )


def _said(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
