"""Pictures: text cannot break out, scales leave greyed tokens out, nothing asks the network."""

from __future__ import annotations

import json
import math
import os
import re
import socket
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import HOSTILE, JOINER, Flat, browser, document, visit
from circuitsvis.utils.render import RenderedHTML
from circuitsvis.utils.render import render as circuitsvis_render
from hypothesis import given
from hypothesis import strategies as st

from tl_contrastive_lrp.render import (
    Report,
    colored_tokens,
    colored_tokens_by_site,
    page,
    report_html,
    save_html,
)
from tl_contrastive_lrp.render.scale import colours
from tl_contrastive_lrp.render.text import inert, inline_script, script_json, visible

VALUES = np.linspace(-1.0, 1.0, len(HOSTILE))


# ---- text ------------------------------------------------------------------------------------


PIECES = ["<", "</", "<b>", "</b>", "<i", ">", "<!--", "-->", "<?", "&", "&lt;", "&#60;", "a", " "]


@given(st.lists(st.sampled_from(PIECES) | st.text()).map("".join))
def test_inert_text_holds_no_markup_and_keeps_its_characters(token: str) -> None:
    flat = Flat(inert(token))
    assert flat.tags == []
    assert flat.entities == []
    assert flat.other == []
    shown = flat.text.replace(JOINER, "")
    plain = [c for c in token if c.isprintable() and c != JOINER]
    assert [c for c in shown if c in plain] == plain


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists))
def test_script_json_means_the_same_and_cannot_end_a_script(value: Any) -> None:
    text = script_json(value)
    assert json.loads(text) == value
    assert text.isascii()
    assert not set(text) & set("<>&'")


def test_script_json_refuses_what_json_has_no_word_for() -> None:
    with pytest.raises(ValueError, match="JSON"):
        script_json([math.nan])


def test_visible_shows_whitespace_and_controls() -> None:
    assert visible("\n") == "↵"
    assert visible(" word") == " word"
    assert visible("    x") == "····x"
    assert visible(" ") == "·"
    assert visible("") == "∅"
    assert visible("a\tb\x00\ud800") == "a⇥b␀\ufffd"
    assert inline_script("'</script>' '<!--'") == "'<\\/script>' '<\\!--'"


# ---- scale -----------------------------------------------------------------------------------


def props(view: RenderedHTML) -> list[Any]:
    """The arguments of a view's drawing call: element id, properties, extra data."""
    found = re.search(r"\)\((\"circuits-vis-.*)\);$", view.script, re.DOTALL)
    assert found
    return list(json.loads(f"[{found[1]}]"))


def test_greyed_tokens_are_left_out_of_the_scale() -> None:
    values = [500.0, 0.25, -0.5, 0.0]
    greyed = [True, False, False, False]
    tokens = ["<s>", "a", "b", "c"]
    view = colored_tokens(tokens, values, greyed=greyed)
    _, given_props = props(view)
    assert (given_props["minValue"], given_props["maxValue"]) == (-0.5, 0.5)
    assert given_props["values"] == values
    assert "span:nth-of-type(1)>span{background:" in view.body
    assert "nth-of-type(2)" not in view.body

    everything = colored_tokens(tokens, torch.tensor(values, dtype=torch.bfloat16))
    assert props(everything)[1]["maxValue"] == 500.0
    assert "nth-of-type" not in everything.body


def test_each_site_has_its_own_scale_unless_shared() -> None:
    values = [[900.0, 0.5, -2.0], [-900.0, 0.125, 0.0], [7.0, 0.0, 0.0]]
    greyed = [True, False, False]
    labels = ["s0", "s1", "s2"]
    own = colored_tokens_by_site(["a", "b", "c"], values, labels, greyed=greyed)
    _, given_props, extra = props(own)
    assert extra["scales"] == [2.0, 0.125, 1.0]  # nothing but zeros: any scale, never 0
    assert given_props["values"] == [[900, -900, 7], [0.5, 0.125, 0], [-2, 0, 0]]
    shared = colored_tokens_by_site(["a", "b", "c"], values, labels, greyed=greyed, scale="shared")
    assert props(shared)[2]["scales"] == [2.0, 2.0, 2.0]


