"""The rule sets: one rule for each kind of operation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """How relevance passes each kind of operation; ``"gradient"`` is the ordinary gradient.

    norm: ``"constant"``, the denominator is a constant (LN-rule).
    activation, softcap: ``"identity"``, the gradient of y = f(x) is f(x) / x.
    gate, query_key: ``"half"``, half the product rule to each factor.
    pattern_value: ``"half"``, or ``"value"``: all to the values, the pattern is a constant.
    softmax: ``"constant"``, nothing passes (AH-rule), or ``"hot"``: the Jacobian is taken at
        temperature 2 and without its factor 1/2 (GIM).
    """

    norm: str
    activation: str
    softcap: str
    gate: str
    query_key: str
    pattern_value: str
    softmax: str


RULE_SETS: dict[str, Rules] = {
    "attnlrp": Rules(
        norm="constant", activation="identity", softcap="identity",
        gate="half", query_key="half", pattern_value="half", softmax="gradient",
    ),
    "cplrp": Rules(
        norm="constant", activation="identity", softcap="identity",
        gate="half", query_key="half", pattern_value="value", softmax="constant",
    ),
    "relp": Rules(
        norm="constant", activation="identity", softcap="identity",
        gate="half", query_key="gradient", pattern_value="gradient", softmax="gradient",
    ),
    "gim": Rules(
        norm="constant", activation="gradient", softcap="gradient",
        gate="half", query_key="half", pattern_value="half", softmax="hot",
    ),
    "gradient": Rules(
        norm="gradient", activation="gradient", softcap="gradient",
        gate="gradient", query_key="gradient", pattern_value="gradient", softmax="gradient",
    ),
}  # fmt: skip


def resolve(rules: str | Rules) -> Rules:
    """A rule set by name, or as given. KeyError for an unknown name."""
    return RULE_SETS[rules] if isinstance(rules, str) else rules
