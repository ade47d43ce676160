"""Hooks of this package: in this thread only, and gone after the block."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.hooks.placement import embedding_leaves, own_hooks

NAME = "blocks.1.hook_in"


def look(tensor: Any, hook: Any) -> None:
    """A hook function that does nothing."""


@pytest.fixture(scope="module")
def model() -> TransformerBridge:
    return clrp.load_demo_model()


@pytest.fixture(scope="module")
def tokens(model: TransformerBridge) -> torch.Tensor:
    return model.to_tokens("def f(")


def test_they_act_in_this_thread_only(model: TransformerBridge, tokens: torch.Tensor) -> None:
    calls: list[str] = []

    def note(tensor: Any, hook: Any) -> None:  # noqa: ARG001
        calls.append(hook.name)

    with own_hooks(model, [(NAME, note)]):
        other = threading.Thread(target=model, args=(tokens,))
        other.start()
        other.join()
        assert calls == []
        model(tokens)
    model(tokens)
    assert calls == [NAME]


def test_an_exception_removes_them_and_no_others(model: TransformerBridge) -> None:
    point, level = model.hook_dict[NAME], model.context_level
    with model.hooks(fwd_hooks=[(NAME, look)]):
        users = list(point.fwd_hooks)
        with pytest.raises(ValueError, match="22 are"), own_hooks(model, [(NAME, look)]):
            int(f"{len(point.fwd_hooks)}{len(point._forward_hooks)} are not a number")
        assert point.fwd_hooks == users
        assert len(point._forward_hooks) == len(users)
    assert model.context_level == level


def test_a_hook_point_that_never_fires_is_refused(model: TransformerBridge) -> None:
    first = (NAME, look)
    for name, error in (("blocks.0.attn.hook_result", ValueError), ("no such point", KeyError)):
        with pytest.raises(error), own_hooks(model, [first, (name, look)]):
            pass
        assert not model.hook_dict[NAME].fwd_hooks


def test_the_graph_starts_at_changed_embeddings(
    model: TransformerBridge, tokens: torch.Tensor
) -> None:
    leaves: dict[str, torch.Tensor] = {}
    with own_hooks(model, embedding_leaves(model, leaves, lambda x: 2 * x)):
        logits = model(tokens)
    (leaf,) = leaves.values()
    assert leaf.is_leaf
    assert torch.equal(leaf, 2 * model.embed(tokens))
    assert torch.autograd.grad(logits[0, -1, 0], leaf)[0].shape == leaf.shape
