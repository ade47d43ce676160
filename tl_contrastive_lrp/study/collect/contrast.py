"""What should have been written instead: the contrast token, in the order of the paper.

- "own": among the model's ten most probable tokens, the most probable other one whose substitution
  and greedy rollout pass the checker.
- "sibling": the same among a stronger sibling's ten, for each sibling in turn. The rollout is the
  base model's own.
- "given": the token that the item carries (``row["contrast_id"]``), or that a benchmark with
  planted truth knows (its method ``right_text``). Nothing is checked.

The target itself must be the model's first choice; ``collect`` checks that before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .generate import Greedy
from .place import Failure

CONTRASTS = ("own", "sibling", "given")


def find_contrast(
    failure: Failure,
    position: int,
    logits: Float[Tensor, " vocab"],
    order: Sequence[str],
    top_k: int,
    siblings: Mapping[str, Greedy],
) -> tuple[int, str] | None:
    """The contrast token of a located failure.

    Args:
        failure: The failure.
        position: Index of its first wrong token.
        logits: The model's logits there.
        order: Which of ``CONTRASTS`` to try, in turn.
        top_k: How many of a model's most probable tokens are candidates, the target included.
        siblings: Stronger models of the same tokenizer, by name.

    Returns:
        The token and where it is from, or None.
    """
    target = failure.completion.ids[position]
    for source in order:
        if source == "own":
            token = _first_passing(failure, position, logits, target, top_k)
            if token is not None:
                return token, f"own top {top_k}"
        elif source == "sibling":
            for name, sibling in siblings.items():
                before = failure.completion.ids[:position]
                theirs = sibling.read(failure.completion.prompt_ids, before).logits[-1]
                token = _first_passing(failure, position, theirs, target, top_k)
                if token is not None:
                    return token, f"sibling {name}"
        else:
            token = _given(failure, position)
            if token is not None and token != target and 0 <= token < len(logits):
                return token, "given"
    return None


def _first_passing(
    failure: Failure, position: int, logits: Tensor, target: int, top_k: int
) -> int | None:
    tokens = torch.topk(logits, min(top_k, logits.shape[0])).indices.tolist()
    others = [token for token in tokens if token != target]
    passed = failure.passes([(position, token) for token in others])
    return next((t for t, ok in zip(others, passed, strict=True) if ok), None)


def _given(failure: Failure, position: int) -> int | None:
    """The item's own contrast, or the first token of what the planted truth would go on with."""
    done: Any = failure.completion
    own = done.item.row.get("contrast_id")
    if isinstance(own, int) and not isinstance(own, bool):
        return own
    truth = getattr(failure.benchmark, "right_text", None)
    if truth is None:
        return None
    text = truth(done.item, "".join(done.pieces[:position]))
    if text is None:
        return None
    if not text:  # the answer should have ended here
        return failure.writer.end_ids[0] if failure.writer.end_ids else None
    tokenizer = failure.writer.model.tokenizer
    return int(tokenizer(text, add_special_tokens=False)["input_ids"][0])
