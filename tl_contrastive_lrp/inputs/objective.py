"""Objectives: a scalar of the logits to explain, positive where the model prefers the target.

    Δℓ = mean logit of the target(s) − contrast term,     at one position.

Any other differentiable function logits → scalar will do, such as a sum over several positions;
``positions_of`` determines from its gradient which positions those are.

An ``Objective`` is a function logits → scalar, so it also serves as the metric of
``transformer_lens.patching`` and ``attribution_patch``. Sign: positive relevance supports the
target (usually the wrong token that the model wrote), negative the contrast (the right one). That
is the opposite of TransformerLens' usual ``logit_diff``, correct − incorrect. Over a batch the rows
are summed, so that each row's relevance is that of its own Δℓ.

The file is long because it has the public functions that make objectives, with their examples, and
all functions that determine the positions and tokens of an objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from ..errors import ModelStateError, TokenError
from ..rules.functions import at_least_float32
from ..rules.precision import LOW, WideGradient, plain
from .located import LocatedObjective
from .tokens import to_token_ids, token_names, vocab_size

Contrast = Literal["tokens", "top_k", "mean", "none"]

Pos = int | Sequence[int]


@dataclass(frozen=True)
class Objective(LocatedObjective):
    """A contrastive objective in logits, as ``logit_diff`` and its relatives make it.

    Positive relevance supports the target, negative the contrast.

    Attributes:
        target: Token ids whose mean logit counts positive; empty stands for the top token.
        contrast: Token ids whose mean logit counts negative (``versus="tokens"``).
        versus: What is subtracted: those tokens, the mean of the ``k`` highest other logits, the
            mean of all logits, or nothing.
        k: For ``versus="top_k"``.
        pos: Position whose logits count, negative from the end, or one for each row of a batch of
            two or more. Logits do not show which tokens of a row are padding; ``with_mask``
            accounts for it.
        names: Name of each target and contrast token, for printing. Given as a target or contrast,
            a name means that token.

    Raises:
        TokenError: ``pos`` is neither a whole number nor a list of one for each row.

    Example:
        >>> objective = clrp.Objective(target=(3,), contrast=(5,))
        >>> float(objective(torch.tensor([[[0.0, 0.0, 0.0, 2.5, 0.0, 1.0]]])))
        1.5
    """

    target: tuple[int, ...]
    contrast: tuple[int, ...] = ()
    versus: Contrast = "tokens"
    k: int = 0
    pos: int | tuple[int, ...] = -1
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pos", _pos(self.pos))

    def __call__(self, logits: Float[Tensor, "*batch pos vocab"]) -> Float[Tensor, ""]:
        """Δℓ summed over the batch, in logits.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: The position or a token does not exist in these logits.
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
            Both terms in logits; the contrast term is None if nothing is subtracted.

        Raises:
            TokenError: The position or a token does not exist in these logits.

        Example:
            >>> logits = model(case.prompt)
            >>> target, contrast = objective.parts(logits)
            >>> torch.equal((target - contrast).sum(), objective(logits))
            True
        """
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

    def with_mask(self, attention_mask: Shaped[Tensor, "batch pos"]) -> Objective:
        """The same objective for padded rows: negative positions count from the last real token.

        ``run_with_relevance(..., attention_mask=...)`` does this automatically. Inside ``lrp``,
        where you run the model yourself, call ``objective.with_mask(mask)(logits)``.

        Args:
            attention_mask: 0 at padding, on whichever side, and 1 elsewhere.

        Raises:
            TokenError: A position is padding, or a row has too few tokens.

        Example:
            >>> objective.with_mask(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])).pos
            (2, 3)
        """
        real = attention_mask.detach().cpu() != 0
        if bool(real.all()):
            return self
        length, positions = real.shape[1], list[int]()
        for row, p in enumerate(self._by_row(len(real))):
            tokens = torch.nonzero(real[row])[:, 0].tolist()
            if p < 0 and -p > len(tokens):
                raise TokenError(
                    f"Position {p} does not exist in row {row}, which has {len(tokens)} tokens "
                    "beside its padding."
                )
            if p >= length:
                raise TokenError(f"Position {p} does not exist in a prompt of {length} tokens.")
            if p >= 0 and not bool(real[row, p]):
                raise TokenError(
                    f"Position {p} of row {row} is padding (attention_mask is 0 there). Use pos=-1 "
                    "for each row's last token, or a list of one position for each row."
                )
            positions.append(p if p >= 0 else tokens[p])
        return replace(self, pos=tuple(positions) if len(positions) > 1 else positions[0])

    def positions(self, length: int) -> tuple[int, ...]:
        """The one position whose logits are read, from 0.

        Args:
            length: How many tokens the prompt has.

        Raises:
            TokenError: The prompt has no such position, or there is one for each row of a batch.

        Example:
            >>> clrp.top_logit(pos=-2).positions(10)
            (8,)
        """
        return (one_position(self.pos, length),)

    def at(self, read: tuple[int, ...], length: int) -> Objective:
        """The same objective as a function of some positions' logits, [1, len(read), vocab].

        Args:
            read: Rising positions from 0, the objective's own among them.
            length: How many tokens the prompt has.

        Raises:
            TokenError: As ``positions``.

        Example:
            >>> clrp.top_logit(pos=-2).at((3, 8), 10).pos
            1
        """
        return replace(self, pos=read.index(one_position(self.pos, length)))

    def target_is_top(self, logits: Float[Tensor, "1 pos vocab"]) -> bool:
        """Whether one of the target tokens has the highest logit.

        Args:
            logits: As the model returns them.

        Raises:
            TokenError: The position does not exist in these logits.

        Example:
            >>> objective.target_is_top(model(case.prompt))
            True
        """
        return int(self._at_position(logits)[0].argmax()) in self.target

    def _by_row(self, batch: int) -> list[int]:
        positions = [self.pos] * batch if isinstance(self.pos, int) else list(self.pos)
        if len(positions) != batch:
            raise TokenError(f"{len(positions)} positions were given for a batch of {batch} rows.")
        return positions

    def _at_position(self, logits: Tensor) -> Tensor:
        if logits.ndim == 2:
            logits = logits[None]
        batch, length, _ = logits.shape
        positions = self._by_row(batch)
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
        """The target's text and what it is contrasted with, for labels.

        Example:
            >>> objective.texts() == (case.target, case.contrast)
            True
        """
        target, contrast = self._describe()
        names, n = self.names, len(self.target)
        target = names[0] if n == 1 and names else target
        contrast = names[n] if len(self.contrast) == 1 and names else contrast
        return target, contrast

    def __str__(self) -> str:
        target, contrast = self._describe()
        where = "the last position" if self.pos == -1 else f"position {self.pos}"
        if not isinstance(self.pos, int):
            where = f"positions {', '.join(map(str, self.pos))} of the rows"
        difference = f"{target} − {contrast}" if contrast else target
        sign = f"positive relevance supports {target}"
        sign += f", negative supports {contrast}" if contrast else ", negative speaks against it"
        return f"{difference} at {where} ({sign})"


def _pos(pos: Any) -> int | tuple[int, ...]:
    """Positions given as numbers of any library, as Python integers; nothing is rounded."""
    given = pos.tolist() if hasattr(pos, "tolist") else pos  # NumPy, torch
    many = isinstance(given, list | tuple)
    for p in given if many else [given]:
        if isinstance(p, bool) or not isinstance(p, Integral):
            raise TokenError(
                f"pos={pos!r} is no position; use a whole number (negative counts from the end), "
                "or one for each row of a batch."
            )
    if many and len(given) < 2:
        suggestion = f"pos={int(given[0])}" if given else "a whole number, such as pos=-1"
        raise TokenError(
            f"pos={pos!r} is a list of {len(given)}; use {suggestion}. A list has one position for "
            "each row of a batch of two or more."
        )
    return tuple(int(p) for p in given) if many else int(given)


def one_position(pos: Any, length: int) -> int:
    """A position of one prompt, counted from 0.

    Args:
        pos: A whole number of any library, negative from the end.
        length: How many tokens the prompt has.

    Raises:
        TokenError: Something else, or a position that the prompt does not have.
    """
    at = _pos(pos)
    if not isinstance(at, int):
        raise _of_rows(at)
    if not -length <= at < length:
        raise TokenError(f"Position {at} does not exist in a prompt of {length} tokens.")
    return at % length


def _of_rows(pos: tuple[int, ...]) -> TokenError:
    return TokenError(
        f"pos={list(pos)} has one position for each row of a batch, but this is about one prompt: "
        f"use one whole number, such as pos={pos[-1]} (negative counts from the end). To explain "
        "several positions of one prompt, add objectives up: "
        "lambda logits: first(logits) + second(logits)."
    )


def for_one_prompt(objective: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The objective, if it applies to one prompt.

    Raises:
        TokenError: It has a position for each row of a batch.
    """
    if isinstance(objective, Objective) and not isinstance(objective.pos, int):
        raise _of_rows(objective.pos)
    return objective


