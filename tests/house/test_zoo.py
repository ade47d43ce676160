"""Every family of the zoo is either right or refused; nothing in between.

Right: the logits with rules on are those without, bit for bit; relevance at the embedding, at
every block's input and at the last block's output, and the graph's edges between blocks, are those
of the operation oracle (``op_oracle.py``, float64, on Hugging Face's own forward), to 1e-5 of the
largest of their kind, under AttnLRP and two more rule sets in turns (``rules_of``). Refused:
``UncoveredComponentError`` that names the component. What is expected of each is
written down here, so that no change passes unnoticed.
"""

from __future__ import annotations

import pytest
import torch
from support.zoo_checks import TOKENS, Finding, examine, truth
from support.zoo_expected import COVERED, NO_GRAPH, REFUSED
from truth import zoo
from truth.rounding import PROMISED

ROWS = [row for row in zoo.ROWS.values() if not row.unbootable]
LIMIT = PROMISED[torch.float32]

# To be covered; refused until then: name -> what the refusal names.
PENDING: dict[str, str] = {}

# Neither right nor refused yet: name -> what is wrong.
WRONG: dict[str, str] = {
    "falcon-new-mha": "TransformerLens computes other logits than Hugging Face, unsaid",
}


def test_every_row_has_one_expectation() -> None:
    tables = [COVERED, NO_GRAPH, REFUSED, PENDING, WRONG]
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(row.name for row in ROWS)


def assert_right(found: Finding) -> None:
    """Whatever numbers the package gave are the oracle's."""
    moved = [rules for rules, same in found.same_logits.items() if not same]
    assert not moved, f"the rules change the logits: {moved}"
    errors = {**found.relevance, **{("edges", *key): e for key, e in found.edges.items()}}
    worst = max(errors, key=lambda key: errors[key])
    assert errors[worst] <= LIMIT, (worst, errors[worst])


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.name not in WRONG])
def test_right_or_refused(name: str) -> None:
    found = examine(name)
    if not found.refused:
        assert_right(found)
    refusal = found.refused or found.graph_refused
    if name in COVERED:
        assert not refusal
    elif name in NO_GRAPH:
        assert not found.refused
        assert found.graph_refused, "its graph is covered now"
        assert NO_GRAPH[name] in refusal
    elif name in REFUSED:
        assert found.refused, "it is covered now"
        assert REFUSED[name] in refusal
    elif refusal:
        assert PENDING[name] in refusal
        pytest.xfail(f"pending: {refusal}")


@pytest.mark.parametrize("name", sorted(WRONG))
def test_known_to_be_wrong(name: str) -> None:
    try:
        found = examine(name)
        if not found.refused:
            assert_right(found)
    except Exception as error:
        pytest.xfail(f"{WRONG[name]}: {error}")


@pytest.mark.parametrize("row", [row for row in ROWS if row.kind != "encoder-decoder"],
                         ids=lambda row: row.name)  # fmt: skip
def test_the_bridge_computes_the_hugging_face_model(row: zoo.Row) -> None:
    """Else the oracle would be the truth of another model."""
    with torch.no_grad():
        wanted = zoo.hf_model(row.name, torch.float32)(TOKENS).logits
        off = (zoo.boot(row.name)(TOKENS) - wanted).abs().max() / wanted.abs().max()
    assert bool(off > 0.1) if row.differs else bool(off < 1e-5)
    if row.name in COVERED or row.name in NO_GRAPH:
        oracle = truth(row.name, "attnlrp").logits
        assert (oracle - wanted).abs().max() / wanted.abs().max() < 1e-5


@pytest.mark.parametrize("row", [row for row in zoo.ROWS.values() if row.unbootable],
                         ids=lambda row: row.name)  # fmt: skip
def test_what_transformer_lens_does_not_boot(row: zoo.Row) -> None:
    with pytest.raises((ValueError, RuntimeError, AssertionError), match=row.unbootable):
        zoo.boot(row.name)
