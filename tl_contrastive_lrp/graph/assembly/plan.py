"""The plan of a graph: its sites, how each transition is computed, and what is read of its nodes.

A ``GraphPlan`` says what the forward has to be prepared for. A ``GraphQuestion`` says which
objectives to explain with it, and which edges to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from ...engine.plain import RunResult
from ...engine.reading import BY_DIMENSION, BY_NEURON, BY_POSITION, RelevanceSums
from ...hooks.sites import Site, find_sites
from ...inputs.bridge import hook_points, residual_sites, without_neurons
from ...inputs.facts import PromptFacts
from ...rules.rule_sets import RuleSet, get_rule_set
from ..columns import EdgeColumns
from ..graph import AttributionGraph
from ..prune_history import PruneStep
from ..pruning import PruneRule

Granularity = Literal["block", "sublayer"]


@dataclass(frozen=True)
class Step:
    """One transition between two sites, and how its edges are computed.

    Attributes:
        source, target: Indices of the sites.
        kind: "attention" is the attention of one block, in closed form; "position" mixes no
            positions, so that its edges are a diagonal; "batched" spans several blocks and takes
            batched backward signals.
        block: The first block it spans.
    """

    source: int
    target: int
    kind: Literal["attention", "position", "batched"]
    block: int


@dataclass(frozen=True)
class GraphQuestion:
    """The objectives to explain with one forward, and the edges to keep.

    Attributes:
        objectives: The objectives; each gives one graph.
        rule: Which edges to keep.
        node_threshold: Targets with |relevance| at or below it, in logits, are not expanded.
    """

    objectives: Sequence[Callable[[Tensor], Tensor]]
    rule: PruneRule
    node_threshold: float


@dataclass(frozen=True, eq=False)
class NodeRelevance:
    """Relevance of a graph's nodes, in logits, and what ``details`` adds.

    Attributes:
        relevance: Relevance by site and position.
        dimensions: Relevance by site, position and hidden dimension.
        heads, neurons: Relevance of the heads and neurons of every block.
    """

    relevance: Float[Tensor, "site pos"]
    dimensions: Float[Tensor, "site pos d_model"] | None = None
    heads: Float[Tensor, "layer head pos"] | None = None
    neurons: Float[Tensor, "layer pos d_mlp"] | None = None


@dataclass(frozen=True, eq=False)
class GraphPlan:
    """What a graph's forward has to be prepared for.

    Attributes:
        model, rule_set: The model, and the rules under which it runs.
        covered: ``find_sites(model)``.
        sites, steps: Names of the graph's sites, input first, and its transitions.
        granularity: As the graph records it.
        heads, details: As for ``attribution_graph``.
    """

    model: Any
    rule_set: RuleSet
    covered: tuple[Site, ...]
    sites: tuple[str, ...]
    steps: Sequence[Step]
    granularity: str
    heads: bool
    details: bool

    @classmethod
    def of(
        cls,
        model: Any,
        rules: str | RuleSet,
        *,
        granularity: Granularity = "block",
        layers: Sequence[int] | None = None,
        heads: bool = False,
        details: bool = False,
    ) -> GraphPlan:
        """Plan a graph; the arguments are those of ``attribution_graph``.

        Raises:
            ValueError: layers or granularity that do not fit the model.
            UncoveredComponentError: no rule covers a part of the model.
        """
        sites, steps = transitions(model, granularity, layers, heads)
        return cls(
            model=model,
            rule_set=get_rule_set(rules),
            covered=find_sites(model),
            sites=sites,
            steps=steps,
            granularity=granularity if layers is None else "custom",
            heads=heads,
            details=details,
        )

    @property
    def attention_steps(self) -> list[Step]:
        """The transitions that are one block's attention."""
        return [step for step in self.steps if step.kind == "attention"]

    @property
    def skips_blocks(self) -> bool:
        """Whether a transition spans several blocks."""
        return any(step.kind == "batched" for step in self.steps)

    @property
    def reads_neurons(self) -> bool:
        """Whether neurons are read: they were requested, and have HookPoints."""
        return self.details and without_neurons(self.model) is None

    def sums(self) -> tuple[RelevanceSums, list[str]]:
        """The sums of all nodes' relevance, and the names under which heads are kept."""
        sums, layers = RelevanceSums(), range(int(self.model.cfg.n_layers))
        for site in self.sites:
            pattern = BY_DIMENSION if self.details else BY_POSITION
            sums.add(site, pattern, stream=site.endswith("resid_mid"))
        heads = [sums.add_heads(self.model, i) for i in layers] if self.details else []
        for i in layers if self.reads_neurons else ():
            sums.add(f"blocks.{i}.mlp.hook_post", BY_NEURON)
        return sums, heads

    def nodes(self, by_name: dict[str, Tensor], heads: list[str]) -> NodeRelevance:
        """The relevance of all nodes, from the sums of one backward."""
        relevance = torch.stack([by_name[site] for site in self.sites])
        if not self.details:
            return NodeRelevance(relevance)
        n_layers = int(self.model.cfg.n_layers)
        if self.reads_neurons:
            neurons = [by_name[f"blocks.{i}.mlp.hook_post"] for i in range(n_layers)]
        else:
            neurons = [relevance.new_zeros(relevance.shape[1], 0)] * n_layers
        return NodeRelevance(
            relevance.sum(-1),
            dimensions=relevance,
            heads=torch.stack([by_name[name] for name in heads]),
            neurons=torch.stack(neurons),
        )

    def graph(
        self,
        prompt: PromptFacts,
        result: RunResult,
        nodes: NodeRelevance,
        columns: EdgeColumns,
        node_threshold: float,
        history: tuple[PruneStep, ...] = (),
    ) -> AttributionGraph:
        """Assemble a graph from its parts, whichever engine computed them.

        Args:
            prompt: The facts about the prompt that the graph records.
            result: One objective's run.
            nodes: Relevance of the nodes.
            columns: The edges.
            node_threshold: As for ``GraphQuestion``.
            history: The account of the pruning that has already been done.
        """
        facts = result.objective
        return AttributionGraph.from_columns(
            **columns.columns(),
            relevance=nodes.relevance,
            dimensions=nodes.dimensions,
            head_relevance=nodes.heads,
            neurons=nodes.neurons,
            sites=self.sites,
            granularity=self.granularity,
            node_threshold=float(node_threshold),
            token_ids=prompt.token_ids,
            special=prompt.special,
            str_tokens=prompt.str_tokens,
            model_name=prompt.model_name,
            prepended_bos=prompt.prepended_bos,
            segments=prompt.segments,
            delta=facts.delta,
            target_logit=facts.target_logit,
            contrast_logit=facts.contrast_logit,
            objective=facts.objective,
            target=facts.target,
            contrast=facts.contrast,
            final_pos=facts.pos,
            earlier_final_pos=facts.earlier_pos,
            rules=result.coverage.rules,
            coverage=result.coverage,
            memory=result.memory,
            attention=result.attention,
            history=history,
        )


def transitions(
    model: Any, granularity: str, layers: Sequence[int] | None, heads: bool
) -> tuple[tuple[str, ...], list[Step]]:
    """The sites of the graph, input first, and how each transition is computed.

    Args:
        model: A ``TransformerBridge``.
        granularity: "block" or "sublayer".
        layers: The blocks whose inputs are sites; None for all.
        heads: Whether edges are split by head.

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
    blocks = sorted({*map(int, layers), n})
    if granularity != "block" or blocks[0] < 0 or blocks[-1] > n or len(blocks) < 2:
        raise ValueError(
            f"layers={list(layers)} must name blocks from 0 to {n} ({n}: the final output) and go "
            "with granularity='block'."
        )
    if heads and blocks != list(range(blocks[0], n + 1)):
        raise ValueError(
            "heads=True splits edges within one block; a transition over several blocks, as with "
            "these layers=[...], has no single head. Leave out heads, or layers."
        )
    steps = [
        Step(i, i + 1, "attention" if above == below + 1 else "batched", below)
        for i, (below, above) in enumerate(pairwise(blocks))
    ]
    return tuple(ends[layer] for layer in blocks), steps


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
