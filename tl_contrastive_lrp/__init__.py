"""Why did the model write this wrong token and not that right one?

Contrastive Layer-wise Relevance Propagation for TransformerLens 4, after arXiv:2604.17761. See the
README for a first example; every public name is listed in ``__all__``.
"""

from .attribution import Attribution
from .context import coverage, lrp, lrp_hooks
from .coverage_table import Coverage
from .demo import DemoCase, load_demo_cases, load_demo_model
from .explain import attribute
from .graph import AttributionGraph
from .graph_build import attribution_graph
from .objective import (
    Objective,
    logit_diff,
    logit_minus_mean,
    logit_minus_top_k,
    next_token_table,
    target_logit,
    top_logit,
)
from .relevance import run_with_relevance
from .rulesets import RULE_SETS, RuleSet

__version__ = "0.1.0"

__all__ = [
    "RULE_SETS",
    "Attribution",
    "AttributionGraph",
    "Coverage",
    "DemoCase",
    "Objective",
    "RuleSet",
    "attribute",
    "attribution_graph",
    "coverage",
    "load_demo_cases",
    "load_demo_model",
    "logit_diff",
    "logit_minus_mean",
    "logit_minus_top_k",
    "lrp",
    "lrp_hooks",
    "next_token_table",
    "run_with_relevance",
    "target_logit",
    "top_logit",
]
