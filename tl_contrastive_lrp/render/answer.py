"""An answer's tokens as one HTML page, in which a click on a token opens its explanation.

Each explanation is a whole report of its own (``report.py``), held by the page as the text of a
frame, so that scripts, styles and element names of one cannot meet those of another. Which frame is
seen is decided by the link that was followed (``:target``), without a script.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .offline import source, templates
from .text import signed, visible

_SCRIPTS = re.compile(r"script-src ([^;\"]*);")


@dataclass(frozen=True)
class AnswerPage:
    """The data of a page.

    Attributes:
        title: Heading of the page.
        model_name: Name of the model.
        rules: Name of the rule set.
        rows: One for each token of the answer: ``pos``, ``token``, ``rank``, ``probability``,
            ``alternative`` and ``delta`` (Δℓ in logits, positive where the model prefers the
            alternative).
        reports: By number of the row, the page that explains it.
    """

    title: str
    model_name: str
    rules: str
    rows: Sequence[Mapping[str, Any]]
    reports: Mapping[int, str]


def answer_html(page: AnswerPage) -> str:
    """The page: one self-contained string of HTML that requests nothing.

    All text is escaped. The content security policy forbids every request and every script but
    those of the reports.
    """
    rows = [
        {
            "name": visible(str(row["token"])),
            "pos": int(row["pos"]),
            "rank": int(row["rank"]),
            "probability": f"{100 * float(row['probability']):.2f} %",
            "alternative": visible(str(row["alternative"])),
            "delta": signed(float(row["delta"])),
            "wrong": float(row["delta"]) > 0,
            "explained": number in page.reports,
        }
        for number, row in enumerate(page.rows)
    ]
    hashes = {
        one
        for report in page.reports.values()
        for found in _SCRIPTS.findall(report)
        for one in found.split()
    }
    return (
        templates()
        .get_template("answer.html")
        .render(
            page=page,
            rows=rows,
            n_wrong=sum(bool(row["wrong"]) for row in rows),
            reports=page.reports,
            style=Markup(source("report.css") + source("answer.css")),
            hashes=Markup(" ".join(sorted(hashes)) or "'none'"),
        )
    )
