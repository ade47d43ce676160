"""Pictures of graphs: the numbers they show, and what they say they leave out."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
from support.graphs import edge_lists, given, listed, made
from support.pictures import BLUE, PLANTED, RED, Drawn, planted

from tl_contrastive_lrp.graph.picture import site_labels, view_of
from tl_contrastive_lrp.render.graph.picture import graph_html, graph_picture

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
