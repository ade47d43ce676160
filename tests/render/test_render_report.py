"""The report: its colours and words, no requests, and no section without content."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.browser import Flat
from support.reports import contrast_ratio, hostile_report, planted_report

from tl_contrastive_lrp.render import Report, report_html
from tl_contrastive_lrp.render.scale import colours
from tl_contrastive_lrp.render.tables import general


def token_spans(html: str) -> list[dict[str, str]]:
    spans = [attrs for tag, attrs in Flat(html).tags if tag == "span" and "data-i" in attrs]
    return [{key: value or "" for key, value in attrs.items()} for attrs in spans]


def test_report_colours_leave_greyed_tokens_out_until_included() -> None:
    spans = token_spans(report_html(planted_report()))
    assert [s["data-i"] for s in spans] == ["0", "1", "2", "3"]
    looks = [re.findall(r"#\w{6}", s["style"]) for s in spans]
    full, half = colours(np.array([1.0, -0.5]))[0]
    assert looks[1][0] == full
    assert looks[2][0] == half
    assert looks[3] == ["#ffffff", "#ffffff"]
    assert looks[0][1] == full  # included: the giant takes the colour, the rest are all but white
    assert contrast_ratio(looks[1][1], "#ffffff") < 1.01
    assert "g" in spans[0]["class"].split()
    assert "g" not in spans[1]["class"].split()
    assert "relevance +0.500 · +50.0 % of Δℓ" in spans[1]["title"]
    assert "relevance −0.250" in spans[2]["title"]


def test_report_has_no_address_and_only_its_own_scripts() -> None:
    html = report_html(hostile_report())
    flat = Flat(html)
    assert "http:" not in html
    assert "https:" not in html
    assert "@import" not in html
    assert "url(" not in html
    fetching = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert [tag for tag, attrs in flat.tags if fetching & attrs.keys()] == []
    assert [attrs.get("type") for tag, attrs in flat.tags if tag == "script"] == [
        "application/json",
        None,
    ]
    assert not {"img", "svg", "iframe", "object"} & {tag for tag, _ in flat.tags}
    assert not [tag for tag, attrs in flat.tags if any(key.startswith("on") for key in attrs)]
    html.encode("utf-8")  # half surrogates are gone


def test_report_leaves_out_what_is_not_there() -> None:
    bare = Report(
        title="t",
        model_name="m",
        rules="r",
        objective="top logit of «a»",
        str_tokens=["a"],
        token_ids=[7],
        tokens=[0.0],
        delta=0.0,
    )
    html = report_html(bare)
    text = Flat(html).text
    assert "top logit" in text
    for words in ("Layer by layer", "Attention heads", "Ledger", "could have written"):
        assert words not in text
    assert 'id="include"' not in html


def test_report_words_say_who_wrote_what() -> None:
    report = replace(planted_report(), target=[" First"], contrast=[" <<"])
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", report_html(report)))
    assert "The model wrote « First»; « &lt;&lt;» was possible." in text
    text = re.sub(r"<[^>]+>", "", report_html(replace(report, target_is_top=False)))
    assert "Why « First» rather than « &lt;&lt;»?" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [1]}, "1 token ids for 4 tokens"),
        ({"site_labels": ["a"]}, "1 site labels"),
        ({"resid": [[0.0, math.inf, 0.0, 0.0]] * 2}, "NaN or infinite"),
        ({"heads": np.zeros((1, 1, 3))}, "but there are 4 tokens"),
        ({"greyed": [0, 1, 0, 0]}, "one bool per token"),
        ({"delta": math.nan}, "delta has 1 value"),
    ],
)
def test_report_refuses_what_does_not_fit(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        report_html(replace(planted_report(), **change))


def test_report_of_a_long_prompt_stays_small() -> None:
    n, sites = 1200, 57
    rng = np.random.default_rng(0)
    report = Report(
        title="long",
        model_name="m",
        rules="r",
        objective="o",
        str_tokens=[f" word{i}" for i in range(n)],
        token_ids=range(n),
        tokens=rng.standard_normal(n),
        delta=1.0,
        resid=rng.standard_normal((sites, n)),
        site_labels=[f"blocks.{i}.hook_resid_pre" for i in range(sites)],
        heads=rng.standard_normal((28, 16, n)),
    )
    assert len(report_html(report).encode()) < 2_000_000


def test_bars_of_shares_beyond_one_keep_their_proportions() -> None:
    """Shares of a difference may be many times it; the largest has the full bar."""
    table = general([{"share": 0.5}, {"share": -20.0}, {"share": None}, {"share": float("nan")}])
    assert table is not None
    assert [row[0].bar for row in table.rows] == [2.5, 100.0, None, 0.0]
    small = general([{"share": 0.5}, {"share": -0.25}])
    assert small is not None
    assert [row[0].bar for row in small.rows] == [50.0, 25.0]


def test_a_verdict_and_measured_effects_are_shown_beside_relevance() -> None:
    plain = planted_report()
    assert "measured effect" not in report_html(plain)
    html = report_html(
        replace(plain, verdict=["Supported: <so>.", "And more."], measured=[None, -0.25, 0.5, None])
    )
    assert "Does the map hold?" in html
    assert "Supported: &lt;so&gt;." in html
    assert html.count('<th scope="col" class="num">measured effect</th>') >= 2
    row = re.search(r'<td class="num">1</td><td><code>.*?</tr>', html, re.S)
    assert row is not None
    assert "−0.250" in row[0].rsplit("<td", 1)[1]
    with pytest.raises(ValueError, match="3 measured effects for 4 tokens"):
        report_html(replace(plain, measured=[None, 1.0, 2.0]))
    with pytest.raises(ValueError, match="measured has 1 value"):
        report_html(replace(plain, measured=[None, math.nan, 1.0, None]))


def test_a_verdict_on_segments_has_a_table() -> None:
    rows = [{"segment": "line 1", "relevance": 0.5, "measured": None}]
    html = report_html(replace(planted_report(), verdict=["Weak."], measured_segments=rows))
    assert "line 1" in html
    assert "Does the map hold?" in html
