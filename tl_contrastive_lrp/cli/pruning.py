"""Making the graph of a question: whole, or of a long prompt pruned while its edges come."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from .errors import CliError, Code

if TYPE_CHECKING:
    from ..graph.graph import AttributionGraph

# Of the threshold that --relative means, while Δℓ is known from another forward only.
_CAREFUL = 0.9


@dataclass(frozen=True)
class Pruning:
    """Which edges stay, as ``AttributionGraph.prune`` takes it; and whether only connected ones."""

    mass: float | None = None
    threshold: float | None = None
    relative: float | None = None
    top_k: int | None = None
    connected: bool = True

    def check(self) -> None:
        """Refuse what no option alone can: infinity, and two thresholds.

        Raises:
            typer.BadParameter: either of them.
        """
        for name in ("mass", "threshold", "relative"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise typer.BadParameter(f"--{name} must be a finite number.")
        if self.threshold is not None and self.relative is not None:
            raise typer.BadParameter("Give either --threshold (in logits) or --relative (to |Δℓ|).")

    def on_the_way(self, delta: float) -> dict[str, float | int]:
        """The rule to prune a long prompt's edges by while they come, as ``of`` continues it.

        Each rule keeps the largest edges of a transition, so of several the strictest decides, and
        the others can be applied to what one has left; but a share of mass only to the whole.

        Args:
            delta: Δℓ, from another forward: rounded otherwise.

        Raises:
            typer.BadParameter: ``relative``, where Δℓ is 0.
        """
        from ..graph.pruning import DEFAULT_MASS

        if self.mass is not None:
            return {"mass": self.mass}
        if self.top_k is not None:
            return {"top_k": self.top_k}
        if self.threshold is not None:
            return {"threshold": self.threshold}
        if self.relative is not None:
            self._check_delta(delta)
            return {"threshold": _CAREFUL * self.relative * abs(delta)}
        return {"mass": DEFAULT_MASS}

    def _check_delta(self, delta: float) -> None:
        if self.relative is not None and not delta:
            raise typer.BadParameter("Δℓ is 0, so nothing is relative to it: use --threshold.")

    def of(self, graph: AttributionGraph) -> AttributionGraph:
        """The graph that is left.

        Args:
            graph: The full one, or one that was pruned as ``on_the_way`` says.

        Raises:
            typer.BadParameter: ``relative``, where Δℓ is 0.
        """
        self._check_delta(graph.delta)
        names = ("mass", "threshold", "relative", "top_k")
        rules = {name: value for name in names if (value := getattr(self, name)) is not None}
        for step in graph.history:
            if rules.pop(step.name, None) is None and "relative" in rules:
                self._check_careful(dict(step.parameters), graph.delta)
        pruned = graph.prune(**rules) if rules or not graph.history else graph
        return pruned.connected() if self.connected else pruned

    def _check_careful(self, done: dict[str, Any], delta: float) -> None:
        assert self.relative is not None
        if done["threshold"] > self.relative * abs(delta):
            raise CliError(
                Code.UNEXPECTED,
                f"Δℓ is {delta:.3g}, and another where the candidates are found: too small to be "
                "the measure of a threshold here. Use --threshold instead of --relative.",
            )
