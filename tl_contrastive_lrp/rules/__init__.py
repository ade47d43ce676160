"""Propagation rules for single kinds of operation, as functions whose forward changes nothing.

``functions`` has the rules of products, norms and activations, ``softmax`` and ``softcap`` those of
attention, ``activations`` the ratios f(x)/x in closed form, and ``rule_sets`` named combinations of
rules. ``precision`` keeps the backward of a bfloat16 or float16 model in float32, and ``threads``
restricts rules and readings to the thread that attached them.
"""

from __future__ import annotations

from .functions import (
    at_least_float32,
    constant,
    gated_product,
    identity,
    linear_norm,
    norm_scale,
    normalized_of,
    ordinary,
    scale_gradient,
    uniform,
    weighted,
)
from .precision import in_float32
from .rule_sets import DEFAULT_RULES, RULE_SETS, RuleSet, get_rule_set
from .threads import model_lock

__all__ = [
    "DEFAULT_RULES",
    "RULE_SETS",
    "RuleSet",
    "at_least_float32",
    "constant",
    "gated_product",
    "get_rule_set",
    "identity",
    "in_float32",
    "linear_norm",
    "model_lock",
    "norm_scale",
    "normalized_of",
    "ordinary",
    "scale_gradient",
    "uniform",
    "weighted",
]
