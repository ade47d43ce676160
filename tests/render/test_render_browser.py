"""Pictures opened in a browser: no injected markup, no requests, and the stated colours."""

from __future__ import annotations

from pathlib import Path

from circuitsvis.utils.render import render as circuitsvis_render
from support.browser import HOSTILE, JOINER, browser, document, visit
from support.reports import VALUES, hostile_report, planted_report

from tl_contrastive_lrp.render import colored_tokens, colored_tokens_by_site, page, report_html
from tl_contrastive_lrp.render.text import visible


def cleaned(texts: list[str]) -> list[str]:
    """Shown texts without the invisible joiner, spaces made plain."""
    return [text.replace(JOINER, "").replace("\u00a0", " ") for text in texts]


@browser
def test_the_browser_harness_sees_requests_and_injections(tmp_path: Path) -> None:
    seen = visit(tmp_path, document("<img src='http://127.0.0.1:9/x.png'>" + HOSTILE[2]))
    assert seen.requests == ["http://127.0.0.1:9/x.png"]
    assert seen.pwned


@browser
def test_circuitsvis_alone_would_run_token_text(tmp_path: Path) -> None:
    plain = circuitsvis_render("ColoredTokens", tokens=[HOSTILE[2]], values=[1.0])
    assert visit(tmp_path, document(plain.local_src)).pwned


@browser
def test_report_opens_inert_and_alone(tmp_path: Path) -> None:
    seen = visit(tmp_path, report_html(hostile_report()))
    assert not seen.pwned
    assert seen.requests == []
    assert 'id="switches">' in seen.dom  # its script ran under its own policy


@browser
def test_report_shows_tokens_and_switches_scale(tmp_path: Path) -> None:
    seen = visit(
        tmp_path,
        report_html(hostile_report()),
        "[...document.querySelectorAll('.t')].map(e => e.textContent)",
    )
    assert not seen.pwned
    assert seen.requests == []
    assert seen.probe == [visible(token) for token in HOSTILE]

    probe = """(async () => {
      const look = () => [...document.querySelectorAll('.t')].map(
        e => getComputedStyle(e).backgroundColor);
      const canvas = document.getElementById('canvas');
      const pixel = (site, i) => {
        const left = canvas.clientWidth - 1 - 4 * 22, ratio = devicePixelRatio;
        return [...canvas.getContext('2d').getImageData(
          (left + (i + 0.5) * 22) * ratio, (site + 0.5) * 18 * ratio, 1, 1).data].slice(0, 3);
      };
      const before = [look(), pixel(0, 0), pixel(0, 1), pixel(1, 3)];
      document.getElementById('include').click();
      const after = [look(), pixel(0, 0), pixel(0, 1), pixel(1, 3)];
      document.getElementById('include').click();
      const gain = document.getElementById('gain');
      gain.value = 2;
      gain.dispatchEvent(new Event('input'));
      const limits = [...document.querySelectorAll('.limit')].map(e => e.textContent);
      const up = document.querySelector('.t[data-i="1"]');
      up.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      return {before, after, stronger: look(), limits,
              readout: document.getElementById('readout').textContent};
    })()"""
    answer = visit(tmp_path, report_html(planted_report()), probe).probe
    full, half, grey, white = (
        "rgb(168, 21, 41)",
        "rgb(143, 193, 230)",
        "rgb(228, 228, 231)",
        "rgb(255, 255, 255)",
    )
    assert answer["before"][0] == [grey, full, half, white]
    assert answer["before"][1:] == [[228, 228, 231], [168, 21, 41], [168, 21, 41]]
    assert answer["after"][0][0] == full
    assert answer["after"][1] == [168, 21, 41]
    assert min(answer["after"][2] + answer["after"][3]) > 220  # all but white beside the giant
    assert answer["stronger"] == [grey, full, "rgb(28, 79, 150)", white]
    assert answer["limits"] == ["0.250", "250", "0.250", "250"]
    assert "« up»" in answer["readout"]
    assert "+0.500" in answer["readout"]


@browser
def test_circuitsvis_views_open_inert_and_alone(tmp_path: Path) -> None:
    greyed = [i == 0 for i in range(len(HOSTILE))]
    first = colored_tokens(HOSTILE, VALUES, greyed=greyed, target=HOSTILE[2], contrast=HOSTILE[5])
    second = colored_tokens_by_site(
        HOSTILE, [VALUES, -VALUES], [HOSTILE[1], HOSTILE[2]], greyed=greyed
    )
    together = visit(tmp_path, page([first, second], HOSTILE[1]))
    assert not together.pwned
    assert together.requests == []
    assert together.dom.count('class="colored-tokens"') == 2  # drawn under the page's policy

    alone = visit(
        tmp_path,
        document(first._repr_html_()),
        """(async () => {
      const spans = [...document.querySelectorAll('.colored-tokens > span')];
      spans[1].dispatchEvent(new MouseEvent('mouseenter'));
      await new Promise(done => setTimeout(done, 300));
      return [spans.map(e => e.textContent),
              document.querySelector('.colored-tokens strong').textContent];
    })()""",
    )
    assert not alone.pwned
    assert alone.requests == []
    texts, tooltip = alone.probe
    assert cleaned(texts)[:6] == HOSTILE[:6]
    assert len(texts) == len(HOSTILE)
    assert cleaned([tooltip]) == [HOSTILE[1]]


@browser
def test_circuitsvis_views_have_the_stated_colours(tmp_path: Path) -> None:
    greyed = [True, False, False]
    look = """[...document.querySelectorAll('.colored-tokens > span > span')].map(
        e => getComputedStyle(e).backgroundColor)"""
    full, negative, grey = "rgb(245, 138, 114)", "rgb(116, 179, 234)", "rgb(228, 228, 231)"
    one = colored_tokens(["a", "b", "c"], [900.0, 0.5, -0.5], greyed=greyed)
    assert visit(tmp_path, document(one._repr_html_()), look).probe == [grey, full, negative]

    many = colored_tokens_by_site(
        ["a", "b", "c"], [[900.0, 0.5, -0.5], [900.0, -0.002, 0.0]], ["s0", "s1"], greyed=greyed
    )
    probe = (
        """(async () => {
      const look = () => """
        + look
        + """;
      const first = look();
      const label = [...document.querySelectorAll('div')].find(e => e.textContent === 's1');
      label.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      label.click();
      await new Promise(done => setTimeout(done, 300));
      return [first, look()];
    })()"""
    )
    first, second = visit(tmp_path, document(many._repr_html_()), probe).probe
    assert first == [grey, full, negative]
    assert second == [grey, negative, "rgb(255, 255, 255)"]  # 250 times weaker, same colour
