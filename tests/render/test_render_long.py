"""Long prompts: what is folded is counted and summed, nothing is lost, pages stay small."""

from __future__ import annotations

import base64
import math
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.browser import HOSTILE, Flat
from support.reports import long_prompt

from tl_contrastive_lrp.render import colored_tokens, colored_tokens_by_site, page, report_html
from tl_contrastive_lrp.render.folds import LONG, MOST_SHOWN, folds_of
from tl_contrastive_lrp.render.offline import PlainHTML, bundle
from tl_contrastive_lrp.render.text import magnitude, packed_half, signed, visible


class Folded(HTMLParser):
    """The prompt of a page as a parser reads it: tokens shown, and pieces with their words."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.spans: list[tuple[int, str]] = []
        self.pieces: list[dict[str, str]] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        given_attrs = dict(attrs)
        names = (given_attrs.get("class") or "").split()
        if tag == "span" and "t" in names:
            self.spans.append((int(given_attrs["data-i"]), ""))
            self.inside = "t"
        elif tag == "summary" and "title" in given_attrs:
            self.pieces.append({"title": given_attrs["title"], "words": "", "text": ""})
            self.inside = "words"
        elif "lrp-in" in names:
            self.inside = "text"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("summary", "div") or (tag == "span" and self.inside == "t"):
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "t":
            self.spans[-1] = (self.spans[-1][0], self.spans[-1][1] + data)
        elif self.inside:
            self.pieces[-1][self.inside] += data


def positions(piece: dict[str, str]) -> tuple[int, int]:
    actual = re.match(r"positions (\d+) to (\d+) ", piece["title"])
    assert actual
    return int(actual[1]), int(actual[2])


def check(html: str, tokens: list[str], values: Any) -> Folded:
    """Tokens shown and tokens folded are the prompt, in order; counts and sums are true."""
    seen = Folded(html)
    covered = [i for i, _ in seen.spans]
    for piece in seen.pieces:
        first, last = positions(piece)
        inside = [float(value) for value in values[first : last + 1]]
        largest = max(inside, key=abs)
        assert piece["words"] == (
            f"⋯ {last - first + 1:,} tokens · Σ relevance {signed(math.fsum(inside))} "
            f"· largest {signed(largest)} ⋯"
        )
        size = math.fsum(abs(value) for value in inside)
        assert piece["title"].endswith(f"Σ|relevance| {magnitude(size)}")
        shown = [visible(token) for token in tokens[first : last + 1]]
        assert piece["text"].replace("\n", "") == "".join(shown)
        covered += range(first, last + 1)
    assert sorted(covered) == list(range(len(tokens)))
    assert seen.spans == [(i, visible(tokens[i])) for i, _ in seen.spans]
    return seen


# ---- which tokens ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.integers(LONG + 1, 9000),
    st.integers(0, 2**31),
    st.sampled_from([0.3, 1.5, 30.0]),
    st.sampled_from([1, 6, 5000]),
)
def test_pieces_are_apart_in_order_and_hold_no_token_that_matters(
    n: int, seed: int, tail: float, line: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.standard_t(tail, n)
    greyed = rng.random(n) < 0.02
    folds = folds_of(values, greyed, ["x\n" if i % line == line - 1 else "x" for i in range(n)])
    before, folded = -1, np.zeros(n, dtype=bool)
    for fold in folds:
        assert before < fold.first <= fold.last < n
        assert 24 <= fold.count <= 2000 + 12
        inside = values[fold.first : fold.last + 1]
        size = math.fsum(np.abs(inside))
        assert fold.total == pytest.approx(math.fsum(inside), abs=1e-12 * size)
        assert fold.size == pytest.approx(size)
        folded[fold.first : fold.last + 1] = True
        before = fold.last
    assert not folded[:40].any()
    assert not folded[-60:].any()
    assert (~folded).sum() <= MOST_SHOWN
    plain = np.where(greyed, 0.0, np.abs(values))
    assert not folded[plain.argmax()]
    matter, left = [], 0.9 * math.fsum(plain)
    for i in sorted(range(n), key=lambda i: -plain[i])[:150]:
        if left <= 0 or plain[i] <= 0.01 * plain.max():
            break
        matter.append(i)
        left -= plain[i]
    shown = int((~folded).sum())
    if shown < 2800:  # else some gave way to the limit
        assert not folded[matter].any()
    # Around each at most 8 and a rest of a line of 12 on either side, and a rest too short to fold.
    assert shown <= 40 + 60 + 2 * 12 + (len(matter) + 15) * (1 + 2 * 20) + (len(matter) + 17) * 23


def test_prompts_up_to_a_thousand_tokens_are_shown_whole() -> None:
    assert LONG == 1000
    values = np.zeros(LONG + 1)
    values[500] = 1.0
    grey = values > 2
    assert folds_of(values[:LONG], grey[:LONG], ["x"] * LONG) == []
    (left, right) = folds_of(values, grey, ["x"] * (LONG + 1))
    assert (left.first, left.last) == (40, 491)
    assert (right.first, right.last) == (509, LONG + 1 - 61)
    assert left.total == left.size == 0.0
    view = colored_tokens(["x"] * LONG, values[:LONG])
    assert not isinstance(view, PlainHTML)
    assert "CircuitsVis.render" in view.script


def test_a_long_prompt_without_faint_tokens_is_shown_whole_and_says_so() -> None:
    n = LONG + 1
    values = 1 + np.random.default_rng(0).random(n)
    for html in (
        colored_tokens(["x"] * n, values).body,
        report_html(replace(long_prompt().report(), **whole(n), tokens=values)),
    ):
        seen = check(html, ["x"] * n, values)
        assert seen.pieces == []
        assert "This prompt is long; all of its 1,001 tokens are shown." in html
        assert "nothing is folded" in html


def whole(n: int) -> dict[str, Any]:
    """Fields of a report of ``n`` tokens that are all "x"."""
    return {
        "str_tokens": ["x"] * n,
        "token_ids": range(n),
        "greyed": None,
        "resid": None,
        "site_labels": [],
    }


def test_greyed_tokens_do_not_crowd_out_the_others() -> None:
    n = 5000
    values = np.full(n, 1e-6)
    greyed = np.arange(n) % 10 == 0
    values[greyed] = 100.0
    values[[1234, 4321]] = 0.5, -0.5
    folded = np.zeros(n, dtype=bool)
    for fold in folds_of(values, greyed, ["x"] * n):
        folded[fold.first : fold.last + 1] = True
    assert not folded[[1234, 4321]].any()
    assert folded.sum() > 4000


@settings(deadline=None, max_examples=40)
@given(st.integers(LONG + 1, 5000), st.integers(0, 2**31), st.integers(1, 40))
def test_no_piece_holds_tokens_of_two_messages(n: int, seed: int, messages: int) -> None:
    """The same tokens are folded as without messages, with the same sums in all."""
    rng = np.random.default_rng(seed)
    values, greyed = rng.standard_t(1.5, n), np.zeros(n, dtype=bool)
    starts = np.unique([0, *rng.integers(0, n, messages)])
    owner = np.searchsorted(starts, np.arange(n), side="right") - 1
    words = ["x"] * n
    folds = folds_of(values, greyed, words, [(int(s), f"m{i}") for i, s in enumerate(starts)])
    for fold in folds:
        owners = owner[fold.first : fold.last + 1]
        assert set(owners) == {owners[0]}
        assert fold.message == f"m{owners[0]}"
        inside = values[fold.first : fold.last + 1]
        assert fold.total == pytest.approx(math.fsum(inside), abs=1e-9 * np.abs(inside).sum())
    without = folds_of(values, greyed, words)
    assert [i for f in folds for i in range(f.first, f.last + 1)] == [
        i for f in without for i in range(f.first, f.last + 1)
    ]
    assert {fold.message for fold in without} <= {""}


def test_a_folded_piece_names_its_message() -> None:
    long = long_prompt()
    n = len(long.tokens)
    starts = [(0, "system 1"), (n // 2, "user <2>")]
    html = report_html(replace(long.report(), message_starts=starts))
    assert "<i>system 1</i> · <b>" in html
    assert "<i>user &lt;2&gt;</i> · <b>" in html
    assert "<i>system 1</i>" not in report_html(long.report())


# ---- what a page says ------------------------------------------------------------------------


def test_shown_and_folded_tokens_are_the_prompt_and_their_sums_are_true() -> None:
    long = long_prompt()
    html = report_html(long.report())
    seen = check(html, long.tokens, long.values[0])
    assert len(seen.pieces) > 5
    assert len(seen.spans) < MOST_SHOWN
    folded = [i for piece in seen.pieces for i in range(*positions(piece))]
    assert {long.needle[0], long.hostile}.issubset(folded)
    assert not {long.top, long.bottom} & set(folded)

    inside = [x for p in seen.pieces for x in long.values[0, slice(*positions(p))]]
    inside += [long.values[0, positions(p)[1]] for p in seen.pieces]
    total = math.fsum(abs(value) for value in long.values[0])
    share = 100 * math.fsum(abs(value) for value in inside) / total
    text = re.sub(r"<[^>]+>", "", html)
    assert (
        f"{len(seen.spans):,} of its 12,374 tokens are shown. The other {len(inside):,}, of low "
        f"relevance, are folded into {len(seen.pieces)} pieces that hold {share:.1f} % of "
        f"Σ|relevance| and sum to {signed(math.fsum(inside))} logits."
    ) in text


def test_rankings_lead_to_tokens_and_show_what_is_around_them() -> None:
    long = long_prompt()
    html = report_html(long.report())
    flat = Flat(html)
    links = [attrs["data-go"] for tag, attrs in flat.tags if "data-go" in attrs]
    plain = np.where(long.greyed, 0.0, long.values[0])
    order = np.argsort(-plain)
    assert links[:10] == [str(i) for i in order[:10]]
    assert links[10:20] == [str(i) for i in order[::-1][:10]]
    around = "".join(visible(token) for token in long.tokens[long.top - 9 : long.top])[-14:]
    assert around in unescape(re.sub(r"<[^>]+>", "", html))


def test_long_reports_are_small_whatever_their_length() -> None:
    long = long_prompt()
    wide = replace(
        long.report(),
        resid=np.tile(long.values[:3], (19, 1)),
        site_labels=[f"blocks.{site}.hook_resid_mid" for site in range(57)],
    )
    for report in (long.report(), wide):
        html = report_html(report)
        assert len(html.encode()) < 3_000_000
        assert html.count("<span") + html.count("<tr") < MOST_SHOWN + 500
    views = [
        colored_tokens(long.tokens, long.values[0]),
        colored_tokens_by_site(long.tokens, np.tile(long.values[:3], (10, 1)), ["s"] * 30),
    ]
    for view in views:
        html = view._repr_html_()
        assert len(html.encode()) < 2_000_000
        assert html.count("<span") < MOST_SHOWN + 500
        assert bundle()[:2000] not in page([view], "t")


def test_report_of_a_long_prompt_has_no_address_and_one_script() -> None:
    flat = Flat(report_html(long_prompt().report()))
    fetching = {"src", "href", "srcset", "data", "action", "poster", "background"}
    assert [tag for tag, attrs in flat.tags if fetching & attrs.keys()] == []
    scripts = [attrs.get("type") for tag, attrs in flat.tags if tag == "script"]
    assert scripts == ["application/json", None]
    assert not {"img", "svg", "iframe", "object"} & {tag for tag, _ in flat.tags}
    assert not [tag for tag, attrs in flat.tags if any(key.startswith("on") for key in attrs)]


def test_views_of_long_prompts_fold_by_what_matters_at_any_site() -> None:
    long = long_prompt(5000, sites=4)
    values = np.full((4, 5000), 1e-7)
    strong, weak = np.flatnonzero(~long.greyed)[[1000, 2345]].tolist()
    values[0, strong] = 5.0
    values[2, weak] = -1e-3  # small, but the largest of its site
    view = colored_tokens_by_site(long.tokens, values, list("abcd"), greyed=long.greyed)
    assert isinstance(view, PlainHTML)
    seen = check(view.body, long.tokens, values[0])
    assert {strong, weak} <= {i for i, _ in seen.spans}
    one = colored_tokens(long.tokens, values[0], greyed=long.greyed, target=HOSTILE[1])
    seen = check(one.body, long.tokens, values[0])
    assert strong in {i for i, _ in seen.spans}
    assert weak not in {i for i, _ in seen.spans}
    assert HOSTILE[1] not in one._repr_html_()


def test_hidden_states_keep_three_digits() -> None:
    rng = np.random.default_rng(1)
    array = rng.standard_normal((3, 500)) * 10.0 ** rng.integers(-6, 3, (3, 500))
    array[1] = 0.0
    text, units = packed_half(array)
    halves = np.frombuffer(base64.b64decode(text), "<f2").astype(float).reshape(3, 500)
    largest = np.abs(array).max(axis=1, keepdims=True)
    apart = np.abs(halves * np.array(units)[:, None] - array)
    assert (apart <= np.maximum(2.0**-11 * np.abs(array), 2.0**-40 * largest)).all()
    assert apart.any()
