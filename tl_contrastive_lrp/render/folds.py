"""Which tokens of a long prompt are shown, and which are folded away: numbers only, no markup.

Prompts of up to ``LONG`` tokens are shown whole. In longer ones the tokens of largest relevance
are shown with what stands around them, and the beginning and the end of the prompt; each run of
other tokens is folded into a piece that states its count and its sum. Nothing is left out: tokens
shown and tokens folded are the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .ranking import largest_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

LONG = 1000
MOST_SHOWN = 3000  # tokens: what a browser lays out at once without a pause

_SHARE = 0.9  # of the sum of sizes: tokens beyond it are not worth a place of their own,
_FAINTEST = 0.01  # nor are those below this share of the largest: their colour is all but white
_MOST, _MOST_GREYED = 150, 15  # greyed ones are large for no reason that the prompt gives
_CONTEXT, _LINE = 8, 12  # tokens around each, and so many more where a line begins or ends there
_FIRST, _LAST = 40, 60  # what the prompt begins with, and what the prediction follows
_SHORTEST, _LONGEST = 24, 2000  # tokens of a piece


@dataclass(frozen=True)
class Fold:
    """Tokens ``first`` to ``last``, folded: the sum of their relevance, in logits, the sum of
    its sizes, and the one of largest size."""

    first: int
    last: int
    total: float
    size: float
    largest: float

    @property
    def count(self) -> int:
        return self.last - self.first + 1


def folds_of(
    relevance: NDArray[np.float64], greyed: NDArray[np.bool_], tokens: Sequence[str]
) -> list[Fold]:
    """The pieces of a long prompt that are folded, in order; none of a short one.

    Args:
        relevance: in logits, ``[pos]``.
        greyed: bool per token, ``[pos]``.
        tokens: as text, ``[pos]``; pieces begin and end at line ends where one is near.
    """
    ranges = ranges_of(np.abs(relevance), greyed, tokens)
    total, size = sums(relevance, ranges), sums(np.abs(relevance), ranges)
    found = []
    for (first, last), one, all_ in zip(
        ranges.tolist(), total.tolist(), size.tolist(), strict=True
    ):
        inside = relevance[first : last + 1]
        largest = float(inside[np.abs(inside).argmax()])
        found.append(Fold(first, last, one, all_, largest))
    return found


def ranges_of(
    size: NDArray[np.float64], greyed: NDArray[np.bool_], tokens: Sequence[str]
) -> NDArray[np.int64]:
    """First and last position of every piece to fold, ``[fold, 2]``.

    Args:
        size: how much each token matters, never negative: ``[pos]``, or ``[site, pos]`` where a
            token is to be shown that matters at any site, by that site's own scale.
        greyed: bool per token, ``[pos]``.
        tokens: as text, ``[pos]``.
    """
    size = np.atleast_2d(size)
    n = size.shape[1]
    if n <= LONG:
        return np.empty((0, 2), dtype=np.int64)
    ends = np.fromiter((("\n" in token) for token in tokens), bool, n)
    starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
    plain = [_largest(row, _MOST) for row in np.where(greyed, 0.0, size)]
    grey = _largest(np.where(greyed, size.max(axis=0), 0.0), _MOST_GREYED)

    def shown(most: int) -> NDArray[np.bool_]:
        chosen = np.unique(np.concatenate([grey, *(row[:most] for row in plain)]))
        return _shown(chosen, n, starts)

    # The more tokens are chosen the more are shown, so the most that fit are found by halving.
    fits, over = 0, max(map(len, plain)) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if shown(middle).sum() <= MOST_SHOWN else (fits, middle)
    return _pieces(shown(fits), starts)


def sums(values: NDArray[np.float64], ranges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of ``[..., pos]`` over ranges ``[fold, 2]``: ``[..., fold]``."""
    if not len(ranges):
        return np.zeros((*values.shape[:-1], 0))
    # reduceat sums up to the next index, so every second sum is one of a piece.
    edges = np.stack([ranges[:, 0], ranges[:, 1] + 1], axis=1).ravel()
    padded = np.concatenate([values, np.zeros((*values.shape[:-1], 1))], axis=-1)
    found: NDArray[np.float64] = np.add.reduceat(padded, edges, axis=-1)[..., ::2]
    return found


def _largest(size: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """The fewest positions that hold ``_SHARE`` of the sum, largest first; no more than ``most``,
    and none below ``_FAINTEST``."""
    order = largest_first(size, most)
    order = order[size[order] > _FAINTEST * size.max()]
    before = np.cumsum(size[order]) - size[order]
    kept: NDArray[np.int64] = order[before < _SHARE * size.sum()]
    return kept


def _shown(chosen: NDArray[np.int64], n: int, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each token is shown: those chosen, what is around them, both ends, short rests."""
    first = np.concatenate([np.maximum(chosen - _CONTEXT, 0), [0, n - _LAST]])
    after = np.concatenate([np.minimum(chosen + _CONTEXT + 1, n), [_FIRST, n]])
    line = starts[np.searchsorted(starts, first, side="right") - 1]
    first = np.where(first - line <= _LINE, line, first)
    ends = np.append(starts[1:], n)
    line = ends[np.minimum(np.searchsorted(ends, after), len(ends) - 1)]
    after = np.where(line - after <= _LINE, line, after)
    steps = np.bincount(first, minlength=n + 1) - np.bincount(after, minlength=n + 1)
    shown: NDArray[np.bool_] = np.cumsum(steps[:n]) > 0
    begin, end = _runs(~shown)
    short = end - begin < _SHORTEST
    steps = np.bincount(begin[short], minlength=n + 1) - np.bincount(end[short], minlength=n + 1)
    return shown | (np.cumsum(steps[:n]) > 0)


def _pieces(shown: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The runs that are not shown, cut into pieces of about equal length where they are long."""
    found: list[tuple[int, int]] = []
    for begin, end in zip(*(ends.tolist() for ends in _runs(~shown)), strict=True):
        count = -(-(end - begin) // _LONGEST)
        cuts = np.linspace(begin, end, count + 1).astype(np.int64)[1:-1]
        line = starts[np.searchsorted(starts, cuts, side="right") - 1]
        cuts = np.where(cuts - line <= _LINE, line, cuts).tolist()
        found += [(a, b - 1) for a, b in zip([begin, *cuts], [*cuts, end], strict=True)]
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each run of true values begins, and one after where it ends."""
    steps = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
