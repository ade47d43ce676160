"""Graphs as circuitsvis' matrices: scales, what is left out of a long prompt, no injection."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from circuitsvis.utils.render import RenderedHTML
from support.browser import HOSTILE, browser, visit
from support.graphs import made

from tl_contrastive_lrp.graph.picture import matrices_of
from tl_contrastive_lrp.render import page
from tl_contrastive_lrp.render.graph.picture import attention_matrices


def props(view: RenderedHTML) -> tuple[Any, Any]:
    actual = re.search(r"\)\((\"circuits-vis-.*)\);$", view.script, re.DOTALL)
    assert actual
    _, given_props, extra = json.loads(f"[{actual[1]}]")
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
        f"The 3 of 30 positions that exchange the most relevance; their entries hold {share:.1f} %"
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
    assert f"The 4 of 1,200 positions that exchange the most relevance: {share:.1f} %" in view.body


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
