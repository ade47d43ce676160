"""Pictures of results: the numbers in each are those of the result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.browser import browser, document, props, visit
from support.graphs import SPLIT, made
from truth.families import boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.graph.picture import matrices_of


@pytest.fixture(scope="module")
def result() -> clrp.Attribution:
    """A result whose special token outweighs all others, as it often does."""
    model = boot("gemma2", torch.float32)
    actual = clrp.attribute(model, "a b c d e f", target="a", contrast=" b")
    resid = actual.resid.clone()
    resid[:, 0] = 50.0
    return dataclasses.replace(actual, tokens=resid[0], resid=resid)


def near(actual: Any, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(torch.tensor(actual).float(), expected, rtol=1e-4, atol=1e-6))


def test_tokens_in_colour(result: clrp.Attribution) -> None:
    greyed = result.greyed
    assert greyed.sum() == 1
    _, given, *_ = props(result.show())
    assert len(given["tokens"]) == len(result.str_tokens)
    assert near(given["values"], result.tokens)
    assert given["maxValue"] == pytest.approx(float(result.tokens[~greyed].abs().max()), rel=1e-4)
    _, given, *_ = props(result.show(include_special=True))
    assert given["maxValue"] == pytest.approx(float(result.tokens.abs().max()), rel=1e-4)


def test_every_site_in_colour(result: clrp.Attribution) -> None:
    _, given, extra = props(result.show_layers())
    assert given["labels"] == list(result.sites)
    assert near(given["values"], result.resid.T)
    assert near(extra["scales"], result.resid[:, ~result.greyed].abs().amax(1))
    _, _, extra = props(result.show_layers(include_special=True))
    assert near(extra["scales"], result.resid.abs().amax(1))


def test_a_graph_in_layers_and_in_matrices(tmp_path: Path) -> None:
    graph = made(SPLIT, 3, 2, split=True)
    _, given, _ = props(graph.show_matrices())
    assert given["attention"] == [graph.matrix(*pair).tolist() for pair in graph.transitions]
    _, given, _ = props(graph.show_matrices((0, "blocks.1.hook_resid_pre")))
    assert given["attention"] == [graph.matrix(0, 1, head=head).tolist() for head in (0, 3)]
    page = graph.save_html(tmp_path / "graph.html").read_text(encoding="utf-8")
    for picture in (graph.show().body, page):
        assert picture.count("<path ") == len(graph.merge_heads().weight)


def test_matrices_of_some_positions_keep_the_parts_of_their_characters() -> None:
    """Which tokens share a character is known from the whole prompt, not from those shown."""
    texts = (" a", "你", "", "", " b", "é", "")
    edges = [(1, 0, 6, i, 0, 1, float(w)) for i, w in ((1, 5), (3, 4))]
    graph = made([*edges, (1, 0, 4, 2, 0, 1, 0.1)], 2, 7, split=True, str_tokens=texts)
    _, given, _ = props(matrices_of(graph, max_cells=9))
    assert given["tokens"] == ["1:你¹⁄₃", "3:你³⁄₃", "6:é²⁄₂"]


@browser
@pytest.mark.parametrize("final", [0, 1])
def test_the_words_above_a_narrow_picture_are_whole(tmp_path: Path, final: int) -> None:
    """A short prompt has few columns, and its title is longer than they are wide."""
    named = {"target": " a" * 12, "contrast": " b" * 12}
    graph = made([(1, 0, final, 0, -1, 0, 1.0)], 2, 2, final_pos=final, **named)
    body = document(graph.show()._repr_html_())
    seen = visit(
        tmp_path,
        body,
        """(() => {
            const text = [...document.querySelectorAll("svg text")].find(
                one => one.textContent.includes("rather than"));
            const inner = text.getBoundingClientRect();
            const outer = text.closest("svg").getBoundingClientRect();
            return [inner.left - outer.left, outer.right - inner.right, inner.width];
        })()""",
    ).probe
    assert min(seen[:2]) >= 0, seen
    assert seen[2] > 100


def test_no_target_s_logit_is_shown_of_a_function_that_has_none(tmp_path: Path) -> None:
    model = boot("gemma2", torch.float32)
    actual = clrp.attribute(model, "a b c d", lambda logits: logits[0, 1, 5] + logits[0, 2, 6])
    page = actual.save_html(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "logit of the target" not in page
    assert "difference Δℓ" in page
