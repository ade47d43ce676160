"""The errors this package raises on purpose, and its warnings, so that callers can name them.

Each message says what is wrong, where, and what to type instead. All of them derive from
``LrpError``, and from the built-in error they are a kind of, so ``except ValueError`` goes on
working. An argument that is wrong in itself (``k=-1``, an unknown name) raises a plain
``ValueError`` or ``TypeError``, as everywhere in Python.
"""

from __future__ import annotations


class LrpError(Exception):
    """Base class of every error below."""


class UncoveredComponentError(LrpError, RuntimeError):
    """A component of the model has no rule, so relevance through it would be made up."""


class ModelStateError(LrpError, RuntimeError):
    """The model or torch is in a state in which relevance would be wrong (training, no grad)."""


class NotTileableError(ModelStateError):
    """The model, its hooks or the question cannot run in tiles of positions."""


class NonFiniteError(LrpError, ValueError):
    """Relevance, a logit or an edge is NaN or infinite: the numbers overflowed."""


class OutOfMemoryError(LrpError, MemoryError):
    """The computation does not fit into the memory that is free."""


class TokenError(LrpError, ValueError):
    """A token, a set of tokens or a position does not name what an objective needs."""


class PromptError(LrpError, ValueError):
    """A prompt cannot be explained: empty, of the wrong shape or type, or out of range."""


class VersionError(LrpError, ImportError):
    """TransformerLens is missing or older than this package needs."""


class FileFormatError(LrpError, ValueError):
    """A file is damaged or was not written by this package."""


class SpecialTokenWarning(UserWarning):
    """A prompt's token ids begin or end differently from what the model's tokenizer produces."""
