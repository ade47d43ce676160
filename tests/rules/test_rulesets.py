"""Rule sets as data: what the five hold, and what no set may hold."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.cli import options
from tl_contrastive_lrp.cli import retype as command
from tl_contrastive_lrp.cli.check import check_command
from tl_contrastive_lrp.cli.graph import graph_command
from tl_contrastive_lrp.cli.main import ExplainOptions, demo_command, explain_command
from tl_contrastive_lrp.rules.rule_sets import get_rule_set

# norm, activation, softcap, gate, q·k, pattern·v, softmax, temperature: the table of the papers
TABLE = {
    "attnlrp": ("ln", "identity", "identity", "half", "half", "half", "gradient", 1.0),
    "cplrp": ("ln", "identity", "identity", "half", None, "gradient", "constant", 1.0),
    "relp": ("ln", "identity", "identity", "half", "gradient", "gradient", "gradient", 1.0),
    "gim": ("ln", "gradient", "gradient", "half", "half", "half", "temperature", 2.0),
    "gradient": ("gradient",) * 7 + (1.0,),
}
FIELDS = ("norm", "activation", "softcap", "gate", "qk", "pattern_v", "softmax", "temperature")


def test_there_are_these_five() -> None:
    assert set(clrp.RULE_SETS) == set(TABLE)
    assert all(name == rules.name for name, rules in clrp.RULE_SETS.items())


@pytest.mark.parametrize("name", TABLE)
def test_each_holds_what_its_paper_says(name: str) -> None:
    for field, wanted in zip(FIELDS, TABLE[name], strict=True):
        if wanted is not None:  # q·k is never reached where the pattern is a constant
            assert getattr(clrp.RULE_SETS[name], field) == wanted, field


@pytest.mark.parametrize("name", ["attnlrp", "AttnLRP", "ATTNLRP"])
def test_names_in_any_case(name: str) -> None:
    assert get_rule_set(name) is clrp.RULE_SETS["attnlrp"]


@pytest.mark.parametrize("field", FIELDS[:-1])
@pytest.mark.parametrize("value", ["zero", "", None, 1, "LN"])
def test_unknown_rules_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"'mine'.*{field}={value!r}.*use one of"):
        dataclasses.replace(clrp.RULE_SETS["attnlrp"], name="mine", **{field: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax": "constant"},
        {"softmax": "temperature"},
        {"temperature": 2.0},
        {"softmax": "temperature", "temperature": 0.0},
        {"softmax": "temperature", "temperature": -1.0},
        {"softmax": "temperature", "temperature": float("nan")},
        {"softmax": "temperature", "temperature": float("inf")},
        {"softmax": "temperature", "temperature": "2"},
    ],
    ids=str,
)
def test_contradictions_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"temperature|pattern_v"):
        dataclasses.replace(clrp.RULE_SETS["attnlrp"], **changes)


def test_a_set_of_ones_own() -> None:
    mine = dataclasses.replace(
        clrp.RULE_SETS["attnlrp"], name="mine", softmax="constant", pattern_v="gradient"
    )
    assert get_rule_set(mine) is mine
    assert mine != clrp.RULE_SETS["attnlrp"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        mine.norm = "gradient"  # type: ignore[misc]


@pytest.mark.parametrize("rules", [None, 3, ("attnlrp",), b"attnlrp"], ids=repr)
def test_what_is_no_rule_set_is_refused(rules: Any) -> None:
    with pytest.raises(TypeError, match="RuleSet"):
        get_rule_set(rules)


@pytest.mark.parametrize("name", ["", "lrp", "attn-lrp", "epsilon"])
def test_unknown_names_are_refused_with_the_known(name: str) -> None:
    with pytest.raises(ValueError, match=r"attnlrp.*cplrp.*relp.*gim.*gradient"):
        get_rule_set(name)


# the default


def default_of(function: Callable[..., Any]) -> Any:
    return inspect.signature(function).parameters["rules"].default


@pytest.mark.parametrize(
    "function",
    [
        clrp.attribute,
        clrp.attribution_graph,
        clrp.coverage,
        clrp.lrp,
        clrp.lrp_hooks,
        clrp.run_with_relevance,
        clrp.verify,
    ],
)
def test_every_function_has_the_same_default(function: Callable[..., Any]) -> None:
    assert clrp.DEFAULT_RULES in clrp.RULE_SETS
    assert default_of(function) == clrp.DEFAULT_RULES


def test_the_command_line_spells_them_out_as_they_are() -> None:
    """It cannot import ``rulesets``, which needs torch, to answer --help."""
    assert {rules.value for rules in options.Rules} == set(clrp.RULE_SETS)
    commands = (explain_command, demo_command, graph_command, check_command)
    assert {default_of(one).value for one in commands} == {clrp.DEFAULT_RULES}
    typed = ExplainOptions(prompt="x", rules=options.Rules(clrp.DEFAULT_RULES))
    assert "--rules" not in command.retyped("explain", typed, "x", target=[], contrast=[])
