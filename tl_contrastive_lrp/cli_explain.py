"""Explaining one prediction for the command line: the run, and what is told of it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_exit import CliError, Code
from .cli_terminal import progress, shown, table, tell

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from .attribution import Attribution


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
            f"The folder {path.parent} of {option} does not exist. Make it first: "
            f"mkdir -p '{path.parent}'",
        )
    if not os.access(path.parent, os.W_OK):
        raise CliError(Code.FILE, f"The folder {path.parent} of {option} cannot be written to.")


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
        return ", ".join(f"«{shown(self.names[i])}»" for i in ids)


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

    from .explain import attribute
    from .prompts import model_device, str_tokens

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
        if output.out is not None:
            _write_report(explained, output.out)
        if output.save is not None:
            try:
                result.save(output.save)
            except SafetensorError as error:
                raise CliError(Code.FILE, f"{output.save} cannot be written: {error}") from error
    return explained


def _write_report(explained: Explained, path: Path) -> None:
    from .render.files import save_html
    from .report import report_of

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


def candidate_rows(candidates: pd.DataFrame) -> list[dict[str, Any]]:
    """The candidate table as JSON rows."""
    rows: list[dict[str, Any]] = json.loads(
        candidates.to_json(orient="records", double_precision=15)
    )
    return rows


def print_candidates(candidates: pd.DataFrame) -> None:
    """The candidate table on stdout."""
    columns = ("rank", "token", "id", "logit", "probability", "minus top")
    table(
        [(name, name != "token") for name in columns],
        [
            (
                str(row["rank"]),
                shown(row["token"]),
                str(row["id"]),
                f"{row['logit']:.3f}",
                f"{100 * row['probability']:.2f} %",
                f"{row['minus_top']:+.3f}",
            )
            for row in candidates.to_dict("records")
        ],
    )


def _number(value: float) -> str:
    return f"{value:+.4f}" if value == 0 or abs(value) >= 5e-5 else f"{value:+.1e}"


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %" if math.isfinite(share) else "-"


def print_explained(explained: Explained, output: Output, decisive: Sequence[int] = ()) -> None:
    """Δℓ in words, the tokens of largest relevance, and where the report is, on stdout."""
    result = explained.result
    n = len(result.str_tokens)
    target, contrast = explained.side(explained.target), explained.side(explained.contrast)
    last = explained.pos == n - 1
    where = "after the last token" if last else f"after position {explained.pos}"
    tell(
        f"{explained.model_name}: {n} tokens, rules {result.rules}, {explained.dtype} on "
        f"{explained.device}"
    )
    tell(f"Why {target} and not {contrast}, {where}?")
    of = "mean logit of " if len(explained.target) > 1 else "logit of "
    against = "mean logit of " if len(explained.contrast) > 1 else "logit of "
    tell(
        f"Δℓ = {of}{target} − {against}{contrast} = {result.target_logit:.4f} − "
        f"{result.contrast_logit:.4f} = {_number(result.delta)}"
    )
    tell(f"Positive relevance pushes towards {target}, negative towards {contrast}.")
    top = result.top(output.top).to_dict("records")
    greyed = result.greyed.tolist()
    columns = [("pos", True), ("token", False), ("relevance", True), ("share of Δℓ", True)]
    rows = [
        [
            str(row["pos"]),
            shown(row["token"]) + (" *" if greyed[row["pos"]] else ""),
            _number(row["relevance"]),
            _percent(row["share"]),
        ]
        for row in top
    ]
    if decisive:
        columns.append(("decides", False))
        for row in rows:
            row.append("yes" if int(row[0]) in decisive else "")
    table(columns, rows, dim=[greyed[row["pos"]] for row in top])
    if any(greyed[row["pos"]] for row in top):
        tell("* special or first token: shown grey in the report and left out of its colours.")
    tell(
        f"These are the {len(rows)} of {n} tokens with the largest relevance; all {n} together "
        f"carry {_percent(result.ledger.share_to_tokens)} of Δℓ."
    )
    if output.save is not None:
        tell(f"Result: {output.save}")
    if output.out is not None:
        tell(f"Report: {output.out}")
    else:
        tell("Add --out report.html for a page with every token, layer and head.")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def as_json(explained: Explained, output: Output) -> dict[str, Any]:
    """The JSON object of ``--json``; the help text of ``explain`` documents it."""
    from . import __version__

    result = explained.result
    greyed = result.greyed.tolist()

    def side(ids: Sequence[int], logit: float | None) -> dict[str, Any]:
        return {"ids": list(ids), "tokens": [explained.names[i] for i in ids], "logit": logit}

    return {
        "status": "explained",
        "version": __version__,
        "model": explained.model_name,
        "rules": result.rules,
        "dtype": explained.dtype,
        "device": explained.device,
        "objective": result.objective,
        "pos": explained.pos,
        "target": side(explained.target, result.target_logit) | {"is_top": explained.target_is_top},
        "contrast": side(explained.contrast, result.contrast_logit),
        "delta": result.delta,
        "share_to_tokens": _finite(result.ledger.share_to_tokens),
        "tokens": [
            {
                "pos": row["pos"],
                "id": row["id"],
                "token": row["token"],
                "relevance": row["relevance"],
                "share": _finite(row["share"]),
                "greyed": greyed[row["pos"]],
            }
            for row in result.to_frame().to_dict("records")
        ],
        "top": [int(pos) for pos in result.top(output.top)["pos"]],
        "ledger": [vars(row) for row in result.ledger.rows],
        "candidates": candidate_rows(explained.candidates),
        "report": None if output.out is None else str(output.out),
        "saved": None if output.save is None else str(output.save),
        "notes": list(explained.notes),
    }


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout, in ASCII."""
    print(json.dumps(value, allow_nan=False))
