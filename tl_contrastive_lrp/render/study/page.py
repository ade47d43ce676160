"""The report of a study: one HTML page with its tables, figures and cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ..offline import script_hash, source, templates
from ..text import inline_script, printable, script_json, signed, visible
from .cases import CaseView, case_data, case_script, packed
from .tables import StudyTable, shown


@dataclass(frozen=True, eq=False)
class Section:
    """A section of the page.

    Attributes:
        id: Its anchor.
        title: Its heading.
        tables: Its tables.
        figures: Caption and SVG of its figures; the SVG is this package's own markup.
    """

    id: str
    title: str
    tables: Sequence[StudyTable] = ()
    figures: Sequence[tuple[str, Markup]] = ()


@dataclass(frozen=True, eq=False)
class CaseEntry:
    """A case in the page's list.

    Attributes:
        view: What is drawn when it is opened.
        labels: (labeller, outcome, pattern or None) of each of its labels.
        signs: Sign of each segment sum, −1, 0 or 1.
        verdicts: Verdict on its relevance, by rule set, "" where it was not checked; the first is
            shown in the list.
    """

    view: CaseView
    labels: Sequence[tuple[str, str, str | None]] = ()
    signs: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, str] = field(default_factory=dict)


def report_page(
    name: str, facts: Sequence[str], sections: Sequence[Section], cases: Sequence[CaseEntry]
) -> str:
    """The page as one self-contained string of HTML.

    A case is drawn when it is opened, from compressed data. All text is escaped, and the page's
    content security policy forbids every request and every script but its own.

    Args:
        name: The study's name.
        facts: Sentences of the first paragraph.
        sections: The sections, in order; those without tables and figures are left out.
        cases: The cases, in order.

    Returns:
        The page.
    """
    kept = [section for section in sections if section.tables or section.figures]
    data = script_json(
        {
            "cases": [
                {
                    "benchmark": printable(entry.view.benchmark),
                    "labels": [
                        [printable(who), outcome, pattern] for who, outcome, pattern in entry.labels
                    ],
                    "signs": {printable(k): v for k, v in entry.signs.items()},
                    "verdicts": {printable(k): printable(v) for k, v in entry.verdicts.items()},
                    "data": packed(case_data(entry.view, i)),
                }
                for i, entry in enumerate(cases)
            ]
        }
    )
    script = inline_script(f"({source('study_report.js').strip()})({case_script()});")
    return (
        templates()
        .get_template("study_report.html")
        .render(
            name=printable(name),
            facts=[printable(fact) for fact in facts],
            sections=[
                {
                    "id": section.id,
                    "title": section.title,
                    "tables": [_table(table) for table in section.tables],
                    "figures": [(printable(words), svg) for words, svg in section.figures],
                }
                for section in kept
            ],
            cases=[_case(entry) for entry in cases],
            checked=any(entry.verdicts for entry in cases),
            data=Markup(data),
            script=Markup(script),
            hash=Markup(script_hash(script)),
            style=Markup(source("report.css") + source("study.css")),
        )
    )


def _table(table: StudyTable) -> dict[str, Any]:
    return {
        "id": table.id,
        "title": printable(table.title),
        "note": printable(table.note),
        "heads": [(printable(c.title), c.kind != "text") for c in table.columns],
        "rows": [
            (bool(row.get("published")), cells)
            for row, cells in zip(table.rows, shown(table), strict=True)
        ],
    }


_TONES = {
    "M-IA": "good", "NC-IA+M-AG": "mid", "NC-IA+AG": "bad",
    "supported": "good", "weak": "mid", "contradicted": "against",
}  # fmt: skip


def _case(entry: CaseEntry) -> dict[str, Any]:
    view, verdicts = entry.view, entry.verdicts
    verdict = next(iter(verdicts.values()), "")
    return {
        "id": printable(view.id),
        "target": visible(view.target),
        "contrast": visible(view.contrast),
        "delta": signed(float(view.delta)),
        "tokens": f"{len(view.str_tokens):,}",
        "labels": [
            (printable(who), outcome + (f", {pattern}" if pattern else ""), _TONES.get(outcome, ""))
            for who, outcome, pattern in entry.labels
        ],
        "verdict": printable(verdict or "not checked"),
        "verdict_tone": _TONES.get(verdict, ""),
        "verdicts": printable(
            ", ".join(f"{rules}: {one or 'not checked'}" for rules, one in verdicts.items())
        ),
    }
