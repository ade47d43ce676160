"""The page of an answer in a browser: a click opens one explanation, and nothing is requested."""

from __future__ import annotations

from pathlib import Path

from support.browser import HOSTILE, browser, visit
from support.reports import hostile_report

from tl_contrastive_lrp.render.answer import AnswerPage, answer_html
from tl_contrastive_lrp.render.report import report_html


def hostile_page() -> AnswerPage:
    rows = [
        {
            "pos": 5 + i, "token": text, "rank": i, "probability": 0.5, "alternative": text,
            "delta": i - 0.5,
        }
        for i, text in enumerate(HOSTILE)
    ]  # fmt: skip
    report = report_html(hostile_report())
    return AnswerPage(HOSTILE[0], HOSTILE[1], HOSTILE[2], rows, {0: report, 2: report})


@browser
def test_a_click_opens_its_explanation_and_no_other(tmp_path: Path) -> None:
    probe = """(async () => {
      const shown = () => [...document.querySelectorAll('.explanation')].map(
        e => [e.id, getComputedStyle(e).display]);
      const before = shown();
      document.querySelector('.answer a[href="#row-2"]').click();
      await new Promise(done => setTimeout(done, 200));
      const after = shown();
      document.querySelector('#row-2 a[href="#answer"]').click();
      await new Promise(done => setTimeout(done, 200));
      return [before, after, shown(), document.querySelectorAll('.answer a').length];
    })()"""
    seen = visit(tmp_path, answer_html(hostile_page()), probe)
    assert not seen.pwned
    assert seen.requests == []
    closed = [["row-0", "none"], ["row-2", "none"]]
    assert seen.probe == [closed, [["row-0", "none"], ["row-2", "block"]], closed, 2]


def test_no_report_no_script() -> None:
    page = answer_html(AnswerPage("t", "m", "r", [], {}))
    assert "script-src 'none'" in page.replace("&#39;", "'")