def read_rows(
    objective: Callable[[Tensor], Tensor], logits: Float[Tensor, "batch pos vocab"]
) -> Bool[Tensor, "batch pos"]:
    """Where the objective's value depends on the logits, which is where its gradient is not 0.

    Raises:
        ModelStateError: Its value is no differentiable number.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (logits.clone() if logits.is_inference() else logits.detach()).requires_grad_(True)
        value = objective(leaf)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ModelStateError(
                "The objective must turn logits [batch, pos, vocab] into one differentiable "
                "number, computed from its argument. Use clrp.logit_diff(...), or a function that "
                "sums over the batch and detaches nothing."
            )
        # A mean over many logits has a gradient that float16 would round to 0.
        begin = torch.ones_like(value, dtype=torch.float32)
        start = WideGradient(begin, value.dtype) if leaf.dtype in LOW else None
        (gradient,) = torch.autograd.grad(value, [leaf], start, allow_unused=True)
    if gradient is None:
        return torch.zeros(logits.shape[:2], dtype=torch.bool)
    rows: Tensor = (plain(gradient) != 0).any(-1).cpu()
    return rows


def positions_of(
    objective: Callable[[Tensor], Tensor], logits: Float[Tensor, "1 pos vocab"], length: int
) -> tuple[int, ...]:
    """The positions that an objective of one prompt explains, ascending from 0.

    A ``LocatedObjective`` names its own. For any other function they are the positions at whose
    logits its gradient is not 0.

    Args:
        objective: Any function logits → scalar.
        logits: Those of the whole prompt; not used for a ``LocatedObjective``.
        length: How many tokens the prompt has.

    Raises:
        TokenError: As ``one_position``.
        ModelStateError: Its gradient is 0 everywhere.
    """
    if isinstance(objective, LocatedObjective):
        return objective.positions(length)
    positions = torch.nonzero(read_rows(objective, logits)[0])[:, 0].tolist()
    if not positions:
        raise ModelStateError(
            "The objective's gradient is 0 at every logit of this prompt (is it clipped, or a "
            "comparison?), so all relevance would be 0 and no position is explained. Give one that "
            "changes with the logits."
        )
    return tuple(positions)


def positions_read(
    objectives: Sequence[Callable[[Tensor], Tensor]], length: int
) -> tuple[int, ...] | None:
    """The positions whose logits the objectives read, rising; None if it is not known of one."""
    read: set[int] = set()
    for objective in objectives:
        if not isinstance(objective, LocatedObjective):
            return None
        try:
            read |= {*objective.positions(length)}
        except TokenError:
            return None  # evaluating the objective raises the error
    return tuple(sorted(read))


def in_words(positions: Sequence[int], most: int = 6) -> str:
    """Ascending positions as text, "3, 5-8", shortened in the middle if there are too many."""
    runs: list[list[int]] = []
    for p in positions:
        if runs and runs[-1][-1] == p - 1:
            runs[-1] = [runs[-1][0], p]
        else:
            runs.append([p])
    texts = ["-".join(map(str, run)) for run in runs]
    if len(texts) > most:
        texts = [*texts[: most - 1], "...", texts[-1]]
    return ", ".join(texts)


def logit_diff(model: Any, target: object, contrast: object, pos: Pos = -1) -> Objective:
    """Δℓ = logit(target) − logit(contrast), in logits: why this token and not that one?

    Positive relevance supports the target, negative the contrast.

    Args:
        model: A ``TransformerBridge``.
        target: What the model preferred: a single-token string, an id (also as text, ``id:123``),
            or a set of these, which counts as its mean logit. A leading space matters.
        contrast: What it should have preferred, in the same form.
        pos: Position whose next token is explained, negative from the end; one for each row of a
            batch, if they differ. Under an ``attention_mask`` given to ``run_with_relevance``, -1
            is each row's last real token.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        TokenError: A string that is not one token or may be several, an id out of range, the same
            token on both sides, or a ``pos`` that is neither a whole number nor a list of one for
            each row.

    Example:
        >>> delta = clrp.logit_diff(model, target=case.target, contrast=case.contrast)
        >>> bool(delta(model(case.prompt)) > 0)  # the model prefers the target
        True
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
    """The logit of one token (or the mean of a set), contrasted with nothing.

    Args:
        model: A ``TransformerBridge``.
        target: The token or set of tokens, as for ``logit_diff``.
        pos: Position or positions, as for ``logit_diff``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        TokenError: As ``logit_diff``.

    Example:
        >>> logits = model(case.prompt)
        >>> target, _ = objective.parts(logits)
        >>> torch.equal(clrp.target_logit(model, case.target)(logits), target.sum())
        True
    """
    ids = to_token_ids(model, target, "target")
    return Objective(ids, (), "none", pos=_pos(pos), names=token_names(model, ids))


