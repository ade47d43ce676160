"""Prompts and tokens: from what a user types to checked token ids."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import PromptError, TokenError
from .offload import input_device
from .sites import require_bridge


def vocab_size(model: Any) -> int:
    """Number of logits the model gives for a position."""
    return int(model.cfg.d_vocab)


def str_tokens(model: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """The text of each token by itself, or ``#id`` where the model has no tokenizer."""
    if model.tokenizer is None:
        return tuple(f"#{i}" for i in ids)
    return tuple(str(model.tokenizer.decode([i])) for i in ids)


def model_name(model: Any) -> str:
    """The model's name for results: as TransformerLens has it, of a local folder its last part."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def model_device(model: Any) -> torch.device:
    """Device that token ids must be on.

    Raises:
        ModelStateError: weights on several devices, or without numbers, that nothing brings
            together.
    """
    return input_device(model)


def to_tokens(model: Any, prompt: str | list[str] | Tensor) -> Int[Tensor, "batch pos"]:
    """Token ids of a prompt or a batch, on the model's device.

    Strings go through ``model.to_tokens`` with TransformerLens' defaults for the BOS token; tensors
    are taken as they are.

    Raises:
        PromptError: empty, not integer, not of shape [pos] or [batch, pos], out of range, or
            texts of different lengths, longer than the model's context, or on another device.
        ModelStateError: as ``model_device``.
    """
    many = isinstance(prompt, list)
    if many and any(not isinstance(text, str) for text in prompt):
        raise PromptError(
            "The prompt is a list of something other than texts; give token ids as a tensor, "
            "torch.tensor(ids)."
        )
    if isinstance(prompt, str | list):
        if not prompt or not all(isinstance(text, str) and text for text in prompt):
            raise PromptError("The prompt is empty. Give the text (or ids) the model continued.")
        if model.tokenizer is None:
            raise PromptError("This model has no tokenizer; give the prompt as a tensor of ids.")
        tokens = model.to_tokens(prompt, truncate=False)  # by default it cuts without a word
        lengths = (
            {model.to_tokens(text, truncate=False).shape[-1] for text in prompt} if many else set()
        )
        if len(lengths) > 1:
            # TransformerLens pads on the right by default, and the last position is then a pad.
            raise PromptError(
                f"The texts have different lengths ({min(lengths)} to {max(lengths)} tokens), and "
                "padding would be explained. Pad on the left yourself and give "
                "attention_mask=..., use texts of one length, or loop over them."
            )
    elif isinstance(prompt, Tensor):
        if prompt.dtype.is_floating_point or prompt.dtype in (torch.bool, torch.complex64):
            raise PromptError(
                f"The prompt is a tensor of {prompt.dtype}; token ids are integers, as from "
                "model.to_tokens(text)."
            )
        tokens = prompt[None] if prompt.ndim == 1 else prompt
        if tokens.ndim != 2:
            raise PromptError(
                f"The prompt has shape {list(prompt.shape)}; use [pos] or [batch, pos]."
            )
    else:
        raise PromptError(
            f"The prompt is a {type(prompt).__name__}; use a string or a tensor of token ids "
            "(torch.tensor(ids) for a list of ids)."
        )
    if tokens.numel() == 0:
        raise PromptError("The prompt is empty. Give the text (or ids) the model continued.")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size(model):
        raise PromptError(
            f"Token ids must lie in 0..{vocab_size(model) - 1}; found {low if low < 0 else high}. "
            "Was the prompt tokenised for another model?"
        )
    limit = int(model.cfg.n_ctx)
    if tokens.shape[1] > limit:
        raise PromptError(
            f"The prompt has {tokens.shape[1]} tokens, more than the model's context of {limit}. "
            "Shorten it (model.to_tokens(text) shows what fits)."
        )
    device = model_device(model)
    if isinstance(prompt, Tensor) and prompt.device != device:
        raise PromptError(
            f"The prompt is on {prompt.device}, the model on {device}; "
            f"use tokens.to({str(device)!r})."
        )
    ids: Tensor = tokens.to(device).long()
    return ids


def to_single_prompt(model: Any, prompt: str | Tensor) -> Int[Tensor, "1 pos"]:
    """Like ``to_tokens``, for exactly one prompt.

    Raises:
        PromptError: also for a batch of several prompts.
    """
    tokens = to_tokens(model, prompt)
    if tokens.shape[0] != 1:
        raise PromptError(
            f"One prompt is explained at a time, got a batch of {tokens.shape[0]}. Loop over the "
            "rows, or use run_with_relevance, which takes batches."
        )
    return tokens


def _single_id(model: Any, token: object, role: str) -> int:
    if isinstance(token, Tensor) and token.ndim == 0 and not token.dtype.is_floating_point:
        token = token.item()
    if isinstance(token, str):
        if model.tokenizer is None:
            raise TokenError(f"This model has no tokenizer; give the {role} as a token id.")
        ids = model.to_tokens(token, prepend_bos=False)[0].tolist() if token else []
        if len(ids) != 1:
            pieces = ", ".join(map(repr, str_tokens(model, ids)))
            raise TokenError(
                f"The {role} {token!r} is {len(ids)} tokens ({pieces or 'none'}), not one. Give "
                "one of them (mind a leading space), its id, or explain the first token where the "
                "two answers differ."
            )
        unknown = model.tokenizer.unk_token_id
        if ids[0] == unknown and token != model.tokenizer.unk_token:
            raise TokenError(f"The {role} {token!r} is not in the model's vocabulary.")
        return int(ids[0])
    if isinstance(token, bool) or not isinstance(token, Integral):
        raise TokenError(
            f"The {role} must be a single-token string, a token id, or a set of these; "
            f"got {token!r} ({type(token).__name__})."
        )
    if not 0 <= int(token) < vocab_size(model):
        raise TokenError(
            f"The {role} id {int(token)} is outside the vocabulary 0..{vocab_size(model) - 1}."
        )
    return int(token)


def to_token_ids(model: Any, tokens: object, role: str) -> tuple[int, ...]:
    """One token or a set of tokens as sorted, distinct ids.

    Args:
        tokens: A single-token string, an id, or a list, tuple, set or 1-d tensor of these.
        role: What the error messages call it ("target", "contrast").

    Raises:
        TokenError: a string that is not one token (its tokens are shown), an id out of range, an
            empty set.
    """
    require_bridge(model)
    if isinstance(tokens, Tensor) and tokens.ndim == 1:
        tokens = tokens.tolist()
    several = tokens if isinstance(tokens, list | tuple | set | frozenset) else [tokens]
    ids = {_single_id(model, token, role) for token in several}
    if not ids:
        raise TokenError(f"The {role} is an empty set; give at least one token.")
    return tuple(sorted(ids))
