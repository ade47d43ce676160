"""The page on which a person labels cases with the keyboard, offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from ..offline import script_hash, source, templates
from ..text import inline_script, printable, script_json
from .cases import CaseView, case_data, case_script, packed


def label_page_html(
    name: str,
    cases: Sequence[CaseView],
    outcomes: Mapping[str, str],
    patterns: Mapping[str, str],
    *,
    key: str,
    version: int,
    blind: bool = True,
) -> str:
    """One self-contained page: case after case, labelled with keys, saved in the browser.

    Progress is kept in the browser (``localStorage``) under ``key`` and downloaded as JSON lines,
    which the page also imports. All text is escaped, and the page's content security policy forbids
    every request and every script but its own.

    Args:
        name: The study's name.
        cases: The cases, in the order in which they are labelled.
        outcomes: The outcomes' names and meanings.
        patterns: The patterns' names and meanings.
        key: What progress is stored under: the same for the same cases only.
        version: Version of the label records.
        blind: Whether the automatic label is hidden until a case is labelled, at first.

    Returns:
        The page.
    """
    data = script_json(
        {
            "key": key,
            "version": version,
            "blind": blind,
            "outcomes": list(outcomes.items()),
            "patterns": list(patterns.items()),
            "file": "".join(c if c.isalnum() or c in "-_" else "-" for c in name) or "study",
            "cases": [
                # As in the records, not as shown: labels go back under this id.
                {"id": view.id, "name": printable(view.id), "data": packed(case_data(view, i))}
                for i, view in enumerate(cases)
            ],
        }
    )
    script = inline_script(f"({source('study_label.js').strip()})({case_script()});")
    return (
        templates()
        .get_template("study_label.html")
        .render(
            name=printable(name),
            count=len(cases),
            data=Markup(data),
            script=Markup(script),
            hash=Markup(script_hash(script)),
            style=Markup(source("report.css") + source("study.css") + source("study_label.css")),
            outcomes=list(outcomes.items()),
            patterns=list(patterns.items()),
        )
    )
