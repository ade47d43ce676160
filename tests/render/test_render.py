"""Views and files: text cannot break out, scales leave greyed tokens out, no network is used."""

from __future__ import annotations

import json
import math
import os
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from circuitsvis.utils.render import RenderedHTML
from hypothesis import given
from hypothesis import strategies as st
from support.browser import JOINER, Flat, props
from support.reports import contrast_ratio

from tl_contrastive_lrp.render import colored_tokens, colored_tokens_by_site, page, save_html
from tl_contrastive_lrp.render.scale import colours
from tl_contrastive_lrp.render.text import inert, inline_script, script_json, visible

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
        (([1, "b"], [1.0, 2.0]), TypeError, r"str_tokens\[0\] is an int"),
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
