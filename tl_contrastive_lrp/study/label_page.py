"""The labelling page of a study: one HTML file that a person opens in a browser."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path

from ..files import save_html
from ..render.study.label_page import label_page_html
from .case_view import case_view
from .labels import LABEL_VERSION, OUTCOMES, PATTERNS
from .results import StudyResults


def label_page(
    results: StudyResults, path: str | os.PathLike[str], *, blind: bool = True, seed: int = 0
) -> Path:
    """Write the page on which a person confirms or corrects labels with the keyboard.

    The page works offline: progress is kept in the browser, and labels are downloaded as JSON
    lines that ``read_labels`` reads. Cases come in one random order, the same for all labellers, so
    that tiredness does not fall on one benchmark.

    Args:
        results: The study.
        path: The HTML file to write.
        blind: Whether the automatic label is hidden until a case is labelled; the labeller can
            change it on the page.
        seed: Seed of the order of cases.

    Returns:
        The path.

    Raises:
        ValueError: There is no case, or none with an analysis by the base model, or the file's name
            is no page's.

    Example:
        >>> from tl_contrastive_lrp.study.label_page import label_page
        >>> label_page(results, "label.html").name
        'label.html'
    """
    if not results.cases:
        raise ValueError(f"study {results.name!r} has no case to label; {results.why_none}")
    pairs = []
    for case in results.cases:
        found = [results.analysis(case.id, results.base.name, rules) for rules in results.rules]
        analyses = [analysis for analysis in found if analysis is not None]
        if analyses:
            pairs.append((case, analyses))
    if not pairs:
        raise ValueError("there is no case with an analysis to label; run the study first")
    random.Random(seed).shuffle(pairs)
    # Labels of other cases, or of other analyses of them, are not shown as progress here.
    content = json.dumps([[c.id, c.ids, [c.target_id, c.contrast_id]] for c, _ in pairs])
    key = f"tl_contrastive_lrp labels {hashlib.sha256(content.encode()).hexdigest()[:24]}"
    html = label_page_html(
        results.name,
        [case_view(case, analyses) for case, analyses in pairs],
        OUTCOMES,
        PATTERNS,
        key=key,
        version=LABEL_VERSION,
        blind=blind,
    )
    return save_html(path, html)
