"""Why did the model write this wrong token and not that right one?

Contrastive Layer-wise Relevance Propagation for TransformerLens 4, after arXiv:2604.17761. See the
README for a first example; every public name is listed in ``__all__``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .attribution import (
        AnswerExplanations,
        AnswerRelevance,
        AnswerSide,
        Attribution,
        MapCheck,
        Trace,
        answer_table,
        attribute,
        attribute_each,
        explain_answer,
        next_token_table,
        run_with_relevance,
        trace_back,
    )
    from .demo import DemoCase, load_demo_cases, load_demo_model
    from .effects import TokenEffects, token_effects, token_effects_each
    from .evaluation import (
        CircuitCurve,
        CircuitFaithfulness,
        Comparison,
        FaithfulnessCurves,
        Verification,
        baseline_scores,
        circuit_curve,
        circuit_faithfulness,
        compare,
        faithfulness_curves,
        verify,
    )
    from .graph import AttributionGraph, attribution_graph, attribution_graphs
    from .hooks import Audit, Coverage, audit, coverage, lrp, lrp_hooks
    from .inputs import (
        AnswerDiff,
        ChatPrompt,
        Objective,
        Segment,
        SpanLogit,
        answer_diff,
        chat,
        logit_diff,
        logit_minus_mean,
        logit_minus_top_k,
        span_logit,
        target_logit,
        top_logit,
    )
    from .rules import DEFAULT_RULES, RULE_SETS, RuleSet, in_float32, model_lock

__version__ = "0.1.0"

__all__ = [
    "DEFAULT_RULES",
    "RULE_SETS",
    "AnswerDiff",
    "AnswerExplanations",
    "AnswerRelevance",
    "AnswerSide",
    "Attribution",
    "AttributionGraph",
    "Audit",
    "ChatPrompt",
    "CircuitCurve",
    "CircuitFaithfulness",
    "Comparison",
    "Coverage",
    "DemoCase",
    "FaithfulnessCurves",
    "MapCheck",
    "Objective",
    "RuleSet",
    "Segment",
    "SpanLogit",
    "TokenEffects",
    "Trace",
    "Verification",
    "answer_diff",
    "answer_table",
    "attribute",
    "attribute_each",
    "attribution_graph",
    "attribution_graphs",
    "audit",
    "baseline_scores",
    "chat",
    "circuit_curve",
    "circuit_faithfulness",
    "compare",
    "coverage",
    "explain_answer",
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
    "span_logit",
    "target_logit",
    "token_effects",
    "token_effects_each",
    "top_logit",
    "trace_back",
    "verify",
]

# Loaded at first use (PEP 562): the command line answers --help without importing torch.
_ROOMS = {
    "attribution": (
        "AnswerExplanations",
        "AnswerRelevance",
        "AnswerSide",
        "Attribution",
        "MapCheck",
        "Trace",
        "answer_table",
        "attribute",
        "attribute_each",
        "explain_answer",
        "next_token_table",
        "run_with_relevance",
        "trace_back",
    ),
    "demo": ("DemoCase", "load_demo_cases", "load_demo_model"),
    "effects": ("TokenEffects", "token_effects", "token_effects_each"),
    "evaluation": (
        "CircuitCurve",
        "CircuitFaithfulness",
        "Comparison",
        "FaithfulnessCurves",
        "Verification",
        "baseline_scores",
        "circuit_curve",
        "circuit_faithfulness",
        "compare",
        "faithfulness_curves",
        "verify",
    ),
    "graph": ("AttributionGraph", "attribution_graph", "attribution_graphs"),
    "hooks": ("Audit", "Coverage", "audit", "coverage", "lrp", "lrp_hooks"),
    "inputs": (
        "AnswerDiff",
        "ChatPrompt",
        "Objective",
        "Segment",
        "SpanLogit",
        "answer_diff",
        "chat",
        "logit_diff",
        "logit_minus_mean",
        "logit_minus_top_k",
        "span_logit",
        "target_logit",
        "top_logit",
    ),
    "rules": ("DEFAULT_RULES", "RULE_SETS", "RuleSet", "in_float32", "model_lock"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}
_SUBMODULES = {
    "demo": ".demo",
    "errors": ".errors",
    "faithfulness": ".evaluation.faithfulness",
    "patching": ".evaluation.patching",
    "rules": ".rules",
    "study": ".study",
}


def __getattr__(name: str) -> object:
    if name not in _SUBMODULES and name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .inputs.versions import require_transformer_lens

    require_transformer_lens()
    if name in _SUBMODULES:
        return import_module(_SUBMODULES[name], __name__)
    value = getattr(import_module(f".{_ROOM_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
