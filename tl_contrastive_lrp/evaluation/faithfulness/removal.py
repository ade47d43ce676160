"""The value of an objective when some of a prompt's tokens are removed.

A removed token's embedding is set to zero, or the token is replaced by another of the vocabulary.
Neither gives a prompt like those the model was trained on: zero embeddings do not occur there, and
random tokens add information instead of removing it. Both are therefore offered, and results name
the one that was used.

Only the logits that the objective reads are computed, where it says which (``logit_diff`` and the
package's other objectives do); a plain function of the logits gets those of all positions, for
``batch_size`` prompts at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...attribution.result import Attribution
from ...engine.plain import sees_unembed, unembedded
from ...errors import PromptError
from ...hooks.placement import own_hooks
from ...hooks.user_hooks import user_hooks
from ...inputs.bridge import LEAVES, hook_points, public_name, require_bridge
from ...inputs.located import LocatedObjective
from ...inputs.tokens import drawable_ids, special_ids, special_mask, to_single_prompt, to_tokens

Replace = Literal["zero", "random"]


@dataclass(frozen=True, eq=False)
class Removal:
    """A prompt, its objective, the tokens that may be removed and what replaces them.

    Attributes:
        model: The bridge.
        tokens: The prompt.
        objective: Maps logits to Δℓ.
        removable: Positions that may be removed.
        stand_ins: Token ids that replace removed ones, one row per draw. None for zero embeddings.
        how: What replaces removed tokens, in words, for results.
        batch_size: Prompts per forward pass.
        progress: Whether to show progress bars.
    """

    model: Any
    tokens: Int[Tensor, "1 pos"]
    objective: Callable[[Tensor], Tensor]
    removable: Bool[Tensor, " pos"]
    stand_ins: Int[Tensor, "draw pos"] | None
    how: str
    batch_size: int
    progress: bool

    @property
    def positions(self) -> Int[Tensor, " removable"]:
        """The positions that may be removed, in ascending order."""
        return torch.nonzero(self.removable)[:, 0]

    def checked(self, name: str, ranking: Attribution | Tensor) -> Float[Tensor, " pos"]:
        """Scores in float64, if there is a finite one for each position that may be removed.

        Args:
            name: What messages call them.
            ranking: The scores.

        Raises:
            ValueError: There is not.
        """
        scores = ranking.tokens if isinstance(ranking, Attribution) else ranking
        n = self.tokens.shape[1]
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (n,):
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"Scores {name!r} are {got}; the prompt needs a tensor [{n}].")
        scores = scores.detach().cpu().double()
        if not bool(torch.isfinite(scores[self.removable]).all()):
            raise ValueError(f"Scores {name!r} hold NaN or infinity.")
        return scores

    def values(
        self, removed: Bool[Tensor, "run pos"], what: str = "removing tokens"
    ) -> Float[Tensor, " run"]:
        """Return the objective with these positions removed, averaged over draws, in float64.

        Args:
            removed: The positions that each run removes.
            what: The title of the progress bar.
        """
        from tqdm.auto import tqdm

        masks, mask_of_run = torch.unique(removed, dim=0, return_inverse=True)
        draws = 1 if self.stand_ins is None else len(self.stand_ins)
        runs = [(row, draw) for draw in range(draws) for row in range(len(masks))]
        values = torch.zeros(len(masks), dtype=torch.float64)
        starts = range(0, len(runs), self.batch_size)
        for start in tqdm(starts, desc=what, leave=False, disable=not self.progress):
            rows, draw_of_row = zip(*runs[start : start + self.batch_size], strict=True)
            logits = self.logits(masks[list(rows)], list(draw_of_row))
            for row, logits_of_run in zip(rows, logits, strict=True):
                values[row] += float(self._of_read(logits_of_run[None])) / draws
        return values[mask_of_run]

    def logits(
        self, removed: Bool[Tensor, "run pos"], draw_of_run: list[int]
    ) -> Float[Tensor, "run read vocab"]:
        """The logits of one forward with these positions removed, at every position that is read.

        Args:
            removed: The positions that each run removes.
            draw_of_run: The draw of replacements that each run uses.
        """
        removed = removed.to(self.tokens.device)
        tokens = self.tokens.expand(len(removed), -1)
        hooks = []
        if self.stand_ins is None:

            def set_to_zero(embedded: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                return embedded.masked_fill(removed[..., None], 0.0)

            hooks = [(public_name(hook_points(self.model), LEAVES[0]), set_to_zero)]
        else:
            tokens = torch.where(removed, self.stand_ins[draw_of_run].to(tokens), tokens)
        only = nullcontext() if self._read is None else unembedded(self.model, self._read)
        with torch.no_grad(), own_hooks(self.model, hooks), only:
            logits: Tensor = self.model(tokens)
        return logits

    @cached_property
    def _read(self) -> tuple[int, ...] | None:
        """The positions whose logits are computed; None for all.

        All are, where the objective does not say which it reads, or a hook of the user's sees them.
        """
        if not isinstance(self.objective, LocatedObjective):
            return None
        if sees_unembed(user_hooks(self.model)):
            return None
        return self.objective.positions(self.tokens.shape[1])

    @cached_property
    def _of_read(self) -> Callable[[Tensor], Tensor]:
        """The objective as a function of the logits that are computed."""
        if self._read is None:
            return self.objective
        assert isinstance(self.objective, LocatedObjective)
        return self.objective.at(self._read, self.tokens.shape[1])


def prepare_removal(
    model: Any,
    prompt: str | Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    replace: Replace | Tensor = "zero",
    draws: int = 4,
    pool: Tensor | None = None,
    seed: int = 0,
    exclude: Iterable[int] = (),
    include_special: bool = False,
    batch_size: int = 16,
    progress: bool = True,
    prepend_bos: bool | None = None,
) -> Removal:
    """Check the arguments that ``faithfulness_curves`` describes and build a ``Removal``.

    Raises:
        PromptError: The prompt, or the token ids to replace its own with, cannot be used.
        ValueError: Another argument is out of range, or no token can be removed.
    """
    require_bridge(model)
    tokens = to_single_prompt(model, prompt, prepend_bos)
    n = tokens.shape[1]
    if batch_size < 1 or draws < 1:
        raise ValueError(f"batch_size={batch_size} and draws={draws} must be 1 or more.")
    special = special_ids(model)
    protected = torch.zeros(n, dtype=torch.bool)
    if not include_special:
        protected |= special_mask(tokens[0].cpu(), special)
        protected[0] = True
    excluded = [int(p) for p in exclude]
    outside = [p for p in excluded if not -n <= p < n]
    if outside:
        raise ValueError(f"exclude= names position {outside[0]}, outside the prompt's {n} tokens.")
    protected[excluded] = True
    if bool(protected.all()):
        raise ValueError(
            "Nothing is left to remove: every token is special, the first one, or excluded. "
            "Use include_special=True, or exclude fewer."
        )
    stand_ins, how = _stand_ins(model, tokens, replace, draws, pool, seed)
    return Removal(model, tokens, objective, ~protected, stand_ins, how, batch_size, progress)


def _stand_ins(
    model: Any,
    tokens: Tensor,
    replace: Replace | Tensor,
    draws: int,
    pool: Tensor | None,
    seed: int,
) -> tuple[Tensor | None, str]:
    if isinstance(replace, Tensor):
        stand_ins = to_tokens(model, replace)
        if stand_ins.shape[1] != tokens.shape[1]:
            raise PromptError(
                f"replace= has {stand_ins.shape[1]} tokens and the prompt {tokens.shape[1]}: give "
                "one token id for each position of the prompt, [pos] or [draw, pos]."
            )
        return stand_ins, "the given tokens"
    if replace == "zero":
        return None, "zero embeddings"
    if replace != "random":
        raise ValueError(
            f"replace={replace!r} is unknown; use 'zero', 'random', or token ids [pos]."
        )
    if pool is None:
        pool = drawable_ids(model)
    pool = to_tokens(model, pool.flatten().to(tokens.device))[0].cpu()
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(pool), (draws, tokens.shape[1]), generator=generator)
    return pool[indices], f"random tokens ({draws} draws, seed {seed})"
