"""Writing options and whole commands as a shell reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from enum import Enum
from typing import TYPE_CHECKING

from .terminal import shell_word

if TYPE_CHECKING:
    from .options import QuestionOptions

PROGRAM = "tl-contrastive-lrp"
_MOST_INLINE = 4000  # characters of standard input repeated in a command; a shell line has limits


def spelled_option(name: str, value: object = None) -> str:
    """Spell one option, quoted for a shell.

    Args:
        name: The parameter's name in Python.
        value: Its value; True for a flag, None for the option's name alone.
    """
    if name == "prepend_bos":
        return "--no-bos" if value is False else "--bos"
    option = f"--{name.replace('_', '-')}"
    if value is None or value is True:
        return option
    text = str(value.value if isinstance(value, Enum) else value)
    # A value that begins with a dash would look like an option.
    return f"{option}{'=' if text.startswith('-') else ' '}{shell_word(text)}"


def retyped(
    command: str,
    options: QuestionOptions,
    text: str,
    *,
    target: Sequence[str],
    contrast: Sequence[str],
) -> str:
    """Repeat a command with target and contrast filled in, quoted for a shell.

    Args:
        command: "explain" or "graph".
        options: The options that were typed; those with their default value are left out.
        text: The prompt. If it came from standard input it is written out, unless it is very long.
        target: Values of ``--target``.
        contrast: Values of ``--contrast``.
    """
    options = replace(options, target=list(target), contrast=list(contrast))
    if options.prompt_file == "-" and len(text) <= _MOST_INLINE:
        options = replace(options, prompt=text, prompt_file=None, strip_newline=False)
    words = [PROGRAM, command]
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            values = value if isinstance(value, list) else [value]
            words += [spelled_option(field.name, one) for one in values]
    return " ".join(words)
