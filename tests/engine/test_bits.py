"""Where the same bits are promised, the same operations get operands that lie in memory alike.

The bits themselves are compared in ``test_context.py``, ``test_zoo.py``, ``test_tiled_runs.py`` and
``test_tiled_killed.py``, on the one processor the tests run on. What is compared here decides them
on every processor; see ``memory_layout.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.memory_layout import ALIGNMENT, Call, is_within, layouts
from support.tiling import TILED
from truth import zoo
from truth.families import FAMILIES, boot, random_tokens
from truth.oracle import RULE_SETS

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.engine.tiled.tiles import laid_out

# Contractions, whose order of adding up is the kernel's own choice.
PRODUCTS = {
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "dot", "mv", "addmv", "convolution",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip


def products(calls: list[Call]) -> list[Call]:
    return [call for call in calls if call[0] in PRODUCTS]


def forward_of(model: Any) -> list[Call]:
    with layouts() as calls:
        model(random_tokens())
    return calls


@pytest.mark.parametrize("name", [*FAMILIES, "qwen3-bias", "zoo:phi3", "zoo:gpt_oss", "zoo:mpt"])
def test_the_forward_with_rules_computes_on_the_same_memory_layout(name: str) -> None:
    whole, _, row = name.rpartition(":")
    model = zoo.boot(row, torch.float32) if whole else boot(name, torch.float32)
    model(random_tokens())
    plain = forward_of(model)
    assert len(products(plain)) >= 10
    for rules in RULE_SETS:
        with clrp.lrp(model, rules):
            ruled = forward_of(model)
        assert products(plain) == products(ruled), rules
        assert set(plain) <= set(ruled), rules


def _rest_of(run: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Call]]:
    """A run's result, and all it computes from that block's backward to its end."""
    began = []
    with monkeypatch.context() as patched, layouts() as calls:
        layer = tiled_backward.Backward.layer

        def noted(self: Any, at: int) -> None:
            if at == block:
                began.append(len(calls))
            layer(self, at)

        patched.setattr(tiled_backward.Backward, "layer", noted)
        found = run()
    return found, calls[began[0] :]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["nodes", "fused nodes", "edges", "heads of two"])
def test_what_a_checkpoint_brings_back_lies_as_what_was_computed(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot(name, torch.float32), random_tokens(1, 20)
    asked = [clrp.logit_diff(model, 7, 11), clrp.logit_diff(model, 3, 5, pos=9)]
    more: dict[str, Any] = {"top_k": 30, "heads": kind != "edges"}
    folder = tmp_path / "run"

    def run() -> Any:
        how = {**TILED, "checkpoint_dir": folder}
        if kind.endswith("nodes"):
            attention: Any = "fused" if kind == "fused nodes" else "auto"
            return [clrp.attribute(model, ids, asked[0], attention=attention, **how)]
        if kind == "edges":
            return [clrp.attribution_graph(model, ids, asked[0], **more, **how)]
        return clrp.attribution_graphs(model, ids, asked, **more, **how)

    for block in range(int(model.cfg.n_layers) - 1):
        wanted, undisturbed = _rest_of(run, block, monkeypatch)
        for at in range(block + 1):
            (folder / f"block_{at}.safetensors").unlink()
        found, resumed = _rest_of(run, block, monkeypatch)
        assert products(undisturbed)
        assert not [name for name, *_ in undisturbed if "attention" in name], "kept, or written out"
        assert undisturbed == resumed
        for one, other in zip(wanted, found, strict=True):
            for part in ("resid", "heads") if kind.endswith("nodes") else ("relevance", "weight"):
                assert torch.equal(getattr(one, part), getattr(other, part)), part
        for path in folder.iterdir():
            path.unlink()


def test_laid_out_as_torch_lays_out_results() -> None:
    memory = torch.arange(100.0)
    for x in (memory[1:13].view(3, 4), memory[:12].view(3, 4).T, memory[5], memory[3:3]):
        for like in (None, torch.zeros((), dtype=torch.float64)):
            found = laid_out(x, like)
            assert torch.equal(found.to(x.dtype), x)
            assert found.dtype == (x if like is None else like).dtype
            assert found.is_contiguous()
            assert found.storage_offset() == 0
            assert found.data_ptr() % ALIGNMENT == 0
            assert found.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr()


def test_order_and_layout_are_seen() -> None:
    """What the comparisons above rest on."""
    a, b = torch.randn(4, 4), torch.randn(17)[1:].view(4, 4)

    def calls(*pairs: tuple[torch.Tensor, torch.Tensor]) -> list[Call]:
        with layouts() as found:
            for x, y in pairs:
                x @ y
        return found

    assert calls((a, a)) == calls((a, a))
    assert calls((a, a)) != calls((a, b))
    assert calls((a, a)) != calls((a, a.T))
    assert is_within(calls((a, b), (b, a)), calls((a, b), (a, a), (b, a)))
    assert not is_within(calls((a, b), (b, a)), calls((b, a), (a, b)))
