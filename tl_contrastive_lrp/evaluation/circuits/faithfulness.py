"""How much of a prediction a circuit carries: keep a graph's edges, ablate all others, run.

An edge from (s, i) to (t, j) is ablated by letting target j see source i's state from a corrupted
prompt (or the mean over prompts) instead of its state in this run; ``runs.py`` gives the exact
definition. With m the objective's value (Δℓ, in logits), the share that a circuit C recovers is

    f(C) = (m(C) − m(∅)) / (m(all edges) − m(∅)),

0 if no edge is kept and 1 if all are. Over circuits C_k that keep the share k of all possible
edges, largest |weight| first,

    CPR = ∫₀¹ f(C_k) dk        (how much the first edges carry; higher is better),
    CMD = ∫₀¹ |1 − f(C_k)| dk  (how far the circuits are from the model; 0 is best).

These are the measures of the Mechanistic Interpretability Benchmark (arXiv:2504.13151, circuit
localisation track), which applies them to edges between a model's components. Here they apply to
the edges of ``AttributionGraph``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...inputs.objective import question
from ...rules.threads import one_at_a_time
from ..ranking import first_in_order
from .edge_space import EdgeSpace
from .results import CircuitCurve, CircuitFaithfulness
from .setting import CircuitSetting

if TYPE_CHECKING:
    from ...graph.graph import AttributionGraph

# The benchmark's shares. Every curve also has 0 and 1, where f is 0 and 1 by definition.
FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@one_at_a_time
def circuit_faithfulness(
    model: Any,
    circuit: AttributionGraph,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    corrupted: str | Tensor | None = None,
    mean_over: Tensor | None = None,
    batch_size: int = 8,
    prepend_bos: bool | None = None,
) -> CircuitFaithfulness:
    """Measure the share of Δℓ that a circuit recovers when every other edge is ablated.

    This works for every model and prompt that ``attribution_graph`` works for, including
    grouped-query attention. If the graph is split by head, so are the ablations. The measure is
    that of arXiv:2504.13151.

    Args:
        model: The ``TransformerBridge`` that the graph was made with.
        circuit: A graph, usually pruned: ``graph.prune(mass=0.85).connected()``. Only the choice of
            edges matters, not their weights.
        objective: The objective of the graph, as for ``attribution_graph``.
        target: The objective's target token, if no ``objective`` is given.
        contrast: The objective's contrast token, if no ``objective`` is given.
        pos: The objective's position, if no ``objective`` is given.
        corrupted: A prompt of the same number of tokens in which the cause is changed, as text or
            ids [pos] or [1, pos]. Ablated states are taken from its run. Give either this or
            ``mean_over``.
        mean_over: Token ids [prompt, pos] of several prompts, over which ablated states are
            averaged.
        batch_size: Prompts per forward pass, for ``mean_over``.
        prepend_bos: Whether ``corrupted``, if it is text, begins with the BOS token, as for
            ``attribute``. By default, as it was decided for the graph's own prompt if that was
            text.

    Returns:
        Δℓ in logits, positive if it favours the target, and the share of it that is recovered.

    Raises:
        ValueError: The graph is not of this model, prompt and objective, or its transitions span
            several blocks; neither or both of ``corrupted`` and ``mean_over`` are given; Δℓ is the
            same with every edge and with none.
        PromptError: A reference prompt has another length.
        TypeError, TokenError, UncoveredComponentError: As for ``attribution_graph``.

    Example:
        >>> corrupted = graph.token_ids.flip(0)
        >>> full = clrp.circuit_faithfulness(model, graph, objective, corrupted=corrupted)
        >>> full.share, round(full.recovered, 3)  # the circuit of all edges is the model
        (1.0, 1.0)
    """
    setting = CircuitSetting.of(
        model, circuit, question(model, objective, target, contrast, pos), corrupted, mean_over,
        batch_size, prepend_bos,
    )  # fmt: skip
    keep = setting.space.mask_of_graph(circuit)
    return setting.measure(keep[None], 1, progress=False)[0]


@one_at_a_time
def circuit_curve(
    model: Any,
    graph: AttributionGraph,
    objective: Callable[[Tensor], Tensor] | None = None,
    *,
    target: object = None,
    contrast: object = None,
    pos: int = -1,
    corrupted: str | Tensor | None = None,
    mean_over: Tensor | None = None,
    fractions: Sequence[float] = FRACTIONS,
    by: str | Tensor = "weight",
    seed: int = 0,
    name: str | None = None,
    batch_size: int = 4,
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> CircuitCurve:
    """Measure the recovered share of Δℓ over the share of edges kept, with CPR and CMD.

    The measures are those of arXiv:2504.13151.

    Args:
        model: The ``TransformerBridge`` that the graph was made with.
        graph: The whole graph, not pruned.
        objective: The objective of the graph, as for ``attribution_graph``.
        target: The objective's target token, if no ``objective`` is given.
        contrast: The objective's contrast token, if no ``objective`` is given.
        pos: The objective's position, if no ``objective`` is given.
        corrupted: As for ``circuit_faithfulness``.
        mean_over: As for ``circuit_faithfulness``.
        fractions: Shares of the possible edges to keep. 0 and 1 are always added.
        by: Which edges are kept first: "weight" (largest |weight| in the graph), "random", or a
            score for each edge of the graph, [edge], highest first. Possible edges that the graph
            lacks come last. Tied edges are in random order.
        seed: Seed for "random" and for ties.
        name: Name of the ranking. By default, the graph's rule set, "random" or "scores".
        batch_size: Circuits (and prompts of ``mean_over``) per forward pass.
        progress: Whether to show a progress bar.
        prepend_bos: As for ``circuit_faithfulness``.

    Returns:
        One point per circuit, from no edge to all edges. Δℓ is in logits, and positive values
        favour the target.

    Raises:
        ValueError: As for ``circuit_faithfulness``; or a fraction is not between 0 and 1, or ``by``
            is invalid.
        TypeError, PromptError, TokenError, UncoveredComponentError: As for
            ``circuit_faithfulness``.

    Example:
        >>> corrupted = graph.token_ids.flip(0)
        >>> settings = {"corrupted": corrupted, "fractions": [0.1, 0.5], "progress": False}
        >>> curve = clrp.circuit_curve(model, graph, objective, **settings)
        >>> [round(point.share, 2) for point in curve.points]
        [0.0, 0.1, 0.5, 1.0]
    """
    setting = CircuitSetting.of(
        model, graph, question(model, objective, target, contrast, pos), corrupted, mean_over,
        batch_size, prepend_bos,
    )  # fmt: skip
    shares = sorted({0.0, 1.0, *map(float, fractions)})
    if shares[0] < 0 or shares[-1] > 1 or not all(map(math.isfinite, shares)):
        raise ValueError(f"fractions={list(fractions)} must be shares of edges from 0 to 1.")
    scores = _scores(setting.space, graph, by)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(scores), generator=generator)
    order = shuffled[scores[shuffled].argsort(descending=True, stable=True)]
    counts = sorted({round(share * len(scores)) for share in shares})
    keep = first_in_order(order, torch.tensor(counts), len(scores))
    if isinstance(by, Tensor):
        default_name = "scores"
    else:
        default_name = graph.rules if by == "weight" else "random"
    points = setting.measure(keep, batch_size, progress)
    return CircuitCurve(name or default_name, tuple(points))


def _scores(space: EdgeSpace, graph: AttributionGraph, by: str | Tensor) -> Tensor:
    if isinstance(by, Tensor):
        if tuple(by.shape) != (len(graph.weight),) or not bool(torch.isfinite(by).all()):
            raise ValueError(
                f"by= has shape {list(by.shape)}; it must hold one finite score for each of the "
                f"graph's {len(graph.weight)} edges."
            )
        ranks = torch.unique(by.detach().cpu(), return_inverse=True)[1]
        return space.scatter(graph, ranks + 1.0)
    if by == "random":
        return torch.zeros(space.size)
    if by != "weight":
        raise ValueError(f"by={by!r} is unknown; use 'weight', 'random' or a score for each edge.")
    return space.scores(graph)
