"""A picture of an attribution graph: tokens across, sites up.

It is inline SVG with a small script of its own, which needs neither circuitsvis' bundle nor the
network. In a long prompt the positions that matter least share columns (``folds.py``), and a search
box finds the column of any text of the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from markupsafe import Markup

from ..folds import LONG
from ..offline import PlainHTML, script_hash, source, templates
from ..text import inline_script, printable, script_json, signed, visible, visible_tokens
from . import marks
from .data import CheckedGraph, GraphView, checked
from .folds import MAX_POSITIONS, account, fold_positions, tops
from .layout import TOP, Layout, layout
from .matrices import attention_matrices

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MAX_EDGES",
    "MAX_POSITIONS",
    "GraphPicture",
    "GraphView",
    "attention_matrices",
    "graph_function",
    "graph_html",
    "graph_markup",
    "graph_picture",
    "graph_section",
    "section_script",
]

MAX_EDGES = 4000
_SECTION = "graph"  # the id of the element that holds the only picture of a page


class GraphPicture(PlainHTML):
    """A picture of a graph, whose script highlights what the pointer is on."""


def graph_picture(
    view: GraphView, *, max_edges: int = MAX_EDGES, max_positions: int = MAX_POSITIONS
) -> GraphPicture:
    """The graph as a layered picture: tokens across, sites up, the final node at the top.

    Red is positive relevance and supports the target, blue negative and supports the contrast. A
    node's area and an edge's width are linear in the magnitude of its relevance, in logits; edges
    that stay at their position are pale. Positions without an edge have no column, and a mark says
    how many are missing there. Every node and edge has a tooltip with its numbers.

    Args:
        view: The graph to draw; prune it first, because a full graph has too many edges to see.
        max_edges: The largest number of edges to draw; the strongest are drawn, and the picture
            says how many are left out.
        max_positions: How many positions, besides the final one, have a column each in a prompt
            of more than ``folds.LONG`` tokens. The others share columns, in which relevance and
            edges are added up, and the picture says so.

    Returns:
        An object that a notebook displays; its HTML is complete and requests nothing.

    Raises:
        ValueError: The view's shapes, indices or numbers do not fit, or ``max_edges`` or
            ``max_positions`` is below 1.
        TypeError: Its ``str_tokens`` is not a list of strings.
    """
    uid = f"graph-{uuid4().hex[:13]}"
    return GraphPicture(_body(view, max_edges, uid, max_positions), _script(uid))


def graph_html(
    view: GraphView, *, max_edges: int = MAX_EDGES, max_positions: int = MAX_POSITIONS
) -> str:
    """The same picture as one self-contained HTML page.

    All text is escaped, and the page's content security policy forbids every request and every
    script but its own. Arguments and errors are those of :func:`graph_picture`.
    """
    script = section_script()
    return (
        templates()
        .get_template("graph_page.html")
        .render(
            title=graph_title(view),
            objective=printable(view.objective),
            facts=[
                printable(view.model_name),
                f"rules: {printable(view.rules)}" if view.rules else "",
                f"{len(view.str_tokens):,} tokens",
            ],
            delta=signed(float(view.delta)),
            body=Markup(_body(view, max_edges, _SECTION, max_positions)),
            script=Markup(script),
            hash=Markup(script_hash(script)),
        )
    )


def graph_section(
    view: GraphView, *, max_edges: int = MAX_EDGES, max_positions: int = MAX_POSITIONS
) -> Markup:
    """The same picture as markup for a page that runs :func:`section_script` after it, once."""
    return Markup(_body(view, max_edges, _SECTION, max_positions))


def section_script() -> str:
    """The script for a :func:`graph_section`: always the same text, so that a page can hash it."""
    return _script(_SECTION)


def graph_markup(
    view: GraphView, uid: str, *, max_edges: int = MAX_EDGES, max_positions: int = MAX_POSITIONS
) -> Markup:
    """The same picture for a page of many pictures, each in an element with an id of its own.

    The page calls :func:`graph_function` with that id once the element is there.
    """
    return Markup(_body(view, max_edges, uid, max_positions))


def graph_function() -> str:
    """JavaScript of the function (id) that makes the picture in the element interactive."""
    return f"(uid)=>({source('graph.js').strip()})(uid,{source('find.js').strip()})"


def graph_title(view: GraphView) -> str:
    """The question that the picture answers: Why «target» and not «contrast»?"""
    if not view.target:
        several = len(view.earlier_final_pos)
        return f"Attribution graph of {'several predictions' if several else 'one prediction'}"
    contrast = f" and not {_quoted(view.contrast)}" if view.contrast else ""
    return f"Why {_quoted(view.target)}{contrast}?"


def _script(uid: str) -> str:
    find = source("find.js").strip()
    return inline_script(f"({source('graph.js').strip()})({script_json(uid)},{find});")


def _body(view: GraphView, max_edges: int, uid: str, max_positions: int) -> str:
    whole = checked(view)
    data = fold_positions(whole, max_positions)
    plan = layout(data, max_edges)
    names = [marks.short(printable(str(label)), 26) for label in view.site_labels]
    where = marks.places(data)
    labels = marks.labels(data, plan, where)
    gaps = marks.gaps(plan)
    final, below = plan.column[data.final_pos], plan.below + 4
    at_right = final > plan.width / 2
    # Labels slant by 60 degrees, down and to the left; leave room for those that reach farthest.
    reach = [(la["x"], marks.width(la["text"])) for la in labels]
    reach += [
        (gap.x, marks.width(words["words"])) for gap, words in zip(plan.gaps, gaps, strict=True)
    ]
    over = max(0.0, *(0.5 * length + 10 - x for x, length in reach))
    deep = 0.87 * max(length for _, length in reach) + 14
    side = 12 + max(marks.width(name) for name in names)
    # The words above the final node begin at its left in a narrow picture, and make it wider.
    final_words = _final_words(view, data)
    anchor, text_x = ("end", final + 12) if at_right else ("start", final - 12)
    right, room = plan.width + 16, 1.2 * marks.width(final_words)  # of 13 pixels, and bold
    if at_right and text_x - room < -over:
        anchor, text_x = "start", 4 - over
    if anchor == "start":
        right = max(right, text_x + room)
    return (
        templates()
        .get_template("graph.html")
        .render(
            uid=uid,
            up=marks.UP,
            down=marks.DOWN,
            target=_quoted(view.target) if view.target else "the target",
            contrast=_quoted(view.contrast) if view.contrast else "its alternatives",
            final_words=final_words,
            final={
                "x": marks.rounded(final),
                "y": marks.rounded(plan.row[-1]),
                "r": marks.rounded(plan.radius[-1] + 3.5),
                "anchor": anchor,
                "text_x": marks.rounded(text_x),
            },
            finals=[marks.rounded(plan.column[pos]) for pos in data.finals.tolist()],
            edges=marks.edges(data, plan, where, names),
            nodes=marks.nodes(data, plan, where, names, view.sites),
            labels=labels,
            gaps=gaps,
            rows=marks.rows(plan, names, view.sites),
            side=marks.rounded(side),
            side_end=marks.rounded(side - 4),
            from_x=marks.rounded(-over),
            box=marks.rounded(right + over),
            height=marks.rounded(below + deep),
            width=marks.rounded(plan.width),
            top=TOP - 14,
            below=marks.rounded(below),
            widest=signed(plan.widest)[1:],
            largest=signed(plan.largest)[1:],
            any_grey=bool(data.greyed[plan.node_pos].any()),
            any_several=bool((data.first != data.last).any()),
            count=_count(data, plan),
            notes=[account(whole, data), *(printable(str(note)) for note in view.notes)],
            search=_search(whole, view.str_tokens) if len(whole.tokens) > LONG else None,
            style=Markup(source("folded.css")),
        )
    )


def _search(data: CheckedGraph, str_tokens: Sequence[str]) -> dict[str, Any]:
    """The data for searching a long prompt's picture, and the most relevant positions."""
    sides = tops(data)
    return {
        "data": Markup(script_json({"tokens": visible_tokens(str_tokens)})),
        "tops": [
            [
                {
                    "pos": at,
                    "token": visible(data.tokens[at]),
                    "value": signed(float(data.relevance[0, at])),
                }
                for at in side
            ]
            for side in sides
        ],
    }


