"""The objective of a stretch of what was written: a sum over its tokens, explained at once.

    Δℓ = Σ_p [ logit(token written at p) − what it is held against at p ],    start ≤ p < stop,

with the logits at p − 1, which predict the token at p. Relevance is linear in the objective, so
that of a span is the sum of its tokens' relevance, from one forward and one backward whatever the
span's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from ..errors import TokenError
from ..rules.functions import at_least_float32
from .bridge import require_bridge
from .located import LocatedObjective
from .tokens import str_tokens, to_single_prompt, to_token_ids, token_names, vocab_size

Against = Literal["tokens", "top_k", "mean", "none"]

_KEYWORDS: dict[str, Against] = {"none": "none", "mean": "mean", "top_k": "top_k"}
LOGPROB = "log-probability"  # how the words of an objective in log-probabilities begin
_LABEL = 48  # characters of the span's text in labels


@dataclass(frozen=True)
class SpanLogit(LocatedObjective):
    """The sum of a span's logits, as ``span_logit`` makes it.

    Positive relevance supports what was written, negative what it is held against.

    Attributes:
        ids: The tokens written, one for each position of the span.
        first: The position whose logits predict the first of them, from 0: one before the span.
        versus: What each token's logit is held against: the token of ``contrast`` at its position,
            the mean of the ``k`` highest other logits, the mean of all logits, or nothing.
        contrast: One token for each position of the span (``versus="tokens"``).
        k: For ``versus="top_k"``.
        logprob: Whether log-probabilities are summed instead of logits.
        text: The span's text, for labels.
        contrast_text: The text of what it is held against (``versus="tokens"``).

    Example:
        >>> span = clrp.SpanLogit(ids=(1, 0), first=0)
        >>> float(span(torch.tensor([[[1.0, 2.0], [4.0, 8.0], [0.0, 0.0]]])))
        6.0
    """

    ids: tuple[int, ...]
    first: int
    versus: Against = "none"
    contrast: tuple[int, ...] = ()
    k: int = 0
    logprob: bool = False
    text: str = ""
    contrast_text: str = ""

    def __call__(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, ""]:
        """Δℓ summed over the span and over the batch.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: A position or token does not exist in these logits.
        """
        target, contrast = self.parts(logits)
        return target.sum() if contrast is None else (target - contrast).sum()

    def parts(
        self, logits: Float[Tensor, "*batch pos vocab"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
        """The target term and the contrast term, one value per row; Δℓ is their difference.

        Args:
            logits: As the model returns them.

        Returns:
            Both terms, summed over the span, in logits or log-probabilities; the contrast term is
            None if nothing is subtracted.

        Raises:
            TokenError: A position or token does not exist in these logits.

        Example:
            >>> span = clrp.span_logit(model, case.prompt, (3, 6), against="mean")
            >>> written, mean = span.parts(model(case.prompt))
            >>> torch.allclose((written - mean).sum(), span(model(case.prompt)))
            True
        """
        target, held = self.terms(logits)
        return (
            reduce(target, "batch span -> batch", "sum"),
            None if held is None else reduce(held, "batch span -> batch", "sum"),
        )

    def terms(
        self, logits: Float[Tensor, "*batch pos vocab"]
    ) -> tuple[Float[Tensor, "batch span"], Float[Tensor, "batch span"] | None]:
        """Both terms of each of the span's tokens, before they are summed.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: A position or token does not exist in these logits.

        Example:
            >>> span = clrp.span_logit(model, case.prompt, (3, 6))
            >>> span.terms(model(case.prompt))[0].shape
            torch.Size([1, 3])
        """
        rows = self.rows(logits)
        target, held = _at(rows, self.ids), self._held(rows)
        if self.logprob:
            normaliser = rows.logsumexp(-1)
            target, held = target - normaliser, None if held is None else held - normaliser
        return target, held

    def _held(self, rows: Float[Tensor, "batch span vocab"]) -> Float[Tensor, "batch span"] | None:
        """The logits that those of the tokens written are held against."""
        if self.versus == "none":
            return None
        if self.versus == "mean":
            return reduce(rows, "batch span vocab -> batch span", "mean")
        if self.versus == "tokens":
            return _at(rows, self.contrast)
        others = rows.detach().scatter(-1, _index(rows, self.ids), -torch.inf)
        best = rows.gather(-1, others.topk(self.k, dim=-1).indices)
        return reduce(best, "batch span k -> batch span", "mean")

    def rows(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, "batch span vocab"]:
        """The logits that predict the span, in float32 at least.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: A position or token does not exist in these logits.

        Example:
            >>> logits = model(case.prompt)
            >>> span = clrp.span_logit(model, case.prompt, (3, 6))
            >>> torch.equal(span.rows(logits), logits[:, 2:5])
            True
        """
        if logits.ndim == 2:
            logits = rearrange(logits, "pos vocab -> 1 pos vocab")
        positions = self.positions(logits.shape[1])
        largest = max(*self.ids, *self.contrast, 0)
        if largest >= logits.shape[-1]:
            raise TokenError(f"Token id {largest} is outside these {logits.shape[-1]} logits.")
        return at_least_float32(logits[:, positions[0] : positions[-1] + 1])

    def positions(self, length: int) -> tuple[int, ...]:
        """The positions whose logits are read, rising from 0; the first lies before the span.

        Args:
            length: How many tokens the prompt has.

        Raises:
            TokenError: The prompt is too short.

        Example:
            >>> clrp.span_logit(model, case.prompt, (3, 6)).positions(10)
            (2, 3, 4)
        """
        end = self.first + len(self.ids)
        if end > length:
            raise TokenError(
                f"The span's last token is predicted at position {end - 1}, which does not exist "
                f"in a prompt of {length} tokens. Give the prompt that the span was written in."
            )
        return tuple(range(self.first, end))

    def at(self, read: tuple[int, ...], length: int) -> SpanLogit:
        """The same objective as a function of some positions' logits, [1, len(read), vocab].

        Args:
            read: Rising positions from 0, those of ``positions(length)`` among them.
            length: How many tokens the prompt has.

        Raises:
            TokenError: As ``positions``.

        Example:
            >>> span = clrp.span_logit(model, case.prompt, (3, 6))
            >>> logits = model(case.prompt)
            >>> torch.equal(span.at((2, 3, 4), 10)(logits[:, 2:5]), span(logits))
            True
        """
        return replace(self, first=read.index(self.positions(length)[0]))

    def target_is_top(self, logits: Float[Tensor, "1 pos vocab"]) -> bool:
        """Whether greedy decoding writes each of the span's tokens at its position.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: A position or token does not exist in these logits.

        Example:
            >>> clrp.span_logit(model, case.prompt, (3, 6)).target_is_top(model(case.prompt))
            False
        """
        return self.rows(logits)[0].argmax(-1).tolist() == list(self.ids)

    def texts(self) -> tuple[str, str]:
        """The span's text, shortened, and what it is held against, for labels.

        Example:
            >>> clrp.span_logit(model, case.prompt, (3, 6), against="mean").texts()[1]
            'mean of all logits'
        """
        many = "log-probabilities" if self.logprob else "logits"
        held = {
            "none": "",
            "mean": f"mean of all {many}",
            "top_k": f"mean of the {self.k} highest other {many}",
        }
        return _short(self.text) or self._tokens(), held.get(self.versus, self._contrast_name())

    def _tokens(self) -> str:
        start, last = self.first + 1, self.first + len(self.ids)
        return f"token {start}" if start == last else f"tokens {start}-{last}"

    def _contrast_name(self) -> str:
        ids = {*self.contrast}
        return _short(self.contrast_text) or (f"id:{min(ids)}" if len(ids) == 1 else "other tokens")

    def __str__(self) -> str:
        quantity = LOGPROB if self.logprob else "logit"
        written = f"{_short(self.text)!r} ({self._tokens()})" if self.text else self._tokens()
        summed = f"{quantity} of {written}" + (", summed" if len(self.ids) > 1 else "")
        read = (self.first, self.first + len(self.ids) - 1)
        where = f"positions {read[0]}-{read[1]}" if read[0] < read[1] else f"position {read[0]}"
        held = self.texts()[1]
        if self.versus == "tokens":
            held = f"{quantity} of {held!r} instead"
        difference = f"{summed} − {held}" if held else summed
        negative = "negative supports what it is held against"
        negative = negative if held else "negative speaks against it"
        return f"{difference} at {where} (positive relevance supports what was written, {negative})"


def _index(rows: Float[Tensor, "batch span vocab"], ids: Sequence[int]) -> Tensor:
    """Ids of one token for each position, as an index of the last axis."""
    index = torch.tensor(ids, device=rows.device)
    return rearrange(index, "span -> 1 span 1").expand(len(rows), -1, 1)


def _at(rows: Float[Tensor, "batch span vocab"], ids: Sequence[int]) -> Float[Tensor, "batch span"]:
    return rearrange(rows.gather(-1, _index(rows, ids)), "batch span 1 -> batch span")


def _short(text: str) -> str:
    half = _LABEL // 2 - 1
    return text if len(text) <= _LABEL else f"{text[:half]} … {text[-half:]}"


def span_logit(
    model: Any,
    tokens: str | Tensor,
    span: tuple[int, int],
    against: object = "none",
    k: int = 10,
    logprob: bool = False,
    *,
    prepend_bos: bool | None = None,
) -> SpanLogit:
    """Explain a stretch of what was written: the sum of its tokens' logits, or of differences.

    The token at p is predicted by the logits at p − 1. An objective like ``logit_diff``, for every
    function that takes one; relevance is the sum of its tokens' relevance, from one forward and
    one backward. Positive relevance supports what was written. Relevance of the span's own tokens
    is what each does for the tokens after it.

    Args:
        model: A ``TransformerBridge``.
        tokens: The whole prompt, the span included: text, or token ids [pos] or [1, pos].
        span: Positions (start, stop) of the tokens to explain, from 0, without ``stop``.
        against: What each token's logit is held against: "none", "mean" (of all logits), "top_k"
            (the mean of the ``k`` highest logits of other tokens), an id for all positions, or a
            list of ids or texts, one for each position. Where a list repeats the token written,
            that position contributes 0.
        k: How many other tokens, for "top_k".
        logprob: Sum log-probabilities instead of logits. A difference of two log-probabilities at
            one position is that of the logits, so this matters for "none" only.
        prepend_bos: Whether a text begins with the BOS token, as for ``attribute``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        PromptError: As ``attribute``.
        TokenError: ``span`` is not two positions of the prompt, of which the first is 1 or more;
            ``against`` is none of these, or repeats every token written; ``k`` is out of range.

    Example:
        >>> n = model.to_tokens(case.prompt).shape[1]
        >>> span = clrp.span_logit(model, case.prompt, (n - 4, n), against="top_k", k=5)
        >>> result = clrp.attribute(model, case.prompt, span)
        >>> result.positions == (n - 5, n - 4, n - 3, n - 2)
        True
    """
    require_bridge(model)
    prompt = to_single_prompt(model, tokens, prepend_bos)[0].tolist()
    start, stop = _span(span, len(prompt))
    ids = tuple(prompt[start:stop])
    text = "".join(str_tokens(model, prompt)[start:stop])
    about = SpanLogit(ids, start - 1, logprob=bool(logprob), text=text)
    if isinstance(against, str):
        if against not in _KEYWORDS:
            raise _unknown(against)
        if against == "top_k" and not (_is_whole(k) and 1 <= k < vocab_size(model)):
            raise TokenError(
                f"k={k!r} must lie between 1 and the {vocab_size(model) - 1} other tokens."
            )
        return replace(about, versus=_KEYWORDS[against], k=int(k) if against == "top_k" else 0)
    contrast = _contrast(model, against, len(ids))
    if contrast == ids:
        raise TokenError(
            "against repeats every token of the span, so Δℓ would be 0. Give other tokens."
        )
    several = len({*contrast}) > 1
    name = "".join(str_tokens(model, list(contrast))) if several else None
    name = token_names(model, contrast[:1])[0] if name is None else name
    return replace(about, versus="tokens", contrast=contrast, contrast_text=name)


def _unknown(against: object) -> TokenError:
    return TokenError(
        f"against={against!r} is unknown; use 'none', 'mean', 'top_k', an id for all positions, or "
        "a list of ids or texts, one for each position of the span."
    )


def _is_whole(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def _span(span: Any, length: int) -> tuple[int, int]:
    """The span's ends, checked.

    Raises:
        TokenError: As ``span_logit``.
    """
    given = span.tolist() if hasattr(span, "tolist") else span
    whole = isinstance(given, list | tuple) and len(given) == 2 and all(map(_is_whole, given))
    if not whole:
        raise TokenError(
            f"span={span!r} is no span; use (start, stop), two positions counted from 0, of which "
            "stop is the first that no longer belongs to it."
        )
    start, stop = map(int, given)
    if start == 0 and stop > 0:
        raise TokenError(
            f"span={span!r} begins with the prompt's first token, which nothing predicts; begin at "
            "1 or later."
        )
    if not 1 <= start < stop <= length:
        raise TokenError(
            f"span={span!r} must have 1 <= start < stop <= {length}, the prompt's tokens (the last "
            f"four are ({max(1, length - 4)}, {length}))."
        )
    return start, stop


def _contrast(model: Any, against: object, n: int) -> tuple[int, ...]:
    """One contrast token for each of ``n`` positions.

    Raises:
        TokenError: As ``span_logit``.
    """
    given = against.tolist() if hasattr(against, "tolist") else against
    if not isinstance(given, list | tuple):
        if not _is_whole(given):
            raise _unknown(against)
        return to_token_ids(model, [given], "contrast") * n
    if len(given) != n:
        raise TokenError(
            f"against has {len(given)} tokens, but the span has {n}; give one for each position, "
            "or one id (not in a list) for all of them."
        )
    return tuple(to_token_ids(model, [one], "contrast")[0] for one in given)
