"""The prompt and objective of a result, as typed records.

``Attribution`` and ``AttributionGraph`` both copy these fields, so that they describe prompts and
objectives in the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from .located import LocatedObjective
from .objective import positions_of
from .segments import Segment
from .tokens import model_name, single_prompt, special_ids, special_mask, str_tokens


@dataclass(frozen=True, eq=False)
class PromptFacts:
    """One prompt, checked, and the facts that results record about it.

    Attributes:
        tokens: The token ids that the model is given, on its device.
        token_ids: The same ids on the CPU.
        special: Which of them are special tokens of the tokenizer.
        str_tokens: What each token contributes to the prompt's text.
        model_name: The model's name, as TransformerLens has it.
        prepended_bos: Whether a BOS token was put before the text; None where ids were given.
        segments: The messages of a prompt made by ``chat``; () for any other.
    """

    tokens: Int[Tensor, "1 pos"]
    token_ids: Int[Tensor, " pos"]
    special: Bool[Tensor, " pos"]
    str_tokens: tuple[str, ...]
    model_name: str
    prepended_bos: bool | None
    segments: tuple[Segment, ...] = ()

    @classmethod
    def of(cls, model: Any, prompt: str | Tensor, prepend_bos: bool | None = None) -> PromptFacts:
        """Check a prompt and describe it.

        Args:
            model: A ``TransformerBridge``.
            prompt: Text, or token ids [pos] or [1, pos].
            prepend_bos: Whether a text begins with the BOS token; None for the model's default.

        Raises:
            PromptError, TypeError, ModelStateError: as ``tokens.single_prompt``.
        """
        given = single_prompt(model, prompt, prepend_bos)
        ids = given.tokens[0].cpu()
        return cls(
            tokens=given.tokens,
            token_ids=ids,
            special=special_mask(ids, special_ids(model)),
            str_tokens=str_tokens(model, ids.tolist()),
            model_name=model_name(model),
            prepended_bos=given.prepended_bos,
            segments=given.segments,
        )


@dataclass(frozen=True)
class ObjectiveFacts:
    """An objective's value on one prompt, and its description.

    Attributes:
        delta: Δℓ, the objective's value, in logits (or in what the objective is in).
        target_logit: Its target term; ``delta`` itself for a plain function.
        contrast_logit: Its contrast term, or None without one.
        objective: The objective in words, with its sign.
        target, contrast: Their texts for labels, "" for none.
        pos: The last position whose logits it depends on, from 0.
        earlier_pos: The others, rising.
        target_is_top: Whether greedy decoding writes the target: one of the target tokens has the
            highest logit at ``pos``, or each token of a span at its own position.
    """

    delta: float
    target_logit: float
    contrast_logit: float | None
    objective: str
    target: str
    contrast: str
    pos: int
    earlier_pos: tuple[int, ...]
    target_is_top: bool

    @classmethod
    def of(
        cls,
        objective: Callable[[Tensor], Tensor],
        logits: Float[Tensor, "1 rows vocab"],
        value: Float[Tensor, ""],
        length: int,
        local: Callable[[Tensor], Tensor] | None = None,
    ) -> ObjectiveFacts:
        """Describe an objective that has been evaluated.

        Args:
            objective: The objective.
            logits: The prompt's logits: of all positions, or of some if ``local`` is given.
            value: Δℓ.
            length: Number of tokens in the prompt.
            local: The objective for ``logits``, where they are those of some positions only.

        Raises:
            TokenError: the prompt lacks the position that the objective names.
            ModelStateError: its gradient is 0 at every logit, so no position is explained.
        """
        *earlier, last = positions_of(objective, logits, length)
        delta = float(value)
        if not isinstance(objective, LocatedObjective):
            name = getattr(objective, "__name__", repr(objective))
            return cls(delta, delta, None, name, "", "", last, tuple(earlier), False)
        evaluated = objective if local is None else local
        assert isinstance(evaluated, LocatedObjective)
        target, contrast = evaluated.parts(logits)
        return cls(
            delta,
            float(target[0]),
            None if contrast is None else float(contrast[0]),
            str(objective),
            *objective.texts(),
            pos=last,
            earlier_pos=tuple(earlier),
            target_is_top=evaluated.target_is_top(logits),
        )
