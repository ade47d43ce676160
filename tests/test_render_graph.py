"""Pictures of graphs: the numbers they show, what they leave out and say so, no way out of them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import HOSTILE, Flat, browser, document, visit
from circuitsvis.utils.render import RenderedHTML
from graphs import edge_lists, given, listed, made
from hypothesis import strategies as st

from tl_contrastive_lrp.graph_view import matrices_of, site_labels, view_of
from tl_contrastive_lrp.render import Report, page, report_html
from tl_contrastive_lrp.render.graph import (
    GraphPicture,
    GraphView,
    attention_matrices,
    graph_html,
    graph_picture,
    graph_section,
)
from tl_contrastive_lrp.render.graph_layout import strongest

RED, BLUE = "#d8513f", "#3f86c5"
# source site and position, target site and position, weight
PLANTED = [
    (1, 11, 2, 11, 1.5),  # stays: most of the relevance
    (1, 4, 2, 11, 0.4),
    (1, 3, 2, 11, -0.2),
    (0, 4, 1, 4, 0.3),
    (0, 3, 1, 4, 0.1),
    (0, 0, 1, 4, 50.0),  # a first token that would drown the rest
    (0, 11, 1, 11, 1.5),
]


def planted(edges: list[tuple[int, int, int, int, float]] = PLANTED, **changes: Any) -> GraphView:
    """Twelve tokens, of which 0, 3, 4 and 11 have edges; Δℓ = 2."""
    relevance = np.zeros((3, 12))
    relevance[2, 11] = 2.0
    relevance[1, [3, 4, 11]] = -0.2, 0.5, 1.5
    relevance[0, [0, 3, 4, 11]] = 50.0, 0.1, 0.3, 1.5
    columns = list(zip(*edges, strict=True)) if edges else [()] * 5
    view = GraphView(
        sites=["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"],
        site_labels=["input", "block 1", "output"],
        relevance=relevance,
        str_tokens=["<s>", *(f" t{i}" for i in range(1, 12))],
        greyed=np.arange(12) == 0,
        source_site=np.array(columns[0], dtype=int),
        source_pos=torch.tensor(columns[1], dtype=torch.int32),
        target_site=np.array(columns[2], dtype=int),
        target_pos=torch.tensor(columns[3], dtype=torch.int32),
        weight=torch.tensor(columns[4], dtype=torch.float64),
        final_pos=11,
        target=" a",
        contrast=" b",
        delta=2.0,
        notes=["Pruned by hand."],
    )
    return replace(view, **changes)


class Drawn(HTMLParser):
    """What a parser finds in a picture: paths and circles with a title, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.found: list[tuple[str, dict[str, str], str]] = []
        self.text = ""
        self.feed(html)
        self.text = re.sub(r"\s+", " ", self.text)
        self.edges = [(attrs, title) for tag, attrs, title in self.found if tag == "path"]
        self.nodes = [(attrs, title) for tag, attrs, title in self.found if tag == "circle"]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self.open]
        if tags[-1:] == ["title"] and "svg" in tags:
            self.found.append((*self.open[-2], data))
        elif not {"style", "script"} & set(tags):
            self.text += data

    def edge(self, words: str) -> tuple[dict[str, str], str]:
        (found,) = [edge for edge in self.edges if words in edge[1]]
        return found

    def node(self, words: str) -> tuple[dict[str, str], str]:
        token, site = words.split(" at ")
        start, place = f"« {token}» ", f" · {site} ("
        (found,) = [n for n in self.nodes if n[1].startswith(start) and place in n[1]]
        return found


# ---- numbers ---------------------------------------------------------------------------------


def test_tooltips_give_token_site_and_signed_numbers() -> None:
    drawn = Drawn(graph_html(planted()))
    _, title = drawn.edge("from « t3» position 3, block 1 ")
    assert title == (
        "from « t3» position 3, block 1 to « t11» position 11, output "
        "· edge −0.200 logits · −10.0 % of Δℓ"
    )
    _, title = drawn.node("t4 at block 1")
    assert title == (
        "« t4» position 4 · block 1 (blocks.1.hook_resid_pre) "
        "· relevance +0.500 logits · +25.0 % of Δℓ"
    )
    assert len(drawn.edges) == 7
    assert len(drawn.nodes) == 8  # (0: 0, 3, 4, 11), (1: 3, 4, 11), final


