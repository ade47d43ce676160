"""What is explained: a scalar of the logits, positive where the model prefers the target.

    Δℓ = mean logit of the target(s) − contrast term,     at one position.

An ``Objective`` is a function logits → scalar, so it also serves as the metric of
``transformer_lens.patching`` and ``attribution_patch``. Sign: positive relevance supports the
target (usually the wrong token the model wrote), negative the contrast (the right one). That is
the opposite of TransformerLens' usual ``logit_diff``, correct − incorrect. Over a batch the rows
are summed, so that each row's relevance is that of its own Δℓ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import TokenError
from .prompts import to_token_ids, token_names, vocab_size
from .rules import at_least_float32

Contrast = Literal["tokens", "top_k", "mean", "none"]
Pos = int | Sequence[int]


@dataclass(frozen=True)
class Objective:
    """A contrastive objective; make one with ``logit_diff`` or its sisters.

    Attributes:
        target: Token ids whose mean logit counts positive; empty stands for the top token.
        contrast: Token ids whose mean logit counts negative (``versus="tokens"``).
        versus: What is subtracted: those tokens, the mean of the ``k`` highest other logits, the
            mean of all logits, or nothing.
        k: For ``versus="top_k"``.
        pos: Position whose logits count, negative from the end, or one for each row of a batch.
        names: Name of each target and contrast token, for printing: typed back, it means that
            token (``prompts.token_names``).
    """

    target: tuple[int, ...]
    contrast: tuple[int, ...] = ()
    versus: Contrast = "tokens"
    k: int = 0
    pos: int | tuple[int, ...] = -1
    names: tuple[str, ...] = ()

    def __call__(self, logits: Float[Tensor, "batch pos vocab"]) -> Float[Tensor, ""]:
        """Δℓ summed over the batch, in logits.

        Raises:
            TokenError: the position or a token does not exist in these logits.
        """
        target, contrast = self.parts(logits)
        return target.sum() if contrast is None else (target - contrast).sum()

    def parts(
        self, logits: Float[Tensor, "batch pos vocab"]
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"] | None]:
        """The target term and the contrast term, one value a row; Δℓ is their difference."""
        rows = self._at_position(logits)
        ids = [*self.target, *self.contrast]
        if ids and max(ids) >= rows.shape[-1]:
            raise TokenError(f"Token id {max(ids)} is outside these {rows.shape[-1]} logits.")
        target = rows[:, list(self.target)].mean(-1) if self.target else rows.amax(-1)
        if self.versus == "none":
            return target, None
        if self.versus == "mean":
            return target, rows.mean(-1)
        if self.versus == "tokens":
            return target, rows[:, list(self.contrast)].mean(-1)
        others = rows.detach().clone()
        others[:, list(self.target)] = -torch.inf
        return target, rows.gather(-1, others.topk(self.k, dim=-1).indices).mean(-1)

    def _at_position(self, logits: Tensor) -> Tensor:
        if logits.ndim == 2:
            logits = logits[None]
        batch, length, _ = logits.shape
        positions = [self.pos] * batch if isinstance(self.pos, int) else list(self.pos)
        if len(positions) != batch:
            raise TokenError(f"{len(positions)} positions were given for a batch of {batch} rows.")
        for p in positions:
            if not -length <= p < length:
                raise TokenError(f"Position {p} does not exist in a prompt of {length} tokens.")
        rows = logits[torch.arange(batch, device=logits.device), positions]
        return at_least_float32(rows)

    def _describe(self) -> tuple[str, str]:
        texts = self.names or tuple(f"id:{i}" for i in (*self.target, *self.contrast))
        quoted = [repr(text) for text in texts]

        def term(some: list[str]) -> str:
            return f"logit({some[0]})" if len(some) == 1 else f"mean logit of {{{', '.join(some)}}}"

        n = len(self.target)
        target = term(quoted[:n]) if n else "top logit"
        contrasts = {
            "none": "",
            "mean": "mean of all logits",
            "top_k": f"mean of the {self.k} highest other logits",
        }
        contrast = contrasts.get(self.versus)
        return target, term(quoted[n:]) if contrast is None else contrast

    def texts(self) -> tuple[str, str]:
        """The target's text and what it is contrasted with, for labels."""
        target, contrast = self._describe()
        names, n = self.names, len(self.target)
        target = names[0] if n == 1 and names else target
        contrast = names[n] if len(self.contrast) == 1 and names else contrast
        return target, contrast

    def __str__(self) -> str:
        target, contrast = self._describe()
        where = "the last position" if self.pos == -1 else f"position {self.pos}"
        difference = f"{target} − {contrast}" if contrast else target
        sign = f"positive relevance supports {target}"
        sign += f", negative supports {contrast}" if contrast else ", negative speaks against it"
        return f"{difference} at {where} ({sign})"


def _pos(pos: Any) -> int | tuple[int, ...]:
    """Whole numbers of any library as Python's; nothing is rounded or taken for another."""
    plain = pos.tolist() if hasattr(pos, "tolist") else pos  # NumPy, torch
    many = isinstance(plain, list | tuple)
    for p in plain if many else [plain]:
        if isinstance(p, bool) or not isinstance(p, Integral):
            raise TokenError(
                f"pos={pos!r} is no position; use a whole number (negative counts from the end), "
                "or one for each row of a batch."
            )
    return tuple(int(p) for p in plain) if many else int(plain)


