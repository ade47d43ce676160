"""The pruning options of the command line, and how they are applied to a graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import typer

from .errors import CliError, Code, message_of

if TYPE_CHECKING:
    from ..graph.graph import AttributionGraph
    from ..graph.pruning import PruneRule

# Δℓ of the forward that precedes the graph's is rounded differently, so edges are first pruned by a
# threshold that is lower than the one that --relative means.
_SAFETY_FACTOR = 0.9


def _default_rule() -> PruneRule:
    from ..graph.pruning import DEFAULT_RULE  # imports torch, which --help does not need

    return DEFAULT_RULE


@dataclass(frozen=True)
class Pruning:
    """How a graph is pruned: by the size of its edges, and by their connection to the prediction.

    Attributes:
        rule: Which edges to keep by their size.
        connected: Whether to keep only edges that lead to the prediction.
    """

    rule: PruneRule = field(default_factory=_default_rule)
    connected: bool = True

    @classmethod
    def from_options(
        cls,
        *,
        mass: float | None,
        threshold: float | None,
        relative: float | None,
        top_k: int | None,
        connected: bool,
    ) -> Pruning:
        """Check the options ``--mass``, ``--threshold``, ``--relative`` and ``--top-k``.

        Raises:
            typer.BadParameter: A value is out of range, or both thresholds are given.
        """
        from ..graph.pruning import PruneRule

        try:
            rule = PruneRule(mass, threshold, top_k, relative)
        except ValueError as error:
            raise typer.BadParameter(message_of(error)) from None
        return cls(rule or _default_rule(), connected)

    def while_computed(self, delta: float) -> dict[str, Any]:
        """The criterion to prune a long prompt's edges by while they are computed.

        Every criterion keeps the largest edges of a transition, so one may be applied first and
        the others to what it left (see ``apply``). A share of mass refers to the whole transition
        and therefore comes first.

        Args:
            delta: Δℓ in logits, from another forward and therefore rounded differently.

        Returns:
            One keyword argument of ``attribution_graph``.

        Raises:
            typer.BadParameter: There is a relative threshold and Δℓ is 0.
        """
        for name in ("mass", "top_k", "threshold"):
            if name in self.rule.criteria:
                return {name: self.rule.criteria[name]}
        threshold = self._in_logits(delta).threshold
        assert threshold is not None
        return {"threshold": _SAFETY_FACTOR * threshold}

    def apply(self, graph: AttributionGraph) -> AttributionGraph:
        """Prune a graph.

        Args:
            graph: The full graph, or one that was pruned as ``while_computed`` says.

        Raises:
            typer.BadParameter: There is a relative threshold and Δℓ is 0.
            CliError: The graph was pruned by a higher threshold than the relative one means.
        """
        in_logits = self._in_logits(graph.delta)
        remaining = self.rule.criteria
        for step in graph.history:
            if remaining.pop(step.name, None) is None and "relative" in remaining:
                _require_lower(dict(step.parameters)["threshold"], in_logits, graph.delta)
        pruned = graph.prune(**remaining) if remaining else graph
        return pruned.connected() if self.connected else pruned

    def _in_logits(self, delta: float) -> PruneRule:
        try:
            return self.rule.in_logits(delta)
        except ValueError as error:
            raise typer.BadParameter(message_of(error)) from None


def _require_lower(applied: Any, rule: PruneRule, delta: float) -> None:
    """Refuse a graph that was pruned by more than the rule's threshold while it was computed."""
    assert rule.threshold is not None
    if applied > rule.threshold:
        raise CliError(
            Code.UNEXPECTED,
            f"Δℓ is {delta:.3g} here, and differs in the forward that gives the candidates: it is "
            "too small for a relative threshold. Use --threshold instead of --relative.",
        )
