"""Transitions over several blocks where memory does not suffice for many signals at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from truth import families

import tl_contrastive_lrp as clrp


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
    ],
    ids=["cpu", "gpu", "python"],
)
def test_fewer_signals_at_once_where_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model, ids = families.boot("llama", torch.float32), torch.tensor([[1, 5, 6, 7, 5, 8]])
    options: dict[str, Any] = {"target": 5, "contrast": 6, "layers": [0], "progress": False}
    whole = clrp.attribution_graph(model, ids, **options)
    grad, refused = torch.autograd.grad, []

    def scarce(*arguments: Any, **settings: Any) -> Any:
        if settings.get("is_grads_batched") and len(arguments[2]) > 2:
            refused.append(len(arguments[2]))
            raise error
        return grad(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", scarce)
    graph = clrp.attribution_graph(model, ids, **options)
    assert refused
    torch.testing.assert_close(graph.weight, whole.weight)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = families.boot("llama", torch.float32), torch.tensor([[1, 5, 6, 7]])
    grad = torch.autograd.grad

    def broken(*arguments: Any, **settings: Any) -> Any:
        if settings.get("is_grads_batched"):
            raise RuntimeError("tensors share memory")
        return grad(*arguments, **settings)

    monkeypatch.setattr(torch.autograd, "grad", broken)
    with pytest.raises(RuntimeError, match="share memory"):
        clrp.attribution_graph(model, ids, target=5, contrast=6, layers=[0], progress=False)
