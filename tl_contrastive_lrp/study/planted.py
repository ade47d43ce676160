"""Relevance and the automatic label, held against planted truth and against chance.

Where a benchmark knows which tokens decide an answer, one can say how often relevance puts one of
them on top, and whether the criteria of ``criteria``, not told which they are, tell the good maps
from the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .analysis import CaseAnalysis
from .cases import Case
from .criteria import (
    Criteria,
    heatmap_clue,
    ordinary,
    relevant_positions,
    strongest,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        found = int(relevant[strongest(analysis.tokens, counted, k)].sum())
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
