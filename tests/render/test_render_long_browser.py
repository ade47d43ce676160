"""Long prompts in a browser: pieces, search and jumps, no injection and no requests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from support.browser import HOSTILE, browser, document, probe, visit
from support.reports import long_prompt

from tl_contrastive_lrp.render import colored_tokens, colored_tokens_by_site, page, report_html
from tl_contrastive_lrp.render.folds import LONG, MOST_SHOWN
from tl_contrastive_lrp.render.scale import colours
from tl_contrastive_lrp.render.text import signed, visible


def rgb(shade: str) -> str:
    return "rgb({}, {}, {})".format(*(int(shade[i : i + 2], 16) for i in (1, 3, 5)))


@browser
def test_pieces_open_and_close_and_their_sums_are_true(tmp_path: Path) -> None:
    long = long_prompt()
    body = """
      const before = size();
      const facts = all('.lrp-fold').map(piece => [
        piece.firstElementChild.title, piece.querySelector('.lrp-sum').textContent,
        piece.querySelector('b').textContent]);
      const shown = spans().length;
      one('.lrp-fold summary').click();
      await wait();
      const first = spans().length - shown;
      one('.lrp-open').click();
      await wait();
      const open = spans().map(span => [Number(span.dataset.i), span.textContent,
        getComputedStyle(span).backgroundColor]);
      const every = one('.lrp-fold').open && all('.lrp-fold[open]').length;
      one('.lrp-close').click();
      await wait();
      return {before, facts, shown, first, open, every, after: size(),
              left: all('.lrp-fold[open]').length};
    """
    answer: Any = visit(tmp_path, report_html(long.report()), probe(body)).probe
    n, values = len(long.tokens), long.values[0]
    counts = []
    for title, total, count in answer["facts"]:
        first, last = (int(title.split()[word]) for word in (1, 3))
        assert total == signed(math.fsum(values[first : last + 1]))
        assert count == f"{last - first + 1:,} tokens"
        counts.append(last - first + 1)
    assert answer["shown"] + sum(counts) == n
    assert answer["first"] == counts[0]
    assert [i for i, _, _ in answer["open"]] == list(range(n))
    assert [text for _, text, _ in answer["open"]] == [visible(token) for token in long.tokens]
    largest = np.abs(values[~long.greyed]).max()
    shades = [rgb(shade) for shade in colours(values / largest)[0]]
    grey = rgb("#e4e4e7")
    expected = [grey if g else s for g, s in zip(long.greyed.tolist(), shades, strict=True)]
    assert [shade for _, _, shade in answer["open"]] == expected
    assert answer["every"] == len(counts)
    assert (answer["left"], answer["after"]) == (0, answer["before"])
    assert answer["before"] < MOST_SHOWN + 1500


@browser
def test_search_opens_what_is_folded_and_goes_round(tmp_path: Path) -> None:
    long = long_prompt()
    body = """
      const hidden = token(given.needle) === null;
      const shown = await find('NEEDLE  4711');
      const still = token(given.needle) === null;
      await enter();
      const needle = {seen: seen(given.needle), now: now(), count: count(),
        hits: all('.lrp-hit').map(span => Number(span.dataset.i)),
        focus: document.activeElement === one('.lrp-query'), text: one('#readout').textContent};
      const several = await find('im_end');
      await enter({shiftKey: true});
      const last = [now(), count()];
      await enter();
      const first = [now(), count()];
      one('.lrp-previous').click();
      await wait();
      const again = now();
      const spaced = await find('3, "ID": 3');
      const none = await find('(.*)');
      const marks = all('.lrp-hit,.lrp-now').length;
      press('Escape');
      return {hidden, shown, still, needle, several, last, first, again, spaced, none, marks,
        cleared: one('.lrp-query').value + count()};
    """
    actual = probe(body, needle=long.needle[0])
    answer: Any = visit(tmp_path, report_html(long.report()), actual).probe
    assert answer["hidden"]
    assert answer["shown"] == "1 found, 1 folded"
    assert answer["still"]  # typing alone opens nothing
    place = list(range(long.needle[0], long.needle[1] + 1))
    assert answer["needle"]["seen"]
    assert answer["needle"]["now"] == answer["needle"]["hits"] == place
    assert answer["needle"]["count"] == "1 of 1"
    assert answer["needle"]["focus"]
    assert f"position {place[0]} " in answer["needle"]["text"]

    ends = [i for i, token in enumerate(long.tokens) if token == "<|im_end|>"]
    assert answer["several"].startswith(f"{len(ends)} found, ")
    assert answer["last"] == [[ends[-1]], f"{len(ends)} of {len(ends)}"]
    assert answer["first"] == [[ends[0]], f"1 of {len(ends)}"]
    assert answer["again"] == [ends[-1]]
    whole = "".join(visible(token) for token in long.tokens)
    times = whole.count('3,↵··"id":·3')
    assert answer["spaced"].startswith(f"{times:,} found")
    assert (answer["none"], answer["marks"], answer["cleared"]) == ("not in the prompt", 0, "")


@browser
def test_lists_jump_to_their_token_and_arrows_lead_on(tmp_path: Path) -> None:
    long = long_prompt()
    body = """
      const go = async (i) => { one(`[data-go="${i}"]`).click(); await wait(); };
      const on = () => {
        const at = document.activeElement.dataset.i;
        return [seen(at), now(), at, one('#readout').textContent];
      };
      await go(given.top);
      const top = on();
      press('ArrowRight');
      const next = [document.activeElement.dataset.i, one('#readout').textContent];
      await go(given.bottom);
      const bottom = on();
      let steps = 0;
      while (document.activeElement.dataset.i && steps < 200) { press('ArrowRight'); steps += 1; }
      return {top, next, bottom, end: document.activeElement.parentElement.className,
        title: document.activeElement.title};
    """
    jumps = probe(body, top=long.top, bottom=long.bottom)
    answer: Any = visit(tmp_path, report_html(long.report()), jumps).probe
    for name, place, value in (("top", long.top, "+4.000"), ("bottom", long.bottom, "−3.000")):
        seen, now, focus, text = answer[name]
        assert seen
        assert (now, focus) == ([place], str(place))
        assert f"«{visible(long.tokens[place])}» · id {place + 7} · position {place} " in text
        assert f"relevance {value} " in text
    assert answer["next"][0] == str(long.top + 1)
    assert f"position {long.top + 1} " in answer["next"][1]
    assert answer["end"] == "lrp-fold"  # a closed piece is one step
    assert answer["title"].startswith("positions ")


@browser
def test_hostile_tokens_stay_text_wherever_they_are_shown(tmp_path: Path) -> None:
    long = long_prompt()
    body = """
      await find('onerror');
      for (let i = 0; i < 4; i++) await enter();
      const found = now();
      for (const link of all('[data-go]')) link.click();
      for (const span of spans()) span.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      one('.lrp-open').click();
      one('#rows').closest('details').open = true;
      await wait();
      const input = one('#rows input');
      input.value = given.from;
      input.dispatchEvent(new Event('change'));
      await wait();
      const rows = all('#rows tbody tr').map(row => row.children[1].textContent);
      return {found, rows, images: all('img,svg,i').length,
        numbers: all('#rows tbody tr')[1].textContent};
    """
    shown = probe(body, **{"from": long.hostile - 1})
    seen = visit(tmp_path, report_html(long.report()), shown)
    assert not seen.pwned
    assert seen.requests == []
    assert seen.probe["images"] == 0
    with_it = [i for i, token in enumerate(long.tokens) if "onerror" in token]
    assert seen.probe["found"] == [with_it[3]]
    assert len(seen.probe["rows"]) == 200
    assert seen.probe["rows"][1 : 1 + len(HOSTILE)] == [visible(token) for token in HOSTILE]
    place = long.hostile
    value = long.values[0, place]
    assert seen.probe["numbers"] == (
        f"{place}{HOSTILE[0]}{place + 7}{signed(value)}{100 * value / 2:+.1f} %"
    )
    alone = visit(tmp_path, report_html(long.report()))  # under its own policy
    assert not alone.pwned
    assert alone.requests == []
    assert 'role="search">' in alone.dom  # its script ran


@browser
def test_layers_of_a_long_prompt_are_painted_from_packed_numbers(tmp_path: Path) -> None:
    long = long_prompt()
    names = [f"site {HOSTILE[1]} {site}" for site in range(len(long.values))]
    view = colored_tokens_by_site(
        long.tokens, long.values, names, greyed=long.greyed, target=HOSTILE[1], contrast=HOSTILE[2]
    )
    body = """
      const before = size();
      const chooser = one('.lrp-site');
      chooser.selectedIndex = 3;
      chooser.dispatchEvent(new Event('change'));
      one('.lrp-later').click();
      const sums = all('.lrp-fold').map(piece => [
        piece.firstElementChild.title, piece.querySelector('.lrp-sum').textContent]);
      const links = all('.lrp-tops [data-go]').map(link => [
        Number(link.dataset.go), link.textContent]);
      const total = one('.lrp-total').textContent;
      const middle = size();
      await find('needle 4711');
      await enter();
      one('.lrp-open').click();
      await wait();
      const colour = spans().map(span => getComputedStyle(span).backgroundColor);
      token(links[0][0]).dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
      return {before, sums, links, total, middle, now: now(), colour, chosen: chooser.selectedIndex,
        text: one('.lrp-readout').textContent, title: token(links[0][0]).title};
    """
    seen = visit(tmp_path, document(view._repr_html_()), probe(body))
    assert not seen.pwned
    assert seen.requests == []
    answer, site = seen.probe, 4
    values = long.values[site]
    assert answer["chosen"] == site
    assert max(answer["before"], answer["middle"]) < MOST_SHOWN + 1500
    totals = []
    for title, total in answer["sums"]:
        first, last = (int(title.split()[word]) for word in (1, 3))
        totals.append(math.fsum(values[first : last + 1]))
        assert total == signed(totals[-1])
        assert title.endswith(f" {signed(math.fsum(np.abs(values[first : last + 1])))[1:]}")
    assert answer["total"] == signed(math.fsum(totals))
    assert answer["now"] == list(range(long.needle[0], long.needle[1] + 1))
    plain = np.where(long.greyed, 0.0, values)
    order = np.argsort(-plain, kind="stable").tolist()
    assert [place for place, _ in answer["links"]] == [*order[:8], *order[::-1][:8]]
    best = order[0]
    assert answer["links"][0][1] == (f"{visible(long.tokens[best])}{signed(values[best])}at {best}")
    assert answer["text"] == answer["title"]
    assert f"position {best} · relevance {values[best]:+.3g} · {names[site]}" in answer["text"]
    # Linear from white to the lighter ends; float16 keeps three digits of 255 shades.
    share = values / np.abs(plain).max()
    ends = np.where(share[:, None] >= 0, [245, 138, 114], [116, 179, 234])
    expected = 255 + np.minimum(np.abs(share), 1)[:, None] * (ends - 255)
    expected[long.greyed] = 228, 228, 231
    actual = np.array([[int(part) for part in c[4:-1].split(",")] for c in answer["colour"]])
    assert np.abs(actual - expected).max() <= 0.6


@browser
def test_long_views_open_alone_under_the_policy_of_their_page(tmp_path: Path) -> None:
    long = long_prompt()
    views = [
        colored_tokens(long.tokens, long.values[0], greyed=long.greyed, target=HOSTILE[1]),
        colored_tokens(["a", "b"], [1.0, -1.0]),
    ]
    seen = visit(tmp_path, page(views, "t"))
    assert not seen.pwned
    assert seen.requests == []
    assert 'role="search">' in seen.dom
    assert seen.dom.count('class="colored-tokens"') == 1


@browser
def test_sites_can_be_chosen_where_nothing_is_folded(tmp_path: Path) -> None:
    rows = 1 + np.random.default_rng(0).random((2, LONG + 1))
    rows[1] = -rows[1]
    view = colored_tokens_by_site(["x"] * (LONG + 1), rows, ["a", "b"])
    body = """
      const colour = () => getComputedStyle(token(0)).backgroundColor;
      const first = colour();
      one('.lrp-later').click();
      return [first === colour(), one('.lrp-site').value, all('.lrp-fold').length,
        await find('xxx'), getComputedStyle(one('.lrp-open')).display];
    """
    answer = visit(tmp_path, document(view._repr_html_()), probe(body)).probe
    assert answer == [False, "b", 0, f"{(LONG + 1) // 3} found", "none"]
