"""The induction model that was trained (``planted_training.py``), and prompts that need it.

Prompts are a BOS, distinct letters and one of them again. Only three tokens can tell what comes
next: that letter, its earlier occurrence, and the letter after it.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from truth.families import BOS
from truth.planted import Case, bridged
from truth.planted_training import FIRST, LENGTH, LETTERS, model

WEIGHTS = Path(__file__).with_suffix(".safetensors")


@functools.cache
def bridge() -> Any:
    """The trained model as a TransformerBridge, float32; one per session."""
    trained = model()
    weights = {name: p.float() for name, p in load_file(WEIGHTS).items()}
    trained.load_state_dict(weights, strict=True)
    return bridged(trained, "trained induction")


def case(seed: int) -> Case:
    """One prompt; the contrast is a letter that it does not hold."""
    generator = torch.Generator().manual_seed(2000 + seed)
    order = torch.randperm(LETTERS, generator=generator) + FIRST
    where = int(torch.randint(1, LENGTH, (1,), generator=generator))  # not the last of them
    letters = order[:LENGTH]
    tokens = torch.cat([torch.tensor([BOS]), letters, letters[where - 1 : where]])
    target, contrast = int(letters[where]), int(order[LENGTH])
    free = order[LENGTH + 1 :]
    other = free[torch.randint(len(free), (len(tokens),), generator=generator)]
    other[0] = BOS
    truth = frozenset({where, where + 1, LENGTH + 1})
    return Case(tokens[None], other[None], target, contrast, truth, frozenset(), frozenset())
