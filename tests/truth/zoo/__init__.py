"""Tiny random models of every text family that TransformerLens loads and this machine can make.

``ROWS`` is data, a row a family (``row.py`` says what a row holds); ``boot(name)`` and
``hf_model(name)`` make a row's model when first asked and keep it for the session.
"""

from .build import ROWS, boot, hf_model, make_config, make_hf, random_tokens, saved
from .row import VOCAB, Row

__all__ = [
    "ROWS",
    "VOCAB",
    "Row",
    "boot",
    "hf_model",
    "make_config",
    "make_hf",
    "random_tokens",
    "saved",
]
