"""Lazy masks in place of transformers' own: the same masks, for one thread, and nothing is left."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils
from truth.families import boot, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine.masks import lazy_masks
from tl_contrastive_lrp.rules.visible import LazyMask

TABLE = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
PADDED = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])


def config() -> Any:
    made = LlamaConfig(sliding_window=3, attention_chunk_size=4, num_hidden_layers=1)
    made._attn_implementation = "eager"
    return made


def masks(kind: str, dtype: torch.dtype, padding: Tensor | None) -> Any:
    make = getattr(masking_utils, f"create_{kind}_mask")
    return make(config(), torch.zeros(2, 9, 4, dtype=dtype), padding, past_key_values=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, PADDED])
@pytest.mark.parametrize("kind", ["causal", "sliding_window_causal", "chunked_causal"])
def test_the_same_masks(kind: str, padding: Tensor | None, dtype: torch.dtype) -> None:
    expected = masks(kind, dtype, padding)
    with lazy_masks():
        mask = masks(kind, dtype, padding)
    assert isinstance(mask, LazyMask)
    assert not isinstance(expected, LazyMask)
    assert mask.shape == expected.shape
    assert mask.dtype == expected.dtype
    assert torch.equal(mask.made(), expected)
    for start in range(0, 9, 4):
        stop = min(start + 4, 9)
        assert torch.equal(mask.visible(start, stop), expected[:, :, start:stop] == 0)


def test_what_is_not_known_stays_transformers_own() -> None:
    with lazy_masks():
        bidirectional = masks("bidirectional", torch.float32, PADDED)
        overlaid = masking_utils.create_causal_mask(
            config(), torch.zeros(1, 5, 4), None, None, and_mask_function=lambda *at: at[-1] > 1
        )
    assert not isinstance(bidirectional, LazyMask)
    assert not isinstance(overlaid, LazyMask)


def test_only_in_the_thread_and_the_block() -> None:
    seen: list[Any] = []
    before = TABLE["eager"]
    with lazy_masks():
        with lazy_masks():
            pass
        thread = threading.Thread(target=lambda: seen.append(masks("causal", torch.float32, None)))
        thread.start()
        thread.join()
        seen.append(masks("causal", torch.float32, None))
    seen.append(masks("causal", torch.float32, None))
    assert [isinstance(mask, LazyMask) for mask in seen] == [False, True, False]
    assert TABLE["eager"] is before
    assert "eager" not in TABLE._local_mapping


def test_the_table_is_as_it_was_after_an_error_too() -> None:
    def own(*args: Any, **kwargs: Any) -> Any:
        return masking_utils.eager_mask(*args, **kwargs)

    TABLE["eager"] = own
    try:
        with pytest.raises(KeyboardInterrupt), lazy_masks():
            raise KeyboardInterrupt
        assert TABLE["eager"] is own
        with lazy_masks():
            TABLE["eager"] = masking_utils.eager_mask  # somebody changes it meanwhile
        assert TABLE["eager"] is masking_utils.eager_mask
    finally:
        del TABLE["eager"]


def test_two_threads_at_once() -> None:
    """Whoever leaves first takes nothing from the other."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lazy_masks():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with lazy_masks():
        leave.set()
        thread.join()
        assert isinstance(masks("causal", torch.float32, None), LazyMask)
    assert "eager" not in TABLE._local_mapping


def test_left_padding_and_the_models_own_forward() -> None:
    """A fused forward leaves the table alone, and padding is hidden as before."""
    model, ids = boot("qwen3"), random_tokens(1, 12)
    objective = clrp.logit_diff(model, 7, 11)
    with torch.no_grad():
        expected = model(ids)
    clrp.attribute(model, ids, objective, attention="fused")
    with torch.no_grad():
        assert torch.equal(model(ids), expected)
    assert "eager" not in TABLE._local_mapping
