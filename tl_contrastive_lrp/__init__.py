"""Why did the model write this wrong token and not that right one?

Contrastive Layer-wise Relevance Propagation for TransformerLens 4, after arXiv:2604.17761. See the
README for a first example; every public name is listed in ``__all__``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attribution.attribute import attribute
    from .attribution.candidates import next_token_table
    from .attribution.relevance_cache import run_with_relevance
    from .attribution.result import Attribution
    from .demo import DemoCase, load_demo_cases, load_demo_model
    from .evaluation.circuits.faithfulness import circuit_curve, circuit_faithfulness
    from .evaluation.circuits.results import CircuitCurve, CircuitFaithfulness
    from .evaluation.comparison.compare import Comparison, compare
    from .evaluation.faithfulness import FaithfulnessCurves, baseline_scores, faithfulness_curves
    from .evaluation.verification.verify import Verification, verify
    from .graph.assembly.attribution_graph import attribution_graph
    from .graph.data import AttributionGraph
    from .hooks.audit.audit import Audit, audit
    from .hooks.context import coverage, lrp, lrp_hooks
    from .hooks.coverage import Coverage
    from .inputs.objective import (
        Objective,
        logit_diff,
        logit_minus_mean,
        logit_minus_top_k,
        target_logit,
        top_logit,
    )
    from .rules.precision import in_float32
    from .rules.rule_sets import DEFAULT_RULES, RULE_SETS, RuleSet
    from .rules.threads import model_lock

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RULES",
    "RULE_SETS",
    "Attribution",
    "AttributionGraph",
    "Audit",
    "CircuitCurve",
    "CircuitFaithfulness",
    "Comparison",
    "Coverage",
    "DemoCase",
    "FaithfulnessCurves",
    "Objective",
    "RuleSet",
    "Verification",
    "attribute",
    "attribution_graph",
    "audit",
    "baseline_scores",
    "circuit_curve",
    "circuit_faithfulness",
    "compare",
    "coverage",
    "faithfulness_curves",
    "in_float32",
    "load_demo_cases",
    "load_demo_model",
    "logit_diff",
    "logit_minus_mean",
    "logit_minus_top_k",
    "lrp",
    "lrp_hooks",
    "model_lock",
    "next_token_table",
    "run_with_relevance",
    "target_logit",
    "top_logit",
    "verify",
]

# Loaded at first use (PEP 562): the command line answers --help without importing torch.
_ROOMS = {
    "attribution": ("Attribution",),
    "audit_model": ("Audit", "audit"),
    "candidates": ("next_token_table",),
    "circuit_results": ("CircuitCurve", "CircuitFaithfulness"),
    "circuits": ("circuit_curve", "circuit_faithfulness"),
    "comparison": ("Comparison", "compare"),
    "context": ("coverage", "lrp", "lrp_hooks"),
    "coverage_table": ("Coverage",),
    "demo": ("DemoCase", "load_demo_cases", "load_demo_model"),
    "explain": ("attribute",),
    "faithfulness": ("FaithfulnessCurves", "baseline_scores", "faithfulness_curves"),
    "graph": ("AttributionGraph",),
    "graph_build": ("attribution_graph",),
    "objective": (
        "Objective",
        "logit_diff",
        "logit_minus_mean",
        "logit_minus_top_k",
        "target_logit",
        "top_logit",
    ),
    "precision": ("in_float32",),
    "relevance": ("run_with_relevance",),
    "rulesets": ("DEFAULT_RULES", "RULE_SETS", "RuleSet"),
    "threads": ("model_lock",),
    "verification": ("Verification", "verify"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_SUBMODULES = ("demo", "errors", "faithfulness", "patching", "rules")


def __getattr__(name: str) -> object:
    if name not in _SUBMODULES and name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .inputs.versions import require_transformer_lens

    require_transformer_lens()
    if name in _SUBMODULES:
        return import_module(f".{name}", __name__)
    value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
