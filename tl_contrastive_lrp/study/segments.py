"""Which stretch of a case each token belongs to, and the sums of relevance over them.

The names are the published study's. A case's own segments, such as "instruction", come first; what
they leave is "answer" (the completion so far), "query" (the rest of what the messages say, or of a
plain prompt) and "template" (what the chat template wrote around the messages). Special tokens
belong to none. So the segments and the special tokens together are all tokens, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .analysis import SegmentSum
from .cases import Case
from .collect.spans import character_spans

WITH_TARGET, WITHOUT_TARGET = "with target", "without target"


def segment_masks(
    case: Case, str_tokens: Sequence[str], special: Bool[Tensor, " pos"]
) -> dict[str, Bool[Tensor, " pos"]]:
    """Which tokens belong to each segment.

    Args:
        case: The case.
        str_tokens: Text of each token of ``case.ids``; joined, they are the text.
        special: Which tokens are special.

    Returns:
        Masks [pos] by name, of which no two overlap; segments without a token are left out.
    """
    n, begins = len(str_tokens), len(case.prompt_ids)
    position = torch.arange(n)
    said = torch.zeros(n, dtype=torch.bool)
    for start, end in _said(case, str_tokens[:begins]):
        said[start:end] = True
    wanted = {name: _of_spans(spans, n) for name, spans in case.segments.items()}
    rest = {"answer": position >= begins, "query": said, "template": position < begins}
    masks, taken = {}, special.clone()
    for name, mask in [*wanted.items(), *((k, v) for k, v in rest.items() if k not in wanted)]:
        own = mask & ~taken
        taken |= own
        if bool(own.any()):
            masks[name] = own
    return masks


def _of_spans(spans: Sequence[tuple[int, int]], n: int) -> Bool[Tensor, " pos"]:
    mask = torch.zeros(n, dtype=torch.bool)
    for start, end in spans:
        mask[start:end] = True
    return mask


def _said(case: Case, str_tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
    """The tokens that hold what the messages say; all of the prompt where there are none.

    A message is found by its text, after the one before it. One that the template has changed (a
    space stripped, a date put in) is found without the space around it, or counts as template.
    """
    if case.messages is None:
        yield 0, len(str_tokens)
        return
    text = "".join(str_tokens)
    at = 0
    for message in case.messages:
        content = message.get("content")
        if not isinstance(content, str) or not (content := content.strip()):
            continue
        start = text.find(content, at)
        if start < 0:
            continue
        at = start + len(content)
        touched = character_spans(str_tokens, [(start, at)])
        yield touched[0], touched[-1] + 1


def segment_sums(
    masks: dict[str, Bool[Tensor, " pos"]],
    relevance: Float[Tensor, " pos"],
    special: Bool[Tensor, " pos"],
) -> tuple[SegmentSum, ...]:
    """Relevance of each segment, in logits and over the largest |relevance|.

    Args:
        masks: From ``segment_masks``.
        relevance: Relevance of each token, in logits.
        special: Which tokens are special; they do not set the scale either.
    """
    exact, scale = relevance.double(), scale_of(relevance, special)
    return tuple(
        SegmentSum(name, int(mask.sum()), total := float(exact[mask].sum()), total / scale)
        for name, mask in masks.items()
    )


def scale_of(relevance: Float[Tensor, " pos"], special: Bool[Tensor, " pos"]) -> float:
    """The largest |relevance| of a token that is not special, in logits; 1 if it is 0."""
    sizes = relevance.double().abs()[~special]
    return (float(sizes.max()) if len(sizes) else 0.0) or 1.0


def instruction_groups(
    case: Case,
    str_tokens: Sequence[str],
    relevance: Float[Tensor, " pos"],
    special: Bool[Tensor, " pos"],
) -> dict[str, float]:
    """Normalised sums over the instruction's phrases with the target token, and over the others.

    A phrase contains the target if one of its tokens has the target's text, spaces around it and
    capitals aside. These are the published notebooks' two groups.

    Args:
        case: The case; each span of its segment "instruction" is a phrase.
        str_tokens: Text of each token.
        relevance: Relevance of each token, in logits.
        special: Which tokens are special; they count in no phrase.

    Returns:
        Sums by group; a group without a phrase is left out.
    """
    target, scale, n = case.target.strip().lower(), scale_of(relevance, special), len(str_tokens)
    spans: dict[str, list[tuple[int, int]]] = {}
    for start, end in case.segments.get("instruction", ()):
        words = {token.strip().lower() for token in str_tokens[start:end]}
        group = WITH_TARGET if target and target in words else WITHOUT_TARGET
        spans.setdefault(group, []).append((start, end))
    exact = relevance.double()
    return {
        group: float(exact[_of_spans(phrases, n) & ~special].sum()) / scale
        for group, phrases in spans.items()
    }
