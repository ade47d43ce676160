"""What attribution says of one case under one model and one rule set.

A case goes through: the forward under the rules, once; a backward that gives the pruned graph and,
with it, the relevance of the tokens (a backward of its own where the graph's first site is not the
token embedding alone); segments and groups; the graph's numbers; tokens to flip. ``prepare`` holds
what several rule sets of one case share.

``graph="not clear"`` follows the published study: a graph is made where the tokens' relevance,
special tokens left out, adds up to less than 0 although Δℓ is above 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..attribution.attribute import attribute, relevance_readings
from ..engine.fused import AttentionKind, fused_blocks
from ..engine.memory import Memory, plan_memory
from ..engine.prefilled import prefill_prompt
from ..engine.reading import BlockCall
from ..errors import NonFiniteError
from ..evaluation.faithfulness import tokens_to_flip
from ..graph.assembly.attribution_graph import attribution_graph
from ..graph.assembly.plain import graph_readings
from ..graph.assembly.plan import Granularity, GraphPlan
from ..hooks.placement import own_hooks
from ..inputs.bridge import LEAVES, hook_points, public_name, residual_sites
from ..inputs.devices import precise
from ..inputs.facts import PromptFacts
from ..inputs.objective import logit_diff
from ..inputs.tokens import model_device
from .analysis import CaseAnalysis
from .segments import instruction_groups, segment_masks, segment_sums

if TYPE_CHECKING:
    from ..graph.graph import AttributionGraph
    from .cases import Case


@dataclass(frozen=True)
class AnalysisSettings:
    """What is computed of each case.

    Attributes:
        rules: Names of rule sets; the base is explained under each, other models under the first.
        graph: Whether to make a graph; "not clear": only where input relevance is no clue; "first":
            under the first of ``rules`` alone.
        granularity: Sites of the graph.
        mass: Share of each transition's mass that the pruned graph keeps.
        node_threshold: Nodes with |relevance| at or below it, in logits, are not expanded.
        flip_limit: The most tokens removed to flip the prediction; 0 leaves that out.
        memory: "auto", "plain" or "tiled", as for ``attribute``.
        attention: "auto", "fused" or "eager", as for ``attribute``.
    """

    rules: tuple[str, ...] = ("attnlrp",)
    graph: bool | Literal["not clear", "first"] = True
    granularity: Granularity = "block"
    mass: float = 0.85
    node_threshold: float = 0.01
    flip_limit: int = 16
    memory: Memory = "auto"
    attention: AttentionKind = "auto"

    def under(self, rules: str) -> AnalysisSettings:
        """What is computed under one rule set, whatever its place among the others.

        Args:
            rules: Its name.
        """
        return replace(self, graph=rules == self.rules[0]) if self.graph == "first" else self


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the analyses of one case under one model share.

    Attributes:
        case: The case.
        facts: Its ids, checked and described.
        masks: Its segments.
    """

    case: Case
    facts: PromptFacts
    masks: Mapping[str, Bool[Tensor, " pos"]]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def prepare(model: Any, case: Case) -> Prepared:
    """Check a case's ids against a model, and find its segments.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        case: The case.

    Raises:
        PromptError: The model cannot take the ids.
    """
    ids = torch.tensor(case.ids, device=model_device(model))
    facts = PromptFacts.of(model, ids)
    return Prepared(case, facts, segment_masks(case, facts.str_tokens, facts.special))


def analyse(
    model: Any,
    case: Case,
    rules: str,
    settings: AnalysisSettings,
    *,
    name: str,
    fingerprint: str,
    prepared: Prepared | None = None,
) -> CaseAnalysis:
    """Explain one case under one model and one rule set.

    Args:
        model: A ``TransformerBridge`` in evaluation mode.
        case: The case.
        rules: Name of a rule set.
        settings: What is computed.
        name: The model's name in the study.
        fingerprint: Hash of its weights.
        prepared: What ``prepare`` gave for this case and model, for several rule sets.

    Returns:
        The analysis, on the CPU.

    Raises:
        NonFiniteError: Relevance is NaN or infinite.
        PromptError, TokenError, ModelStateError, UncoveredComponentError: As for ``attribute``.
        ValueError: ``prepared`` is of another case.
    """
    settings = settings.under(rules)
    shared = prepared if prepared is not None else prepare(model, case)
    if shared.case is not case:
        raise ValueError(f"prepared= is of case {shared.case.id!r}, not of {case.id!r}.")
    clock, facts = _Clock(), shared.facts
    found = _explained(model, shared, rules, settings, clock)
    if not bool(found.tokens.isfinite().all()):
        raise NonFiniteError(
            f"Relevance of case {case.id!r} is not finite under {rules}: numbers overflowed; "
            "use dtype: float32 for this model."
        )
    target_rank = _rank(found.logits, case.target_id)
    flips = None
    if settings.flip_limit:
        with clock("flip"):
            flips = _flips(model, shared, found.tokens, target_rank, settings)
    return CaseAnalysis(
        case_id=case.id,
        model=name,
        fingerprint=fingerprint,
        rules=rules,
        delta=found.delta,
        target_rank=target_rank,
        contrast_rank=_rank(found.logits, case.contrast_id),
        tokens=found.tokens,
        str_tokens=facts.str_tokens,
        special=facts.special,
        segments=segment_sums(dict(shared.masks), found.tokens, facts.special),
        groups=instruction_groups(case, facts.str_tokens, found.tokens, facts.special),
        metrics={} if found.graph is None else _numbers(found.graph),
        graph=found.graph,
        tokens_to_flip=flips,
        flip_limit=settings.flip_limit,
        seconds=clock.seconds,
    )


