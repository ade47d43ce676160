"""Graphs of long prompts: folded columns lose nothing, and the picture can be searched."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import HOSTILE, Flat, browser, visit
from support.pictures import Drawn, planted

from tl_contrastive_lrp.render.folds import LONG
from tl_contrastive_lrp.render.graph.data import checked
from tl_contrastive_lrp.render.graph.folds import fold_positions
from tl_contrastive_lrp.render.graph.picture import GraphView, graph_html, graph_picture

N = 12_374
HUBS = [5, 6, 200, 4000, 9000, N - 1]  # exchange most
HIDDEN = 6100  # a text to find, in a column of several


def long_view(n: int = N, edges: int = 40_000) -> GraphView:
    """Three sites; a few positions exchange most of the relevance, all others a little."""
    rng = np.random.default_rng(2)
    hubs = [hub for hub in HUBS if hub < n]
    pairs = np.unique(np.sort(rng.integers(1, n, (edges, 2)), axis=1), axis=0)
    pairs = pairs[~np.isin(pairs, hubs).any(axis=1)]
    source, target = rng.permutation(pairs).T.copy()
    edges = len(source)
    weight = rng.standard_normal(edges) * 1e-3
    for at, hub in enumerate(hubs[:-1]):
        source[at], target[at], weight[at] = hub, n - 1, 1.0 + at
    if edges > 1200:  # together more than any hub, most of them folded
        many = slice(1000, 1200)
        source[many], target[many], weight[many] = np.arange(6200, 6400) % n, n - 1, 0.9
    source[len(hubs)], target[len(hubs)], weight[len(hubs)] = 0, n - 1, 99.0
    site = rng.integers(0, 2, edges)
    tokens = [f" t{i % 50}" for i in range(n)]
    if n > HIDDEN:
        tokens[HIDDEN : HIDDEN + 2] = [" Nee", "dle"]
        tokens[7000 : 7000 + len(HOSTILE)] = HOSTILE
        tokens[200] = HOSTILE[1]
    relevance = rng.standard_normal((3, n)) * 0.01
    relevance[0, hubs] = [0.5, -0.4, 0.3, -0.2, 0.1, 0.7][: len(hubs)]
    return replace(
        planted(),
        relevance=relevance,
        str_tokens=tokens,
        greyed=np.arange(n) == 0,
        source_site=site,
        source_pos=source,
        target_site=site + 1,
        target_pos=target,
        weight=weight,
        final_pos=n - 1,
    )


@pytest.mark.parametrize("few", [True, False])
def test_of_several_final_nodes_the_strongest_have_columns(few: bool) -> None:
    """All positions may be explained: the picture stays small, and marks each one's column."""
    earlier = [3, 1500] if few else list(range(N - 1))
    view = replace(long_view(), earlier_final_pos=earlier)
    view.relevance[-1, 1500] = 5.0
    data = fold_positions(checked(view), 20)
    apart = set(data.first[data.first == data.last].tolist())
    assert {1500, N - 1} <= apart
    assert len(data.first) <= 2 * (20 + 2 + 1) + 1
    assert data.finals[-1] == data.final_pos
    column = {c for c in range(len(data.first)) for p in (*earlier, N - 1)
              if data.first[c] <= p <= data.last[c]}  # fmt: skip
    assert set(data.finals.tolist()) == column
    assert graph_html(view, max_positions=20).count('<circle class="on"') == len(column)


def test_folding_keeps_every_sum_and_the_busiest_positions() -> None:
    view = long_view()
    whole = checked(view)
    data = fold_positions(whole, 8)
    apart = set(data.first[data.first == data.last].tolist())
    assert {*HUBS, 0} <= apart
    assert (data.first[0], data.last[-1]) == (0, N - 1)
    assert (data.first[1:] == data.last[:-1] + 1).all()
    assert data.first[data.final_pos] == N - 1
    for site in range(3):
        for column in range(len(data.first)):
            first, last = data.first[column], data.last[column]
            inside = whole.relevance[site, first : last + 1].sum()
            assert data.relevance[site, column] == pytest.approx(inside)
    # Each edge of the whole graph, put where its ends are folded to, the slow way.
    sums: dict[tuple[int, ...], float] = {}
    ends = {
        i: c
        for c, (a, b) in enumerate(zip(data.first, data.last, strict=True))
        for i in range(a, b + 1)
    }
    edges = whole.edges
    for s, i, t, j, weight in zip(
        edges.source_site, edges.source_pos, edges.target_site, edges.target_pos, edges.weight,
        strict=True,
    ):  # fmt: skip
        key = (int(s), ends[int(i)], int(t), ends[int(j)])
        sums[key] = sums.get(key, 0.0) + float(weight)
    keys = np.stack(
        [
            data.edges.source_site,
            data.edges.source_pos,
            data.edges.target_site,
            data.edges.target_pos,
        ]
    )
    actual = dict(zip(map(tuple, keys.T.tolist()), data.edges.weight.tolist(), strict=True))
    assert actual.keys() == sums.keys()
    assert all(actual[key] == pytest.approx(sums[key], abs=1e-12) for key in sums)


