"""From an ``Attribution`` to its HTML page: what is shown, in which words."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from .graph_view import view_of
from .objective import in_words
from .render.report import Report, report_html
from .render.text import visible
from .token_text import printed

if TYPE_CHECKING:
    import pandas as pd

    from .attribution import Attribution
    from .graph import AttributionGraph


def report_of(
    result: Attribution,
    candidates: pd.DataFrame | None = None,
    graph: AttributionGraph | None = None,
    **fields: Any,
) -> str:
    """The report of one explained prediction as an HTML page that fetches nothing.

    Args:
        result: What to show; relevance in logits, positive for the target.
        candidates: Rows of ``next_token_table`` at the explained position.
        graph: The attribution graph of the same prediction, pruned, for a section of its own.
        fields: Fields of ``render.report.Report`` to set otherwise, such as ``model_name`` or
            ``notes``.

    Raises:
        ValueError: a relevance is NaN or infinite.
        TypeError: a field that ``Report`` does not have.
    """
    report = Report(
        title=_title(result),
        model_name=result.model_name,
        rules=result.rules,
        objective=result.objective,
        str_tokens=result.str_tokens,
        token_ids=result.token_ids.tolist(),
        tokens=result.tokens,
        delta=result.delta,
        target=(result.target,) if result.target else (),
        contrast=(result.contrast,) if result.contrast else (),
        target_logit=result.target_logit,
        contrast_logit=result.contrast_logit,
        target_is_top=result.target_is_top,
        greyed=result.greyed,
        position=in_words(result.positions) if result.earlier_pos else result.pos,
        resid=result.resid,
        site_labels=result.sites,
        heads=result.heads,
        candidates=None if candidates is None else _typable(_rows(candidates)),
        ledger=_rows(result.ledger.to_frame()),
        coverage=[vars(row) for row in result.coverage.summary()],
        graph=None if graph is None else view_of(graph),
    )
    return report_html(dataclasses.replace(report, **fields))


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _typable(candidates: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with names that can be read off the page and typed."""
    return [
        row | {"token": printed(str(row["token"]), int(row["id"]))}
        if {"token", "id"} <= row.keys()
        else row
        for row in candidates
    ]


def _title(result: Attribution) -> str:
    if not result.target:
        return f"Relevance of {'several predictions' if result.earlier_pos else 'one prediction'}"
    contrast = f" and not «{visible(result.contrast)}»" if result.contrast else ""
    return f"Why «{visible(result.target)}»{contrast}?"
