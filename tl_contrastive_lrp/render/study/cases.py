"""One case of a study as data that a page unpacks when the case is opened.

A page of 300 cases would be too large and slow with every heatmap and graph in its markup. So each
case is one JSON text, compressed (zlib) and in base64; the page's script inflates it with the
browser's own ``DecompressionStream`` and draws it. Tokens are put in as text, never as markup; a
graph's markup is that of ``render/graph``, which escapes all text.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..graph.picture import GraphView, graph_function, graph_markup
from ..offline import source
from ..scale import as_array, as_mask, check_tokens, colours, span
from ..text import printable, script_json, visible, visible_tokens

# Steps of the colour scale on either side of zero.
_STEPS = 100
# Relevance is sent in thousandths of the largest.
_UNITS = 1000


@dataclass(frozen=True, eq=False)
class CaseView:
    """A case to draw.

    Attributes:
        id: The case's name.
        benchmark: The benchmark's name.
        model: The model's name.
        target: The wrong token that was written.
        contrast: The right token.
        delta: Δℓ in logits.
        str_tokens: The tokens as text, ``[pos]``.
        greyed: One bool per token: special tokens and the first one.
        relevant: One bool per token: the tokens that should decide, underlined; None if unknown.
        relevance: Relevance in logits, ``[pos]``, by rule set; the first is shown first.
        answer_from: Position of the first token that the model wrote.
        segments: Rows of the table of segment sums: segment, tokens, relevance, normalised.
        facts: Name and words of what else is known: completion, reference, verdict.
        graph: The graph, pruned; None without.
        automatic: The automatic label: "outcome", "pattern" and "note"; None without.
        checks: What replacing tokens says of the relevance, by rule set: the verdict, a sentence
            that begins with it, and figures in words.
    """

    id: str
    benchmark: str
    model: str
    target: str
    contrast: str
    delta: float
    str_tokens: Sequence[str]
    greyed: Any
    relevant: Any
    relevance: Mapping[str, Any]
    answer_from: int
    segments: Sequence[Mapping[str, Any]] = ()
    facts: Sequence[tuple[str, str]] = ()
    graph: GraphView | None = None
    automatic: Mapping[str, Any] | None = field(default=None)
    checks: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)


def case_data(view: CaseView, number: int, *, max_edges: int = 150) -> dict[str, Any]:
    """What the page's script draws a case from, as data for JSON.

    Args:
        view: The case.
        number: Its number on the page, for the id of its graph.
        max_edges: The largest number of edges of its graph; the strongest are drawn.

    Raises:
        ValueError: Lengths differ, or a number is NaN or infinite.
        TypeError: ``str_tokens`` is not a list of strings.
    """
    n = len(view.str_tokens)
    tokens = check_tokens(view.str_tokens, n)
    greyed = as_mask(view.greyed, n)
    rows = {}
    for rules, values in view.relevance.items():
        array = as_array(values, 1, f"relevance under {rules}")
        if len(array) != n:
            raise ValueError(f"{len(array)} relevances under {rules} for {n} tokens")
        full = float(span(array, greyed))
        rows[printable(rules)] = {
            "full": float(f"{full:.6g}"),
            "values": np.rint(array / full * _UNITS).astype(int).tolist(),
        }
    uid = f"graph-{number}"
    graph = view.graph and str(graph_markup(view.graph, uid, max_edges=max_edges))
    return {
        "target": visible(view.target),
        "contrast": visible(view.contrast),
        "model": printable(view.model),
        "delta": float(view.delta),
        "tokens": visible_tokens(tokens),
        "lines": [i for i, token in enumerate(tokens) if "\n" in token],
        "greyed": np.flatnonzero(greyed).tolist(),
        "relevant": []
        if view.relevant is None
        else np.flatnonzero(as_mask(view.relevant, n)).tolist(),
        "answer": int(view.answer_from),
        "rows": rows,
        "segments": [
            [printable(str(row["segment"])), row["tokens"], row["relevance"], row["normalised"]]
            for row in view.segments
        ],
        "facts": [[printable(name), printable(words)] for name, words in view.facts],
        "graph": graph,
        "uid": uid,
        "checks": {
            printable(rules): [printable(words) for words in check]
            for rules, check in view.checks.items()
        },
        "automatic": None
        if view.automatic is None
        else {key: value and printable(str(value)) for key, value in view.automatic.items()},
    }


def packed(value: Any) -> str:
    """JSON, compressed, in base64: text that no parser of markup takes for anything else."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def case_script() -> str:
    """JavaScript of the object with ``inflate`` and ``draw`` for packed cases."""
    backs, whites = colours(np.arange(-_STEPS, _STEPS + 1) / _STEPS)
    looks = script_json({"backs": backs, "whites": [int(white) for white in whites]})
    return f"({source('study_case.js').strip()})({looks},{graph_function()})"
