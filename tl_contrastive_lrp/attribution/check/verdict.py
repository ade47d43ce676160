"""The verdict on a relevance map: its thresholds, and what each verdict says.

All that a calibration changes is in this file.
"""

from __future__ import annotations

from typing import Literal

Verdict = Literal["supported", "weak", "contradicted"]

# On ``captured``, which lies in [-1, 1]. Chosen on one half of 145 real failures by a rule
# (benchmarks/_real_verdicts.py), so that few wrong maps are called supported, and few right ones
# contradicted; docs/faithfulness.md says how often the verdicts are right on the other half.
SUPPORTED = 0.6  # this much or more
CONTRADICTED = 0.0  # less than this

MEANINGS: dict[Verdict, str] = {
    "supported": "What the map names has much of the effect that so many tokens can have, in the "
    "direction that it says.",
    "weak": "What the map names has a part of the effect that so many tokens can have, too small "
    "to tell a right map from a wrong one, or nothing could be measured: rely on the measured "
    "effects instead.",
    "contradicted": "Replacing what the map names moves Δℓ the other way than it says.",
}


def verdict_of(captured: float | None) -> Verdict:
    """The verdict for a share of the effect that can be had; None where there is no effect."""
    if captured is None:
        return "weak"
    if captured >= SUPPORTED:
        return "supported"
    return "contradicted" if captured < CONTRADICTED else "weak"


def in_a_sentence(captured: float | None, count: int, unit: str, delta: float) -> str:
    """The verdict with its reason.

    Args:
        captured: As for ``verdict_of``.
        count: How many tokens or segments the map names.
        unit: "token" or "segment".
        delta: Δℓ.
    """
    verdict = verdict_of(captured)
    if captured is None:
        why = "Δℓ is 0" if delta == 0 else "nothing that was replaced or predicted has an effect"
        return f"{verdict}: {why}, so there is nothing to hold the map against."
    named = f"the strongest {unit} holds" if count == 1 else f"the {count} strongest {unit}s hold"
    as_many = f"one {unit}" if count == 1 else f"{count} {unit}s"
    share = f"{100 * abs(captured):.0f} % of the effect that {as_many} can have"
    if captured < 0:
        return f"{verdict}: {named} {share}, with the wrong sign."
    return f"{verdict}: {named} {share}, with the right sign."
