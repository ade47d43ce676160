"""``verify``: each check says ok where all is well, and finds the fault it is there to find."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from support.hooking import Snapshot, fresh
from torch import Tensor
from truth.families import ALL, FAMILIES, boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError, PromptError
from tl_contrastive_lrp.evaluation.verification import checks as verify_checks
from tl_contrastive_lrp.evaluation.verification.conservation import conservation_account
from tl_contrastive_lrp.evaluation.verification.verify import Verification, verify
from tl_contrastive_lrp.hooks.audit.audit import audit
from tl_contrastive_lrp.hooks.sites import ACTIVATIONS
from tl_contrastive_lrp.rules import functions as rules
from tl_contrastive_lrp.rules.precision import in_float32

NAMES = ["audit", "forward", "conservation", "gradient", "finite", "precision"]


def verdicts(v: Verification) -> dict[str, str]:
    return {c.name: c.verdict for c in v.checks}


@pytest.mark.parametrize("name", ALL)
def test_all_is_well_in_float32(name: str) -> None:
    v = verify(boot(name, torch.float32), random_tokens())
    assert [c.name for c in v.checks] == NAMES
    assert set(list(verdicts(v).values())[:-1]) == {"ok"}, str(v)
    assert v["precision"].verdict == "skipped"
    assert v.verdict == "ok"
    assert v["conservation"].figure < 1e-5
    assert v["gradient"].figure < 2e-3
    assert v["forward"].figure == v["audit"].figure == v["finite"].figure == 0


@pytest.mark.parametrize("rule_set", ["cplrp", "relp", "gim", "gradient"])
def test_any_rule_set(rule_set: str) -> None:
    v = verify(boot("gemma2", torch.float32), random_tokens(), rule_set)
    assert v.rules == rule_set
    assert v.verdict == "ok", str(v)


@pytest.mark.parametrize("folded", [False, True], ids=["no processing", "folded"])
def test_compatibility_mode(folded: bool) -> None:
    model = fresh("gpt2")
    model.enable_compatibility_mode(disable_warnings=True, no_processing=not folded)
    assert verify(model, random_tokens()).verdict == "ok"


def test_a_mixture_of_experts_with_constants_added_inside() -> None:
    """gpt_oss computes (up + 1) · glu, and has biases and sinks where no HookPoint is."""
    from truth import zoo

    model = zoo.boot("gpt_oss")
    account = conservation_account(model, zoo.random_tokens(), clrp.logit_diff(model, 7, 11))
    assert account.constants != 0
    assert account.biases != 0
    assert account.missing < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_account_agrees_with_the_ledger(name: str) -> None:
    model, ids = boot(name, torch.float64), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    account = conservation_account(model, ids, objective)
    ledger = clrp.attribute(model, ids, objective, rules="cplrp").ledger
    near = {"rel": 1e-5, "abs": 1e-6}
    assert account.delta == pytest.approx(ledger.delta, **near)
    assert account.tokens == pytest.approx(ledger.rows[0].total, **near)
    assert account.positions == pytest.approx(sum(r.positions for r in ledger.rows), **near)
    assert account.biases == pytest.approx(sum(r.biases for r in ledger.rows), **near)


# ---------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_low_precision_is_compared_with_float32(name: str, dtype: torch.dtype) -> None:
    model, ids = fresh(name, dtype), random_tokens()
    objective = clrp.logit_diff(model, 7, 11)
    v = verify(model, ids, objective=objective)
    assert set(list(verdicts(v).values())[:-1]) == {"ok"}, str(v)
    assert v["precision"].verdict in ("ok", "warning")
    low = clrp.attribute(model, ids, objective)
    with in_float32(model):
        exact = clrp.attribute(model, ids, objective)
    off = [
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip((low.tokens, *low.resid), (exact.tokens, *exact.resid), strict=True)
    ]
    assert v["precision"].figure == pytest.approx(max(off), rel=1e-3, abs=1e-6)
    assert f"{off[0]:.2%}" in v["precision"].says
    assert (v["precision"].verdict == "ok") == (max(off) <= 0.02)


def test_no_room_for_a_copy_is_said_and_nothing_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_checks, "free_bytes", lambda device: 1000)  # noqa: ARG005
    v = verify(fresh("llama", torch.bfloat16), random_tokens())
    assert v["gradient"].verdict == v["precision"].verdict == "skipped"
    assert "MiB free" in v["precision"].says
    assert v["conservation"].verdict == v["finite"].verdict == "ok"


def test_overflow_is_found() -> None:
    model = fresh("llama", torch.float16)
    with torch.no_grad():
        model.blocks[0].mlp.out.original_component.weight.mul_(3e4)
    v = verify(model, random_tokens())
    assert v["finite"].verdict == "failed"
    assert "float32" in v["finite"].says
    assert {v[name].verdict for name in NAMES if name != "finite"} == {"skipped"}
    assert v.verdict == "failed"


def test_underflow_is_found() -> None:
    model = fresh("llama", torch.float16)
    with torch.no_grad():  # what is this small in float16 has few bits, or none
        model.embed.original_component.weight.mul_(1e-7)
    assert verify(model, random_tokens())["finite"].verdict == "warning"


# ---------------------------------------------------------------- faults


def test_a_wrong_ratio_is_found_by_conservation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ACTIVATIONS, "SiLUActivation", lambda x: 1.02 * torch.sigmoid(x))
    v = verify(fresh("llama"), random_tokens())
    assert v["conservation"].verdict == "failed"
    assert v["audit"].verdict == v["forward"].verdict == v["gradient"].verdict == "ok"


def test_a_wrong_norm_is_found_by_conservation(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rules.weighted
    monkeypatch.setattr(rules, "weighted", lambda y, n, weight: honest(y, n, weight * 1.01))
    assert verify(fresh("qwen3"), random_tokens())["conservation"].verdict == "failed"


def test_a_rule_that_changes_values_is_found_by_the_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = rules.uniform
    monkeypatch.setattr(rules, "uniform", lambda x, factors=2: honest(x * (1 + 2e-7), factors))
    v = verify(fresh("llama"), random_tokens())
    assert v["forward"].verdict == "failed"
    assert "logits" in v["forward"].says or "blocks" in v["forward"].says


def test_a_model_that_is_not_reproducible_is_no_fault_of_the_rules() -> None:
    model = fresh("llama")
    wrapped = model.blocks[0].mlp.out.original_component
    honest = type(wrapped).forward
    wrapped.forward = MethodType(lambda s, x: honest(s, x) * (1 + 1e-3 * torch.rand(1)), wrapped)
    check = verify(model, random_tokens())["forward"]
    assert check.verdict == "warning"
    assert "run to run" in check.says


def test_what_the_model_detaches_is_found_by_finite_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tl_contrastive_lrp.hooks.audit.audit import Audit

    monkeypatch.setattr(verify_checks, "audit", lambda model: Audit((), {"Mul": 1}))  # noqa: ARG005
    monkeypatch.setattr("tl_contrastive_lrp.hooks.context.require_clean", lambda model: None)  # noqa: ARG005
    model = fresh("qwen2")
    wrapped = model.blocks[0].mlp.out.original_component
    honest = type(wrapped).forward
    wrapped.forward = MethodType(lambda self, x: honest(self, x.detach()), wrapped)
    v = verify(model, random_tokens())
    assert v["gradient"].verdict == "failed"
    assert "detaches" in v["gradient"].says
    assert v["forward"].verdict == "ok"


def test_a_model_that_is_refused_is_a_failed_check_and_no_error() -> None:
    from truth import zoo

    v = verify(zoo.boot("mamba"), zoo.random_tokens())
    assert v["audit"].verdict == v.verdict == "failed"
    assert v["audit"].figure > 0
    assert "blocks.0" in v["audit"].says
    assert {v[name].verdict for name in NAMES[1:]} == {"skipped"}


# ---------------------------------------------------------------- input, trace, words


def test_nothing_is_left_behind(snapshot: Snapshot) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = fresh("gpt2", dtype)
        model(random_tokens())
        before = snapshot(model)
        verify(model, random_tokens())
        assert snapshot(model) == before
        assert {p.dtype for p in model.original_model.parameters()} == {dtype}

        def objective(logits: Tensor) -> Tensor:  # noqa: ARG001
            raise KeyError("of the user's own")

        with pytest.raises(KeyError, match="own"):
            verify(model, random_tokens(), objective=objective)
        assert snapshot(model) == before


BAD: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda m: verify(m, torch.tensor([[]], dtype=torch.long)), PromptError, "empty"),
    (lambda m: verify(m, torch.tensor([[99]])), PromptError, "0..47"),
    (lambda m: verify(m, random_tokens(), "lrp"), ValueError, "attnlrp"),
    (lambda m: verify(m.original_model, random_tokens()), TypeError, "TransformerBridge"),
    (lambda m: torch.no_grad()(verify)(m, random_tokens()), ModelStateError, "gradients"),
]


@pytest.mark.parametrize(("call", "error", "words"), BAD)
def test_bad_input(call: Callable[[Any], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(boot("llama", torch.float32))


def test_it_reads_well() -> None:
    v = verify(boot("qwen2", torch.float32), random_tokens()[0])
    text = str(v)
    assert text.startswith(f"{v.model_name}: ok (float32, rules {clrp.DEFAULT_RULES}, 9 tokens")
    assert len(text.splitlines()) == 1 + len(NAMES)
    for check, line in zip(v.checks, text.splitlines()[1:], strict=True):
        assert line.split()[:2] == [check.name, check.verdict]
        assert line.endswith(".")
    frame = v.to_frame()
    assert list(frame["name"]) == NAMES
    assert list(frame.columns) == ["name", "verdict", "figure", "limit", "says"]
    with pytest.raises(KeyError):
        v["nothing"]
    worse = dataclasses.replace(v.checks[1], verdict="warning")
    assert dataclasses.replace(v, checks=(*v.checks, worse)).verdict == "warning"


def test_no_module_hides_a_public_function() -> None:
    """A submodule of the same name would replace it once imported."""
    from importlib import import_module

    import_module("tl_contrastive_lrp.hooks.context")
    import_module("tl_contrastive_lrp.cli.check")
    assert clrp.audit is audit
    assert clrp.verify is verify
