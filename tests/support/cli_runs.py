"""What the tests of the command line share, beside the fixtures of ``cli_fixtures``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import AttributionGraph
from tl_contrastive_lrp.cli.errors import Code

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "ab a c b d"
USAGE, MODEL, TEXT, FILE = 2, 3, 4, 5  # exit codes
# Begins with BOS itself: a second one in front would change the prediction.
TEMPLATE = (
    "<bos>{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %} a{% endif %}"
)


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, "one line, one object"
        value: dict[str, Any] = json.loads(self.out)
        return value


Run = Callable[..., Ran]


def words(token: str) -> str:
    """``token`` with any run of white space standing for any other."""
    return re.sub(r"\s+", " ", token)


def typed_next(done: Ran) -> str:
    """The command that the candidate table ends with."""
    assert done.code == Code.PROMPT
    return done.out.split("type:\n\n", 1)[1].rstrip("\n")


def ids_of(done: Ran) -> list[int]:
    return [row["id"] for row in done.json["tokens"]]


def asked(folder: Path, *more: object) -> tuple[object, ...]:
    """Arguments of ``graph``."""
    return ("graph", "--model", folder, "--prompt", PROMPT, "--target", " a", "--contrast", " b",
            *more)  # fmt: skip


COLUMNS = ("source_site", "target_site", "source_pos", "target_pos", "weight")


def built(bridge: Any, **options: Any) -> AttributionGraph:
    """The full graph that ``asked`` is about, from the library."""
    return clrp.attribution_graph(bridge, PROMPT, target=" a", contrast=" b", **options)


def same(a: AttributionGraph, b: AttributionGraph) -> bool:
    return a.sites == b.sites and all(torch.equal(getattr(a, c), getattr(b, c)) for c in COLUMNS)


def keys(graph: AttributionGraph) -> dict[tuple[object, ...], float]:
    """Weight by ends, one edge at a time."""
    names = [n for n in graph.edges.columns if n != "weight"]
    rows = graph.edges.to_dict("records")
    return {tuple(row[n] for n in names): row["weight"] for row in rows}
