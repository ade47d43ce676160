"""The audit of a model's graph: clean where every rule is on, and it names what is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.hooking import fresh
from torch import Tensor
from truth.families import ALL, FAMILIES, boot

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import UncoveredComponentError
from tl_contrastive_lrp.hooks.attach import Attachment, edit
from tl_contrastive_lrp.hooks.audit.audit import Audit, Finding, audit, examine, require_clean
from tl_contrastive_lrp.hooks.placement import attached, place
from tl_contrastive_lrp.hooks.user_hooks import as_own
from tl_contrastive_lrp.rules import functions as rules


def with_attachments(model: Any, attachments: tuple[Attachment, ...]) -> Audit:
    return examine(model, lambda: attached(model, attachments))


def placed(model: Any) -> tuple[Attachment, ...]:
    return place(model, "attnlrp")[0]


@pytest.mark.parametrize("name", ALL)
def test_every_family_is_clean(name: str) -> None:
    model = boot(name, torch.float32)
    report = audit(model)
    assert report.clean, str(report)
    n = model.cfg.n_layers
    # Two products in attention a layer, and its softmax: they were looked at.
    assert report.counts["Bmm"] == 2 * n
    assert report.counts["Softmax"] == n
    assert set(report.ordinary) == {(f"blocks.{i}.attn", "Softmax") for i in range(n)}
    require_clean(model)


def test_a_clean_twin_vouches_for_no_other_model() -> None:
    """Another model of the same classes and configuration is examined itself, block by block."""
    twin, model = fresh("qwen3"), fresh("qwen3")
    assert audit(twin).clean
    last = int(model.cfg.n_layers) - 1
    wrapped = model.blocks[last].mlp.original_component
    forward = wrapped.forward
    wrapped.forward = lambda x: torch.atan(forward(x))
    (finding,) = audit(model).findings
    assert (finding.component, finding.operation) == (f"blocks.{last}.mlp", "Atan")
    with pytest.raises(UncoveredComponentError, match=rf"blocks\.{last}\.mlp"):
        require_clean(model)
    assert audit(twin).clean


@pytest.mark.parametrize("name", FAMILIES)
def test_each_rule_that_is_missing_is_found_and_named(name: str) -> None:
    model = boot(name, torch.float32)
    all_of_them = placed(model)
    assert len(all_of_them) > 5 * model.cfg.n_layers
    for i, gone in enumerate(all_of_them):
        report = with_attachments(model, all_of_them[:i] + all_of_them[i + 1 :])
        if gone.site.operation == "softmax":  # its ordinary gradient is AttnLRP's rule
            assert report.clean
            continue
        # The final soft-cap runs in the wrapped model's own forward.
        where = "model" if gone.site.path == "unembed" else gone.site.path
        assert not report.clean, gone.site
        for f in report.findings:
            assert f.component == where or f.component.startswith(where + "."), (gone.site, f)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "gemma2"])
def test_with_no_rules_every_site_is_found(name: str) -> None:
    model = boot(name, torch.float32)
    report = examine(model, nullcontext)
    found = {f.component for f in report.findings}
    for a in placed(model):
        where = "model" if a.site.path == "unembed" else a.site.path
        assert any(c == where or c.startswith(where + ".") for c in found), a.site
    n = model.cfg.n_layers
    products = [f for f in report.findings if f.operation == "Bmm"]
    # Equal findings are one: query·key and pattern·value of a layer.
    assert {f.component for f in products} == {f"blocks.{i}.attn" for i in range(n)}


@pytest.mark.parametrize(
    ("point", "where"),
    [
        ("blocks.0.hook_out", "blocks.0"),
        ("blocks.1.mlp.hook_out", "blocks.1.mlp"),
        ("blocks.0.attn.q.hook_out", "blocks.0.attn.q"),
        ("blocks.1.attn.hook_attn_scores", "blocks.1.attn"),
        ("blocks.0.attn.o.hook_in", "blocks.0.attn.o"),
        ("blocks.0.ln2.hook_in", "blocks.0.ln2"),
        ("embed.hook_out", "embed"),
        ("unembed.hook_out", "unembed"),
    ],
)
def test_a_stray_halving_is_found(point: str, where: str) -> None:
    model = boot("qwen3", torch.float32)
    some = placed(model)
    more = Attachment(some[0].site, "half", "", ((point, edit(rules.uniform)),))
    report = with_attachments(model, (*some, more))
    assert {(f.component, f.operation) for f in report.findings} == {(where, "halving")}


class _Secret(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]  # noqa: ARG004
        return x * 1.0

    @staticmethod
    def backward(ctx, g):  # type: ignore[no-untyped-def]  # noqa: ARG004
        return g


def _relu_in_a_slice(x: Tensor) -> Tensor:
    x = x * 1.0
    x[..., :4].relu_()
    return x


INJECTED: dict[str, Callable[[Tensor], Tensor]] = {
    "Exp": torch.exp,
    "Mul": lambda x: x * x,
    "Pow": lambda x: x.pow(2),
    "Tanh": torch.tanh,
    "Silu": F.silu,
    "Softplus": F.softplus,
    "Relu": F.relu,
    "Clamp": lambda x: x.clamp(-1, 1),
    "Abs": torch.abs,
    "Div": lambda x: x / x.abs().amax(),
    "Bmm": lambda x: (x @ x.mT).softmax(-1) @ x,
    "NativeLayerNorm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "Round": torch.round,
    "CopySlices": _relu_in_a_slice,
    "Secret": _Secret.apply,
}


def test_a_sigmoid_is_a_gate_only_where_it_weighs_something() -> None:
    model = fresh("llama")
    for path, clean in (("attn.o", False), ("mlp.in", True)):
        parent, _, name = path.rpartition(".")
        wrapped = getattr(getattr(model.blocks[1], parent), name).original_component
        handle = wrapped.register_forward_hook(as_own(lambda *args: torch.sigmoid(args[-1])))
        report = examine(model, lambda: attached(model, placed(model)))
        handle.remove()
        where = (f"blocks.1.{path}", "Sigmoid")
        assert (where in report.ordinary) == clean
        assert (where in {(f.component, f.operation) for f in report.findings}) != clean


@pytest.mark.parametrize("inside", ["mlp.in", "attn.o", "attn.q"])
@pytest.mark.parametrize("operation", INJECTED)
def test_an_operation_hidden_in_a_wrapped_module_is_found(operation: str, inside: str) -> None:
    model = boot("llama", torch.float32)
    path = f"blocks.1.{inside}"
    module = model.blocks[1]
    for part in inside.split("."):
        module = getattr(module, part)
    wrapped = module.original_component
    clean, honest = audit(model), type(wrapped).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return INJECTED[operation](honest(self, x))

    wrapped.forward = MethodType(forward, wrapped)
    try:
        report = audit(model)  # the cached answer no longer holds
        with pytest.raises(UncoveredComponentError, match=rf"{path} \(Linear\): {operation}: "):
            require_clean(model)
        with pytest.raises(UncoveredComponentError), clrp.lrp(model):
            pass
    finally:
        del wrapped.forward
    assert operation in {f.operation for f in report.findings}
    assert {f.component for f in report.findings} == {path}
    assert {f.module_class for f in report.findings} == {"Linear"}
    assert audit(model) == clean


def _in_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = torch.zeros_like(x)
        hidden[..., :4] = x[..., :4]
    return x + hidden


CUT: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda x: x + torch.tanh(x.detach()),
    "data": lambda x: x * x.data.mean(),
    "setitem": _in_no_grad,
    "mean": lambda x: x / torch.no_grad()(torch.mean)(x),
}
NOT_CUT: dict[str, Callable[[Tensor], Tensor]] = {
    "unused": lambda x: (x.detach().exp(), x)[1],
    "shapes": lambda x: x + torch.ones_like(x) + x.new_zeros(1) + torch.ones(1).expand_as(x).to(x),
    "choice": lambda x: x * (x.detach() > 0) + x[..., torch.no_grad()(torch.argsort)(x[0, 0])],
}


@pytest.mark.parametrize("name", [*CUT, *NOT_CUT])
def test_what_a_model_hides_from_autograd_is_found_where_it_is_used(name: str) -> None:
    model = fresh("qwen2")
    wrapped = model.blocks[0].mlp.out.original_component
    honest = wrapped.forward
    wrapped.forward = lambda x: {**CUT, **NOT_CUT}[name](honest(x))
    findings = audit(model).findings
    if name in NOT_CUT:
        assert findings == ()
    else:
        (found,) = findings
        assert (found.component, found.operation) == ("blocks.0.mlp.out", name)
        assert "cuts its result off" in found.why
        with pytest.raises(UncoveredComponentError, match="cuts its result off"):
            require_clean(model)


def test_tokens_that_enter_a_second_time_are_found() -> None:
    model = fresh("llama")
    table = torch.nn.Embedding(model.cfg.d_vocab, model.cfg.d_model)
    wrapped = model.blocks[0].mlp.original_component
    wrapped.second = table.eval()
    ids: list[Tensor] = []
    handle = model.register_forward_pre_hook(as_own(lambda _, args: ids.append(args[0])))
    honest = wrapped.down_proj.original_component.forward
    wrapped.down_proj.original_component.forward = lambda x: honest(x) + table(ids[-1])
    report = audit(model)
    handle.remove()
    (found,) = report.findings
    assert (found.component, found.operation) == ("blocks.0.mlp.second", "input")
    assert "enter" in found.why


def test_a_mixture_of_experts_without_rules_is_found_at_its_experts_and_router() -> None:
    from truth import zoo

    model = zoo.boot("qwen3_moe")
    found = {f.component for f in examine(model, nullcontext).findings}
    for part in ("mlp.experts", "mlp.gate", "attn", "ln1", "ln2", "attn.q_norm"):
        assert {f"blocks.{i}.{part}" for i in range(2)} & found, part


# ---------------------------------------------------------------- in words


def test_findings_read_well() -> None:
    findings = tuple(Finding(f"blocks.{i}.mlp", "AMLP", "Exp", "it is bad") for i in (0, 1, 2, 5))
    report = Audit((*findings, Finding("model", "", "Mul", "two")), {"Exp": 4, "Mul": 7})
    assert str(report) == (
        "audit: 2 findings among 11 operations\n"
        "  blocks.0-2,5.mlp (AMLP): Exp: it is bad.\n"
        "  model: Mul: two."
    )
    assert list(report.to_frame().columns) == ["component", "module_class", "operation", "why"]
    assert len(report.to_frame()) == 5
    assert str(Audit((), {"Mul": 3})).startswith("audit: clean; each of 3 operations")
    assert list(Audit((), {}).to_frame().columns) == list(report.to_frame().columns)


def test_a_block_that_runs_twice_is_a_finding() -> None:
    model = fresh("llama")
    inner = model.original_model.model
    inner.layers.append(inner.layers[0])
    inner.config.num_hidden_layers = 3
    model.original_model.config.use_cache = inner.config.use_cache = False
    assert "it runs 2 times in one forward" in str(audit(model))
