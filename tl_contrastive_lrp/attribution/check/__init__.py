"""A verdict for a relevance map: does what it names have the effect that it says?

``check_map`` (``run.py``) reads top to bottom: the objective, rebuilt and held against the model
(``question.py``); the tokens or segments (``units.py``); their predicted effects; the strongest and
some random ones replaced; the result (``result.py``), whose figures are in ``statistics.py`` and
whose verdict and thresholds are in ``verdict.py``. It reads an ``Attribution`` and imports none.
"""

from __future__ import annotations

from .result import MapCheck

__all__ = ["MapCheck"]
