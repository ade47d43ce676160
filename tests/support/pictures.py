"""Graphs made up for the tests of pictures, and a parser that reads pictures back."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import torch

from support.browser import HOSTILE
from tl_contrastive_lrp.render.graph.picture import GraphView

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
