"""How far labellers agree: per cent, and Cohen's kappa, which takes out agreement by chance.

    κ = (p_o − p_e) / (1 − p_e),    p_e = Σ_c p_a(c) p_b(c)

p_o is the share of cases with the same label, p_a(c) the share of labeller a's labels that are c
(Cohen 1960). κ is undefined where both always give the same one label.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .bootstrap import Interval, bootstrap, share
from .labels import Label

if TYPE_CHECKING:
    from numpy.typing import NDArray

NONE = "none"


@dataclass(frozen=True)
class LabelAgreement:
    """Agreement of two labellers.

    Attributes:
        field: "outcome" or "pattern".
        first: One labeller.
        second: The other.
        same: Share of cases with the same label, with its bootstrap interval.
        kappa: Cohen's κ, with its bootstrap interval.
        table: How many cases have each pair of labels, (first's, second's).

    Example:
        >>> ada, bo = (clrp.study.Label("a/1", name, "M-IA") for name in ("Ada", "Bo"))
        >>> clrp.study.label_agreement([ada, bo])[0].table
        {('M-IA', 'M-IA'): 1}
    """

    field: str
    first: str
    second: str
    same: Interval
    kappa: Interval
    table: dict[tuple[str, str], int]


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's κ of two labellers' labels of the same cases.

    Args:
        first: One labeller's labels.
        second: The other's, in the same order.

    Returns:
        κ, from −1 to 1; NaN where it is undefined.

    Raises:
        ValueError: There are no labels, or not as many of one as of the other.

    Example:
        >>> clrp.study.cohen_kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"])
        0.5
    """
    if len(first) != len(second) or not first:
        raise ValueError(
            f"{len(first)} labels of one labeller and {len(second)} of the other; give both for "
            "the same cases, at least one"
        )
    return float(_kappa(_codes(first, second)))


def _codes(first: Sequence[str], second: Sequence[str]) -> NDArray[np.int64]:
    """Labels as numbers, [labeller, case]."""
    _, codes = np.unique([*first, *second], return_inverse=True)
    return np.asarray(codes, dtype=np.int64).reshape(2, -1)


def _same(codes: NDArray[Any]) -> NDArray[np.float64]:
    """p_o of labels [..., labeller, case]."""
    result: NDArray[np.float64] = (codes[..., 0, :] == codes[..., 1, :]).mean(axis=-1)
    return result


def _kappa(codes: NDArray[Any]) -> NDArray[np.float64]:
    """κ of labels [..., labeller, case]."""
    kinds = np.arange(int(codes.max()) + 1)
    shares = (codes[..., None] == kinds).mean(axis=-2)  # [..., labeller, kind]
    by_chance = (shares[..., 0, :] * shares[..., 1, :]).sum(axis=-1)
    possible = 1 - by_chance
    result: NDArray[np.float64] = np.where(
        possible > 1e-12,
        (_same(codes) - by_chance) / np.where(possible > 1e-12, possible, 1),
        np.nan,
    )
    return result


def label_agreement(
    labels: Iterable[Label], field: Literal["outcome", "pattern"] = "outcome", *, seed: int = 0
) -> tuple[LabelAgreement, ...]:
    """Agreement of every two labellers on the cases that both labelled.

    Args:
        labels: Labels of several labellers, the automatic one included if wanted.
        field: Which part of the labels to compare. No pattern counts as a pattern of its own.
        seed: Seed of the bootstrap over cases.

    Returns:
        One agreement a pair of labellers with a case in common.

    Raises:
        ValueError: ``field`` is another word.

    Example:
        >>> labels = [
        ...     clrp.study.Label(f"a/{i}", who, outcome)
        ...     for who, outcomes in {"Ada": ["M-IA", "NC-IA+AG"], "Bo": ["M-IA", "M-IA"]}.items()
        ...     for i, outcome in enumerate(outcomes)
        ... ]
        >>> clrp.study.label_agreement(labels)[0].same.estimate
        0.5
    """
    if field not in ("outcome", "pattern"):
        raise ValueError(f"field is {field!r}; use 'outcome' or 'pattern'")
    by_labeller: dict[str, dict[str, str]] = {}
    for label in labels:
        by_labeller.setdefault(label.labeller, {})[label.case_id] = getattr(label, field) or NONE
    found = []
    for a, b in combinations(by_labeller, 2):
        common = [case for case in by_labeller[a] if case in by_labeller[b]]
        if not common:
            continue
        pairs = [(by_labeller[a][case], by_labeller[b][case]) for case in common]
        codes = _codes([p[0] for p in pairs], [p[1] for p in pairs])
        found.append(
            LabelAgreement(
                field,
                a,
                b,
                share(int((codes[0] == codes[1]).sum()), codes.shape[1], seed=seed),
                bootstrap(codes, _kappa, method="percentile", seed=seed),
                {pair: pairs.count(pair) for pair in sorted(set(pairs))},
            )
        )
    return tuple(found)
