"""From an ``Attribution`` to its HTML page: what is shown, in which words."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from .render.report import Report, report_html
from .render.text import visible

if TYPE_CHECKING:
    import pandas as pd

    from .attribution import Attribution

# How an Objective ends its words; the result keeps those, not the position itself.
_WHERE = re.compile(r" at position (-?\d+) \(positive relevance supports ")


def report_of(result: Attribution, candidates: pd.DataFrame | None = None, **fields: Any) -> str:
    """The report of one explained prediction as an HTML page that fetches nothing.

    Args:
        result: What to show; relevance in logits, positive for the target.
        candidates: Rows of ``next_token_table`` at the explained position. They also decide
            whether the page says that the model wrote the target; without them it only asks why
            the target rather than the contrast.
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
        target_is_top=_is_top(result, candidates),
        greyed=result.greyed,
        position=_position(result),
        resid=result.resid,
        site_labels=result.sites,
        heads=result.heads,
        candidates=None if candidates is None else _rows(candidates),
        ledger=_rows(result.ledger.to_frame()),
        coverage=[vars(row) for row in result.coverage.summary()],
    )
    return report_html(dataclasses.replace(report, **fields))


def _rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]


def _title(result: Attribution) -> str:
    if not result.target:
        return "Relevance of one prediction"
    contrast = f" and not «{visible(result.contrast)}»" if result.contrast else ""
    return f"Why «{visible(result.target)}»{contrast}?"


def _is_top(result: Attribution, candidates: pd.DataFrame | None) -> bool:
    if candidates is None or candidates.empty:
        return False
    # Two tokens can share a text (pieces of a character): their logits tell them apart.
    top = candidates.iloc[0]
    same_logit = abs(float(top["logit"]) - result.target_logit) <= 1e-4 * abs(float(top["logit"]))
    return bool(top["token"] == result.target and same_logit)


def _position(result: Attribution) -> int | None:
    found = _WHERE.search(result.objective)
    if found is None:
        return None
    position = int(found[1])
    return position + len(result.str_tokens) if position < 0 else position
