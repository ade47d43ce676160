"""A case and its analyses as plain data for the pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..attribution.check import MapCheck
from ..attribution.check.shown import figures_in_words
from ..graph.picture import view_of
from ..render.study.cases import CaseView
from .analysis import CaseAnalysis
from .cases import Case
from .criteria import automatic_label, ordinary, relevant_positions

_LONG_TEXT = 4000


def case_view(
    case: Case, analyses: Sequence[CaseAnalysis], checks: Mapping[str, MapCheck] | None = None
) -> CaseView:
    """What a page shows of a case.

    Args:
        case: The case.
        analyses: Its analyses by one model, the main rule set first; at least one.
        checks: What replacing tokens says of their maps, by rule set.

    Returns:
        The plain data.

    Raises:
        ValueError: There is no analysis.
    """
    if not analyses:
        raise ValueError(f"{case.id!r} has no analysis to show")
    main = analyses[0]
    label = automatic_label(case, main)
    view = None
    if main.graph is not None:
        # Target and contrast as the case has them, whatever the graph's own objective is called.
        view = replace(view_of(main.graph), target=case.target, contrast=case.contrast)
    facts = [
        ("checker", case.verdict.reason or "the completion is wrong"),
        ("reference", case.reference or ""),
        ("completion", case.completion),
        ("found by", case.locator),
        ("contrast", case.contrast_source),
    ]
    if main.flip_limit:
        flips = (
            f"more than {main.flip_limit}" if main.tokens_to_flip is None else main.tokens_to_flip
        )
        facts.append(("tokens to flip", str(flips)))
    return CaseView(
        id=case.id,
        benchmark=case.benchmark,
        model=main.model,
        target=case.target,
        contrast=case.contrast,
        delta=main.delta,
        str_tokens=main.str_tokens,
        greyed=~ordinary(main),
        relevant=relevant_positions(case),
        relevance={analysis.rules: analysis.tokens for analysis in analyses},
        answer_from=len(case.prompt_ids),
        segments=[
            {
                "segment": one.name,
                "tokens": one.n_tokens,
                "relevance": one.relevance,
                "normalised": one.normalised,
            }
            for one in main.segments
        ],
        facts=[(name, _short(words)) for name, words in facts if words],
        graph=view,
        automatic=None
        if label is None
        else {"outcome": label.outcome, "pattern": label.pattern, "note": label.note},
        checks={
            rules: (check.verdict, check.sentence, _figures(check))
            for rules, check in (checks or {}).items()
        },
    )


def _figures(check: MapCheck) -> str:
    figures = figures_in_words(check)
    return f"{figures[:1].upper()}{figures[1:]} {check.cost}."


def _short(words: str) -> str:
    left_out = len(words) - _LONG_TEXT
    return words if left_out <= 0 else f"{words[:_LONG_TEXT]}… ({left_out:,} more characters)"
