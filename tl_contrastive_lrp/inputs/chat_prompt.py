"""A prompt made from a chat: a string that keeps its own token ids and knows its messages."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from .segments import Segment, check_segments


class ChatPrompt(str):
    """The text of a chat, with the ids of its chat template, and its messages as segments.

    It is a string to everything else. Functions of this package that take a prompt use its
    ``tokens`` as they are: the text is not tokenised again and no BOS token is added.

    Args:
        text: The text.
        tokens: Its token ids.
        segments: Its division into messages and what the template writes around them.
        str_tokens: What each token contributes to the text.

    Attributes:
        tokens: The token ids [pos], on the CPU.
        segments: The messages and the template's text between them; they cover the prompt in
            order, without overlap.
        str_tokens: What each token contributes to the text.

    Raises:
        ValueError: The segments do not cover the tokens.

    Example:
        >>> prompt = clrp.ChatPrompt(
        ...     "Hi!", torch.tensor([5, 6]), (clrp.Segment("user 1", "user", "user", 0, 2, "Hi!"),),
        ...     ("Hi", "!"),
        ... )
        >>> prompt.upper(), prompt.tokens.tolist(), prompt.segments[0].name
        ('HI!', [5, 6], 'user 1')
    """

    tokens: Int[Tensor, " pos"]
    segments: tuple[Segment, ...]
    str_tokens: tuple[str, ...]

    def __new__(
        cls,
        text: str,
        tokens: Tensor,
        segments: tuple[Segment, ...],
        str_tokens: tuple[str, ...],
    ) -> ChatPrompt:
        """Keep the parts beside the text."""
        check_segments(segments, len(tokens))
        prompt = super().__new__(cls, text)
        prompt.tokens = torch.as_tensor(tokens, dtype=torch.long).cpu()
        prompt.segments, prompt.str_tokens = tuple(segments), tuple(str_tokens)
        return prompt

    def __getnewargs__(self) -> Any:
        """What copies and pickles are made of."""
        return (str(self), self.tokens, self.segments, self.str_tokens)
