"""Faithfulness of input attributions: remove tokens and measure the change of Δℓ.

``curves.py`` removes tokens in the order of their scores (MoRF, LeRF, comprehensiveness,
sufficiency). ``baselines.py`` computes the scores that any attribution should beat.
``flips.py`` counts the tokens to remove until the prediction changes. ``measures.py`` compares
scores with a known truth (AUROC, average precision) and computes bootstrap intervals.
"""

from __future__ import annotations

from .baselines import BASELINES, baseline_scores
from .curves import FaithfulnessCurves, faithfulness_curves
from .flips import tokens_to_flip
from .measures import auroc, average_precision, bootstrap_interval

__all__ = [
    "BASELINES",
    "FaithfulnessCurves",
    "auroc",
    "average_precision",
    "baseline_scores",
    "bootstrap_interval",
    "faithfulness_curves",
    "tokens_to_flip",
]