def test_colour_is_sign_width_and_area_are_size() -> None:
    drawn = Drawn(graph_html(planted()))
    strong, _ = drawn.edge("from « t4» position 4, block 1 to « t11» position 11, output")
    weak, _ = drawn.edge("from « t3» position 3, block 1 to « t11» position 11, output")
    assert (strong["stroke"], weak["stroke"]) == (RED, BLUE)
    # Widths are linear, and neither the greyed token nor what stays sets the scale.
    assert float(strong["stroke-width"]) == 6.5
    assert float(weak["stroke-width"]) == pytest.approx(3.25, abs=0.01)
    giant, _ = drawn.edge("from «<s>»")
    assert giant["stroke-width"] == "6.5"
    big, small = drawn.node("t11 at output")[0], drawn.node("t4 at block 1")[0]
    assert (float(small["r"]) / float(big["r"])) ** 2 == pytest.approx(0.25, abs=0.02)
    assert big["fill"] == RED
    assert drawn.node("t3 at block 1")[0]["fill"] == BLUE
    assert "full at 2.000 logits" in drawn.text
    assert "full at 0.400 logits" in drawn.text


def test_tokens_run_across_and_sites_go_up() -> None:
    drawn = Drawn(graph_html(planted()))
    x = [float(drawn.node(f"t{i} at input")[0]["cx"]) for i in (3, 4, 11)]
    assert x == sorted(x)
    y = [float(drawn.node(f"t11 at {site}")[0]["cy"]) for site in ("input", "block 1", "output")]
    assert y == sorted(y, reverse=True)
    attrs, _ = drawn.edge("from « t4» position 4, block 1 to")
    start, end = drawn.node("t4 at block 1")[0], drawn.node("t11 at output")[0]
    numbers = re.findall(r"[\d.]+", attrs["d"])
    assert numbers[:2] == [start["cx"], start["cy"]]
    assert numbers[-2:] == [end["cx"], end["cy"]]
    first, second = attrs["data-e"].split()
    assert (start["data-n"], end["data-n"]) == (first, second)
    stays, _ = drawn.edge("from « t11» position 11, input")
    assert float(stays["stroke-opacity"]) < float(attrs["stroke-opacity"])


def test_positions_without_an_edge_have_no_column_and_are_counted() -> None:
    html = graph_html(planted())
    gaps = re.findall(r"⋯ (\d+ tokens?)", html)
    assert gaps == ["2 tokens", "6 tokens"]
    assert "positions 5 to 10: no edge here is drawn" in html
    assert re.findall(r'class="c" data-p="(\d+)"', html) == ["0", "3", "4", "11"]
    assert "7 edges between 8 hidden states, at 4 of 12 positions." in Drawn(html).text
    one = graph_html(planted([(1, 9, 2, 11, 1.0)], final_pos=11))
    assert re.findall(r"⋯ (\d+ tokens?)", one) == ["9 tokens", "1 token"]
    inner = graph_html(planted([(1, 0, 2, 1, 1.0)], final_pos=1))
    assert re.findall(r"⋯ (\d+ tokens?)", inner) == ["10 tokens"]


def test_of_too_many_edges_the_strongest_are_drawn_and_the_rest_counted() -> None:
    drawn = Drawn(graph_html(planted(), max_edges=3))
    values = [re.search(r"edge (\S+) logits", title)[1] for _, title in drawn.edges]  # type: ignore[index]
    assert sorted(values) == ["+1.500", "+1.500", "+50.000"]
    share = 100 * 53 / 54.0
    assert (
        f"The 3 strongest of 7 edges, which carry {share:.1f} % of Σ|weight|; "
        "4 weaker ones are not drawn" in drawn.text
    )


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0])), st.integers(1, 12))
def test_strongest_equals_a_slow_sort_with_ties_to_the_first(size: list[float], most: int) -> None:
    wanted = sorted(range(len(size)), key=lambda i: (-size[i], i))[:most]
    found = strongest(np.array(size), most).tolist()
    assert sorted(found) == sorted(wanted)
    assert [size[i] for i in found] == sorted(size[i] for i in found)


