"""Writing a command line that does again what was typed, with something filled in."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from .options import DEFAULT_RULES
from .terminal import shell_word

PROGRAM = "tl-contrastive-lrp"
_DEFAULTS = {
    "pos": -1, "rules": DEFAULT_RULES.value, "dtype": "float32", "top": 10, "granularity": "block",
    "node_threshold": 0.0, "memory": "auto", "answer": "",
}  # fmt: skip
_INLINE = 4000  # characters of standard input that are written out; a shell line has its limits


def again(
    command: str,
    typed: dict[str, Any],
    text: str,
    *,
    target: Sequence[str],
    contrast: Sequence[str],
) -> str:
    """A command as typed, with target and contrast filled in, quoted for a shell.

    Args:
        command: "explain" or "graph".
        typed: Its options by name.
        text: The prompt. What came from standard input is written out, unless it is very long.
        target: ``--target`` options.
        contrast: ``--contrast`` options.
    """
    options = dict(typed, target=list(target), contrast=list(contrast))
    if options["prompt_file"] == "-" and len(text) <= _INLINE:
        options |= {"prompt": text, "prompt_file": None, "strip_newline": False}
    words = [PROGRAM, command]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, Enum):
            value = value.value
        # By identity: a 0 is a number that was typed, although it equals False.
        if name == "prepend_bos" and value is not None:
            words.append("--bos" if value else "--no-bos")
            continue
        if value is None or value is False or _DEFAULTS.get(name) == value:
            continue
        if value is True:
            words.append(option)
            continue
        for one in value if isinstance(value, list) else [value]:
            quoted = shell_word(str(one))
            # A value that begins with a dash would look like an option.
            words.append(f"{option}={quoted}" if str(one)[:1] == "-" else f"{option} {quoted}")
    return " ".join(words)
