"""The check of a map in words, and as plain data for the page of its result."""

from __future__ import annotations

import math
from typing import Any

import torch

from .result import MapCheck
from .units import Explained
from .verdict import MEANINGS

_SIGN = (
    "An effect is Δℓ with the {unit} replaced by {by}, minus Δℓ: negative where the {unit} speaks "
    "for the target, which is the opposite sign of relevance."
)


def figures_in_words(check: MapCheck) -> str:
    """The figures beside the verdict, in one line; those that are not defined are left out."""
    words = {
        "agreement": "correlation with effects {:+.2f}",
        "sign_agreement": "{:.0%} of the effect has the right sign",
        "contrast_to_random": "{:.1f} times the effect of random {unit}s",
        "predicted_agreement": "correlation of predicted and measured effects {:+.2f}",
        "share_to_tokens": "{:+.0%} of Δℓ at the input tokens",
        "sink_share": "{:+.0%} at the first and special tokens",
        "saturation": "mean largest attention weight {:.2f}",
    }
    parts = [
        text.format(value, unit=check.unit)
        for name, text in words.items()
        if (value := check.statistics[name]) is not None
    ]
    return "; ".join(parts) + "."


def _begun(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def require_of(check: MapCheck, result: Explained) -> None:
    """Refuse the check of another result.

    Raises:
        ValueError: it is of another result.
    """
    same = (check.delta, check.objective, check.rules) == (
        result.delta, result.objective, result.rules
    )  # fmt: skip
    if check.unit == "token":
        relevance = result.tokens.detach().cpu().double()
        same = same and check.names == result.str_tokens
        same = same and torch.equal(check.relevance, relevance)
    if not same:
        raise ValueError(
            "check= is of another result. Give what result.check(model) returned for this one."
        )


def report_fields(check: MapCheck, result: Explained, length: int) -> dict[str, Any]:
    """Fields of ``render.report.Report`` for a check.

    Args:
        check: The check.
        result: The result that it is of.
        length: Tokens on the page: those of the prompt, and of answers after it.

    Raises:
        ValueError: it is of another result.
    """
    require_of(check, result)
    sign = _SIGN.format(unit=check.unit, by=check.replaced_with)
    verdict = [
        _begun(check.sentence),
        MEANINGS[check.verdict],
        f"{_begun(figures_in_words(check))} {check.cost}.",
        f"{sign} It is of one {check.unit} replaced while all else stays.",
    ]
    rows = check.to_frame().to_dict("records")
    measured = [None if math.isnan(row["measured"]) else row["measured"] for row in rows]
    if check.unit == "token":
        return {"verdict": verdict, "measured": [*measured, *[None] * (length - len(measured))]}
    shown = ("segment", "n_tokens", "relevance", "predicted", "measured", "chosen")
    replaced = [{**row, "measured": value} for row, value in zip(rows, measured, strict=True)]
    segments = [{name: row[name] for name in shown} for row in replaced]
    return {"verdict": verdict, "measured_segments": segments}
