"""The first label of a case, by stated criteria that a computer can apply.

They read three things: the sign of the sum, whether relevance lies on few tokens, and, where it is
known which tokens decide (decisive positions, else the instruction), whether one of them is among
the strongest. They are no substitute for a person: a page to confirm or correct them is in
``label_page``, and ``planted`` measures them where the truth is planted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .analysis import CaseAnalysis
from .cases import Case
from .labels import AUTOMATIC, Label


@dataclass(frozen=True)
class Criteria:
    """The thresholds of the automatic label. They were chosen once by reason, not fitted to labels.

    Attributes:
        strongest: How many tokens of the largest |relevance| a reader looks at.
        half_within: Relevance is concentrated if half of Σ|R| lies on at most this share of the
            ordinary tokens (or on ``strongest`` of them, in short prompts).
        weak_pull: The relevant tokens pull too weakly if what they give to the contrast is less
            than this share of Σ|R|.
        strong_push: Irrelevant tokens push to the target if what they give to it is at least this
            share of Σ|R|.

    Raises:
        ValueError: A threshold is out of range.

    Example:
        >>> clrp.study.Criteria(strongest=3).half_within
        0.1
    """

    strongest: int = 5
    half_within: float = 0.1
    weak_pull: float = 0.1
    strong_push: float = 0.5

    def __post_init__(self) -> None:
        if self.strongest < 1:
            raise ValueError(f"strongest is {self.strongest}; it must be 1 or more")
        for name in ("half_within", "weak_pull", "strong_push"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in (0, 1]")


@dataclass(frozen=True)
class Clue:
    """What the criteria found in one row of relevance.

    Attributes:
        sign: Whether the sum has the sign of Δℓ.
        half: The fewest ordinary tokens that hold half of Σ|R|.
        concentrated: Whether that is few.
        relevant: Whether a relevant token is among the strongest; None where none is known.
        strongest: Positions of the strongest tokens, strongest first.
    """

    sign: bool
    half: int
    concentrated: bool
    relevant: bool | None
    strongest: tuple[int, ...]

    @property
    def found(self) -> bool:
        """Whether a reader would find a clue: the sign is right, and where to look is."""
        return self.sign and self.concentrated and self.relevant is not False


def ordinary(analysis: CaseAnalysis) -> Bool[Tensor, " pos"]:
    """Which tokens count: neither special nor the first, as in the heatmap's scale."""
    mask = ~analysis.special
    mask[0] = False
    return mask


def strongest(
    values: Float[Tensor, " pos"], counted: Bool[Tensor, " pos"], k: int
) -> Int[Tensor, " strongest"]:
    """The k counted tokens of largest |value|, or all of them if there are fewer.

    Args:
        values: A number of each token, such as its relevance.
        counted: Which tokens count, as ``ordinary`` says.
        k: How many.

    Returns:
        Their positions, the strongest first; of equal ones the first in the text.
    """
    size = torch.where(counted, values.double().abs(), -1.0)
    return torch.argsort(-size, stable=True)[: min(k, int(counted.sum()))]


def relevant_positions(case: Case) -> Bool[Tensor, " pos"] | None:
    """The tokens that should decide: decisive positions if known, else the instruction, else None.

    Args:
        case: The case.

    Returns:
        One bool for each of ``case.ids``, or None where neither is known.
    """
    mask = torch.zeros(len(case.ids), dtype=torch.bool)
    if case.decisive_positions is not None:
        mask[list(case.decisive_positions)] = True
    else:
        for start, end in case.segments.get("instruction", ()):
            mask[start:end] = True
    return mask if bool(mask.any()) else None


def fewest_for_half(size: Float[Tensor, " n"]) -> int:
    """The fewest entries of non-negative sizes that hold half of their sum; 0 if all are 0."""
    total = float(size.sum())
    if not total > 0:
        return 0
    cumulative = size.double().sort(descending=True).values.cumsum(0)
    return int((cumulative < 0.5 * float(cumulative[-1])).sum()) + 1