def logit_diff(model: Any, target: object, contrast: object, pos: Pos = -1) -> Objective:
    """Δℓ = logit(target) − logit(contrast): why this token and not that one?

    Args:
        model: A ``TransformerBridge``.
        target: What the model preferred: a single-token string, an id (also as text, ``id:123``),
            or a set of these (a set counts as its mean logit). A leading space counts.
        contrast: What it should have preferred, likewise.
        pos: Position whose next token is explained; one for each row of a batch, if they differ.

    Raises:
        TokenError: a string that is not one token or may be several, an id out of range, the
            same token on both sides.
    """
    targets = to_token_ids(model, target, "target")
    contrasts = to_token_ids(model, contrast, "contrast")
    both = sorted(set(targets) & set(contrasts))
    if both:
        raise TokenError(
            f"Target and contrast share the token {token_names(model, both)[0]!r} (id {both[0]}); "
            "their difference would cancel it. Give two different tokens."
        )
    names = token_names(model, (*targets, *contrasts))
    return Objective(targets, contrasts, "tokens", pos=_pos(pos), names=names)


def target_logit(model: Any, target: object, pos: Pos = -1) -> Objective:
    """The logit of one token (or the mean of a set), contrasted with nothing."""
    ids = to_token_ids(model, target, "target")
    return Objective(ids, (), "none", pos=_pos(pos), names=token_names(model, ids))


def top_logit(pos: Pos = -1) -> Objective:
    """The highest logit, whichever token has it, contrasted with nothing."""
    return Objective((), (), "none", pos=_pos(pos))


def logit_minus_top_k(model: Any, target: object, k: int, pos: Pos = -1) -> Objective:
    """The target's logit minus the mean of the ``k`` highest logits of other tokens.

    Raises:
        TokenError: also if ``k`` is not between 1 and the number of other tokens.
    """
    ids = to_token_ids(model, target, "target")
    others = vocab_size(model) - len(ids)
    if not 1 <= k <= others:
        raise TokenError(f"k={k} must lie between 1 and the {others} other tokens.")
    return Objective(ids, (), "top_k", k, _pos(pos), token_names(model, ids))


def logit_minus_mean(model: Any, target: object, pos: Pos = -1) -> Objective:
    """The target's logit minus the mean of all logits."""
    ids = to_token_ids(model, target, "target")
    return Objective(ids, (), "mean", pos=_pos(pos), names=token_names(model, ids))


def question(
    model: Any,
    objective: Callable[[Tensor], Tensor] | None,
    target: object,
    contrast: object,
    pos: Pos,
) -> Callable[[Tensor], Tensor]:
    """The objective itself, or ``logit_diff`` of both tokens.

    Raises:
        TypeError: neither an objective nor both tokens, or both ways at once, or ``pos`` beside
            an objective.
    """
    given = objective is not None, target is not None, contrast is not None
    if given not in ((True, False, False), (False, True, True)):
        raise TypeError(
            "Give either an objective, such as clrp.logit_diff(model, ...), as third argument, or "
            "both tokens, target=... and contrast=... (clrp.next_token_table(model, prompt) lists "
            "candidates for the contrast)."
        )
    if objective is not None and pos != -1:
        raise TypeError(
            "pos belongs to target and contrast; an objective has its own, as in "
            "clrp.logit_diff(model, target, contrast, pos=...)."
        )
    return objective if objective is not None else logit_diff(model, target, contrast, pos)


def questions(
    model: Any,
    objective: Callable[[Tensor], Tensor] | None,
    objectives: Sequence[Callable[[Tensor], Tensor]] | None,
    target: object,
    contrast: object,
    pos: Pos,
) -> list[Callable[[Tensor], Tensor]]:
    """Several objectives as given, or the one of ``question``.

    Raises:
        TypeError: both ways at once, something that is no list of objectives, or as ``question``.
        ValueError: no objective in the list.
    """
    if objectives is None:
        return [question(model, objective, target, contrast, pos)]
    if objective is not None or target is not None or contrast is not None or pos != -1:
        raise TypeError(
            "objectives=[...] is the whole question; leave out objective, target, contrast and "
            "pos, and give each objective its own, as in [clrp.logit_diff(model, target, contrast, "
            "pos=...), ...]."
        )
    if isinstance(objectives, str) or not isinstance(objectives, Sequence):
        raise TypeError(
            f"objectives={objectives!r} must be a list, such as "
            "[clrp.logit_diff(model, target, contrast), ...]; one alone is the third argument."
        )
    if not objectives:
        raise ValueError("objectives=[] asks nothing; give one objective or more.")
    wrong = next((x for x in objectives if not callable(x)), None)
    if wrong is not None:
        raise TypeError(
            f"{wrong!r} among objectives is not one; use clrp.logit_diff(model, target, contrast)."
        )
    return list(objectives)


def described(
    objective: Callable[[Tensor], Tensor], logits: Tensor, value: Tensor
) -> dict[str, Any]:
    """What results say of an objective: delta, target_logit, contrast_logit and texts."""
    delta = float(value)
    if not isinstance(objective, Objective):
        name = getattr(objective, "__name__", repr(objective))
        return {"delta": delta, "target_logit": delta, "contrast_logit": None,
                "objective": name, "target": "", "contrast": ""}  # fmt: skip
    target, contrast = objective.parts(logits)
    texts = objective.texts()
    return {
        "delta": delta,
        "target_logit": float(target[0]),
        "contrast_logit": None if contrast is None else float(contrast[0]),
        "objective": str(objective),
        "target": texts[0],
        "contrast": texts[1],
    }
