"""Explaining one prediction for the command line, and writing the files asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .exit import CliError, Code
from .terminal import progress, shell_word, shown

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..attribution import Attribution


def check_writable(path: Path, option: str) -> None:
    """Refuse a path that cannot be written, before the model is loaded for nothing.

    Raises:
        CliError: it is a folder, or its folder does not exist or is read-only.
    """
    if path.is_dir():
        raise CliError(
            Code.FILE, f"{option} {path} is a folder. Give a file name, such as {path / 'report'}."
        )
    if not path.parent.is_dir():
        raise CliError(
            Code.FILE,
            f"{option} {path}: there is no folder {path.parent}. Make it first: "
            f"mkdir -p {shell_word(str(path.parent))}",
        )
    if not os.access(path.parent, os.W_OK):
        raise CliError(Code.FILE, f"{option} {path}: the folder is read-only.")


@dataclass(frozen=True)
class Output:
    """Where results go, and how much is said."""

    top: int = 10
    as_json: bool = False
    out: Path | None = None
    save: Path | None = None
    quiet: bool = False

    @property
    def spins(self) -> bool:
        return not (self.quiet or self.as_json)

    def check(self) -> None:
        """Refuse paths that cannot be written."""
        for path, option in ((self.out, "--out"), (self.save, "--save")):
            if path is not None:
                check_writable(path, option)


@dataclass(frozen=True)
class Explained:
    """A result with what was asked: ids of both sides, position, and the likeliest tokens."""

    result: Attribution
    candidates: pd.DataFrame
    target: tuple[int, ...]
    contrast: tuple[int, ...]
    names: dict[int, str]
    pos: int
    model_name: str
    dtype: str
    device: str
    notes: tuple[str, ...] = ()

    @property
    def target_is_top(self) -> bool:
        return self.target == (int(self.candidates["id"].iloc[0]),)

    def side(self, ids: Sequence[int]) -> str:
        """One side's tokens in words."""
        return " or ".join(f"«{shown(self.names[i])}»" for i in ids)

    def logit_of(self, ids: Sequence[int]) -> str:
        """One side's term of Δℓ in words."""
        names = ", ".join(f"«{shown(self.names[i])}»" for i in ids)
        return f"logit of {names}" if len(ids) == 1 else f"mean logit of {{{names}}}"


def explain(
    model: Any,
    tokens: Tensor,
    candidates: pd.DataFrame,
    target: tuple[int, ...],
    contrast: tuple[int, ...],
    *,
    pos: int,
    rules: str,
    model_name: str,
    notes: Sequence[str] = (),
    output: Output,
) -> Explained:
    """Attribute, and write the files that were asked for.

    Raises:
        CliError: relevance that is not finite; a file that cannot be written.
        TokenError, UncoveredComponentError, ModelStateError: as ``attribute``.
    """
    from safetensors import SafetensorError

    from ..explain import attribute
    from ..prompts import model_device, str_tokens

    words = f"Forward and backward through {tokens.shape[1]} tokens"
    with progress(words, output.spins):
        result = attribute(model, tokens, target=target, contrast=contrast, pos=pos, rules=rules)
    dtype = str(next(iter(model.original_model.parameters())).dtype).removeprefix("torch.")
    if not (math.isfinite(result.delta) and bool(result.tokens.isfinite().all())):
        raise CliError(
            Code.UNEXPECTED,
            f"The relevance is not finite in {dtype}: numbers overflowed. Use --dtype float32.",
        )
    both = (*target, *contrast)
    explained = Explained(
        result,
        candidates,
        target,
        contrast,
        dict(zip(both, str_tokens(model, both), strict=True)),
        pos % tokens.shape[1],
        model_name,
        dtype,
        str(model_device(model)),
        tuple(notes),
    )
    with progress("Writing the report", output.spins and output.out is not None):
        path = output.out
        try:
            if path is not None:
                _write_report(explained, path)
            path = output.save
            if path is not None:
                result.save(path)
        except (OSError, SafetensorError) as error:
            why = getattr(error, "strerror", None) or error
            raise CliError(Code.FILE, f"{path} cannot be written: {why}.") from error
    return explained


def _write_report(explained: Explained, path: Path) -> None:
    from ..render.files import save_html
    from ..report import report_of

    html = report_of(
        explained.result,
        explained.candidates,
        model_name=explained.model_name,
        target=[explained.names[i] for i in explained.target],
        contrast=[explained.names[i] for i in explained.contrast],
        target_is_top=explained.target_is_top,
        position=None if explained.pos == len(explained.result.str_tokens) - 1 else explained.pos,
        notes=explained.notes,
    )
    save_html(path, html)