def _clue(
    values: Float[Tensor, " pos"],
    counted: Bool[Tensor, " pos"],
    relevant: Bool[Tensor, " pos"] | None,
    sign: bool,
    criteria: Criteria,
) -> Clue:
    size = torch.where(counted, values.double().abs(), 0.0)
    n = int(counted.sum())
    order = strongest(values, counted, criteria.strongest).tolist()
    top = tuple(i for i in order if size[i] > 0)
    half = fewest_for_half(size)
    few = max(criteria.strongest, math.floor(criteria.half_within * n))
    known = None if relevant is None else bool(relevant[list(top)].any())
    return Clue(sign, half, 0 < half <= few, known, top)


def heatmap_clue(case: Case, analysis: CaseAnalysis, criteria: Criteria | None = None) -> Clue:
    """What a reader of the heatmap would find.

    Args:
        case: The case.
        analysis: Its analysis.
        criteria: The thresholds; None for the usual ones.

    Returns:
        The sum's sign, the concentration and the relevant tokens among the strongest.
    """
    counted = ordinary(analysis)
    total = float(analysis.tokens[counted].double().sum())
    sign = total * analysis.delta > 0
    return _clue(analysis.tokens, counted, relevant_positions(case), sign, criteria or Criteria())


def graph_clue(case: Case, analysis: CaseAnalysis, criteria: Criteria | None = None) -> Clue | None:
    """What a reader of the graph would find.

    Counted is the mass Σ|w| that other positions read from the hidden states of each position,
    above the input: edges between two positions, by their source.

    Args:
        case: The case.
        analysis: Its analysis.
        criteria: The thresholds; None for the usual ones.

    Returns:
        The clue, whose sign is always right (graphs show mass); None without a graph.
    """
    graph = analysis.graph
    if graph is None:
        return None
    used = (graph.source_pos != graph.target_pos) & (graph.source_site > 0)
    mass = torch.zeros(len(analysis.tokens), dtype=torch.float64)
    mass.index_add_(0, graph.source_pos[used].long(), graph.weight[used].double().abs())
    return _clue(mass, ordinary(analysis), relevant_positions(case), True, criteria or Criteria())


def automatic_pattern(
    case: Case, analysis: CaseAnalysis, criteria: Criteria | None = None
) -> str | None:
    """URT, OIT or both, where it is known which tokens are relevant.

    Shares are of Σ|R| over ordinary tokens, in logits. Relevant tokens are underweighted if their
    negative relevance (towards the contrast) is less than ``weak_pull``; irrelevant tokens are
    overweighted if their positive relevance (towards the target) is ``strong_push`` or more.

    Args:
        case: The case.
        analysis: Its analysis.
        criteria: The thresholds; None for the usual ones.

    Returns:
        One of ``PATTERNS``; None where neither holds or the relevant tokens are not known.
    """
    criteria = criteria or Criteria()
    relevant, counted = relevant_positions(case), ordinary(analysis)
    values = analysis.tokens.double()
    total = float(values[counted].abs().sum())
    if relevant is None or not total > 0:
        return None
    pull = float(-values[counted & relevant].clamp(max=0).sum()) / total
    push = float(values[counted & ~relevant].clamp(min=0).sum()) / total
    weak, strong = pull < criteria.weak_pull, push >= criteria.strong_push
    return "both" if weak and strong else "URT" if weak else "OIT" if strong else None


