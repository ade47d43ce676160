"""The errors this package raises on purpose, and its warnings, so that callers can name them.

Each message says what is wrong, where, and what to type instead.
"""

from __future__ import annotations


class UncoveredComponentError(RuntimeError):
    """A component of the model has no rule, so relevance through it would be made up."""


class ModelStateError(RuntimeError):
    """The model or torch is in a state in which relevance would be wrong (training, no grad)."""


class TokenError(ValueError):
    """A token, a set of tokens or a position does not name what an objective needs."""


class PromptError(ValueError):
    """A prompt cannot be explained: empty, of the wrong shape or type, or out of range."""


class VersionError(ImportError):
    """TransformerLens is missing or older than this package needs."""


class FileFormatError(ValueError):
    """A file is damaged or was not written by this package."""


class SpecialTokenWarning(UserWarning):
    """A prompt's ids begin or end otherwise than the model's own tokenizer has it."""
