"""Which tokens of a long prompt are shown and which are folded away: numbers only, no markup.

Prompts of up to ``LONG`` tokens are shown whole. In longer ones the tokens of largest relevance are
shown with their context, and so are the beginning and the end of the prompt. Each run of other
tokens is folded into a piece that states its number of tokens and their sum. No token is left out:
the tokens shown and the tokens folded make up the prompt.
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
MOST_SHOWN = 3000  # tokens that a browser lays out at once without a pause

# Tokens are chosen until they hold this share of the sum of sizes; those below this fraction of the
# largest are never chosen, because their colour is almost white.
_SHARE, _FAINTEST = 0.9, 0.01

# The largest numbers of tokens that are chosen. Greyed tokens have large relevance whatever the
# prompt says.
_MOST, _MOST_GREYED = 150, 15

# How many tokens are shown around each, and how many more if a line begins or ends there.
_CONTEXT, _LINE = 8, 12

# How many tokens are shown at the beginning and at the end of the prompt.
_FIRST, _LAST = 40, 60

# How many tokens a folded piece holds.
_SHORTEST, _LONGEST = 24, 2000


@dataclass(frozen=True)
class Fold:
    """A run of tokens that is folded.

    Attributes:
        first: Position of the first token.
        last: Position of the last token.
        total: Sum of their relevance, in logits.
        size: Sum of |relevance|, in logits.
        largest: The relevance of largest magnitude among them, in logits.
        message: The name of the message that they belong to; "" without messages.
    """

    first: int
    last: int
    total: float
    size: float
    largest: float
    message: str = ""

    @property
    def count(self) -> int:
        """Number of tokens."""
        return self.last - self.first + 1


def folds_of(
    relevance: NDArray[np.float64],
    greyed: NDArray[np.bool_],
    tokens: Sequence[str],
    messages: Sequence[tuple[int, str]] = (),
) -> list[Fold]:
    """The folded pieces of a long prompt, in order; a short prompt has none.

    Args:
        relevance: Relevance in logits, ``[pos]``.
        greyed: One bool per token, ``[pos]``.
        tokens: The tokens as text, ``[pos]``; pieces begin and end at a line end if one is near.
        messages: Position of the first token of each message of a chat, rising from 0, and its
            name. No piece holds tokens of two messages then.
    """
    starts = np.array([start for start, _ in messages], dtype=np.int64)
    ranges = _cut(ranges_of(np.abs(relevance), greyed, tokens), starts)
    total, size = sums(relevance, ranges), sums(np.abs(relevance), ranges)
    folds = []
    for (first, last), piece_total, piece_size in zip(
        ranges.tolist(), total.tolist(), size.tolist(), strict=True
    ):
        inside = relevance[first : last + 1]
        largest = float(inside[np.abs(inside).argmax()])
        own = int(np.searchsorted(starts, first, side="right")) - 1
        name = messages[own][1] if own >= 0 else ""
        folds.append(Fold(first, last, piece_total, piece_size, largest, name))
    return folds


def _cut(ranges: NDArray[np.int64], starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The ranges, cut where a message begins inside one."""
    pieces: list[tuple[int, int]] = []
    for first, last in ranges.tolist():
        inside = starts[(starts > first) & (starts <= last)].tolist()
        pieces += [(a, b - 1) for a, b in zip([first, *inside], [*inside, last + 1], strict=True)]
    return np.array(pieces, dtype=np.int64).reshape(-1, 2)


def ranges_of(
    size: NDArray[np.float64], greyed: NDArray[np.bool_], tokens: Sequence[str]
) -> NDArray[np.int64]:
    """First and last position of every piece to fold, ``[fold, 2]``.

    Args:
        size: How much each token matters, never negative, ``[pos]`` or ``[site, pos]``. A token
            that matters at any site, by that site's own scale, is shown.
        greyed: One bool per token, ``[pos]``.
        tokens: The tokens as text, ``[pos]``.
    """
    size = np.atleast_2d(size)
    n = size.shape[1]
    if n <= LONG:
        return np.empty((0, 2), dtype=np.int64)
    ends = np.fromiter((("\n" in token) for token in tokens), bool, n)
    starts = np.concatenate([[0], np.flatnonzero(ends[:-1]) + 1])
    by_site = [_largest(row, _MOST) for row in np.where(greyed, 0.0, size)]
    largest_greyed = _largest(np.where(greyed, size.max(axis=0), 0.0), _MOST_GREYED)

    def shown(most: int) -> NDArray[np.bool_]:
        chosen = np.unique(np.concatenate([largest_greyed, *(row[:most] for row in by_site)]))
        return _shown(chosen, n, starts)

    # Choosing more tokens shows more of them, so bisection finds the largest number that fits.
    fits, over = 0, max(map(len, by_site)) + 1
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if shown(middle).sum() <= MOST_SHOWN else (fits, middle)
    return _pieces(shown(fits), starts)


def sums(values: NDArray[np.float64], ranges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of ``[..., pos]`` over ranges ``[fold, 2]``: ``[..., fold]``."""
    if not len(ranges):
        return np.zeros((*values.shape[:-1], 0))
    # reduceat sums up to the next index, so every second sum is that of a piece.
    edges = np.stack([ranges[:, 0], ranges[:, 1] + 1], axis=1).ravel()
    padded = np.concatenate([values, np.zeros((*values.shape[:-1], 1))], axis=-1)
    totals: NDArray[np.float64] = np.add.reduceat(padded, edges, axis=-1)[..., ::2]
    return totals


def _largest(size: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """The fewest positions that hold ``_SHARE`` of the sum, largest first.

    There are no more than ``most``, and none below ``_FAINTEST`` of the largest.
    """
    order = largest_first(size, most)
    order = order[size[order] > _FAINTEST * size.max()]
    before = np.cumsum(size[order]) - size[order]
    fewest: NDArray[np.int64] = order[before < _SHARE * size.sum()]
    return fewest


def _shown(chosen: NDArray[np.int64], n: int, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each token is shown: the chosen ones with context, both ends, and short gaps."""
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
    """The runs that are not shown; long ones are cut into pieces of about equal length."""
    pieces: list[tuple[int, int]] = []
    for begin, end in zip(*(ends.tolist() for ends in _runs(~shown)), strict=True):
        count = -(-(end - begin) // _LONGEST)
        cuts = np.linspace(begin, end, count + 1).astype(np.int64)[1:-1]
        line = starts[np.searchsorted(starts, cuts, side="right") - 1]
        cuts = np.where(cuts - line <= _LINE, line, cuts).tolist()
        pieces += [(a, b - 1) for a, b in zip([begin, *cuts], [*cuts, end], strict=True)]
    return np.array(pieces, dtype=np.int64).reshape(-1, 2)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first index of each run of true values, and the index after its last."""
    steps = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    return np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
