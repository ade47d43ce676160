"""``chat``: the prompt that a chat template makes of messages, with its messages as segments.

The ids are the template's own. ``message_spans`` finds the messages in the rendered text, exactly;
here the ids are laid over that text, and each token goes to the segment where it begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from ..errors import Argument, Message, PromptError, a_kind
from .bridge import require_bridge
from .chat_prompt import ChatPrompt
from .message_spans import THINKING_TAGS, Span, message_spans, thinking_parts
from .segments import Segment, token_anchors
from .tokens import continuation_ids, str_tokens


def chat(
    model: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
    answer: str = "",
    enable_thinking: bool | None = None,
) -> ChatPrompt:
    """Make a prompt of a chat by the tokenizer's chat template.

    The prompt is a string that keeps the template's token ids exactly, and knows which tokens are
    of which message. It ends where the assistant's next token follows: after the template's
    beginning of an answer, and after ``answer``. If the last message is the assistant's own, that
    message is continued.

    A token belongs to the segment in which its first character that is not white space lies.
    Tags around the thoughts of messages, such as ``<think>``, are the template's; in ``answer``
    they belong to the thought. White space that the template strips from a message is in no
    segment; a text that it writes into JSON is the message's, with its escapes.

    Args:
        model: A ``TransformerBridge`` whose tokenizer has a chat template.
        messages: Dicts with "role" and "content" and, as Hugging Face has them, "tool_calls",
            "reasoning_content", "name" and "tool_call_id".
        tools: Tools that the model may call: JSON schemas, or functions with docstrings, as for
            ``tokenizer.apply_chat_template``.
        answer: What the assistant has written so far. Its tokens follow the template's, character
            by character as it is given.
        enable_thinking: Whether the model is to think first, where the template has that choice;
            None for the template's default.

    Returns:
        The prompt, for ``attribute``, ``attribution_graph`` and everything that takes a prompt.

    Raises:
        TypeError: ``model`` is not a bridge, or ``messages`` are not dicts with a role.
        PromptError: There is no chat template, it fails, it ignores ``tools`` or
            ``enable_thinking``, or it rewrites messages so that they have no exact place in the
            prompt.

    Example:
        >>> messages = [{"role": "user", "content": case.user}]
        >>> prompt = clrp.chat(model, messages, answer=case.answer_prefix)
        >>> prompt == case.prompt
        True
        >>> [(s.name, s.start, s.stop) for s in prompt.segments]
        [('template 1', 0, 3), ('user 1', 3, 38), ('template 2', 38, 43), ('answer', 43, 44)]
        >>> of_case = clrp.attribute(model, prompt, objective)
        >>> of_case.by("message")["segment"].tolist()
        ['template 1', 'user 1', 'template 2', 'answer']
    """
    require_bridge(model)
    tokenizer = model.tokenizer
    _check(tokenizer, messages, answer)
    continued = not answer and _is_own(messages[-1])
    settings: dict[str, Any] = {"add_generation_prompt": not continued}
    if tools:
        settings["tools"] = list(tools)
    if enable_thinking is not None:  # some templates have the one name, some the other
        settings |= {"enable_thinking": enable_thinking, "thinking": enable_thinking}

    def render(changed: list[dict[str, Any]], **other: Any) -> str:
        return str(_applied(tokenizer, changed, tokenize=False, **{**settings, **other}))

    text, spans = message_spans(messages, render)
    given = [dict(message) for message in messages]
    _check_heeded(text, given, tools, enable_thinking, render)
    if continued:
        settings["continue_final_message"] = True
        text, spans = _continued(text, spans, render(given, continue_final_message=True))
    ids = list(_applied(tokenizer, given, tokenize=True, **settings))
    if answer:
        ids += continuation_ids(tokenizer, answer)
        spans += _answer_spans(text, answer)
        text += answer
    if not ids:
        raise PromptError("The chat template writes nothing.")
    anchors = _anchors(model, tokenizer, text, ids)
    return ChatPrompt(
        text, torch.tensor(ids), _segments(text, spans, anchors), str_tokens(model, ids)
    )


def _is_own(message: Mapping[str, Any]) -> bool:
    """Whether a message is a beginning of an answer, which the model continues."""
    return message["role"] == "assistant" and not message.get("tool_calls")


def _continued(text: str, spans: list[Span], open_text: str) -> tuple[str, list[Span]]:
    """The text up to where the last message is continued, and what the messages have of it."""
    if not text.startswith(open_text):
        raise PromptError(
            Message(
                "The chat template does not leave the last message open. Leave that message out, "
                "and give its text as ",
                Argument("answer"),
                ".",
            )
        )
    end = len(open_text)
    kept = [replace(span, stop=min(span.stop, end)) for span in spans if span.start < end]
    return open_text, kept


def _check(tokenizer: Any, messages: Any, answer: str) -> None:
    if tokenizer is None:
        raise PromptError("This model has no tokenizer; give the prompt as a tensor of ids.")
    if not tokenizer.chat_template:
        raise PromptError(
            "This model's tokenizer has no chat template. Give the whole prompt as a text, in the "
            "format the model was trained on, or set model.tokenizer.chat_template."
        )
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"messages is {a_kind(messages)}; give a list of dicts, "
            '[{"role": "user", "content": "..."}].'
        )
    if not messages:
        raise PromptError("The chat has no messages; give at least one.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"Message {index + 1} is {message!r}; each is a dict with a role, "
                '{"role": "user", "content": "..."}.'
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | Mapping):
            raise TypeError(
                f"The content of message {index + 1} is {a_kind(content)}; give a text."
            )
    if answer and _is_own(messages[-1]):
        raise PromptError(
            Message(
                "The last message is the assistant's, which is continued, and there is an ",
                Argument("answer"),
                " too. Give one of them.",
            )
        )


def _applied(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, return_dict=False, **settings)
    except Exception as error:  # a template may raise anything
        system = any(message["role"] == "system" for message in messages)
        remedy = " Some templates have no system message: try without it." if system else ""
        raise PromptError(f"The chat template refuses: {error}.{remedy}") from error


def _check_heeded(
    text: str,
    messages: list[dict[str, Any]],
    tools: Any,
    enable_thinking: bool | None,
    render: Callable[..., str],
) -> None:
    """Refuse settings that the template ignores: the prompt would not hold what was asked for."""
    if tools and render(messages, tools=None) == text:
        raise PromptError(
            Message("This chat template has no place for ", Argument("tools"), ". Leave them out, "
                    "or describe them in the system message.")
        )  # fmt: skip
    if enable_thinking is not None:
        other = not enable_thinking
        if render(messages, enable_thinking=other, thinking=other) == text:
            raise PromptError(
                Message("This chat template writes the same with and without ",
                        Argument("enable_thinking"), ". Leave it out.")
            )  # fmt: skip


def _answer_spans(text: str, answer: str) -> list[Span]:
    """The answer so far, in thoughts and the rest; the template may have opened a thought."""
    opened = any(text.rstrip().endswith(begin) for begin, _ in THINKING_TAGS)
    pieces = thinking_parts(answer, opened)
    kinds = groupby(
        pieces, key=lambda piece: "assistant" if piece[0] == "assistant" else "thinking"
    )
    spans, start = [], len(text)
    for kind, group in kinds:
        stop = start + sum(len(piece) for _, piece in group)
        spans.append(Span(-1, "assistant", kind, "", start, stop))
        start = stop
    return spans


def _anchors(model: Any, tokenizer: Any, text: str, ids: list[int]) -> Any:
    """Where each token counts as beginning, in characters of the text.

    Raises:
        PromptError: The tokens do not spell the text, and the tokenizer gives no offsets.
    """
    texts = str_tokens(model, ids)
    if "".join(texts) == text:
        return token_anchors(texts)
    # The tokenizer normalises the text (composed characters, spaces): ask it for offsets.
    if getattr(tokenizer, "is_fast", False):
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if list(coded["input_ids"]) == ids:
            first, end = np.array(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
            # Some tokenizers leave a token's leading space out of its offsets.
            start = np.minimum(first, np.concatenate([[0], np.maximum.accumulate(end)[:-1]]))
            own = [text[a:b] for a, b in zip(start, end, strict=True)]
            space = [len(t) - len(t.lstrip()) if t.strip() else 0 for t in own]
            return np.maximum.accumulate(start + np.array(space, dtype=np.int64))
    raise PromptError(
        "The tokens do not spell the text of the chat template, so they cannot be assigned to "
        "messages: this tokenizer changes texts and gives no offsets. Give the ids themselves."
    )


def _segments(text: str, spans: list[Span], anchors: Any) -> tuple[Segment, ...]:
    """The messages' segments, with the template's between them."""
    cuts = sorted({0, len(text), *(c for span in spans for c in (span.start, span.stop))})
    # A segment begins with the first token whose anchor lies in it or after it.
    tokens = dict(zip(cuts, np.searchsorted(anchors, np.array(cuts)).tolist(), strict=True))
    tokens[0], tokens[len(text)] = 0, len(anchors)
    by_start = {span.start: span for span in spans if span.stop > span.start}
    counts: Counter[str] = Counter()
    segments = []
    for start, stop in pairwise(cuts):
        span = by_start.get(start)
        kind = "template" if span is None else span.kind
        if span is not None and span.message < 0 and kind == "assistant":
            name = "answer"
        else:
            counts[kind] += 1
            name = f"{kind} {counts[kind]}"
            if span is not None and span.label:
                name += f": {span.label}"
        role = "" if span is None else span.role
        segment = Segment(name, role, kind, tokens[start], tokens[stop], text[start:stop])
        if span is not None or segment.n_tokens or segment.text:
            segments.append(segment)
    return tuple(segments)
