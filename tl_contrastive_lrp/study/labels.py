"""What a case shows: outcome and pattern, by a person and by stated criteria.

The outcome says where the failure can be understood: in the relevance of the input tokens (M-IA),
only in the attribution graph (NC-IA+M-AG), or in neither (NC-IA+AG). The pattern says how relevance
went wrong: the relevant tokens pull too weakly to the contrast (URT), other tokens push to the
target (OIT), or both. The words are those of arXiv 2604.17761, where two people labelled by eye.

Here a first label comes from criteria that a computer can apply (``automatic_label``). They read
three things: the sign of the sum, whether relevance lies on few tokens, and, where it is known
which tokens decide (decisive positions, else the instruction), whether one of them is among the
strongest. They are no substitute for a person: a page to confirm or correct them is in
``label_page``, and ``planted_truth`` measures them where the truth is planted. The file is long
because the record, the criteria, their measure and the files of labels share the same few words.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import FileFormatError
from ..files import atomic_path
from .analysis import CaseAnalysis
from .cases import Case

if TYPE_CHECKING:
    from numpy.typing import NDArray

LABEL_VERSION = 1
# The labeller of the first label.
AUTOMATIC = "automatic"

OUTCOMES = {
    "M-IA": "manifest in the input attribution",
    "NC-IA+M-AG": "no clue in the input attribution, manifest in the graph",
    "NC-IA+AG": "no clue in the input attribution nor in the graph",
}
PATTERNS = {
    "URT": "underweighted relevant tokens",
    "OIT": "overweighted irrelevant tokens",
    "both": "underweighted relevant and overweighted irrelevant tokens",
}


@dataclass(frozen=True)
class Label:
    """What one labeller says of one case.

    Attributes:
        case_id: The case.
        labeller: Who says so; "automatic" for the first label.
        outcome: One of ``OUTCOMES``.
        pattern: One of ``PATTERNS``; None where none is clear.
        note: The labeller's words, or which criteria held.
        date: When, as ISO 8601; "" for automatic labels, which depend on the analysis alone.

    Raises:
        ValueError: A field is empty or none of the words above.

    Example:
        >>> clrp.study.Label("ifeval/12", "Ada", "M-IA", "URT").outcome
        'M-IA'
    """

    case_id: str
    labeller: str
    outcome: str
    pattern: str | None = None
    note: str = ""
    date: str = ""

    def __post_init__(self) -> None:
        for name in ("case_id", "labeller", "outcome", "note", "date"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a text")
        for name in ("case_id", "labeller"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; a label needs one")
        if self.outcome not in OUTCOMES:
            raise ValueError(f"outcome is {self.outcome!r}; use one of {', '.join(OUTCOMES)}")
        if self.pattern is not None and self.pattern not in PATTERNS:
            raise ValueError(
                f"pattern is {self.pattern!r}; use one of {', '.join(PATTERNS)}, or null for none"
            )
        if self.date:
            try:
                datetime.fromisoformat(self.date.replace("Z", "+00:00"))
            except ValueError:
                raise ValueError(
                    f"date is {self.date!r}; write it as 2026-01-31 or 2026-01-31T12:00:00Z"
                ) from None


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
    order = torch.argsort(-size, stable=True)[: min(criteria.strongest, n)]
    top = tuple(int(i) for i in order if size[i] > 0)
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


def manifest_by_chance(
    case: Case, analysis: CaseAnalysis, criteria: Criteria | None = None
) -> float:
    """The probability of M-IA if the same relevance lay on the ordinary tokens in random order.

    Sign and concentration do not depend on the order; whether a relevant token is among the
    strongest does, and is likely by chance where many tokens are relevant. A share of M-IA says
    something about where relevance lies only so far as it exceeds the mean of this number.

    Args:
        case: The case.
        analysis: Its analysis.
        criteria: The thresholds; None for the usual ones.

    Returns:
        A probability.
    """
    criteria = criteria or Criteria()
    clue = heatmap_clue(case, analysis, criteria)
    if not (clue.sign and clue.concentrated):
        return 0.0
    relevant, counted = relevant_positions(case), ordinary(analysis)
    if relevant is None:
        return 1.0
    # Tokens without any relevance are never among the strongest.
    drawn = min(criteria.strongest, int((analysis.tokens[counted] != 0).sum()))
    return _hit_by_chance(int(counted.sum()), int((relevant & counted).sum()), drawn)


def _hit_by_chance(n: int, relevant: int, drawn: int) -> float:
    """The probability that tokens drawn at random without replacement hold a relevant one."""
    return 1 - math.comb(n - relevant, drawn) / math.comb(n, drawn)


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


def without_truth(case: Case) -> Case:
    """The case as a reader has it who is not told which tokens decide."""
    segments = {name: at for name, at in case.segments.items() if name != "instruction"}
    return replace(case, decisive_positions=None, segments=segments)


@dataclass(frozen=True)
class PlantedTruth:
    """How relevance and the automatic label do where the decisive tokens are known.

    Each array has one entry a case, in the order given; ``tables`` on the report page averages
    them.

    Attributes:
        k: How many of the strongest tokens are looked at.
        hit: Whether a decisive token is among the k strongest.
        hit_by_chance: The probability that it is among k ordinary tokens drawn at random.
        precision: Share of the k strongest that are decisive.
        precision_by_chance: Share of ordinary tokens that are decisive.
        recall: Share of decisive tokens that are among the k strongest.
        recall_by_chance: The share that k tokens drawn at random would hold.
        manifest: Whether the automatic label, not told which tokens decide, finds a clue in the
            heatmap.

    Example:
        >>> pairs = [(case, results.analysis(case.id, "demo", "attnlrp")) for case in results.cases]
        >>> clrp.study.planted_truth(pairs, k=5).recall.shape
        (2,)
    """

    k: int
    hit: NDArray[Any]
    hit_by_chance: NDArray[Any]
    precision: NDArray[Any]
    precision_by_chance: NDArray[Any]
    recall: NDArray[Any]
    recall_by_chance: NDArray[Any]
    manifest: NDArray[Any]

    @property
    def label_precision(self) -> tuple[int, int]:
        """Of the cases called manifest without being told, those with a decisive token on top.

        Example:
            >>> pairs = [(c, results.analysis(c.id, "demo", "attnlrp")) for c in results.cases]
            >>> both, called = clrp.study.planted_truth(pairs).label_precision
            >>> both <= called
            True
        """
        return int((self.hit & self.manifest).sum()), int(self.manifest.sum())

    @property
    def label_recall(self) -> tuple[int, int]:
        """Of the cases with a decisive token on top, those called manifest without being told.

        Example:
            >>> pairs = [(c, results.analysis(c.id, "demo", "attnlrp")) for c in results.cases]
            >>> both, found = clrp.study.planted_truth(pairs).label_recall
            >>> both <= found
            True
        """
        return int((self.hit & self.manifest).sum()), int(self.hit.sum())


def planted_truth(
    pairs: Iterable[tuple[Case, CaseAnalysis]], k: int = 5, criteria: Criteria | None = None
) -> PlantedTruth:
    """Hold relevance and the automatic label against planted decisive tokens.

    Args:
        pairs: Cases with known ``decisive_positions``, each with its analysis; others are left out.
        k: How many of the strongest tokens to look at.
        criteria: The thresholds of the label.

    Returns:
        One entry a case.

    Raises:
        ValueError: ``k`` is below 1.

    Example:
        >>> pairs = [(case, results.analysis(case.id, "demo", "attnlrp")) for case in results.cases]
        >>> truth = clrp.study.planted_truth(pairs, k=5)
        >>> bool(truth.hit.mean() > truth.hit_by_chance.mean())
        True
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be 1 or more")
    rows = []
    for case, analysis in pairs:
        if case.decisive_positions is None:
            continue
        counted, relevant = ordinary(analysis), relevant_positions(case)
        if relevant is None or not bool((relevant & counted).any()):
            continue
        n, d = int(counted.sum()), int((relevant & counted).sum())
        drawn = min(k, n)
        size = torch.where(counted, analysis.tokens.double().abs(), -1.0)
        top = torch.argsort(-size, stable=True)[:drawn]
        found = int(relevant[top].sum())
        rows.append(
            (
                found > 0,
                _hit_by_chance(n, d, drawn),
                found / drawn,
                d / n,
                found / d,
                drawn / n,
                heatmap_clue(without_truth(case), analysis, criteria).found,
            )
        )
    columns = [np.array(column) for column in zip(*rows, strict=True)] or [np.zeros(0)] * 7
    columns[0], columns[6] = columns[0].astype(bool), columns[6].astype(bool)
    return PlantedTruth(k, *columns)


