"""What the package says of a model of the zoo, beside what the operation oracle says.

Run as a script it prints a line a family, whatever is expected of it:

    python tests/support/zoo_checks.py [names]
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from truth import zoo
from truth.op_oracle import OpOracle

import tl_contrastive_lrp as clrp
from support.grids import IS_FULL
from tl_contrastive_lrp.errors import UncoveredComponentError

TARGET, CONTRAST = 7, 12
TOKENS = zoo.random_tokens()
RULES = ("attnlrp", "cplrp", "relp", "gim", "gradient")
GRAPH_RULES = ("attnlrp", "cplrp", "gim")


def rules_of(name: str) -> tuple[str, ...]:
    """The rule sets one family is examined under: AttnLRP, and two others in turns.

    Every rule set meets half of the families or more, and each kind of component several of them;
    the graph is examined under AttnLRP and one of the others. ``TEST_GRIDS=full`` takes them all.
    """
    if IS_FULL:
        return RULES
    first, *others = RULES
    i = list(zoo.ROWS).index(name)
    return first, others[i % len(others)], others[(i + 1) % len(others)]


@dataclass
class Finding:
    """What came of one model: where it was refused, or how far off each number is.

    Attributes:
        refused: the refusal's message, for relevance at all; "" where it was given.
        graph_refused: the same for the graph.
        same_logits: whether the forward with rules on has the very same bits, by rule set.
        relevance: largest error at any site over the site's largest relevance, by (rules, site).
        edges: largest error over the transition's largest entry, by (rules, source site).
    """

    refused: str = ""
    graph_refused: str = ""
    same_logits: dict[str, bool] = field(default_factory=dict)
    relevance: dict[tuple[str, str], float] = field(default_factory=dict)
    edges: dict[tuple[str, str], float] = field(default_factory=dict)

    def level(self) -> str:
        """ "refused", "relevance" (but no graph), or "graph"."""
        if self.refused:
            return "refused"
        return "relevance" if self.graph_refused else "graph"


def seed_grad() -> Tensor:
    seed = torch.zeros(*TOKENS.shape, zoo.VOCAB, dtype=torch.float64)
    seed[0, -1, TARGET], seed[0, -1, CONTRAST] = 1.0, -1.0
    return seed


@functools.cache
def truth(name: str, rules: str) -> OpOracle:
    return OpOracle(zoo.hf_model(name), TOKENS, seed_grad(), rules)


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def examine(name: str) -> Finding:
    """Everything this test measures of one model."""
    model, found = zoo.boot(name), Finding()
    objective = clrp.logit_diff(model, TARGET, CONTRAST)
    with torch.no_grad():
        plain = None if zoo.ROWS[name].kind == "encoder-decoder" else model(TOKENS)
    for rules in rules_of(name):
        try:
            logits, relevance = clrp.run_with_relevance(model, TOKENS, objective, rules=rules)
        except UncoveredComponentError as refusal:
            found.refused = str(refusal)
            return found
        found.same_logits[rules] = torch.equal(logits, plain)
        true = truth(name, rules)
        for site, wanted in true.relevance.items():
            # "hook_embed" itself is the embedding's norm where the model has one
            name_here = "embed.hook_out" if site == "hook_embed" else site
            found.relevance[rules, site] = _off(relevance[name_here], wanted)
    for rules in (r for r in rules_of(name) if r in GRAPH_RULES):
        try:
            graph = clrp.attribution_graph(model, TOKENS, objective, rules=rules)
        except UncoveredComponentError as refusal:
            found.graph_refused = str(refusal)
            return found
        true = truth(name, rules)
        for source, target in zip(true.sites, true.sites[1:], strict=False):
            off = _off(graph.matrix(source, target), true.edges(source, target))
            found.edges[rules, source] = off
    return found


def _line(name: str) -> str:
    try:
        found = examine(name)
    except Exception as error:
        return f"{name}: {type(error).__name__}: {str(error)[:300]}"
    if found.refused:
        return f"{name}: refused: {found.refused[:200]}"
    worst = max(found.relevance, key=lambda key: found.relevance[key])
    text = f"{name}: relevance {found.relevance[worst]:.1e} at {worst}"
    if not all(found.same_logits.values()):
        text += f", LOGITS MOVED {found.same_logits}"
    if found.graph_refused:
        return text + f", graph refused: {found.graph_refused[:200]}"
    worst = max(found.edges, key=lambda key: found.edges[key])
    return text + f", edges {found.edges[worst]:.1e} at {worst}"


if __name__ == "__main__":
    import sys
    import warnings

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for row in sys.argv[1:] or [r.name for r in zoo.ROWS.values() if not r.unbootable]:
        print(_line(row), flush=True)
