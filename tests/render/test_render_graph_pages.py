"""Pages with a graph's picture: foreign text stays text, no requests, and what hovering does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from circuitsvis.utils.render import RenderedHTML
from support.browser import Flat, browser, document, visit
from support.pictures import hashes, hostile, planted

from tl_contrastive_lrp.render import Report, report_html
from tl_contrastive_lrp.render.graph.picture import (
    GraphPicture,
    graph_html,
    graph_picture,
    graph_section,
)


def test_text_of_others_stays_text() -> None:
    html = graph_html(hostile())
    html.encode("utf-8")
    flat = Flat(html)
    tags = {tag for tag, _ in flat.tags}
    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "p", "div", "span", "svg", "g",
        "path", "circle", "line", "rect", "text", "br", "script",
    }  # fmt: skip
    attributes = {key for _, attrs in flat.tags for key in attrs}
    assert not {key for key in attributes if key.startswith("on")}
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & attributes
    for address in ("http:", "https:", "url(", "@import", "xmlns"):
        assert address not in html
    assert f"script-src {hashes(html)[0]};" in html
    assert "(–)" not in html
    assert "– of Δℓ" in html  # Δℓ = 0 has no shares


def test_the_report_holds_the_graph_and_allows_its_script_alone() -> None:
    view = planted()
    report = Report(
        title="t",
        model_name="m",
        rules="r",
        objective="o",
        str_tokens=view.str_tokens,
        token_ids=range(12),
        tokens=np.zeros(12),
        delta=2.0,
        graph=view,
    )
    html = report_html(report)
    assert str(graph_section(view)) in html
    first, second = hashes(html)
    assert f"script-src {first} {second};" in html
    assert "<svg" not in report_html(replace(report, graph=None))
    other = replace(view, str_tokens=["x"] * 12)
    with pytest.raises(ValueError, match="another prompt"):
        report_html(replace(report, graph=other))


def test_pictures_stay_small() -> None:
    picture = graph_picture(planted())
    assert isinstance(picture, RenderedHTML)
    assert len(picture._repr_html_()) < 30_000  # no bundle of 1.3 MB
    rng = np.random.default_rng(0)
    n, count = 1200, 100_000
    long = planted(
        relevance=rng.standard_normal((3, n)),
        str_tokens=[f" word{i}" for i in range(n)],
        greyed=None,
        source_site=rng.integers(0, 1, count),
        source_pos=rng.integers(0, n, count),
        target_site=rng.integers(1, 3, count),
        target_pos=rng.integers(0, n, count),
        weight=rng.standard_normal(count),
    )
    html = graph_html(long)
    assert html.count("<path ") == 4000
    assert len(html.encode()) < 2_500_000


# ---- in a browser ----------------------------------------------------------------------------


@browser
def test_the_page_opens_inert_and_alone_under_its_own_policy(tmp_path: Path) -> None:
    seen = visit(tmp_path, graph_html(hostile()))
    assert not seen.pwned
    assert seen.requests == []
    assert "Point at a circle" in seen.dom  # its script ran


@browser
def test_a_picture_lights_up_what_the_pointer_is_on(tmp_path: Path) -> None:
    pictures: list[GraphPicture] = [graph_picture(hostile()), graph_picture(planted())]
    probe = """(() => {
      const root = document.querySelectorAll('.lrp-graph')[1];
      const node = [...root.querySelectorAll('[data-n]')].find(
        (each) => each.querySelector('title').textContent.startsWith('« t4» position 4 · block 1'));
      const box = node.getBoundingClientRect();
      node.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      const on = [...root.querySelectorAll('path.on')].map((path) => path.textContent);
      const words = root.querySelector('.r').textContent;
      root.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      return {on, words, wide: box.width, after: root.querySelectorAll('path.on').length,
              lit: root.classList.contains('lit'),
              tokens: [...root.querySelectorAll('text[data-p]')].map(
                (text) => text.firstChild.textContent)};
    })()"""
    seen = visit(tmp_path, document("".join(p._repr_html_() for p in pictures)), probe)
    assert not seen.pwned
    assert seen.requests == []
    answer = seen.probe
    assert answer["words"].endswith("relevance +0.500 logits · +25.0 % of Δℓ")
    assert len(answer["on"]) == 4
    assert all("« t4» position 4, block 1" in words for words in answer["on"])
    assert answer["wide"] > 3
    assert (answer["after"], answer["lit"]) == (0, False)
    assert answer["tokens"] == ["<s>", " t3", " t4", " t11"]
