"""What the command's exit codes mean, and how an error becomes one of them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from ..errors import (
    FileFormatError,
    ModelStateError,
    PromptError,
    TokenError,
    UncoveredComponentError,
    VersionError,
)
from ..inputs.versions import require_transformer_lens
from .terminal import print_err


class Code(IntEnum):
    """Exit codes. 2 is the command line's own, for options that make no sense."""

    DONE = 0
    UNEXPECTED = 1
    USAGE = 2
    MODEL = 3
    PROMPT = 4
    FILE = 5
    INTERRUPTED = 130


class CliError(Exception):
    """An expected error: one message for the user, and the exit code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


def not_finite(dtype: str) -> CliError:
    """The error for relevance that is NaN or infinite."""
    return CliError(
        Code.UNEXPECTED,
        f"The relevance is not finite in {dtype}: numbers overflowed. Use --dtype float32.",
    )


_CODES: tuple[tuple[type[Exception], Code], ...] = (
    (UncoveredComponentError, Code.MODEL),
    (ModelStateError, Code.MODEL),
    (VersionError, Code.MODEL),
    (TokenError, Code.PROMPT),
    (PromptError, Code.PROMPT),
    (FileFormatError, Code.FILE),
    (OSError, Code.FILE),
)


def _code_of(error: Exception) -> Code | None:
    if isinstance(error, CliError):
        return error.code
    return next((code for kind, code in _CODES if isinstance(error, kind)), None)


# How to type what the library's messages name.
_TYPED = {
    "memory='plain'": "--memory plain",
    "memory='tiled'": "--memory tiled",
    "checkpoint_dir": "--checkpoint-dir",
    "(model.to_tokens(text) would)": "(TransformerLens would)",
    "because model.cfg.default_prepend_bos is": "because its default_prepend_bos for this model is",
    "prepend_bos=True": "--bos",
    "prepend_bos=False": "--no-bos",
    "Load the model unquantised, for example TransformerBridge.boot_transformers(name, "
    "dtype=torch.bfloat16).": "Give the unquantised model.",
    "with mass=0.85, or give threshold= or top_k=": "with --mass 0.85, --threshold or --top-k",
}


def words_of(error: Exception) -> str:
    """An error as the command line says it."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    return typed_words(str(error) or type(error).__name__)


def typed_words(text: str) -> str:
    """A message of the library, with the options of the command line in it."""
    for name, option in _TYPED.items():
        text = text.replace(name, option)
    return text


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turn errors inside the block into a message on stderr and an exit code.

    Args:
        debug: Print the traceback too.
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
            print_err(f"Error: {words_of(error)}")
            raise typer.Exit(code) from None
        if "out of memory" in str(error).lower() or isinstance(error, MemoryError):
            print_err(
                "Error: out of memory. Explain a shorter prompt, or try --memory tiled and a small "
                "--tile, --dtype bfloat16 or --device cpu."
            )
        else:
            print_err(f"Unexpected error: {type(error).__name__}: {error}")
        if not debug:
            print_err("Run the same command with --debug to see where it happened.")
        raise typer.Exit(Code.UNEXPECTED) from None
