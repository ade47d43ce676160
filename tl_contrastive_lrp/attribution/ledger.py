"""Where Δℓ goes: how much arrives at each site, and what happened to the rest.

LRP distributes Δℓ. Part of it ends in biases and position embeddings, which are not input tokens,
and some rules create or destroy relevance (the ordinary gradient of the softmax, soft-caps, norms
that keep theirs). The ledger records how much, between which two sites, so that no loss is silent:

    total(next site) = total(site) + biases + positions + other,

where Δℓ itself takes the place of the site after the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LedgerRow:
    """One site, and the step from it to the next site above. All values in logits, signed as Δℓ.

    Attributes:
        site: HookPoint of the residual stream, or ``hook_embed``.
        total: Relevance that arrives there, summed over positions; over those of the answers' own
            tokens too, where two answers were explained.
        biases: Relevance of the bias parameters between this site and the next.
        positions: Relevance of position embeddings that are added at this step.
        other: The rest, which rules that do not conserve relevance lost (positive) or created.
    """

    site: str
    total: float
    biases: float
    positions: float
    other: float


@dataclass(frozen=True)
class Ledger:
    """The account of Δℓ from the input (first row) to the logits.

    Attributes:
        rows: One per site, input first.
        delta: Δℓ, the objective's value in logits.
    """

    rows: tuple[LedgerRow, ...]
    delta: float

    @classmethod
    def balance(
        cls,
        sites: tuple[str, ...],
        totals: list[float],
        biases: list[float],
        positions: float,
        delta: float,
    ) -> Ledger:
        """Build the ledger; ``other`` balances each row.

        Args:
            sites: Names of the sites, input first.
            totals: Relevance at each site.
            biases: Relevance of the biases of each step.
            positions: Relevance of the position embeddings.
            delta: Δℓ.
        """
        above = [*totals[1:], delta]
        placed = [positions, *[0.0] * (len(sites) - 1)]
        rows = [
            LedgerRow(site, total, bias, position, up - total - bias - position)
            for site, total, bias, position, up in zip(
                sites, totals, biases, placed, above, strict=True
            )
        ]
        return cls(tuple(rows), delta)

    @classmethod
    def combined(cls, ledgers: Sequence[tuple[int, Ledger]]) -> Ledger:
        """The account of a sum of several Δℓ, each with its sign; every entry is linear in Δℓ.

        Args:
            ledgers: Signs and ledgers of the same sites.
        """
        signs = [sign for sign, _ in ledgers]

        def added(values: Iterable[float]) -> float:
            return sum(sign * value for sign, value in zip(signs, values, strict=True))

        rows = [
            LedgerRow(
                same[0].site,
                total=added(row.total for row in same),
                biases=added(row.biases for row in same),
                positions=added(row.positions for row in same),
                other=added(row.other for row in same),
            )
            for same in zip(*(ledger.rows for _, ledger in ledgers), strict=True)
        ]
        return cls(tuple(rows), added(ledger.delta for _, ledger in ledgers))

    @property
    def share_to_tokens(self) -> float:
        """The share of Δℓ that reaches the input tokens (NaN where Δℓ is 0).

        Where two answers were explained, their own tokens are among the input tokens.

        Example:
            >>> share = float(result.tokens.sum()) / result.delta
            >>> abs(result.ledger.share_to_tokens - share) < 1e-4
            True
        """
        return self.rows[0].total / self.delta if self.delta else float("nan")

    def to_frame(self) -> pd.DataFrame:
        """The ledger as a table.

        Returns:
            Columns site, total, share (of Δℓ), biases, positions, other; in logits but for share.

        Example:
            >>> result.ledger.to_frame()["site"][0]
            'hook_embed'
        """
        import pandas as pd

        frame = pd.DataFrame([vars(row) for row in self.rows])
        frame.insert(2, "share", frame["total"] / (self.delta or float("nan")))
        return frame

    def __str__(self) -> str:
        table = self.to_frame().to_string(index=False, float_format=lambda v: f"{v:+.4f}")
        return f"{table}\nΔℓ = {self.delta:+.4f}"
