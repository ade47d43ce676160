"""What attribution says of one case under one model and one rule set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

if TYPE_CHECKING:
    from ..graph.graph import AttributionGraph


@dataclass(frozen=True)
class SegmentSum:
    """Relevance of one named stretch of a case's tokens, special tokens left out.

    Attributes:
        name: "instruction", "query", "answer", "template", or a case's own name.
        n_tokens: Tokens counted.
        relevance: Their relevance, in logits.
        normalised: The same over the largest |relevance| of a token that is not special.

    Example:
        >>> {type(part) for part in results.analyses[0].segments} == {clrp.study.SegmentSum}
        True
    """

    name: str
    n_tokens: int
    relevance: float
    normalised: float


@dataclass(frozen=True, eq=False)
class CaseAnalysis:
    """What attribution says of one case under one model and one rule set.

    Attributes:
        case_id: The case.
        model: The model's name in the study.
        fingerprint: Hash of its weights.
        rules: Name of the rule set.
        delta: logit(target) − logit(contrast) of this model after the case's ids.
        target_rank: Rank of the target among all tokens there; 1 is the model's first choice.
        contrast_rank: Rank of the contrast.
        tokens: Relevance of each token, in logits; positive supports the target.
        str_tokens: Text of each token.
        special: Which tokens are special.
        segments: Sums over named stretches.
        groups: The published notebooks' two groups of instruction phrases, normalised sums:
            "with target" (phrases that contain the target token) and "without target"; {} where no
            instruction is known.
        metrics: Numbers of the pruned graph, by name; {} where no graph was made.
        graph: The pruned graph, where one was made.
        tokens_to_flip: How many tokens, removed in order of relevance, until the target is no
            longer first; None if it stays first within the limit, or was not measured.
        flip_limit: The most tokens removed; 0 where not measured.
        seconds: Wall time of the parts: "attribute", "graph", "flip".

    Example:
        >>> analysis = results.analyses[0]
        >>> analysis.rules, len(analysis.tokens) == len(analysis.str_tokens)
        ('attnlrp', True)
    """

    case_id: str
    model: str
    fingerprint: str
    rules: str
    delta: float
    target_rank: int
    contrast_rank: int
    tokens: Float[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    special: Bool[Tensor, " pos"]
    segments: tuple[SegmentSum, ...]
    groups: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    graph: AttributionGraph | None = None
    tokens_to_flip: int | None = None
    flip_limit: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
