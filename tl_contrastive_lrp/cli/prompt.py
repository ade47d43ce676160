"""Turns typed text into token ids: the prompt, the target and the contrast."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CliError, Code
from .terminal import plain, print_err

if TYPE_CHECKING:
    from ..inputs.segments import Segment
    from ..inputs.tokens import Prompt


def read_prompt(prompt: str | None, file: str | None, strip_newline: bool) -> str:
    """Read the prompt.

    Args:
        prompt: The prompt itself, if it was typed.
        file: Otherwise the file that holds it; ``-`` is standard input.
        strip_newline: Leave out the last newline of a file.

    Raises:
        CliError: The file cannot be read or is not UTF-8.
    """
    if file is None:
        text = prompt or ""
    else:
        text = _decoded(file)
        if text.endswith("\n") and strip_newline:
            text = text[:-2] if text.endswith("\r\n") else text[:-1]
    check_text(text, "prompt")
    return text


def check_text(text: str | None, what: str) -> None:
    """Refuse text that was typed in another encoding.

    Args:
        text: The text, if any.
        what: What it is, for the message.

    Raises:
        CliError: The text holds bytes that are not UTF-8.
    """
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise CliError(Code.PROMPT, f"The {what} holds bytes that are no UTF-8 text.") from None


def _decoded(file: str) -> str:
    """The text of a file or of standard input."""
    if file == "-":
        if sys.stdin.isatty():
            print_err("Type the prompt; Ctrl-D on an empty line ends it.")
        data, what = sys.stdin.buffer.read(), "Standard input"
    else:
        try:
            data, what = Path(file).expanduser().read_bytes(), file
        except FileNotFoundError:
            raise CliError(Code.FILE, f"There is no prompt file {file}.") from None
        except OSError as error:
            raise CliError(
                Code.FILE, f"The prompt file {file} cannot be read: {error.strerror}."
            ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CliError(
            Code.FILE,
            f"{what} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start}. "
            "Convert it first, for example with iconv.",
        ) from None


def read_json(path: Path, what: str) -> list[Any]:
    """Read a JSON file that holds a list.

    Args:
        path: The file.
        what: What the list is of: "messages" or "tools".

    Raises:
        CliError: The file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.expanduser().read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CliError(Code.FILE, f"There is no file {path}.") from None
    except OSError as error:
        raise CliError(Code.FILE, f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise CliError(Code.PROMPT, f"{path} is not JSON: {error}.") from None
    if not isinstance(value, list) or not value:
        example = (
            '[{"role": "user", "content": "..."}]'
            if what == "messages"
            else '[{"type": "function", "function": {"name": ..., "parameters": ...}}]'
        )
        raise CliError(Code.PROMPT, f"{path} must hold a list of {what}: {example}.")
    return value


def chat_ids(
    model: Any, messages: Sequence[Any], tools: Sequence[Any] | None, answer: str
) -> Prompt:
    """Tokenise a chat, and find its messages.

    Args:
        model: The bridge.
        messages: The messages, as ``clrp.chat`` takes them.
        tools: The tools that the model may call.
        answer: What the assistant has written so far.

    Raises:
        CliError: The messages are malformed.
        PromptError: As ``clrp.chat``; or the chat is longer than the context.
    """
    from ..inputs.chats import chat
    from ..inputs.tokens import single_prompt

    try:
        return single_prompt(model, chat(model, messages, tools, answer))
    except TypeError as error:
        raise CliError(Code.PROMPT, str(error)) from error


def prompt_ids(
    model: Any,
    text: str,
    *,
    chat: bool = False,
    system: str | None = None,
    answer: str = "",
    prepend_bos: bool | None = None,
) -> Prompt:
    """Tokenise the prompt.

    Args:
        model: The bridge.
        text: The prompt; with ``chat``, the user's message.
        chat: Put the text into the tokenizer's chat template. The ids are the template's own: no
            BOS token is added to them.
        system: The system message, with ``chat``.
        answer: What has been written so far. Its tokens follow the prompt's or the template's,
            character by character as typed.
        prepend_bos: As for ``attribute``, without ``chat``.

    Returns:
        All token ids [1, pos], and whether a BOS token was put before the text.

    Raises:
        CliError: There is no chat template or it fails, or the prompt is longer than the context.
        PromptError: The prompt is empty, or a BOS token cannot be put before it.
    """
    import torch

    from ..inputs.bos import tokenised
    from ..inputs.tokens import Prompt, continuation_ids, model_device, to_single_prompt

    if not text:
        to_single_prompt(model, text)  # raises, with a message of its own
    if chat:
        ids, prepended = _chat_ids(model.tokenizer, text, system, answer), None
    else:
        tokens_of_text = tokenised(model, text, prepend_bos)
        ids, prepended = tokens_of_text.ids, tokens_of_text.prepended_bos
        ids = [*ids, *continuation_ids(model.tokenizer, answer)] if answer else ids
    tokens = torch.tensor([ids], device=model_device(model))
    limit = int(model.cfg.n_ctx)
    if tokens.shape[1] > limit:
        raise CliError(
            Code.PROMPT,
            f"The prompt is {tokens.shape[1]} tokens, but this model's context is {limit}. "
            "Shorten it.",
        )
    segments = _chat_segments(model, text, system, answer, ids) if chat else ()
    return Prompt(to_single_prompt(model, tokens), prepended, segments)


def _chat_segments(
    model: Any, text: str, system: str | None, answer: str, ids: list[int]
) -> tuple[Segment, ...]:
    """Where the messages of ``--chat`` lie; () where that cannot be told."""
    from ..errors import PromptError
    from ..inputs.chats import chat

    messages = [] if system is None else [{"role": "system", "content": system}]
    try:
        prompt = chat(model, [*messages, {"role": "user", "content": text}], answer=answer)
    except PromptError:
        return ()
    return prompt.segments if prompt.tokens.tolist() == ids else ()


def special_notes(model: Any, text: str, prepend_bos: bool | None) -> list[str]:
    """Notes on where a text's ids differ from those of the model's own tokenizer."""
    from ..inputs.bos import tokenised

    return [note.text for note in tokenised(model, text, prepend_bos).notes]


def _chat_ids(tokenizer: Any, text: str, system: str | None, answer: str) -> list[int]:
    """Ids of the chat template, followed by those of the beginning of the answer."""
    if not tokenizer.chat_template:
        raise CliError(
            Code.PROMPT,
            "This model's tokenizer has no chat template. Leave out --chat and give the whole "
            "prompt, in the format the model was trained on.",
        )
    from ..inputs.tokens import continuation_ids

    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True
        )
    except Exception as error:  # a template may raise anything
        remedy = " Some templates have no system message: try without --system." if system else ""
        raise CliError(Code.PROMPT, f"The chat template refuses: {error}.{remedy}") from error
    ids = encoded["input_ids"] if isinstance(encoded, Mapping) else encoded
    ids = list(ids[0] if ids and isinstance(ids[0], Sequence) else ids)
    return [*ids, *continuation_ids(tokenizer, answer)] if answer else ids


def token_ids(model: Any, texts: Sequence[str], role: str) -> tuple[int, ...]:
    """Ids of the tokens that ``--target`` or ``--contrast`` name.

    Raises:
        TokenError: A text is not exactly one token, or an id is out of range.
    """
    from ..errors import TokenError
    from ..inputs.tokens import to_token_ids

    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise TokenError(f"The {role} holds bytes that are no UTF-8 text.") from None
    return to_token_ids(model, list(texts), role)


def token_word(model: Any, token_id: int) -> str:
    """Name a token for the command line: by its text if that is safe, else as ``id:123``."""
    from ..inputs.token_text import printed, written_id
    from ..inputs.tokens import token_names

    name = token_names(model, [token_id])[0]
    if written_id(name) is None and printed(name, token_id) == name == plain(name):
        return name
    return f"id:{token_id}"
