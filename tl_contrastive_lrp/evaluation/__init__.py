"""Evaluation of relevance against interventions on the model, a known truth and itself.

``patching`` estimates activation patching, ``compare`` compares an estimate with a measurement,
``faithfulness`` removes tokens, ``circuits`` runs a graph as a circuit, and ``verify`` checks a
model. ``patching`` needs TransformerLens 4.3 and is imported at first use.
"""

from __future__ import annotations

from .circuits.faithfulness import circuit_curve, circuit_faithfulness
from .circuits.results import CircuitCurve, CircuitFaithfulness
from .comparison.compare import Comparison, compare
from .faithfulness import FaithfulnessCurves, baseline_scores, faithfulness_curves
from .verification.verify import Verification, verify

__all__ = [
    "CircuitCurve",
    "CircuitFaithfulness",
    "Comparison",
    "FaithfulnessCurves",
    "Verification",
    "baseline_scores",
    "circuit_curve",
    "circuit_faithfulness",
    "compare",
    "faithfulness_curves",
    "verify",
]
