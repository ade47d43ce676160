"""Runs of a prompt with some of its tokens removed: what becomes of the objective.

A removed token's embedding is set to zero, or the token is exchanged for another of the
vocabulary. Neither is a prompt the model was trained on: zeros are outside its inputs, random
tokens say something else instead of nothing. So both are there, and results name which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...errors import PromptError
from ...hooks.placement import own_hooks
from ...inputs.bridge import hook_points, public_name, require_bridge
from ...inputs.tokens import special_ids, special_mask, to_single_prompt, to_tokens, vocab_size

Replace = Literal["zero", "random"]


@dataclass(frozen=True, eq=False)
class Removal:
    """A prompt, its objective, which tokens may be removed, and by what they are replaced.

    Attributes:
        tokens: The prompt.
        removable: Positions that may be removed.
        stand_ins: Token ids that replace removed ones, a row a draw; None for zero embeddings.
        how: In words, for results.
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
        """The positions that may be removed, ascending."""
        return torch.nonzero(self.removable)[:, 0]

    def values(
        self, removed: Bool[Tensor, "run pos"], what: str = "removing tokens"
    ) -> Float[Tensor, " run"]:
        """The objective with the given positions removed, averaged over draws, in float64."""
        from tqdm.auto import tqdm

        different, back = torch.unique(removed, dim=0, return_inverse=True)
        draws = 1 if self.stand_ins is None else len(self.stand_ins)
        runs = [(row, draw) for draw in range(draws) for row in range(len(different))]
        found = torch.zeros(len(different), dtype=torch.float64)
        starts = range(0, len(runs), self.batch_size)
        for start in tqdm(starts, desc=what, leave=False, disable=not self.progress):
            rows, drawn = zip(*runs[start : start + self.batch_size], strict=True)
            logits = self._logits(different[list(rows)], list(drawn))
            for row, line in zip(rows, logits, strict=True):
                found[row] += float(self.objective(line[None])) / draws
        return found[back]

    def _logits(self, gone: Tensor, drawn: list[int]) -> Tensor:
        gone = gone.to(self.tokens.device)
        tokens = self.tokens.expand(len(gone), -1)
        hooks = []
        if self.stand_ins is None:

            def silence(embedded: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
                return embedded.masked_fill(gone[..., None], 0.0)

            hooks = [(public_name(hook_points(self.model), "embed.hook_out"), silence)]
        else:
            tokens = torch.where(gone, self.stand_ins[drawn].to(tokens), tokens)
        with torch.no_grad(), own_hooks(self.model, hooks):
            logits: Tensor = self.model(tokens)
        return logits


def removal(
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
    """A ``Removal`` of checked arguments; see ``faithfulness_curves`` for what they mean.

    Raises:
        PromptError: the prompt, or tokens to replace its own with, cannot be used.
        ValueError: another argument is out of range, or nothing is left to remove.
    """
    require_bridge(model)
    tokens = to_single_prompt(model, prompt, prepend_bos)
    n = tokens.shape[1]
    if batch_size < 1 or draws < 1:
        raise ValueError(f"batch_size={batch_size} and draws={draws} must be 1 or more.")
    special = special_ids(model)
    kept = torch.zeros(n, dtype=torch.bool)
    if not include_special:
        kept |= special_mask(tokens[0].cpu(), special)
        kept[0] = True
    excluded = [int(p) for p in exclude]
    outside = [p for p in excluded if not -n <= p < n]
    if outside:
        raise ValueError(f"exclude= names position {outside[0]}, outside the prompt's {n} tokens.")
    kept[excluded] = True
    if bool(kept.all()):
        raise ValueError(
            "Nothing is left to remove: every token is special, the first one, or excluded. "
            "Use include_special=True, or exclude fewer."
        )
    stand_ins, how = _stand_ins(model, tokens, replace, draws, pool, seed, special)
    return Removal(model, tokens, objective, ~kept, stand_ins, how, batch_size, progress)


def _stand_ins(
    model: Any,
    tokens: Tensor,
    replace: Replace | Tensor,
    draws: int,
    pool: Tensor | None,
    seed: int,
    special: list[int],
) -> tuple[Tensor | None, str]:
    if isinstance(replace, Tensor):
        given = to_tokens(model, replace)
        if given.shape[1] != tokens.shape[1]:
            raise PromptError(
                f"replace= has {given.shape[1]} tokens and the prompt {tokens.shape[1]}: give one "
                "token id for each position of the prompt, [pos] or [draw, pos]."
            )
        return given, "the given tokens"
    if replace == "zero":
        return None, "zero embeddings"
    if replace != "random":
        raise ValueError(
            f"replace={replace!r} is unknown; use 'zero', 'random', or token ids [pos]."
        )
    if pool is None:
        known = vocab_size(model)
        if model.tokenizer is not None:  # embeddings beyond the tokenizer's words were never used
            known = min(known, len(model.tokenizer))
        pool = torch.arange(known)
        pool = pool[~torch.isin(pool, torch.tensor(special, dtype=pool.dtype))]
    pool = to_tokens(model, pool.flatten().to(tokens.device))[0].cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pool), (draws, tokens.shape[1]), generator=generator)
    return pool[chosen], f"random tokens ({draws} draws, seed {seed})"