def test_edges_between_the_same_nodes_are_added_up() -> None:
    twice = [*PLANTED, (1, 3, 2, 11, 0.5)]
    drawn = Drawn(graph_html(planted(twice)))
    assert len(drawn.edges) == 7
    attrs, title = drawn.edge("from « t3» position 3, block 1")
    assert "+0.300 logits" in title
    assert attrs["stroke"] == RED


def test_a_graph_without_edges_still_shows_the_prediction() -> None:
    drawn = Drawn(graph_html(planted([])))
    assert (len(drawn.edges), len(drawn.nodes)) == (0, 1)
    assert "No edges: nothing is left" in drawn.text
    assert "Why « a» and not « b»?" in drawn.text
    assert "« a» rather than « b» Δℓ = +2.000" in drawn.text
    assert "Pruned by hand." in drawn.text


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"weight": [math.nan] * 7}, ValueError, "NaN or infinite"),
        ({"weight": [1.0]}, ValueError, "there are 1 weights"),
        ({"source_pos": [99] * 7}, ValueError, "source_pos holds 99 to 99"),
        ({"target_site": [0] * 7}, ValueError, "before its target site"),
        ({"source_site": np.zeros(7)}, ValueError, "not integers"),
        ({"final_pos": 12}, ValueError, "final_pos is 12"),
        ({"final_pos": -1}, ValueError, "final_pos is -1"),
        ({"str_tokens": ["a"]}, ValueError, "1 tokens, but values for 12"),
        ({"str_tokens": "abcdefghijkl"}, TypeError, "not one string"),
        ({"site_labels": ["a"]}, ValueError, "1 site_labels"),
        ({"greyed": [1] * 12}, ValueError, "one bool per token"),
        ({"delta": math.inf}, ValueError, "delta"),
    ],
)
def test_bad_views_are_named(changes: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        graph_picture(planted(**changes))


def test_bad_limits_are_named() -> None:
    with pytest.raises(ValueError, match="max_edges must be 1 or more"):
        graph_html(planted(), max_edges=0)


# ---- from a graph ----------------------------------------------------------------------------


@given(edge_lists())
def test_view_of_a_graph_draws_each_pair_of_nodes_once(case: Any) -> None:
    edges, sites, pos, split = case
    graph = made(edges, sites, pos, split=split)
    sums: dict[tuple[int, ...], float] = {}
    for t, s, j, i, _, _, weight in listed(graph):
        sums[s, i, t, j] = sums.get((s, i, t, j), 0.0) + weight
    view = view_of(graph)
    columns = (view.source_site, view.source_pos, view.target_site, view.target_pos)
    keys = zip(*(column.tolist() for column in columns), strict=True)
    assert dict(zip(keys, view.weight.tolist(), strict=True)) == sums
    drawn = Drawn(graph_html(view))
    assert len(drawn.edges) == len(sums)
    ends = {(s, i) for s, i, _, _ in sums} | {(t, j) for _, _, t, j in sums}
    assert len(drawn.nodes) == len(ends | {(sites - 1, pos - 1)})


def test_view_of_a_graph_says_what_was_dropped() -> None:
    edges = [(1, 0, 1, i, -1, 0, w) for i, w in enumerate([0.1, 3.0])]
    graph = made([*edges, (2, 1, 1, 1, -1, 0, 2.0)], 3, 2, node_threshold=0.01).prune(top_k=1)
    view = view_of(graph)
    assert view.greyed.tolist() == [True, False]
    assert list(view.site_labels) == ["input", "block 1 · in", "output"]
    text = Drawn(graph_html(view)).text
    assert "|relevance| ≤ 0.01 logits (0.50% of |Δℓ|)" in text
    assert f"Pruned by {graph.history[0]}." in text
    assert "2 of 3 edges" in text


def test_labels_of_sites() -> None:
    sites = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_mid", "blocks.7.hook_resid_post")
    assert site_labels(sites) == ["input", "block 0 · mid", "output"]
    assert site_labels(("blocks.3.hook_resid_pre", "odd")) == ["block 3 · in", "odd"]


# ---- matrices --------------------------------------------------------------------------------


def props(view: RenderedHTML) -> tuple[Any, Any]:
    found = re.search(r"\)\((\"circuits-vis-.*)\);$", view.script, re.DOTALL)
    assert found
    _, given_props, extra = json.loads(f"[{found[1]}]")
    return given_props, extra


def test_matrices_have_scales_of_their_own_without_diagonal_and_greyed() -> None:
    first = [[9.0, 0.0, 0.0], [5.0, 8.0, 0.0], [4.0, -0.25, 7.0]]
    second = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    arguments: Any = (["<s>", " a", " b"], [first, second], ["m0", "m1"])
    greyed = [True, False, False]
    given_props, extra = props(attention_matrices(*arguments, greyed=greyed))
    assert given_props["attention"] == [first, second]
    assert given_props["tokens"] == ["<s>", " a", " b"]
    assert given_props["maskUpperTri"] is True
    assert extra["scales"] == [0.25, 2.0]
    shared = attention_matrices(*arguments, greyed=greyed, scale="shared")
    assert props(shared)[1]["scales"] == [2.0, 2.0]
    both_ways = attention_matrices(["a", "b"], [[[0.0, 1.0], [0.0, 0.0]]], ["m"])
    assert props(both_ways)[0]["maskUpperTri"] is False


def test_of_many_positions_those_that_exchange_most_are_shown() -> None:
    matrix = np.eye(30) * 100
    matrix[20, 7], matrix[29, 20] = 3.0, -1.0
    view = attention_matrices([f"t{i}" for i in range(30)], matrix[None], ["m"], max_cells=9)
    given_props, _ = props(view)
    assert given_props["tokens"] == ["7:t7", "20:t20", "29:t29"]
    assert given_props["attention"] == [[[100.0, 0.0, 0.0], [3.0, 100.0, 0.0], [0.0, -1.0, 100.0]]]
    share = 100 * 304 / 3004
    assert (
        f"The 3 of 30 positions that exchange most relevance; their entries hold {share:.1f} %"
        in (view.body)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["a"], np.ones((1, 1, 2)), ["m"]), "must be square"),
        ((["a"], np.ones((1, 2, 2)), ["m"]), "1 tokens, but values for 2"),
        ((["a"], np.ones((1, 1, 1)), ["m", "n"]), "2 labels, but 1 matrices"),
        ((["a"], np.full((1, 1, 1), np.nan), ["m"]), "NaN or infinite"),
    ],
)
def test_bad_matrices_are_named(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention_matrices(*arguments)
    with pytest.raises(ValueError, match="'matrix' or 'shared'"):
        attention_matrices(["a"], np.ones((1, 1, 1)), ["m"], scale="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not fit into 40 cells"):
        attention_matrices(["a"] * 4, np.ones((30, 4, 4)), ["m"] * 30, max_cells=40)


SPLIT = [
    (1, 0, 1, 0, 0, 1, 0.5),
    (1, 0, 1, 0, 0, 2, -0.25),
    (1, 0, 2, 1, 3, 1, 2.0),
    (1, 0, 2, 2, -1, 0, 9.0),
    (2, 1, 2, 2, -1, 0, 4.0),
]


def test_matrices_of_a_graph_are_its_transitions() -> None:
    graph = made(SPLIT, 3, 3, split=True)
    view = matrices_of(graph)
    given_props, _ = props(view)
    assert given_props["attentionHeadNames"] == ["block 0"]
    assert given_props["attention"] == [graph.matrix(0, 1).tolist()]
    assert "1 transition(s) without an edge between positions left out" in view.body


def test_matrices_of_a_transition_are_its_heads() -> None:
    graph = made(SPLIT, 3, 3, split=True)
    given_props, _ = props(matrices_of(graph, (0, "blocks.1.hook_resid_pre")))
    assert given_props["attentionHeadNames"] == ["head 0", "head 3"]
    assert given_props["attention"] == [graph.matrix(0, 1, head=h).tolist() for h in (0, 3)]
    merged, _ = props(matrices_of(graph.merge_heads(), (0, 1)))
    assert merged["attention"] == [graph.matrix(0, 1).tolist()]
    with pytest.raises(ValueError, match="no transition"):
        matrices_of(graph, (0, 2))
    with pytest.raises(ValueError, match="no edge between two positions"):
        matrices_of(graph, (1, 2))


def test_matrices_of_a_long_prompt_keep_true_positions() -> None:
    edges = [(1, 0, 900, 40, -1, 0, 3.0), (1, 0, 1199, 900, -1, 0, -2.0)]
    edges += [(1, 0, i, i, -1, 0, 50.0) for i in range(1200)]
    edges += [(1, 0, i, 0, -1, 0, 0.001) for i in range(1, 1200)]
    view = matrices_of(made(sorted(edges), 2, 1200), max_cells=16)
    given_props, extra = props(view)
    assert given_props["tokens"] == ["0: t0", "40: t40", "900: t900", "1199: t1199"]
    dense = np.array(given_props["attention"][0])
    assert (dense[2, 1], dense[3, 2], dense[0, 0]) == (3.0, -2.0, 50.0)
    assert extra["scales"] == [3.0]
    share = 100 * 5.003 / (5 + 1.199)
    assert f"The 4 of 1,200 positions that exchange most relevance: {share:.1f} %" in view.body


# ---- no way out ------------------------------------------------------------------------------


def hostile() -> GraphView:
    n = len(HOSTILE)
    return GraphView(
        sites=[HOSTILE[1], HOSTILE[3], HOSTILE[5]],
        site_labels=[HOSTILE[2], HOSTILE[3], HOSTILE[14]],
        relevance=np.ones((3, n)),
        str_tokens=HOSTILE,
        greyed=None,
        source_site=[1] * n + [0] * n,
        source_pos=[*range(n), *range(n)],
        target_site=[2] * n + [1] * n,
        target_pos=[n - 1] * n + list(range(n)),
        weight=np.linspace(-1, 1, 2 * n),
        final_pos=n - 1,
        target=HOSTILE[1],
        contrast=HOSTILE[5],
        delta=0.0,
        objective=HOSTILE[3],
        rules=HOSTILE[2],
        model_name=HOSTILE[14],
        notes=[HOSTILE[1], HOSTILE[4], HOSTILE[14]],
    )


def hashes(html: str) -> list[str]:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    return [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]


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


@browser
def test_matrices_are_drawn_inert_each_on_its_own_scale(tmp_path: Path) -> None:
    tokens = [HOSTILE[1], HOSTILE[3], HOSTILE[5]]
    strong = [[0.0, 0.0, 0.0], [8.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    weak = [[0.0, 0.0, 0.0], [-0.001, 0.0, 0.0], [0.0, 0.0, 0.0]]
    view = attention_matrices(
        tokens, [strong, weak], [HOSTILE[1], "weak"], target=HOSTILE[1], contrast=HOSTILE[5]
    )
    # The middle of the cell (1, 0) in each thumbnail: a third is the width of a cell.
    probe = """(async () => {
      await new Promise((done) => setTimeout(done, 500));
      return [...document.querySelectorAll('canvas')].slice(0, 2).map((canvas) => [
        ...canvas.getContext('2d').getImageData(
          canvas.width / 6, canvas.height / 2, 1, 1).data].slice(0, 3));
    })()"""
    seen = visit(tmp_path, page([view], "t"), probe)
    assert not seen.pwned
    assert seen.requests == []
    assert seen.probe == [[245, 138, 114], [116, 179, 234]]
