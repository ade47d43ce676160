"""Prompts and tokens: from a user's input to checked token ids."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import Argument, Message, PromptError, TokenError, a_kind
from .bos import Tokenised, tokenised, warn_once
from .bridge import require_bridge
from .chat_prompt import ChatPrompt
from .devices import input_device
from .segments import Segment
from .token_text import is_text_of, own_text, readings, texts_in_context, token_name, written_id


def vocab_size(model: Any) -> int:
    """Number of logits that the model gives per position."""
    return int(model.cfg.d_vocab)


def special_ids(model: Any) -> list[int]:
    """Ids of the tokenizer's special tokens, sorted; none without a tokenizer.

    These are the tokens that have a role (BOS, EOS, padding, ...), and those without a role that
    tokenizer.json or tokenizer_config.json mark as special, such as ``<|im_start|>``.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        return []
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted(marked.union(tokenizer.all_special_ids))


def drawable_ids(model: Any) -> Int[Tensor, " token"]:
    """The ids that may stand for any token of a text: none that is special, or has no text.

    A vocabulary may be larger than its tokenizer's; the embeddings beyond were never used.
    """
    size = vocab_size(model)
    if model.tokenizer is not None:
        size = min(size, len(model.tokenizer))
    ids = torch.arange(size)
    return ids[~torch.isin(ids, torch.tensor(special_ids(model), dtype=ids.dtype))]


