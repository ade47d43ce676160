"""How much of a prediction a circuit carries: keep a graph's edges, ablate all others, run.

An edge from (s, i) to (t, j) is ablated by letting target j see source i's state of a corrupted
prompt (or a mean over prompts) instead of its state in this run; ``circuit_runs.py`` has the exact
definition. With m the objective's value (Δℓ, logits), the recovered share of a circuit C is

    f(C) = (m(C) − m(∅)) / (m(all edges) − m(∅)),

0 with no edge kept and 1 with all. Over circuits C_k of the share k of all possible edges, largest
|weight| first,

    CPR = ∫₀¹ f(C_k) dk        (how much the first edges carry; higher is better),
    CMD = ∫₀¹ |1 − f(C_k)| dk  (how far circuits are from the model; 0 is best),

the measures of the Mechanistic Interpretability Benchmark (arXiv:2504.13151, circuit localisation),
there over edges between a model's components, here over those of ``AttributionGraph``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...inputs.objective import question
from ...rules.threads import one_at_a_time
from .edge_space import EdgeSpace
from .results import CircuitCurve, CircuitFaithfulness
from .setting import CircuitSetting

if TYPE_CHECKING:
    from ...graph.graph import AttributionGraph

# Of the benchmark above; 0 is added, where the recovered share is 0 by definition.
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
    """The share of Δℓ that a circuit recovers when every edge outside it is ablated.

    Works for every model and prompt that ``attribution_graph`` works for, grouped-query attention
    included; if the graph is split by heads, so are the ablations.

    Args:
        model: The ``TransformerBridge`` the graph was made with.
        circuit: A graph, usually pruned: ``graph.prune(mass=0.85).connected()``. Of its edges only
            which ones they are counts, not their weights.
        objective, target, contrast, pos: As for ``attribution_graph``, and the same as there.
        corrupted: A prompt of the same number of tokens in which the cause is changed, as text or
            ids [pos] or [1, pos]: ablated states are those of its run; or
        mean_over: Token ids [prompt, pos] of several prompts: ablated states are their means.
        batch_size: Prompts a forward pass, for ``mean_over``.
        prepend_bos: Whether ``corrupted``, if a text, begins with the BOS token, as for
            ``attribute``. None: as it was decided for the graph's own prompt, if that was a text.

    Raises:
        ValueError: the graph is not of this model, prompt and objective, or spans several blocks a
            transition; neither or both references; both runs have the same Δℓ.
        PromptError: a reference of another length.
        TypeError, TokenError, UncoveredComponentError: as ``attribution_graph``.
    """
    setting = CircuitSetting.of(
        model, circuit, question(model, objective, target, contrast, pos), corrupted, mean_over,
        batch_size, prepend_bos,
    )  # fmt: skip
    keep = setting.space.held(circuit)
    return setting.measured(keep[None], 1, progress=False)[0]


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
    """Recovered share of Δℓ over the kept share of all possible edges, and CPR and CMD.

    Args:
        model, graph, objective, target, contrast, pos, corrupted, mean_over: As for
            ``circuit_faithfulness``; give the whole graph, not a pruned one.
        fractions: Shares of the possible edges to keep; 0 and 1 are always there.
        by: Which edges are kept first: "weight" (largest |weight| in the graph), "random", or a
            score for each edge of the graph [edge], highest first. Possible edges that the graph
            does not hold come last. Edges that tie are in random order.
        seed: Of "random" and of ties.
        name: Of the ranking; the graph's rule set, or ``by``, if None.
        batch_size: Circuits (and prompts of ``mean_over``) a forward pass.
        progress: Show a bar.
        prepend_bos: As for ``circuit_faithfulness``.

    Raises:
        ValueError, PromptError, ...: as ``circuit_faithfulness``; a fraction outside 0 to 1.
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
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    counts = sorted({round(share * len(scores)) for share in shares})
    keep = rank[None] < torch.tensor(counts)[:, None]
    default = graph.rules if isinstance(by, str) and by == "weight" else "random"
    default = default if isinstance(by, str) else "scores"
    return CircuitCurve(name or default, tuple(setting.measured(keep, batch_size, progress)))


def _scores(space: EdgeSpace, graph: AttributionGraph, by: str | Tensor) -> Tensor:
    if isinstance(by, Tensor):
        if tuple(by.shape) != (len(graph.weight),) or not bool(torch.isfinite(by).all()):
            raise ValueError(
                f"by= has shape {list(by.shape)}; it must hold one finite score for each of the "
                f"graph's {len(graph.weight)} edges."
            )
        ranks = torch.unique(by.detach().cpu(), return_inverse=True)[1]
        return space.spread(graph, ranks + 1.0)
    if by == "random":
        return torch.zeros(space.size)
    if by != "weight":
        raise ValueError(f"by={by!r} is unknown; use 'weight', 'random' or a score for each edge.")
    return space.scores(graph)
