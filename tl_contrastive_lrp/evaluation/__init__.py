"""Is it right? Relevance held against interventions on the model, planted truth and itself.

``patching`` estimates activation patching, ``compare`` holds an estimate against what was measured,
``faithfulness`` removes tokens, ``circuits`` runs a graph as a circuit, and ``verify`` checks a
model.
``patching`` needs TransformerLens 4.3 and is imported when it is asked for.
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
