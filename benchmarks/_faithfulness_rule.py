"""Which rule set the measurements make the default for attribution. The rule was written before
the real weights were measured for this page:

1. AttnLRP, the set of the paper that this package implements, is the default unless another named
   set is a candidate.
2. A candidate is better than AttnLRP on at least two measures of token attribution on real weights,
   from at least two groups of prompts, and worse on none. Better and worse: more prompts on its
   side than on the other by a two-sided sign test paired by prompt, at 5 % after Holm's correction
   over all of the candidate's measures on real weights.
3. On the models trained here it is worse on no measure of token attribution (paired by prompt, the
   95 % bootstrap interval of the mean difference excludes 0).
4. Its relevance is finite, and in bfloat16 and float16 a median of at most 5 % of the largest
   token's from that of float32 on the same weights.
5. Of several candidates, the one that is better on more measures on real weights; of equals, the
   first in ``RULE_SETS``.

Measures of token attribution on real weights, each in each group of prompts (``REAL``): the area
between the curves of removed tokens; the rank correlation of relevance with the measured effects of
single tokens, zeroed and exchanged for random ones; tokens to flip; how far the share of Δℓ at the
tokens is from 1, and whether it has the wrong sign. Estimates of patching and circuits are
published beside them and do not count: they are not about tokens, and estimates of patching have a
default of their own.

Why sign tests: differences between rule sets have heavy tails on real prompts (a few prompts with
Δℓ near 0 or a share of minus 20 decide a mean), and the sign test assumes nothing of their
distribution but that prompts are independent; Wilcoxon's would assume it symmetric.

What was known before: all measures on the models trained here, and an earlier measurement on real
weights with fewer prompts and measures, in which GIM and AttnLRP did not differ and RelP and the
gradient were worse. The rule prefers AttnLRP where nothing differs because it is the published
method and its backward through the softmax costs half of GIM's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from tl_contrastive_lrp.evaluation.faithfulness import bootstrap_interval

FIRST = "attnlrp"
LEAST = 2  # measures on real weights on which a candidate is better, and groups they are from
LEVEL = 0.05  # of the sign tests, after Holm's correction
LOW = 5.0  # percent that low precision may cost


@dataclass(frozen=True)
class Column:
    """A measure of token attribution on real weights: its name in the files, and in words."""

    name: str
    said: str
    higher: bool


REAL = (
    Column("area", "area (zero)", True),
    Column("spearman_zero", "rank correlation with effects (zero)", True),
    Column("spearman_random", "rank correlation with effects (random)", True),
    Column("flips", "tokens to flip", False),
    Column("off_share", "distance of the share from 1", False),
    Column("wrong_sign", "the share has the wrong sign", False),
)


@dataclass(frozen=True)
class Measure:
    """One row of the comparison: ``values`` has a row a prompt and a column a method.

    group: the prompts it was measured on. tokens: whether it is about token attribution.
    """

    said: str
    group: str
    values: pd.DataFrame
    higher: bool
    tokens: bool = True

    @classmethod
    def of(
        cls, said: str, group: str, frame: pd.DataFrame, column: str, *, higher: bool = True,
        tokens: bool = True, keys: Sequence[str] = ("prompt",),
    ) -> Measure:  # fmt: skip
        wide = frame.pivot(index=list(keys), columns="method", values=column)
        return cls(said, group, wide, higher, tokens)

    def gap(self, method: str, other: str) -> np.ndarray:
        """By prompt; prompts on which either is undefined are left out."""
        gap = (self.values[method] - self.values[other]).to_numpy(dtype=float)
        return gap[~np.isnan(gap)]

    def sign(self, method: str, other: str) -> int:
        """By the interval of the mean: 1 where ``method`` is better than ``other``, -1 where worse,
        0 where one cannot tell."""
        low, high = bootstrap_interval(self.gap(method, other))
        if low <= 0 <= high:
            return 0
        return 1 if (low > 0) == self.higher else -1

    def wins(self, method: str, other: str) -> tuple[int, int]:
        """On how many prompts ``method`` is better than ``other``, and on how many worse."""
        gap = self.gap(method, other) * (1 if self.higher else -1)
        return int((gap > 0).sum()), int((gap < 0).sum())


def sign_test(better: int, worse: int) -> float:
    """The two-sided p of so uneven a count if both were equally likely; equal prompts left out."""
    n, few = better + worse, min(better, worse)
    return min(1.0, 2.0 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """p values adjusted for being many (Holm 1979): the smallest times their number, the next times
    one less, and so on, none smaller than the one before."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, number in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, (len(p) - rank) * p[number]))
        adjusted[number] = least
    return adjusted


def adjusted(measures: Sequence[Measure], method: str, other: str = FIRST) -> list[float]:
    """p of each measure's sign test, by Holm over all of them."""
    return holm([sign_test(*one.wins(method, other)) for one in measures])


def verdicts(measures: Sequence[Measure], method: str, other: str = FIRST) -> list[int]:
    """For each measure on real weights 1 where ``method`` is better, -1 where worse, else 0."""
    found = []
    for one, p in zip(measures, adjusted(measures, method, other), strict=True):
        better, worse = one.wins(method, other)
        found.append(0 if p > LEVEL else 1 if better > worse else -1)
    return found


def counts(measures: Sequence[Measure], method: str, other: str) -> tuple[int, int]:
    """By intervals of the mean: on how many measures it is better, and on how many worse."""
    signs = [measure.sign(method, other) for measure in measures]
    return signs.count(1), signs.count(-1)


def candidates(
    real: Sequence[Measure],
    trained: Sequence[Measure],
    methods: Sequence[str],
    low: Mapping[str, float],
) -> list[str]:
    """Those of ``methods`` that 2 to 4 let pass.

    real, trained: measures on real weights, and on models trained here. low: percent by which low
    precision is off; NaN for a set whose relevance is not finite.
    """
    counted = [one for one in real if one.tokens]
    found = []
    for method in methods:
        if method == FIRST:
            continue
        signs = verdicts(counted, method)
        better = [one.group for one, sign in zip(counted, signs, strict=True) if sign > 0]
        _, worse = counts([one for one in trained if one.tokens], method, FIRST)
        enough = len(better) >= LEAST and len(set(better)) >= LEAST
        if enough and -1 not in signs and worse == 0 and low[method] <= LOW:
            found.append(method)
    return found


def chosen(
    real: Sequence[Measure],
    trained: Sequence[Measure],
    methods: Sequence[str],
    low: Mapping[str, float],
) -> str:
    """The default."""
    found = candidates(real, trained, methods, low)
    if not found:
        return FIRST
    counted = [one for one in real if one.tokens]
    return max(found, key=lambda method: verdicts(counted, method).count(1))
