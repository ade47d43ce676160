"""What a graph shall hold: its sites, how each transition is found, and what is read of nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.relevance_sums import RelevanceSums, add_heads
from ...hooks.sites import Site
from ...inputs.bridge import hook_points, residual_sites, without_neurons
from ...inputs.objective import positions_of
from ...inputs.tokens import model_name, special_ids, special_mask, str_tokens
from ...rules.rule_sets import RuleSet
from ..pruning import PruneRule

Granularity = Literal["block", "sublayer"]


@dataclass(frozen=True)
class Step:
    """One transition between two sites (indices) and how its edges are found.

    kind: "attention" is one block's attention (closed form), "position" mixes no positions (the
    diagonal is all), "packed" spans several blocks. block: the first block it spans.
    """

    source: int
    target: int
    kind: Literal["attention", "position", "packed"]
    block: int


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """What is asked of ``attribution_graph``, checked.

    Attributes:
        model, tokens, objectives, rule_set: What runs; tokens [1, pos].
        covered: ``find_sites(model)``.
        sites, steps: Names of the graph's sites, and its transitions.
        granularity: As the graph says it.
        rule: Which edges to keep.
        node_threshold, heads, details, progress: As for ``attribution_graph``.
        prepended_bos: As in the graph.
    """

    model: Any
    tokens: Tensor
    objectives: Sequence[Callable[[Tensor], Tensor]]
    rule_set: RuleSet
    covered: tuple[Site, ...]
    sites: tuple[str, ...]
    steps: Sequence[Step]
    granularity: str
    rule: PruneRule
    node_threshold: float
    heads: bool
    details: bool
    progress: bool
    prepended_bos: bool | None = None

    @property
    def reads_neurons(self) -> bool:
        """Whether neurons are wanted, and there are any."""
        return self.details and without_neurons(self.model) is None

    def sums(self) -> tuple[RelevanceSums, list[str]]:
        """Readings of all nodes, and under which names heads are kept."""
        sums, layers = RelevanceSums(), range(int(self.model.cfg.n_layers))
        for site in self.sites:
            whole = site.endswith("resid_mid")
            reduce: Callable[[Tensor], Tensor] = _by_dimension if self.details else _by_position
            sums.add(site, reduce, stream=whole)
        by_head = [add_heads(sums, self.model, i) for i in layers] if self.details else []
        for i in layers if self.reads_neurons else ():
            sums.add(f"blocks.{i}.mlp.hook_post", _by_dimension)
        return sums, by_head

    def nodes(
        self, kept: dict[str, Tensor], by_head: list[str]
    ) -> tuple[Float[Tensor, "site pos"], dict[str, Any]]:
        """Relevance of all nodes, and what ``details`` adds to the graph."""
        relevance = torch.stack([kept[site] for site in self.sites])
        if not self.details:
            return relevance, {}
        n_layers = int(self.model.cfg.n_layers)
        neurons = [kept[f"blocks.{i}.mlp.hook_post"] for i in range(n_layers)] if (
            self.reads_neurons
        ) else [relevance.new_zeros(relevance.shape[1], 0)] * n_layers  # fmt: skip
        return relevance.sum(-1), {
            "dimensions": relevance,
            "head_relevance": torch.stack([kept[name] for name in by_head]),
            "neurons": torch.stack(neurons),
        }

    def facts(self, objective: Callable[[Tensor], Tensor], logits: Tensor) -> dict[str, Any]:
        """What the graph says of the model, its prompt and what was asked.

        Raises:
            ModelStateError: no position can be found that the objective explains.
        """
        *earlier, last = positions_of(objective, logits, self.tokens.shape[1])
        ids = self.tokens[0].cpu()
        return {
            "sites": self.sites,
            "granularity": self.granularity,
            "node_threshold": float(self.node_threshold),
            "token_ids": ids,
            "special": special_mask(ids, special_ids(self.model)),
            "str_tokens": str_tokens(self.model, ids.tolist()),
            "model_name": model_name(self.model),
            "prepended_bos": self.prepended_bos,
            "final_pos": last,
            "earlier_final_pos": tuple(earlier),
        }


def _by_dimension(relevance: Tensor) -> Tensor:
    return relevance[0]


def _by_position(relevance: Tensor) -> Tensor:
    return relevance.sum(-1)[0]


def transitions(
    model: Any, granularity: str, layers: Sequence[int] | None, heads: bool
) -> tuple[tuple[str, ...], list[Step]]:
    """The sites of the graph, input first, and how each transition is found.

    Raises:
        ValueError: layers or granularity that do not fit the model.
    """
    n = int(model.cfg.n_layers)
    if granularity not in ("block", "sublayer"):
        raise ValueError(f"granularity={granularity!r} is unknown; use 'block' or 'sublayer'.")
    ends = residual_sites(model)
    if layers is None:
        return _adjacent(model, ends, granularity == "sublayer")
    if not all(isinstance(layer, Integral) for layer in layers):
        raise ValueError(f"layers={list(layers)} must be whole numbers, indices of blocks.")
    chosen = sorted({*map(int, layers), n})
    if granularity != "block" or chosen[0] < 0 or chosen[-1] > n or len(chosen) < 2:
        raise ValueError(
            f"layers={list(layers)} must name blocks from 0 to {n} ({n}: the final output) and go "
            "with granularity='block'."
        )
    if heads and chosen != list(range(chosen[0], n + 1)):
        raise ValueError(
            "heads=True splits edges within one block; with layers=[...] that skip blocks there "
            "is no single head. Leave out heads, or layers."
        )
    steps = [
        Step(i, i + 1, "attention" if to == at + 1 else "packed", at)
        for i, (at, to) in enumerate(pairwise(chosen))
    ]
    return tuple(ends[layer] for layer in chosen), steps


def _adjacent(
    model: Any, ends: tuple[str, ...], sublayers: bool
) -> tuple[tuple[str, ...], list[Step]]:
    hook_dict = hook_points(model)
    sites, steps = [ends[0]], []
    for block, after in enumerate(ends[1:]):
        middle = f"blocks.{block}.hook_resid_mid"
        steps.append(Step(len(sites) - 1, len(sites), "attention", block))
        if sublayers and middle in hook_dict:
            sites.append(middle)
            steps.append(Step(len(sites) - 1, len(sites), "position", block))
        sites.append(after)
    return tuple(sites), steps
