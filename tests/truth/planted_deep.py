"""The eight-block model that was trained (``planted_deep_training.py``), and prompts that need it.

Prompts are a BOS, pairs of letters in any order, and the first letter of a chain a → b, b → c. Only
five tokens can tell the end of the chain: that letter, and the four of the chain's two pairs.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from truth.families import BOS
from truth.planted import Case, bridged
from truth.planted_deep_training import CHAINS, FIRST, LETTERS, LINKS, PAIRS, model

WEIGHTS = Path(__file__).with_suffix(".safetensors")


@functools.cache
def bridge(dtype: torch.dtype = torch.float32) -> Any:
    """The trained model as a TransformerBridge; one per session and dtype."""
    trained = model().to(dtype)
    weights = {name: p.to(dtype) for name, p in load_file(WEIGHTS).items()}
    trained.load_state_dict(weights, strict=True)
    return bridged(trained, "trained chains")


def case(seed: int) -> Case:
    """One prompt; the contrast is a letter that it does not hold."""
    generator = torch.Generator().manual_seed(3000 + seed)
    order = torch.randperm(LETTERS, generator=generator) + FIRST
    used = CHAINS * (LINKS + 1)
    chains = order[:used].view(CHAINS, LINKS + 1)  # the first is asked for
    pairs = torch.stack([chains[:, :-1].flatten(), chains[:, 1:].flatten()], 1)
    places = torch.randperm(PAIRS, generator=generator)
    last = 2 * PAIRS + 1
    tokens = torch.cat([torch.tensor([BOS]), pairs[places].flatten(), chains[0, :1]])
    target, contrast, free = int(chains[0, -1]), int(order[used]), order[used + 1 :]
    other = free[torch.randint(len(free), (len(tokens),), generator=generator)]
    other[0] = BOS
    asked = (places < LINKS).nonzero().flatten() * 2 + 1  # where the pairs of the chain begin
    truth = frozenset({*asked.tolist(), *(asked + 1).tolist(), last})
    return Case(tokens[None], other[None], target, contrast, truth, frozenset(), frozenset())