def top_logit(pos: Pos = -1) -> Objective:
    """The highest logit, whichever token has it, contrasted with nothing.

    Args:
        pos: Position or positions, as for ``logit_diff``.

    Raises:
        TokenError: ``pos`` is neither a whole number nor a list of one for each row.

    Example:
        >>> logits = model(case.prompt)
        >>> torch.equal(clrp.top_logit()(logits), logits[0, -1].max())
        True
    """
    return Objective((), (), "none", pos=_pos(pos))


def logit_minus_top_k(model: Any, target: object, k: int, pos: Pos = -1) -> Objective:
    """The target's logit minus the mean of the ``k`` highest logits of other tokens.

    Args:
        model: A ``TransformerBridge``.
        target: The token or set of tokens, as for ``logit_diff``.
        k: How many other tokens, at least 1.
        pos: Position or positions, as for ``logit_diff``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        TokenError: As ``logit_diff``; also if ``k`` is not between 1 and the number of other
            tokens.

    Example:
        >>> logits = model(case.prompt)
        >>> one, ten = (clrp.logit_minus_top_k(model, case.target, k)(logits) for k in (1, 10))
        >>> bool(one < ten)  # the other tokens' mean falls with k
        True
    """
    ids = to_token_ids(model, target, "target")
    others = vocab_size(model) - len(ids)
    if not 1 <= k <= others:
        raise TokenError(f"k={k} must lie between 1 and the {others} other tokens.")
    return Objective(ids, (), "top_k", k, _pos(pos), token_names(model, ids))


