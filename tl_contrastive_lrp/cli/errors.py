"""The command line's exit codes, and how errors become messages and exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from ..errors import (
    Argument,
    FileFormatError,
    Message,
    ModelStateError,
    NonFiniteError,
    NotRunError,
    PromptError,
    TokenError,
    TokenizerMismatchError,
    UncoveredComponentError,
    VersionError,
    is_out_of_memory,
)
from ..inputs.versions import require_transformer_lens
from .retype import spelled_option
from .terminal import print_err

Spelling = Callable[[Argument], str]


class Code(IntEnum):
    """Exit codes; Typer itself exits with 2 where options are unknown or malformed."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    MODEL = 3
    PROMPT = 4
    FILE = 5
    INTERRUPTED = 130


class CliError(Exception):
    """An expected error: its message for the user and its exit code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def not_finite(dtype: str) -> CliError:
    """The error for relevance that is NaN or infinite in a floating-point type."""
    return CliError(
        Code.UNEXPECTED,
        f"The relevance is not finite in {dtype}: numbers overflowed. Use --dtype float32.",
    )


_CODES: tuple[tuple[type[Exception], Code], ...] = (
    (UncoveredComponentError, Code.MODEL),
    (ModelStateError, Code.MODEL),
    (VersionError, Code.MODEL),
    (TokenizerMismatchError, Code.MODEL),
    (TokenError, Code.PROMPT),
    (PromptError, Code.PROMPT),
    (FileFormatError, Code.FILE),
    (NotRunError, Code.FILE),
    (NonFiniteError, Code.UNEXPECTED),
    (OSError, Code.FILE),
)
_OUT_OF_MEMORY = (
    "out of memory. Explain a shorter prompt, or try --memory tiled and a small --tile, --dtype "
    "bfloat16 or --device cpu."
)


def _code_of(error: Exception) -> Code | None:
    """The exit code of an expected error, or None."""
    if isinstance(error, CliError):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), None)


def as_option(argument: Argument) -> str:
    """Spell an argument of the library as an option, with its value if there is one."""
    return spelled_option(argument.name, argument.value)


def in_shell(text: str, spelling: Spelling = as_option) -> str:
    """Spell a message of the library for the shell; other text stays as it is."""
    return text.spelled(spelling) if isinstance(text, Message) else text


def message_of(error: Exception, spelling: Spelling = as_option) -> str:
    """The message of an error as the command line prints it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if error.args and isinstance(error.args[0], Message):
        return in_shell(error.args[0], spelling)
    return str(error) or type(error).__name__


@contextmanager
def exit_codes(debug: bool, spelling: Spelling = as_option) -> Iterator[None]:
    """Turn errors of the block into a message on stderr and an exit code.

    Args:
        debug: Print the traceback too.
        spelling: How messages spell arguments of the library.

    Raises:
        typer.Exit: An error occurred; its code says of which kind.
    """
    try:
        require_transformer_lens()
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        print_err("Interrupted.")
        raise typer.Exit(Code.INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc(file=sys.stderr)
        code = _code_of(error)
        if code is not None:
            print_err(f"Error: {message_of(error, spelling)}")
            raise typer.Exit(code) from None
        if is_out_of_memory(error):
            print_err(f"Error: {_OUT_OF_MEMORY}")
        else:
            print_err(f"Unexpected error: {type(error).__name__}: {error}")
        if not debug:
            print_err("Run the same command with --debug to see where it happened.")
        raise typer.Exit(Code.UNEXPECTED) from None
