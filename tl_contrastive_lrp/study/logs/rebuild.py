"""The exact token ids of a logged completion, or a refusal.

A log has texts; a case needs ids. The prompt's ids are those of the model's own chat template, or
of its tokenizer where the prompt is text; the completion's are those of its text after them. They
are refused where they cannot be exact:

- the template rewrites a message, or has no place for the tools;
- the ids do not decode to the text that the log has;
- the log recorded how many tokens there were, or their texts, and these are others. A model may
  write a text in other tokens than its tokenizer would, so only such a record proves the ids;
- a plain text may or may not have begun with a BOS token, and nobody says which.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import PromptError
from ...inputs import chat
from ...inputs.bos import own_tokens, tokenised
from ...inputs.tokens import continuation_ids, special_ids, str_tokens
from .entry import Entry, UnusableError


def rebuilt(
    model: Any, entry: Entry, enable_thinking: bool | None, prepend_bos: bool | None
) -> tuple[str, tuple[int, ...], tuple[int, ...], bool]:
    """Rebuild the ids of one completion.

    Args:
        model: The bridge of the model that wrote it.
        entry: The completion.
        enable_thinking: Whether the model was to think; None for the template's default.
        prepend_bos: Whether a prompt that is text begins with BOS; None if that is not known.

    Returns:
        The prompt's text, its ids, the completion's ids, and whether the log proves the latter.

    Raises:
        UnusableError: They cannot be exact.
    """
    try:
        texts = [entry.prompt, entry.completion, entry.messages, entry.tools]
        json.dumps(texts, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UnusableError("malformed", f"{entry.where}: no Unicode text ({error})") from error
    try:
        prompt, prompt_ids = _prompt(model, entry, enable_thinking, prepend_bos)
        ids = tuple(continuation_ids(model.tokenizer, entry.completion))
    except PromptError as error:
        raise UnusableError("tokens unknown", f"{entry.where}: {error}") from error
    if "".join(str_tokens(model, ids)) != entry.completion:
        raise UnusableError(
            "tokens unknown", f"{entry.where}: the tokenizer changes the completion's text"
        )
    if entry.prompt_tokens is not None and entry.prompt_tokens != len(prompt_ids):
        raise UnusableError(
            "tokens unknown",
            f"{entry.where}: the log counted {entry.prompt_tokens} tokens in the prompt, this "
            f"model's template gives {len(prompt_ids)}",
        )
    return prompt, prompt_ids, ids, _proved(model, entry, ids)


def _prompt(
    model: Any, entry: Entry, enable_thinking: bool | None, prepend_bos: bool | None
) -> tuple[str, tuple[int, ...]]:
    if entry.messages is not None:
        if entry.messages[-1]["role"] == "assistant" and not entry.messages[-1].get("tool_calls"):
            raise UnusableError(
                "tokens unknown",
                f"{entry.where}: the message before the answer is the assistant's too, and "
                "templates differ in whether they continue it",
            )
        made = chat(
            model, entry.messages, tools=entry.tools or None, enable_thinking=enable_thinking
        )
        return str(made), tuple(made.tokens.tolist())
    text = entry.prompt or ""
    if prepend_bos is None:
        own = own_tokens(model)
        without = tokenised(model, text, prepend_bos=False).ids
        begins = bool(without) and without[0] == model.tokenizer.bos_token_id
        if (own is None or own.bos) and not begins:
            raise UnusableError(
                "tokens unknown",
                f"{entry.where}: this tokenizer may begin a text with "
                f"{model.tokenizer.bos_token!r}, and the log does not say whether it did; give "
                "prepend_bos=True or False",
            )
        return text, tuple(without)
    return text, tuple(tokenised(model, text, prepend_bos=prepend_bos).ids)


def _proved(model: Any, entry: Entry, ids: tuple[int, ...]) -> bool:
    """Whether what the log recorded proves the completion's ids; an error if it refutes them."""
    if entry.token_texts is not None:
        recorded = list(entry.token_texts)
        ends = {"", *(model.tokenizer.decode([id]) for id in special_ids(model))}
        while recorded and recorded[-1] in ends and len(recorded) > len(ids):
            recorded.pop()
        own = [model.tokenizer.decode([id]) for id in ids]
        if recorded != own:
            raise UnusableError(
                "tokens unknown",
                f"{entry.where}: the log recorded other tokens of the completion than the "
                "tokenizer makes of its text",
            )
        return True
    if entry.completion_tokens is None:
        return False
    # Servers count the token that ends an answer, or leave it out.
    if entry.completion_tokens not in (len(ids), len(ids) + 1):
        raise UnusableError(
            "tokens unknown",
            f"{entry.where}: the log counted {entry.completion_tokens} tokens in the completion, "
            f"the tokenizer makes {len(ids)} of its text",
        )
    return True
