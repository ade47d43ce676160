"""How rules are put on a component that delegates: by operation, while its own code runs."""

from __future__ import annotations

from typing import Any

import torch

from ...rules.rule_sets import RuleSet
from ..attachment import Attachment, gradient
from ..sites import Site, delegates_attention, operations_of
from .mode import OperationRules


def _summary(rule_set: RuleSet, attention: bool) -> str:
    if not attention:
        weights = "constant" if rule_set.softmax == "constant" else "gradient"
        return f"products {rule_set.gate}, router weights {weights}"
    return f"q·k {rule_set.qk}, softmax {rule_set.softmax}, pattern·v {rule_set.pattern_v}"


def attach_inside(site: Site, rule_set: RuleSet) -> Attachment:
    """The attachment of all rules inside a component that delegates."""
    attention = site.operation == "attention"
    rules_inside = (rule_set.norm, rule_set.activation, rule_set.gate, rule_set.qk)
    plain = {*rules_inside, rule_set.pattern_v, rule_set.softmax}
    if not attention and plain == {"gradient"}:
        return gradient(site, rule_set)
    heads = getattr(site.component.config, "n_heads", 1) if attention else 1
    mode = OperationRules(rule_set, attention=attention, heads=heads)
    live = {f"{site.path}.{name}": fns for name, fns in mode.live.items()} if attention else {}
    code = site.module if site.component is None else where_computed(site.component)
    own = code is site.component
    return Attachment(
        site,
        _summary(rule_set, attention),
        f"by operation inside {'it' if own else 'the wrapped module'}",
        scoped=lambda: mode.around(code),
        live=live,
    )


def where_computed(component: Any) -> torch.nn.Module:
    """The module whose code computes: the component itself, or what it delegates to."""
    delegates = operations_of(component) != ("attention",) or delegates_attention(component)
    code: torch.nn.Module = component.original_component if delegates else component
    return code
