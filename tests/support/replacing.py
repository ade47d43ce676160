"""What tests of replaced tokens share: a prompt, what replaces it, and which models can do what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from truth import zoo

from support.zoo_expected import COVERED

N = 9
TOKENS = zoo.random_tokens(N)
OTHERS = zoo.random_tokens(N, seed=5)[0].clamp_min(4)
WAYS: dict[str, Tensor | None] = {"zero": None, "others": OTHERS}

# Keys are chosen by a product of their own, before the softmax.
FOLLOWED_NOT = {"glm_moe_dsa": "keys at once"}
WITHOUT_CACHE = ("openai_gpt",)
NOT_CAUSAL = ("bert", "roberta")
CAUSAL = [name for name in COVERED if name not in NOT_CAUSAL and name not in FOLLOWED_NOT]


def delta_of(logits: Tensor) -> Tensor:
    """Δℓ of two tokens after the last position."""
    return logits[0, -1, 7] - logits[0, -1, 12]


@contextmanager
def counted_forwards(model: Any) -> Iterator[list[float]]:
    """What is embedded in the block, one entry for each run, as forwards of ``TOKENS``."""
    runs: list[float] = []
    embedding = next(m for m in model.original_model.modules() if isinstance(m, nn.Embedding))
    handle = embedding.register_forward_hook(
        lambda _module, _given, found: runs.append(found.shape[:2].numel() / N)
    )
    try:
        yield runs
    finally:
        handle.remove()
