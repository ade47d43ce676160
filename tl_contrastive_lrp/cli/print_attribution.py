"""Printing a result: as tables and sentences, or as one JSON object."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .output import Output
from .terminal import print_out, shown, table

if TYPE_CHECKING:
    import pandas as pd

    from ..attribution.check import MapCheck
    from ..attribution.result import Attribution
    from ..graph.graph import AttributionGraph
    from .memory import RunPlan
    from .question import Question
    from .results import Explained


def candidate_rows(candidates: pd.DataFrame) -> list[dict[str, Any]]:
    """The candidate table as JSON rows."""
    rows: list[dict[str, Any]] = json.loads(
        candidates.to_json(orient="records", double_precision=15)
    )
    return rows


def print_candidates(candidates: pd.DataFrame) -> None:
    """Print the candidate table on stdout."""
    from ..inputs.token_text import printed

    columns = ("rank", "token", "id", "logit", "probability", "minus top")
    table(
        [(name, name != "token") for name in columns],
        [
            (
                str(row["rank"]),
                printed(row["token"], row["id"]),
                str(row["id"]),
                f"{row['logit']:.3f}",
                f"{100 * row['probability']:.2f} %",
                f"{row['minus_top']:+.3f}",
            )
            for row in candidates.to_dict("records")
        ],
    )


def _number(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:+.4f}" if abs(value) >= 5e-5 else f"{value:+.1e}"


def _percent(share: float) -> str:
    if share == 0:
        return "0 %"
    return f"{100 * share:+.1f} %" if math.isfinite(share) else "-"


def print_question(
    question: Question, result: Attribution | AttributionGraph, run: RunPlan
) -> None:
    """Print model, tokens and Δℓ in words, on stdout."""
    target, contrast = question.side(question.target), question.side(question.contrast)
    last = question.pos == question.n_tokens - 1
    where = "after the last token" if last else f"after position {question.pos}"
    print_out(
        f"{question.model_name}: {question.n_tokens:,} tokens, rules {result.rules}, "
        f"{question.dtype} on {question.device}"
    )
    if description := run.described(result.memory, getattr(result, "attention", "eager")):
        print_out(description)
    print_out(f"Why {target} and not {contrast}, {where}?")
    print_out(
        f"Δℓ = {question.logit_of(question.target)} − {question.logit_of(question.contrast)} "
        f"= ({result.target_logit:.4f}) − ({result.contrast_logit:.4f}) = {_number(result.delta)}"
    )
    if result.delta < 0:
        print_out(f"Δℓ is negative: the model prefers {contrast}.")
    print_out(f"Positive relevance pushes towards {target}, negative towards {contrast}.")


def print_explained(explained: Explained, output: Output, decisive: Sequence[int] = ()) -> None:
    """Print Δℓ in words, the tokens of largest relevance, and where the report is, on stdout.

    Args:
        explained: The answer.
        output: Where results went.
        decisive: Positions known to decide the answer, for a column of their own.
    """
    from ..render.text import with_parts

    result = explained.result
    n = len(result.str_tokens)
    print_question(explained.question, result, explained.run)
    top = result.top(output.top).to_dict("records")
    greyed = result.greyed.tolist()
    texts = with_parts(result.str_tokens)
    columns = [("pos", True), ("token", False), ("relevance", True), ("share of Δℓ", True)]
    rows = [
        [
            str(row["pos"]),
            shown(texts[row["pos"]]) + (" *" if greyed[row["pos"]] else ""),
            _number(row["relevance"]),
            _percent(row["share"]),
        ]
        for row in top
    ]
    if explained.check is not None:
        columns.append(("measured effect", True))
        effects = measured_effects(explained.check)
        for row in rows:
            effect = effects.get(int(row[0]))
            row.append("-" if effect is None else _number(effect))
    if decisive:
        columns.append(("decides", False))
        for row in rows:
            row.append("yes" if int(row[0]) in decisive else "")
    table(columns, rows, dim=[greyed[row["pos"]] for row in top])
    if any(greyed[row["pos"]] for row in top):
        print_out("* special or first token: shown grey in the report and left out of its colours.")
    print_out(
        f"These are the {len(rows)} of {n} tokens with the largest relevance; all {n} together "
        f"carry {_percent(result.ledger.share_to_tokens)} of Δℓ, the first token and the special "
        f"tokens {_percent(result.sink_share)}."
    )
    if explained.check is not None:
        _print_check(explained.check)
    if result.segments:
        _print_messages(result)
    if output.save is not None:
        print_out(f"Result: {output.save}")
    if output.out is not None:
        print_out(f"Report: {output.out}")
    else:
        print_out("Add --out report.html for a page with every token, layer and head.")


def measured_effects(check: MapCheck) -> dict[int, float]:
    """The measured effects by position."""
    return dict(zip(check.measured_at.tolist(), check.measured.tolist(), strict=True))


def _print_check(check: MapCheck) -> None:
    """Print the verdict on the map, its figures and its cost, on stdout."""
    from ..attribution.check.shown import figures_in_words

    print_out(f"Verdict: {check.sentence}")
    print_out(f"  {figures_in_words(check)}")
    print_out(
        f"  Effects: Δℓ with the token replaced by {check.replaced_with} minus Δℓ, the opposite "
        f"sign of relevance. {check.cost}."
    )


def _print_messages(result: Attribution) -> None:
    """Print the relevance of each message of a chat, on stdout."""
    print_out()
    table(
        [("message", False), ("tokens", True), ("relevance", True), ("share of Δℓ", True),
         ("largest token", False)],
        [
            [
                row["segment"],
                str(row["n_tokens"]),
                _number(row["relevance"]),
                _percent(row["share"]),
                shown(row["largest_token"]),
            ]
            for row in result.by("message").to_dict("records")
        ],
    )  # fmt: skip


def finite(value: float) -> float | None:
    """The number, or None where JSON cannot hold it."""
    return value if math.isfinite(value) else None


def question_as_json(
    question: Question, result: Attribution | AttributionGraph, run: RunPlan, status: str
) -> dict[str, Any]:
    """The part that the JSON objects of ``explain`` and ``graph`` have in common."""
    from .. import __version__

    def side(ids: Sequence[int], logit: float | None) -> dict[str, Any]:
        return {"ids": list(ids), "tokens": [question.names[i] for i in ids], "logit": logit}

    target = side(question.target, result.target_logit) | {"is_top": question.target_is_top}
    return {
        "status": status,
        "version": __version__,
        "model": question.model_name,
        "rules": result.rules,
        "dtype": question.dtype,
        "device": question.device,
        "objective": result.objective,
        "pos": question.pos,
        "target": target,
        "contrast": side(question.contrast, result.contrast_logit),
        "delta": result.delta,
        "memory": run.as_json(result.memory),
    }


def as_json(explained: Explained, output: Output) -> dict[str, Any]:
    """The JSON object of ``--json``; the help text of ``explain`` documents it."""
    result = explained.result
    greyed = result.greyed.tolist()
    return question_as_json(explained.question, result, explained.run, "explained") | {
        "share_to_tokens": finite(result.ledger.share_to_tokens),
        "tokens": [
            {
                "pos": row["pos"],
                "id": row["id"],
                "token": row["token"],
                "relevance": row["relevance"],
                "share": finite(row["share"]),
                "greyed": greyed[row["pos"]],
            }
            for row in result.to_frame().to_dict("records")
        ],
        "messages": _message_rows(result),
        "top": [int(pos) for pos in result.top(output.top)["pos"]],
        "ledger": [vars(row) for row in result.ledger.rows],
        "candidates": candidate_rows(explained.question.candidates),
        "attention": result.attention,
        "report": None if output.out is None else str(output.out),
        "saved": None if output.save is None else str(output.save),
        "notes": list(explained.notes),
        "check": None if explained.check is None else _check_as_json(explained.check),
    }


def _check_as_json(check: MapCheck) -> dict[str, Any]:
    """The check of a map as a JSON object."""
    effects = measured_effects(check)
    rows = check.to_frame().to_dict("records")
    return {
        "verdict": check.verdict,
        "sentence": check.sentence,
        "statistics": check.statistics,
        "tokens": [
            {
                "pos": row["pos"],
                "predicted": row["predicted"],
                "measured": effects.get(row["pos"]),
                "chosen": row["chosen"],
            }
            for row in rows
        ],
        "replaced_with": check.replaced_with,
        "forwards": check.forwards,
        "seconds": check.seconds,
    }


def _message_rows(result: Attribution) -> list[dict[str, Any]]:
    """The messages of a chat as JSON rows; [] for a prompt without."""
    if not result.segments:
        return []
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items()}
        for row in result.by("message").to_dict("records")
    ]
    return [row | {"share": finite(row["share"])} for row in rows]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout, in ASCII."""
    print(json.dumps(value, allow_nan=False))