def str_tokens(model: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """What each token of a prompt contributes to its text; joined, they are the prompt's text.

    Where several tokens share a character, the first shows it and the others are empty. Without a
    tokenizer, and for an id that it does not know, the text is ``id:123``.
    """
    if model.tokenizer is None:
        return tuple(f"id:{i}" for i in ids)
    return texts_in_context(model.tokenizer, ids)


def token_names(model: Any, ids: Iterable[int]) -> tuple[str, ...]:
    """A text for each token that, given as a target or contrast, means that token.

    No two ids have the same name; ``token_text`` says how names are formed.
    """
    if model.tokenizer is None:
        return tuple(f"id:{i}" for i in ids)
    return tuple(token_name(model.tokenizer, int(i)) for i in ids)


def model_name(model: Any) -> str:
    """The model's name for results: TransformerLens' name, or the last part of a local folder."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def model_device(model: Any) -> torch.device:
    """Device that token ids must be on.

    Raises:
        ModelStateError: Weights are on several devices, or on none, and no hook of accelerate
            brings them together.
    """
    return input_device(model)


def to_tokens(
    model: Any, prompt: str | list[str] | Tensor, prepend_bos: bool | None = None
) -> Int[Tensor, "batch pos"]:
    """Token ids of a prompt or a batch, on the model's device.

    Texts become the ids of ``model.to_tokens(text, prepend_bos=...)``; see ``bos.tokenised`` for
    the warnings, and for a text that begins with the BOS token. Tensors are used unchanged, and so
    are the ids of a ``ChatPrompt``.

    Warns:
        SpecialTokenWarning: The ids of a text begin or end differently from what the model's own
            tokenizer produces, and ``prepend_bos`` does not ask for it. Once per model and kind.

    Raises:
        PromptError: Empty, not integer, not of shape [pos] or [batch, pos], out of range, or
            texts of different lengths, longer than the model's context, or on another device;
            ``prepend_bos=True`` with ids, or where it cannot be done.
        TypeError: ``prepend_bos`` is neither None nor a bool.
        ModelStateError: As ``model_device``.
    """
    return _checked(model, prompt, prepend_bos)[0]


def _checked(
    model: Any, prompt: str | list[str] | Tensor, prepend_bos: bool | None
) -> tuple[Int[Tensor, "batch pos"], bool | None]:
    """``to_tokens``, and whether a BOS token was put before all texts (None for ids)."""
    if isinstance(prompt, list) and any(not isinstance(text, str) for text in prompt):
        raise PromptError(
            "The prompt is a list of something other than texts; give token ids as a tensor, "
            "torch.tensor(ids)."
        )
    prepended: bool | None = None
    if isinstance(prompt, str | list):
        texts = prompt if isinstance(prompt, list) else [prompt]
        if not texts or not all(texts):
            raise PromptError("The prompt is empty. Give the text (or ids) the model continued.")
        if model.tokenizer is None:
            raise PromptError("This model has no tokenizer; give the prompt as a tensor of ids.")
        rows = [_row(model, text, prepend_bos) for text in texts]
        lengths = {len(row.ids) for row in rows}
        if len(lengths) > 1:
            # TransformerLens pads on the right by default, and the last position is then a pad.
            raise PromptError(
                f"The texts have different lengths ({min(lengths)} to {max(lengths)} tokens), and "
                "padding would be explained. Pad on the left yourself and give "
                "attention_mask=..., use texts of one length, or loop over them."
            )
        tokens = torch.tensor([row.ids for row in rows], dtype=torch.long)
        from_chat = any(isinstance(text, ChatPrompt) for text in texts)
        prepended = None if from_chat else all(row.prepended_bos for row in rows)
        notes = tuple(note for row in rows for note in row.notes)
    elif isinstance(prompt, Tensor):
        if prompt.dtype.is_floating_point or prompt.dtype in (torch.bool, torch.complex64):
            raise PromptError(
                f"The prompt is a tensor of {prompt.dtype}; token ids are integers, as from "
                "model.to_tokens(text)."
            )
        if prepend_bos:
            raise PromptError(
                "prepend_bos=True is for texts; the prompt is a tensor of ids, which are taken as "
                "they are. Leave it out, or give ids that begin with the BOS token."
            )
        tokens, notes = prompt[None] if prompt.ndim == 1 else prompt, ()
        if tokens.ndim != 2:
            raise PromptError(
                f"The prompt has shape {list(prompt.shape)}; use [pos] or [batch, pos]."
            )
    else:
        raise PromptError(
            f"The prompt is {a_kind(prompt)}; use a string or a tensor of token ids "
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
    warn_once(model, notes)  # only for a prompt that passed all checks
    return ids, prepended


def _row(model: Any, text: str, prepend_bos: bool | None) -> Tokenised:
    """The ids of one text; those of a chat are its own."""
    if not isinstance(text, ChatPrompt):
        return tokenised(model, text, prepend_bos)
    if prepend_bos:
        raise PromptError(
            Message(
                Argument("prepend_bos", True),
                " is for texts; the prompt is a chat, whose template decides whether it begins "
                "with the BOS token. Leave it out.",
            )
        )
    ids = text.tokens.tolist()
    if max(ids) >= vocab_size(model) or str_tokens(model, ids) != text.str_tokens:
        raise PromptError(
            "The chat was made for a model with another tokenizer; make it with this one: "
            "clrp.chat(model, messages)."
        )
    return Tokenised(ids, False, ())


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt, checked.

    Attributes:
        tokens: Its ids, on the model's device.
        prepended_bos: Whether a BOS token was put before the text; None where ids were given.
        segments: The messages of a prompt made by ``chat``; () for any other.
    """

    tokens: Int[Tensor, "1 pos"]
    prepended_bos: bool | None
    segments: tuple[Segment, ...] = ()


def single_prompt(model: Any, prompt: str | Tensor, prepend_bos: bool | None = None) -> Prompt:
    """As ``to_tokens``, for exactly one prompt.

    Raises:
        PromptError: Also for a batch of several prompts.
    """
    tokens, prepended = _checked(model, prompt, prepend_bos)
    if tokens.shape[0] != 1:
        raise PromptError(
            f"One prompt is explained at a time, got a batch of {tokens.shape[0]}. Loop over the "
            "rows, or use run_with_relevance, which takes batches."
        )
    return Prompt(tokens, prepended, prompt.segments if isinstance(prompt, ChatPrompt) else ())


def to_single_prompt(
    model: Any, prompt: str | Tensor, prepend_bos: bool | None = None
) -> Int[Tensor, "1 pos"]:
    """The ids of ``single_prompt``."""
    return single_prompt(model, prompt, prepend_bos).tokens


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that continues another: no special tokens are added, and no space.

    SentencePiece tokenizers put a space before the first word of a text. With them, the text is
    tokenised after a character that no entry of the vocabulary joins to it.

    Raises:
        PromptError: There is no such character.
    """

    def ids_of(part: str) -> list[int]:
        return list(tokenizer(part, add_special_tokens=False)["input_ids"])

    first = "".join(tokenizer.convert_ids_to_tokens(ids_of("a")))
    if not text or not first.startswith(("\u2581", "\u0120")):  # as vocabularies write a space
        return ids_of(text)
    for anchor in ("\x01", "\n", "|", "\u00a7", "=", ";"):
        before, whole = ids_of(anchor), ids_of(anchor + text)
        is_known = tokenizer.unk_token_id not in before
        separates = is_known and tokenizer.decode(before).strip(" ") != ""
        if separates and whole[: len(before)] == before:
            return whole[len(before) :]
    raise PromptError(
        "The answer cannot be tokenised separately from the prompt: the tokenizer joins its "
        "beginning to the text before it. Give the whole text, or ids."
    )


def _typed_id(model: Any, text: str, role: str) -> int:
    """The id that a text given as a target or contrast names."""
    tokenizer, written = model.tokenizer, written_id(text)
    if written is not None:
        token_id, claimed = written
        if claimed is not None and not (
            tokenizer is not None and is_text_of(tokenizer, token_id, claimed)
        ):
            own = None if tokenizer is None else own_text(tokenizer, token_id)
            raise TokenError(
                f"The {role} {text!r} contradicts itself: id {token_id} is "
                f"{'a token without a name' if own is None else repr(own)}, not {claimed!r}. "
                f"For the id, give 'id:{token_id}'."
            )
        return token_id
    if not text:
        raise TokenError(f"The {role} is an empty text. Give one token, or its id.")
    if tokenizer is None:
        raise TokenError(f"This model has no tokenizer; give the {role} as a token id.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenError(f"The {role} {text!r} holds half a character, which is no text.") from None
    ids_meant = readings(tokenizer, text)
    if len(ids_meant) == 1:
        return ids_meant[0]
    if ids_meant:
        ways = "; or ".join(
            f"{_short_name(model, i)!r} for {tokenizer.convert_ids_to_tokens(i)!r} of the "
            f"vocabulary (id {i})"
            for i in ids_meant
        )
        raise TokenError(f"The {role} {text!r} is ambiguous. Give {ways}.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) == 1:
        raise TokenError(f"The {role} {text!r} is not in the model's vocabulary.")
    pieces = ", ".join(map(repr, token_names(model, ids)))
    raise TokenError(
        f"The {role} {text!r} is {len(ids)} tokens ({pieces or 'none'}), not one. Give one of them "
        "(mind a leading space), its id, also written id:123, or explain the first token where "
        "the two answers differ."
    )


def _short_name(model: Any, token_id: int) -> str:
    name = token_names(model, [token_id])[0]
    return name if written_id(name) is None else f"id:{token_id}"


def _single_id(model: Any, token: object, role: str) -> int:
    if isinstance(token, Tensor) and token.ndim == 0 and not token.dtype.is_floating_point:
        token = token.item()
    if isinstance(token, str):
        token = _typed_id(model, token, role)
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
        model: A ``TransformerBridge``.
        tokens: A single-token string, an id (a number, or text such as ``id:123``), or a list,
            tuple, set or 1-d tensor of these. A string is a token's own text, an entry of the
            vocabulary, or a text that the tokenizer turns into one token; see ``token_text``.
        role: Its name in error messages ("target", "contrast").

    Raises:
        TokenError: A string that is not one token (the message shows its tokens) or is ambiguous
            (the message shows a name for each), an id out of range, an empty set.
    """
    require_bridge(model)
    if isinstance(tokens, Tensor) and tokens.ndim == 1:
        tokens = tokens.tolist()
    several = tokens if isinstance(tokens, list | tuple | set | frozenset) else [tokens]
    ids = {_single_id(model, token, role) for token in several}
    if not ids:
        raise TokenError(f"The {role} is an empty set; give at least one token.")
    return tuple(sorted(ids))


def special_mask(token_ids: Tensor, special_ids: list[int]) -> Bool[Tensor, " pos"]:
    """Which tokens are among the tokenizer's special tokens."""
    return torch.isin(token_ids, torch.tensor(special_ids, dtype=token_ids.dtype))