def automatic_label(
    case: Case, analysis: CaseAnalysis, criteria: Criteria | None = None
) -> Label | None:
    """A first label by stated criteria.

    M-IA: the sum of ordinary tokens (not special, not the first) has the sign of Δℓ, half of Σ|R|
    lies on few of them (``Criteria.half_within``, at least ``strongest``), and, where relevant
    tokens are known, one is among the ``strongest``. NC-IA+M-AG: not so, but what positions read
    from the hidden states of others is concentrated in the same way and, where relevant tokens are
    known, one of them is among those read most. NC-IA+AG: neither. The pattern is that of
    ``automatic_pattern``; none where nothing is manifest.

    Args:
        case: The case.
        analysis: Its analysis under one model and rule set.
        criteria: The thresholds; None for the usual ones.

    Returns:
        The label; None where the heatmap has no clue and no graph was made.

    Raises:
        ValueError: The analysis is of another case, or of another number of tokens.

    Example:
        >>> case = results.cases[0]
        >>> analysis = results.analysis(case.id, "demo", "attnlrp")
        >>> clrp.study.automatic_label(case, analysis).outcome
        'M-IA'
    """
    if analysis.case_id != case.id or len(analysis.tokens) != len(case.ids):
        raise ValueError(
            f"the analysis is of {analysis.case_id!r} with {len(analysis.tokens)} tokens, the case "
            f"is {case.id!r} with {len(case.ids)}"
        )
    heatmap = heatmap_clue(case, analysis, criteria)
    graph = graph_clue(case, analysis, criteria)
    if heatmap.found:
        outcome = "M-IA"
    elif graph is None:
        return None
    else:
        outcome = "NC-IA+M-AG" if graph.found else "NC-IA+AG"
    pattern = None if outcome == "NC-IA+AG" else automatic_pattern(case, analysis, criteria)
    return Label(case.id, AUTOMATIC, outcome, pattern, note=_reasons(heatmap, graph))


def _reasons(heatmap: Clue, graph: Clue | None) -> str:
    words = [
        f"the sum {'has' if heatmap.sign else 'has not'} the sign of Δℓ",
        f"half of Σ|R| on {heatmap.half} token{'s' * (heatmap.half != 1)}",
    ]
    if heatmap.relevant is not None:
        words.append(f"relevant token {'among' if heatmap.relevant else 'not among'} the strongest")
    if graph is not None and not heatmap.found:
        words.append(f"graph: half of the mass read from {graph.half}")
        if graph.relevant is not None:
            words.append(f"relevant token {'among' if graph.relevant else 'not among'} them")
    return "; ".join(words)


@dataclass(frozen=True)
class NotebookReading:
    """What the published notebooks' own criteria say of a case, from signs of segment sums.

    Attributes:
        graph_needed: Whether the sum is negative while Δℓ exceeds 1.
        reading: "underweighted", "looks right", "under- and overweighted" or "neutral".
        pattern: The same as one of ``PATTERNS``; None for the other two.
    """

    graph_needed: bool
    reading: str
    pattern: str | None


def notebook_reading(analysis: CaseAnalysis) -> NotebookReading:
    """Apply the published notebooks' criteria.

    Instruction < 0 and sum > 0: underweighted; instruction < 0 and sum ≤ 0: looks right;
    instruction > 0, group 1 (phrases with the target token) > 0 and group 2 < 0 or absent: under-
    and overweighted; instruction > 0 else: underweighted; else neutral. The sum is over all tokens
    that are not special.

    Args:
        analysis: The analysis of a case.

    Returns:
        The reading.

    Example:
        >>> reading = clrp.study.notebook_reading(results.analyses[0])
        >>> reading.graph_needed, reading.reading  # the demo has no instruction segment
        (False, 'neutral')
    """
    total = float(analysis.tokens[~analysis.special].double().sum())
    instruction = sum(s.relevance for s in analysis.segments if s.name == "instruction")
    with_target = analysis.groups.get("with target", 0.0)
    without = analysis.groups.get("without target", 0.0)
    if instruction < 0:
        reading = "underweighted" if total > 0 else "looks right"
    elif instruction > 0:
        mixed = with_target > 0 and without <= 0
        reading = "under- and overweighted" if mixed else "underweighted"
    else:
        reading = "neutral"
    pattern = {"underweighted": "URT", "under- and overweighted": "both"}.get(reading)
    return NotebookReading(total < 0 and analysis.delta > 1, reading, pattern)