def test_only_long_prompts_with_many_positions_are_folded() -> None:
    short = checked(long_view(LONG))
    assert fold_positions(short, 5) is short
    few = checked(long_view(edges=7))
    assert fold_positions(few, 60) is few
    assert "squares" not in graph_html(long_view(edges=7))
    with pytest.raises(ValueError, match="max_positions must be 1 or more"):
        graph_picture(long_view(), max_positions=0)


def test_the_page_says_what_is_folded() -> None:
    view = long_view()
    html = graph_html(view)
    drawn = Drawn(html)
    squares = re.findall(r"<rect [^>]*data-n=[^>]*><title>([\d,]+) tokens, positions", html)
    assert squares
    labels = re.findall(r"<title>(folded: [\d,]+ tokens?, positions (\d+) to (\d+))</title>", html)
    folded = sum(int(last) - int(first) + 1 for _, first, last in labels)
    own = len(re.findall(r'<text class="c" data-p="\d+"', html)) - len(labels)
    assert own + folded == N
    apart = np.ones(N, dtype=bool)
    for _, first, last in labels:
        apart[int(first) : int(last) + 1] = False
    touches = ~(apart[view.source_pos] & apart[view.target_pos])
    share = 100 * np.abs(view.weight[touches]).sum() / np.abs(view.weight).sum()
    assert (
        f"{own} of its 12,374 positions have a column each, those that exchange the most relevance "
        f"among them. The other {folded:,} are folded into {len(labels)} columns (squares), their "
        f"relevance and edges added up: {touches.sum():,} of {len(touches):,} edges, "
        f"{share:.1f} % of Σ|weight|, begin or end there." in drawn.text
    )
    assert "square: folded tokens" in drawn.text
    assert own <= 120
    assert "full at 5.000 logits" in drawn.text  # neither greyed nor folded edges set the scale


def test_pages_of_long_graphs_stay_text_and_small() -> None:
    html = graph_html(long_view())
    flat = Flat(html)
    attributes = {key for _, attrs in flat.tags for key in attrs}
    assert not {key for key in attributes if key.startswith("on")}
    assert not {"src", "href", "xlink:href", "srcset", "data", "action"} & attributes
    assert "img" not in {tag for tag, _ in flat.tags}
    assert len(html.encode()) < 3_000_000
    assert len(flat.tags) < 15_000


@browser
def test_a_long_graph_is_searched_and_jumped_in(tmp_path: Path) -> None:
    probe = """(async () => {
      const root = document.querySelector('.lrp-graph'), frame = root.querySelector('.f');
      const words = () => root.querySelector('.r').textContent;
      const wait = () => new Promise(done => setTimeout(done, 250));
      const query = root.querySelector('.lrp-query');
      const enter = async (text) => {
        query.value = text;
        query.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));
        await wait();
        const on = [...root.querySelectorAll('.c.on')].find((each) => {
          const [first, last] = each.dataset.c.split(' ').map(Number);
          return first <= 6100 && 6100 <= last;
        });
        const at = on ? on.getBoundingClientRect() : null, box = frame.getBoundingClientRect();
        return [words(), root.querySelector('.lrp-count').textContent,
          Boolean(at) && at.left < box.right && at.right > box.left, frame.scrollLeft];
      };
      const needle = await enter('needle');
      const hostile = await enter('onerror');
      const none = await enter('nowhere');
      root.querySelector('[data-go="12373"]').click();
      const end = frame.scrollLeft;
      root.querySelector('[data-go="5"]').click();
      const links = [...root.querySelectorAll('[data-go]')].map(link => Number(link.dataset.go));
      const on = [...root.querySelectorAll('text.c.on')].map(label => label.textContent);
      return {needle, hostile, none, jumped: words(), end, links, on,
        paths: root.querySelectorAll('path.on').length,
        images: root.querySelectorAll('img').length};
    })()"""
    view = long_view()
    seen = visit(tmp_path, graph_html(view), probe)
    assert not seen.pwned
    assert seen.requests == []
    answer: Any = seen.probe
    words, count, visible, scrolled = answer["needle"]
    assert count == "1 of 1"
    actual = re.match(
        r"« Needle» position 6100 · folded: ([\d,]+) tokens, positions (\d+) to", words
    )
    assert actual
    assert int(actual[2]) <= HIDDEN
    assert visible
    assert scrolled < answer["end"]
    assert answer["hostile"][1].startswith("1 of ")
    assert answer["none"][1] == "not in the prompt"
    row = np.where(view.greyed, 0.0, view.relevance[0])
    order = np.argsort(-row, kind="stable").tolist()
    assert answer["links"] == [*order[:6], *order[::-1][:6]]
    drawn = Drawn(graph_html(view))
    tied = [title for _, title in drawn.edges if "« t5» position 5," in title]
    assert answer["paths"] == len(tied)
    assert answer["jumped"] == (
        f"« t5» position 5 · {len(tied)} of the edges drawn begin or end here"
    )
    assert answer["images"] == 0
    alone = visit(tmp_path, graph_html(view))
    assert not alone.pwned
    assert alone.requests == []
    assert 'role="search">' in alone.dom
