"""A small model with its failures, for trying the package offline.

The model is a Qwen3 of under a million parameters, trained from scratch on a generated
instruction benchmark (see ``data/MODEL_CARD.md``). ``load_demo_model`` boots it;
``load_demo_cases`` gives held-out prompts, with the token that the model writes, the token that it
should have preferred, and the prompt positions that decide between them.
"""

from __future__ import annotations

from .cases import KINDS, DemoCase, load_demo_cases
from .model import demo_dir, load_demo_model

__all__ = ["KINDS", "DemoCase", "demo_dir", "load_demo_cases", "load_demo_model"]
