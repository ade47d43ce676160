"""What the edges of graphs should be, made once for all tests, and how far a graph is from it.

Errors are relative to the largest entry of what is compared, off the diagonal and on it
separately: residual streams make diagonals large.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from truth.families import hf_model, random_tokens
from truth.oracle import contrast_seed
from truth.oracle_edges import EdgeTruth

TARGET, CONTRAST, VOCAB = 7, 12, 48
TOKENS = random_tokens()
N = TOKENS.shape[1]


@functools.cache
def truth(name: str, rules: str, pos: int = -1) -> EdgeTruth:
    seed = contrast_seed(TOKENS, TARGET, CONTRAST, VOCAB, pos)
    return EdgeTruth(hf_model(name), TOKENS, seed, rules)


@functools.cache
def matrix(name: str, rules: str, source: str, target: str) -> Tensor:
    return truth(name, rules).matrix(source, target)


def between(a: Tensor) -> Tensor:
    """The edges between different positions: a without its diagonal."""
    return a - a.diag().diag()


def error(found: Tensor, wanted: Tensor, whole: Tensor | None = None) -> float:
    """Largest error relative to the largest entry of ``whole`` (else ``wanted``), in two parts."""
    whole = wanted if whole is None else whole
    parts = [(found.diag(), wanted.diag(), whole.diag())]
    parts += [(between(found), between(wanted), between(whole))]
    errors = []
    for f, w, scale in parts:
        difference = (f.double() - w).abs().max()
        largest = scale.abs().max()
        errors.append(float(difference / largest if largest > 0 else difference))
    return max(errors)


def errors_of(g: Any, true: EdgeTruth, transitions: list[tuple[str, str]]) -> dict[Any, float]:
    return {(s, t): error(g.matrix(s, t), true.matrix(s, t)) for s, t in transitions}


def assert_all_below(errors: dict[Any, float], limit: float) -> None:
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= limit, (worst, errors[worst])
