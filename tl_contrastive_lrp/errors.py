"""The errors and warnings that this package raises on purpose, and how their messages are built.

Each message says what is wrong, where, and what to do instead. Every error derives from
``LrpError`` and from the built-in error that it is a kind of, so ``except ValueError`` keeps
working. An argument that is wrong in itself (``k=-1``, an unknown name) raises a plain
``ValueError`` or ``TypeError``, as everywhere in Python.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Argument:
    """An argument of the public functions that a message names.

    ``str`` gives Python's spelling; other front ends have their own, see ``Message``.

    Attributes:
        name: Name of the argument.
        value: The value to pass; None where the message names the argument alone.

    Example:
        >>> print(clrp.errors.Argument("memory", "plain"))
        memory='plain'
    """

    name: str
    value: object = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


@dataclass(frozen=True)
class Wording:
    """A part of a message whose wording depends on whether the user writes Python.

    Attributes:
        python: The text that users of Python read.
        elsewhere: The text that all other users read in its place.

    Example:
        >>> print(clrp.errors.Wording("model.to_tokens(text)", "TransformerLens"))
        model.to_tokens(text)
    """

    python: str
    elsewhere: str = ""

    def __str__(self) -> str:
        return self.python


class Message(str):
    """The text of an error or a note, which keeps the arguments that it names as data.

    It is an ordinary string in Python's spelling. Front ends whose users write no Python, such as
    the command line, call ``spelled`` to get the same sentence with their own names.

    Args:
        parts: Strings, arguments, wordings and other messages, to be joined.

    Attributes:
        parts: The parts, those of other messages included in their place.

    Example:
        >>> message = clrp.errors.Message("Use ", clrp.errors.Argument("memory", "plain"), ".")
        >>> print(message, message.spelled(lambda a: f"--{a.name} {a.value}"))
        Use memory='plain'. Use --memory plain.
    """

    parts: tuple[str | Argument | Wording, ...]

    def __new__(cls, *parts: str | Argument | Wording) -> Message:
        """Join the parts, each as Python spells it."""
        message = super().__new__(cls, "".join(map(str, parts)))
        message.parts = tuple(
            inner
            for part in parts
            for inner in (part.parts if isinstance(part, Message) else (part,))
        )
        return message

    def spelled(self, argument: Callable[[Argument], str]) -> str:
        """The text for those who do not write Python.

        Args:
            argument: How to spell an argument.

        Returns:
            The text, with ``argument`` applied to each argument and ``elsewhere`` of each wording.

        Example:
            >>> clrp.errors.Message("Give ", clrp.errors.Argument("top_k")).spelled(
            ...     lambda a: "--" + a.name.replace("_", "-")
            ... )
            'Give --top-k'
        """

        def text(part: str | Argument | Wording) -> str:
            if isinstance(part, Argument):
                return argument(part)
            return part.elsewhere if isinstance(part, Wording) else part

        return "".join(map(text, self.parts))


def with_article(noun: str) -> str:
    """A noun behind its indefinite article, "an int" or "a list", as messages name a type.

    Args:
        noun: A word that is pronounced as it is spelt.

    Example:
        >>> clrp.errors.with_article("int"), clrp.errors.with_article("Tensor")
        ('an int', 'a Tensor')
    """
    return f"{'an' if noun[:1].lower() in {*'aeiou'} else 'a'} {noun}"


def a_kind(value: object) -> str:
    """The type of a value behind its article; "None" for None.

    Args:
        value: Any value that was given where another was expected.

    Example:
        >>> clrp.errors.a_kind(5), clrp.errors.a_kind([5]), clrp.errors.a_kind(None)
        ('an int', 'a list', 'None')
    """
    return "None" if value is None else with_article(type(value).__name__)


class LrpError(Exception):
    """Base class of every error below."""


class UncoveredComponentError(LrpError, RuntimeError):
    """A component of the model has no rule, so relevance through it would be made up."""


class ModelStateError(LrpError, RuntimeError):
    """The model or torch is in a state in which relevance would be wrong (training, no grad)."""


class NotTileableError(ModelStateError):
    """The model, its hooks or the objective cannot run in tiles of positions."""


class NonFiniteError(LrpError, ValueError):
    """Relevance, a logit or an edge is NaN or infinite: the numbers overflowed."""


class OutOfMemoryError(LrpError, MemoryError):
    """The computation does not fit into the memory that is free."""


# Messages of the CPU allocator, MPS and CUDA's libraries, for which torch has no error class.
_ALLOCATION_FAILED = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device.

    That is true of ``MemoryError``, ``torch.OutOfMemoryError``, and the plain ``RuntimeError`` of
    torch's other allocators, which can be recognised only by its text.

    Args:
        error: Any exception.

    Returns:
        True if memory ran out.

    Example:
        >>> clrp.errors.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        True
    """
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")  # not imported here, so that --help answers at once
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, LrpError):
        return False
    text = str(error).lower()
    return any(phrase in text for phrase in _ALLOCATION_FAILED)


class TokenError(LrpError, ValueError):
    """A token, a set of tokens or a position does not name what an objective needs."""


class PromptError(LrpError, ValueError):
    """A prompt cannot be explained: empty, of the wrong shape or type, or out of range."""


class VersionError(LrpError, ImportError):
    """TransformerLens is missing or older than this package needs."""


class TokenizerMismatchError(LrpError, ValueError):
    """Two models that are compared on the same token ids have different tokenizers."""


class FileFormatError(LrpError, ValueError):
    """A file is damaged or was not written by this package."""


class SettingsError(FileFormatError):
    """A study's file is wrong at a named place.

    Args:
        where: The path of the key, such as "collect.max_new_tokens"; "" for the whole file.
        problem: What is wrong, and what to write instead.

    Attributes:
        where: As given.
        problem: As given.

    Example:
        >>> print(clrp.errors.SettingsError("seed", "it is -1; give 0 or more"))
        seed: it is -1; give 0 or more
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where, self.problem = where, problem


class NotRunError(LrpError, RuntimeError):
    """A step of a study needs results that are not in its store yet."""


class SpecialTokenWarning(UserWarning):
    """A prompt's token ids begin or end differently from what the model's tokenizer produces."""