def logit_minus_mean(model: Any, target: object, pos: Pos = -1) -> Objective:
    """The target's logit minus the mean of all logits.

    Args:
        model: A ``TransformerBridge``.
        target: The token or set of tokens, as for ``logit_diff``.
        pos: Position or positions, as for ``logit_diff``.

    Raises:
        TypeError: ``model`` is not a ``TransformerBridge``.
        TokenError: As ``logit_diff``.

    Example:
        >>> logits, mean_diff = model(case.prompt), clrp.logit_minus_mean(model, case.target)
        >>> torch.allclose(mean_diff(logits), mean_diff(logits + 1.0), atol=1e-4)
        True
    """
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
        TypeError: Neither or both of an objective and two tokens, an objective that is not a
            function, or ``pos`` together with an objective.
        TokenError: ``pos`` is no position of one prompt.
    """
    given = objective is not None, target is not None, contrast is not None
    if given not in ((True, False, False), (False, True, True)):
        raise TypeError(
            "Give either an objective, such as clrp.logit_diff(model, ...), as third argument, or "
            "both tokens, target=... and contrast=... (clrp.next_token_table(model, prompt) lists "
            "candidates for the contrast)."
        )
    if objective is not None and not callable(objective):
        raise TypeError(
            f"The objective {objective!r} is not one; use clrp.logit_diff(model, target, "
            "contrast), or give target=... and contrast=... by name."
        )
    if objective is not None and _pos(pos) != -1:
        raise TypeError(
            "pos belongs to target and contrast; an objective has its own, as in "
            "clrp.logit_diff(model, target, contrast, pos=...)."
        )
    return for_one_prompt(
        objective if objective is not None else logit_diff(model, target, contrast, pos)
    )


def require_objectives(objectives: object) -> list[Callable[[Tensor], Tensor]]:
    """Check a list of objectives, each of a single prompt.

    Args:
        objectives: What the caller gave.

    Raises:
        TypeError: It is no list, or one of its items is no function.
        ValueError: The list is empty.
        TokenError: As ``for_one_prompt``.
    """
    if isinstance(objectives, str) or not isinstance(objectives, Sequence):
        raise TypeError(
            f"objectives={objectives!r} must be a list, such as "
            "[clrp.logit_diff(model, target, contrast), ...]; for a single objective there are "
            "clrp.attribute and clrp.attribution_graph."
        )
    if not objectives:
        raise ValueError("objectives=[] is empty; give one objective or more.")
    wrong = next((x for x in objectives if not callable(x)), None)
    if wrong is not None:
        raise TypeError(
            f"{wrong!r} among objectives is not one; use clrp.logit_diff(model, target, contrast)."
        )
    return [for_one_prompt(one) for one in objectives]


def check_earlier(name: str, pos: int, others: str, earlier: tuple[int, ...]) -> None:
    """Check the further positions explained.

    Raises:
        ValueError: They are not whole numbers from 0 that rise and lie before ``pos``.
    """
    whole = all(isinstance(p, int) and not isinstance(p, bool) for p in earlier)
    if earlier and not (whole and all(a < b for a, b in pairwise((-1, *earlier, pos)))):
        raise ValueError(
            f"{others}={earlier!r} must be positions from 0 that rise and lie before {name}={pos}."
        )