def _count(data: CheckedGraph, plan: Layout) -> str:
    """A sentence about the nodes and edges that the picture shows and leaves out."""
    drawn, nodes = len(plan.edges), len(plan.node_pos)
    words = f"{drawn:,} edge{'s' * (drawn != 1)} between {nodes:,} hidden state{'s' * (nodes != 1)}"
    apart = data.first == data.last
    shown = int((np.isfinite(plan.column) & apart).sum())
    where = f"at {shown:,} of {int(data.last[-1]) + 1:,} positions"
    if not apart.all():
        where += " and in columns of several"
    if not drawn:
        return "No edges: nothing is left of this graph but the prediction itself."
    if not plan.left_out:
        return f"{words}, {where}."
    return (
        f"The {drawn:,} strongest of {len(data.edges):,} edges, which carry "
        f"{100 * plan.mass:.1f} % of \u03a3|weight|; {plan.left_out:,} weaker ones are not drawn. "
        f"{nodes:,} hidden states {where}. Prune the graph to see all of what is left."
    )


def _final_words(view: GraphView, data: CheckedGraph) -> str:
    several = len(view.earlier_final_pos) + 1
    one = "the prediction" if several == 1 else f"the predictions at {several:,} positions"
    words = _quoted(view.target) if view.target else one
    if view.target and view.contrast:
        words += f" rather than {_quoted(view.contrast)}"
    return f"{words}   \u0394\u2113 = {signed(data.delta)}"


def _quoted(token: str) -> str:
    return f"\u00ab{marks.short(visible(token), 40)}\u00bb"
