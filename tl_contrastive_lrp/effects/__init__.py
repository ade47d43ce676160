"""What replacing a token does to Δℓ, predicted for every token at once.

``token_effects`` reads top to bottom: the question, the prompt, what replaces its tokens, whether
the model's code can be followed (``followed.py``), the run (``estimate.py``), the result
(``result.py``). It is no relevance: it answers *what if this token were not there*, not *which
token spoke for the answer*.
"""

from __future__ import annotations

from .result import TokenEffects
from .token_effects import token_effects, token_effects_each

__all__ = ["TokenEffects", "token_effects", "token_effects_each"]