def contrast_ratio(a: str, b: str) -> float:
    """WCAG 2 contrast ratio, from its definition."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_stays_readable_on_every_shade_and_size_darkens() -> None:
    shades, white = colours(np.linspace(-1, 1, 201))
    for shade, is_white in zip(shades, white, strict=True):
        assert contrast_ratio(shade, "#ffffff" if is_white else "#000000") >= 4.5
    assert shades[100] == "#ffffff"
    distance = [contrast_ratio(shade, "#ffffff") for shade in shades]
    assert distance[:101] == sorted(distance[:101], reverse=True)
    assert distance[100:] == sorted(distance[100:])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((["a"], [1.0, 2.0]), ValueError, "1 tokens, but values for 2"),
        (("ab", [1.0, 2.0]), TypeError, "one per token"),
        (([1, "b"], [1.0, 2.0]), TypeError, r"str_tokens\[0\] is a int"),
        (([], []), ValueError, "no tokens"),
        ((["a", "b"], [1.0, math.nan]), ValueError, r"first at index \(1,\)"),
        ((["a", "b"], [[1.0, 2.0]]), ValueError, "1 dimension"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        colored_tokens(*arguments)


def test_bad_masks_and_labels_are_named() -> None:
    with pytest.raises(ValueError, match="one bool per token"):
        colored_tokens(["a", "b"], [1.0, 2.0], greyed=[0, 1])
    with pytest.raises(ValueError, match="one bool per token"):
        colored_tokens(["a", "b"], [1.0, 2.0], greyed=[True])
    with pytest.raises(ValueError, match="1 labels, but values for 2 sites"):
        colored_tokens_by_site(["a"], [[1.0], [2.0]], ["x"])
    with pytest.raises(ValueError, match="'site' or 'shared'"):
        colored_tokens_by_site(["a"], [[1.0]], ["x"], scale="all")  # type: ignore[arg-type]


# ---- the report ------------------------------------------------------------------------------


def hostile_report() -> Report:
    n = len(HOSTILE)
    return Report(
        title=HOSTILE[1],
        model_name=HOSTILE[2],
        rules=HOSTILE[3],
        objective=HOSTILE[5],
        str_tokens=HOSTILE,
        token_ids=range(n),
        tokens=VALUES,
        delta=2.0,
        target=[HOSTILE[1]],
        contrast=[HOSTILE[2], HOSTILE[5]],
        target_logit=4.0,
        contrast_logit=2.0,
        greyed=[i == 0 for i in range(n)],
        resid=torch.tensor(np.stack([VALUES, -VALUES])),
        site_labels=[HOSTILE[1], HOSTILE[5]],
        heads=np.ones((2, 3, n)),
        candidates=[{"rank": 1, "token": HOSTILE[1], "id": 5, "logit": 4.0, "probability": 0.5}],
        ledger=[{"site": HOSTILE[2], "total": 2.0, "share": 1.0, "other": None}],
        coverage=[{"component": HOSTILE[3], "rule": HOSTILE[5]}],
        notes=[HOSTILE[1], HOSTILE[6]],
    )


def planted_report() -> Report:
    """A first token 1,000 times larger than the rest."""
    return Report(
        title="planted",
        model_name="m",
        rules="attnlrp",
        objective="o",
        str_tokens=["<s>", " up", " down", "\n"],
        token_ids=[0, 1, 2, 3],
        tokens=[500.0, 0.5, -0.25, 0.0],
        greyed=[True, False, False, False],
        delta=1.0,
        resid=[[500.0, 0.5, -0.25, 0.0], [-500.0, 0.0, 0.0, 1.0]],
        site_labels=["a", "b"],
    )


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


# ---- files -----------------------------------------------------------------------------------


def test_save_html_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.html"
    assert save_html(str(path), "old «é»") == path
    assert path.read_text(encoding="utf-8") == "old «é»"
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_html(path, "new")
    assert path.read_text(encoding="utf-8") == "old «é»"
    assert os.listdir(tmp_path) == ["r.html"]


def test_save_html_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mkdir -p"):
        save_html(tmp_path / "no" / "r.html", "x")
    with pytest.raises(IsADirectoryError, match=r"report\.html"):
        save_html(tmp_path, "x")
    assert os.listdir(tmp_path) == []


# ---- without network -------------------------------------------------------------------------


def test_display_opens_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    view = colored_tokens(["a"], [1.0])
    assert isinstance(view, RenderedHTML)
    for html in (view._repr_html_(), view.__html__(), view.show_code(), str(view)):
        assert "import {" not in html
        assert html == view.local_src
    assert asked == []
    # What this guards against: the parent class asks at every display.
    RenderedHTML("local", "cdn")._repr_html_()
    assert len(asked) == 1


def test_a_page_of_views_holds_the_bundle_once() -> None:
    view = colored_tokens(["a"], [1.0])
    once, twice = (len(page([view] * count, "t")) for count in (1, 2))
    assert twice - once < 10_000
    assert once > 1_000_000


# ---- in a browser ----------------------------------------------------------------------------


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