def write_labels(path: str | os.PathLike[str], labels: Iterable[Label]) -> Path:
    """Write labels as JSON lines, whole or not at all.

    Args:
        path: The file.
        labels: The labels.

    Returns:
        The path.

    Raises:
        FileNotFoundError: The folder does not exist.

    Example:
        >>> path = clrp.study.write_labels("ada.jsonl", [clrp.study.Label("a/1", "Ada", "M-IA")])
        >>> len(path.read_text().splitlines())
        1
    """
    lines = [json.dumps({"version": LABEL_VERSION, **asdict(label)}) for label in labels]
    with atomic_path(path, example="labels.jsonl") as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return Path(path)


def read_labels(path: str | os.PathLike[str]) -> tuple[Label, ...]:
    """Read labels that ``write_labels`` or the labelling page wrote.

    Args:
        path: The file.

    Returns:
        The labels; of several by one labeller for one case the last, which corrects the others.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: A line is no label; the message names line and field.

    Example:
        >>> path = clrp.study.write_labels("ada.jsonl", [clrp.study.Label("a/1", "Ada", "M-IA")])
        >>> clrp.study.read_labels(path)[0].labeller
        'Ada'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    labels: dict[tuple[str, str], Label] = {}
    # Not splitlines: a browser writes U+2028 in a note as it is, and no line ends there.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            label = _label(json.loads(line))
        except (ValueError, TypeError) as error:
            raise FileFormatError(f"{path}, line {number}: {error}") from error
        labels.pop((label.case_id, label.labeller), None)
        labels[label.case_id, label.labeller] = label
    return tuple(labels.values())


def _label(row: Any) -> Label:
    if not isinstance(row, Mapping):
        raise ValueError(f"a label is a JSON object, not {type(row).__name__}")
    values = dict(row)
    version = values.pop("version", None)
    if version != LABEL_VERSION:
        raise ValueError(f"version is {version!r}; this package reads {LABEL_VERSION}")
    names = {field.name for field in fields(Label)}
    unknown, missing = set(values) - names, {"case_id", "labeller", "outcome"} - set(values)
    if unknown or missing:
        words = ", ".join(sorted(unknown or missing))
        raise ValueError(f"{'unknown' if unknown else 'missing'} field: {words}")
    return Label(**values)


def now() -> str:
    """The present as an ISO 8601 date in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