@dataclass(frozen=True, eq=False)
class _Found:
    delta: float
    tokens: Float[Tensor, " pos"]
    logits: Float[Tensor, " vocab"]
    graph: AttributionGraph | None


def _explained(
    model: Any, shared: Prepared, rules: str, settings: AnalysisSettings, clock: _Clock
) -> _Found:
    """The forward, and the backwards from it."""
    case, tokens = shared.case, shared.facts.tokens
    objective = logit_diff(model, case.target_id, case.contrast_id)
    how: dict[str, Any] = {
        "memory": settings.memory, "attention": settings.attention, "progress": False,
    }  # fmt: skip

    def edges(prefilled: Any = None) -> AttributionGraph:
        return attribution_graph(
            model, tokens, objective, rules=rules, granularity=settings.granularity,
            node_threshold=settings.node_threshold, mass=settings.mass, prefilled=prefilled, **how,
        ).connected()  # fmt: skip

    with_graph = settings.graph is True
    reads_tokens = not (with_graph and _graph_reads_tokens(model))
    readings, calls = [], dict[int, BlockCall]()
    if reads_tokens:
        readings += relevance_readings(model)
    if with_graph:
        plan = GraphPlan.of(model, rules, granularity=settings.granularity)
        readings += graph_readings(plan, calls)
    length = int(tokens.shape[1])
    with clock("attribute"):
        prefilled = prefill_prompt(
            model, tokens, rules, readings,
            plan_memory(
                model, length, settings.memory, graphs=int(with_graph), pruned=True,
                fused=fused_blocks(model, settings.attention, length),
            ),
            calls=calls, uses=int(reads_tokens) + int(with_graph), attention=settings.attention,
        )  # fmt: skip
        result = None
        if reads_tokens:
            result = attribute(model, tokens, objective, rules=rules, prefilled=prefilled, **how)
    graph = None
    if with_graph:
        with clock("graph"):
            graph = edges(prefilled)
    if result is not None and settings.graph == "not clear":
        is_clear = float(result.tokens.double()[~shared.facts.special].sum()) >= 0
        if result.delta > 1 and not is_clear:
            with clock("graph"):
                graph = edges()
    if result is not None:
        return _Found(result.delta, result.tokens, prefilled.logits, graph)
    assert graph is not None
    return _Found(graph.delta, graph.relevance[0].clone(), prefilled.logits, graph)


_READS_TOKENS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def _graph_reads_tokens(model: Any) -> bool:
    """Whether the graph's first site is the token embedding itself, bit for bit."""
    if model not in _READS_TOKENS:
        points, seen = hook_points(model), list[Tensor]()
        sites = (LEAVES[0], residual_sites(model)[0])

        def keep(tensor: Tensor, hook: Any) -> None:  # noqa: ARG001
            seen.append(tensor.detach().clone())

        if LEAVES[1] in points or any(site not in points for site in sites):
            return False
        device = model_device(model)
        with (
            torch.no_grad(),
            own_hooks(model, [(public_name(points, site), keep) for site in sites]),
        ):
            model(torch.arange(min(4, int(model.cfg.d_vocab)), device=device)[None])
        _READS_TOKENS[model] = len(seen) == 2 and torch.equal(*seen)
    return _READS_TOKENS[model]


def _rank(logits: Float[Tensor, " vocab"], token: int) -> int:
    """Rank of a token; 1 is the first choice, and of equal logits the lower id comes first."""
    exact = precise(logits)
    own = exact[token]
    return 1 + int((exact > own).sum()) + int((exact[:token] == own).sum())


def _flips(
    model: Any,
    shared: Prepared,
    relevance: Float[Tensor, " pos"],
    target_rank: int,
    settings: AnalysisSettings,
) -> int | None:
    """Tokens to flip; 0 where the target is not first, None where no token can be removed."""
    if target_rank > 1:
        return 0
    if not bool((~shared.facts.special)[1:].any()):
        return None
    return tokens_to_flip(
        model, shared.facts.tokens, relevance, target=shared.case.target_id,
        limit=settings.flip_limit,
    )["scores"]  # fmt: skip


def _numbers(graph: AttributionGraph) -> dict[str, float]:
    """The numbers of ``graph.summary()``, by name; those that are not defined are left out."""
    row = graph.summary().iloc[0].to_dict()
    numbers = {str(n): float(v) for n, v in row.items() if isinstance(v, Real)}
    return {name: value for name, value in numbers.items() if value == value}
