"""Rule sets as data: one rule for each kind of operation.

A rule set gives the rule of each kind of operation, never its location in a model
(``hooks/sites.py``). To make your own, change one of them:
``dataclasses.replace(RULE_SETS["attnlrp"], name="mine", ...)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

NormRule = Literal["ln", "gradient"]
ActivationRule = Literal["identity", "gradient"]
ProductRule = Literal["half", "gradient"]
SoftmaxRule = Literal["gradient", "constant", "temperature"]

_CHOICES = {
    "norm": get_args(NormRule),
    "activation": get_args(ActivationRule),
    "softcap": get_args(ActivationRule),
    "gate": get_args(ProductRule),
    "qk": get_args(ProductRule),
    "pattern_v": get_args(ProductRule),
    "softmax": get_args(SoftmaxRule),
}


@dataclass(frozen=True)
class RuleSet:
    """One rule for each kind of operation; linear maps always keep the ordinary gradient.

    Attributes:
        name: Name of the set in results and reports.
        norm: LayerNorm and RMSNorm, including query and key norms. "ln" holds the denominator
            fixed.
        activation: Elementwise activation functions. "identity" takes f(x)/x as the gradient.
        softcap: cap·tanh(x/cap), on attention scores and on the final logits.
        gate: The product activation(gate) ⊙ up of a gated MLP. "half" divides its relevance
            equally.
        qk: The product query·key.
        pattern_v: The product pattern·value.
        softmax: "constant" is the AH-rule; "temperature" takes the gradient at ``temperature``.
        temperature: Used by ``softmax="temperature"`` only.

    Raises:
        ValueError: A field holds no known rule, or two fields contradict each other.

    Example:
        >>> import dataclasses
        >>> attnlrp = clrp.RULE_SETS["attnlrp"]
        >>> mine = dataclasses.replace(attnlrp, name="mine", activation="gradient")
        >>> clrp.attribute(model, case.prompt, objective, rules=mine).rules
        'mine'
    """

    name: str
    norm: NormRule
    activation: ActivationRule
    softcap: ActivationRule
    gate: ProductRule
    qk: ProductRule
    pattern_v: ProductRule
    softmax: SoftmaxRule
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            choices = _CHOICES.get(field.name)
            value = getattr(self, field.name)
            if choices is not None and value not in choices:
                raise ValueError(
                    f"RuleSet {self.name!r}: {field.name}={value!r} is no rule; "
                    f"use one of {', '.join(map(repr, choices))}."
                )
        if self.softmax == "constant" and self.pattern_v == "half":
            raise ValueError(
                f"RuleSet {self.name!r}: softmax='constant' gives all relevance of pattern·value "
                "to the values, so pattern_v must be 'gradient'; 'half' would lose half of it."
            )
        number = isinstance(self.temperature, int | float) and 0 < self.temperature < math.inf
        if not number or (self.temperature != 1.0) != (self.softmax == "temperature"):
            raise ValueError(
                f"RuleSet {self.name!r}: temperature={self.temperature!r} with "
                f"softmax={self.softmax!r}; give a positive temperature other than 1 together "
                "with softmax='temperature', and leave it at 1.0 otherwise."
            )


RULE_SETS: dict[str, RuleSet] = {
    rule_set.name: rule_set
    for rule_set in (
        # arXiv:2402.05602
        RuleSet("attnlrp", "ln", "identity", "identity", "half", "half", "half", "gradient"),
        # arXiv:2202.07304, with the identity and half rules for operations that it does not cover.
        RuleSet("cplrp", "ln", "identity", "identity", "half", "gradient", "gradient", "constant"),
        # arXiv:2508.21258 as its code runs it (LN, identity, half); its table also names the
        # AH-rule for attention, which is "cplrp" here.
        RuleSet("relp", "ln", "identity", "identity", "half", "gradient", "gradient", "gradient"),
        # arXiv:2505.17630
        RuleSet(
            "gim", "ln", "gradient", "gradient", "half", "half", "half", "temperature",
            temperature=2.0,
        ),
        RuleSet(
            "gradient", "gradient", "gradient", "gradient", "gradient", "gradient", "gradient",
            "gradient",
        ),
    )
}  # fmt: skip

# The default rule set for attribution; docs/faithfulness.md gives the reasons. Estimates of
# patching have their own, "relp" (evaluation/patching).
DEFAULT_RULES: Final = "attnlrp"


def get_rule_set(rules: str | RuleSet) -> RuleSet:
    """The rule set of that name, or the given one.

    Args:
        rules: A name in ``RULE_SETS``, in any case, or a ``RuleSet``.

    Raises:
        ValueError: The name is not known.
        TypeError: ``rules`` is neither a name nor a ``RuleSet``.

    Example:
        >>> clrp.rules.get_rule_set("CPLRP").softmax
        'constant'
    """
    if isinstance(rules, RuleSet):
        return rules
    if not isinstance(rules, str):
        raise TypeError(f"rules must be a name or a RuleSet, got {type(rules).__name__}.")
    try:
        return RULE_SETS[rules.lower()]
    except KeyError:
        raise ValueError(
            f"rules={rules!r} is not known; use one of {', '.join(map(repr, RULE_SETS))}, "
            "or pass a RuleSet."
        ) from None
