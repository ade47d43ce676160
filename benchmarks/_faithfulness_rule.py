"""Which rule set the measurements make the default. The rule, which stood before the deepest model
was measured (figures for models of one to four blocks were known):

1. A named rule set is a candidate if it is better than AttnLRP, the set of the paper that this
   package implements, on at least three measures, one of them on the deepest model, and worse on
   none. Better and worse: paired by prompt, the 95 % bootstrap interval of the mean difference
   excludes 0. Were no difference real, each measure would still be better by chance once in forty.
2. A candidate's relevance must be finite, and in bfloat16 and float16 a median of at most 5 % of
   the largest token's from that of float32 on the same weights.
3. Of several candidates, the one that is better than AttnLRP on more measures; of equals, the one
   that conserves more.
4. Without a candidate it is AttnLRP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_contrastive_lrp.evaluation.faithfulness import bootstrap_interval

FIRST = "attnlrp"
LEAST = 3  # measures on which a candidate is better
LOW = 5.0  # percent that low precision may cost


@dataclass(frozen=True)
class Measure:
    """One row of the comparison: ``values`` has a row a prompt and a column a method."""

    said: str
    values: pd.DataFrame
    higher: bool
    deepest: bool = False

    @classmethod
    def of(
        cls, said: str, frame: pd.DataFrame, column: str, *, higher: bool = True,
        keys: Sequence[str] = ("prompt",), deepest: bool = False,
    ) -> Measure:  # fmt: skip
        wide = frame.pivot(index=list(keys), columns="method", values=column)
        return cls(said, wide, higher, deepest)

    def gap(self, method: str, other: str) -> np.ndarray:
        return (self.values[method] - self.values[other]).to_numpy(dtype=float)

    def sign(self, method: str, other: str) -> int:
        """1 where ``method`` is better than ``other``, -1 where worse, 0 where one cannot tell."""
        low, high = bootstrap_interval(self.gap(method, other))
        if low <= 0 <= high:
            return 0
        return 1 if (low > 0) == self.higher else -1


def counts(measures: Sequence[Measure], method: str, other: str) -> tuple[int, int]:
    """On how many measures it is better, and on how many worse."""
    signs = [measure.sign(method, other) for measure in measures]
    return signs.count(1), signs.count(-1)


def candidates(
    measures: Sequence[Measure], methods: Sequence[str], low: Mapping[str, float]
) -> list[str]:
    """Those of ``methods`` that 1 and 2 let pass. ``low``: percent by which low precision is off;
    NaN for a set whose relevance is not finite."""
    found = []
    for method in methods:
        better, worse = counts(measures, method, FIRST)
        deep, _ = counts([m for m in measures if m.deepest], method, FIRST)
        if better >= LEAST and deep >= 1 and worse == 0 and low[method] <= LOW:
            found.append(method)
    return found


def chosen(
    measures: Sequence[Measure],
    methods: Sequence[str],
    low: Mapping[str, float],
    lost: Mapping[str, float],
) -> str:
    """The default. ``lost``: how far what arrives at the tokens is from Δℓ, in shares of it."""
    found = candidates(measures, [m for m in methods if m != FIRST], low)
    if not found:
        return FIRST
    return max(found, key=lambda method: (counts(measures, method, FIRST)[0], -lost[method]))
