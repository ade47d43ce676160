"""Greedy completions in batches, and rollouts from a place inside one of them.

Texts are written by transformers' own ``generate`` on the model that the bridge wraps: left
padding, attention mask, argmax at each step, and no setting of the model's own generation file (a
repetition penalty would make the written token another one than the model's first choice).

What a chunk gives depends on the chunk and the settings alone. Batches are formed within it, in
order of length, so no other chunk, worker or earlier call can change a result. Another
``batch_size`` can: two tokens that tie within rounding may swap, as in every batched decoder. What
a case says is therefore not taken from a batch: its target, its rank and Δℓ come from one forward
of the case's ids alone, unpadded (``read``).

Rollouts of one completion share its prefix. ``read`` leaves a key-value cache of the whole text;
``roll`` repeats it for each branch and masks what comes after the branch's place, so only new
tokens are computed. Masked slots do not count as positions. Where a model's cache is not of the
plain kind (sliding windows, state spaces) the branches are written from their whole text.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import PromptError
from ...inputs.bridge import require_bridge
from ...inputs.devices import input_device
from ...inputs.tokens import str_tokens


@dataclass(frozen=True, eq=False)
class Reading:
    """One forward of a prompt and its completion.

    Attributes:
        ids: The prompt's ids and the completion's.
        n_prompt: How many of them are the prompt's.
        logits: Row i predicts token i of the completion; there is one more, for what would follow.
        cache: Keys and values of ``ids``, if the model's cache can be branched; else None.
    """

    ids: tuple[int, ...]
    n_prompt: int
    logits: Float[Tensor, "next vocab"]
    cache: Any


class Greedy:
    """A model that writes what it finds most probable.

    Args:
        model: A ``TransformerBridge``.
        batch_size: Rows written at once.

    Attributes:
        end_ids: Tokens that end a completion.
        n_ctx: The most tokens that the model reads.

    Raises:
        PromptError: The model has no tokenizer.
        ValueError: ``batch_size`` is not positive.
    """

    def __init__(self, model: Any, batch_size: int = 8) -> None:
        require_bridge(model)
        if model.tokenizer is None:
            raise PromptError("This model has no tokenizer, so it cannot complete texts.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a positive number.")
        self.model, self.batch_size = model, batch_size
        self._hf = model.original_model
        named = getattr(getattr(self._hf, "generation_config", None), "eos_token_id", None)
        ends = named if isinstance(named, list | tuple) else [named]
        known = {*ends, model.tokenizer.eos_token_id} - {None}
        self.end_ids: tuple[int, ...] = tuple(sorted(int(i) for i in known))
        self.n_ctx = int(model.cfg.n_ctx)
        self._keeps = "logits_to_keep" in inspect.signature(type(self._hf).forward).parameters

    def write(
        self, prompts: Sequence[Sequence[int]], limits: Sequence[int]
    ) -> list[tuple[int, ...]]:
        """Continue prompts greedily.

        Args:
            prompts: Ids of each.
            limits: The most new tokens of each.

        Returns:
            The new ids of each, with the token that ended it where one did.
        """
        written: list[tuple[int, ...]] = [()] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        for at in range(0, len(order), self.batch_size):
            rows = order[at : at + self.batch_size]
            longest = max(len(prompts[i]) for i in rows)
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for r, i in enumerate(rows):
                ids[r, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[r, longest - len(prompts[i]) :] = 1
            new = self._generate(ids, mask, max(limits[i] for i in rows))
            for r, i in enumerate(rows):
                written[i] = self._cut(new[r].tolist(), limits[i])
        return written

    @torch.inference_mode()
    def read(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> Reading:
        """Run one prompt and its completion, alone and unpadded.

        Args:
            prompt_ids: Ids of the prompt, at least one.
            completion_ids: Ids of the completion, or its beginning; may be empty.

        Returns:
            The logits at the completion, and a cache for ``roll``.
        """
        ids = (*prompt_ids, *completion_ids)
        n = len(completion_ids) + 1
        keep = {"logits_to_keep": n} if self._keeps else {}
        out = self._hf(
            input_ids=torch.tensor([ids], device=input_device(self.model)), use_cache=True, **keep
        )
        cache = getattr(out, "past_key_values", None)
        return Reading(
            ids, len(prompt_ids), out.logits[0, -n:].float().cpu(), _branchable(cache, len(ids))
        )

    def roll(
        self, reading: Reading, branches: Sequence[tuple[int, int]], limit: int
    ) -> list[tuple[int, ...]]:
        """Write another token at a place of a completion, and go on greedily.

        Args:
            reading: The completion.
            branches: For each rollout, the index in the completion and the token put there.
            limit: The most tokens of a whole completion.

        Returns:
            For each branch the whole completion: what was before, the token, and what follows.
        """
        before = [reading.ids[reading.n_prompt : reading.n_prompt + at] for at, _ in branches]
        starts = [(*b, token) for b, (_, token) in zip(before, branches, strict=True)]
        open_ = [i for i, s in enumerate(starts) if s[-1] not in self.end_ids and len(s) < limit]
        limits = [limit - len(starts[i]) for i in open_]
        if reading.cache is None:
            prompt = reading.ids[: reading.n_prompt]
            new = self.write([(*prompt, *starts[i]) for i in open_], limits)
        else:
            new = self._roll_cached(reading, [branches[i] for i in open_], limits)
        for i, more in zip(open_, new, strict=True):
            starts[i] = (*starts[i], *more)
        return starts

    def _roll_cached(
        self, reading: Reading, branches: Sequence[tuple[int, int]], limits: Sequence[int]
    ) -> list[tuple[int, ...]]:
        # Late branches write few tokens, so they go together.
        written: list[tuple[int, ...]] = [()] * len(branches)
        order = sorted(range(len(branches)), key=lambda i: (branches[i][0], i))
        for first in range(0, len(order), self.batch_size):
            rows = order[first : first + self.batch_size]
            # what none of these branches keeps is cut off
            kept = reading.n_prompt + max(branches[i][0] for i in rows)
            cache = copy.deepcopy(reading.cache)
            if kept < len(reading.ids):
                cache.crop(kept - len(reading.ids))  # negative: how many to remove
            cache.batch_repeat_interleave(len(rows))
            ids = torch.tensor([reading.ids[:kept]]).repeat(len(rows), 1)
            last = torch.tensor([[branches[i][1]] for i in rows])
            lengths = torch.tensor([[reading.n_prompt + branches[i][0]] for i in rows])
            mask = (torch.arange(kept)[None] < lengths).long()
            new = self._generate(
                torch.cat([ids, last], 1),
                torch.cat([mask, torch.ones_like(last)], 1),
                max(limits[i] for i in rows),
                cache,
            )
            for r, i in enumerate(rows):
                written[i] = self._cut(new[r].tolist(), limits[i])
        return written

    @torch.inference_mode()
    def _generate(
        self,
        ids: Int[Tensor, "row pos"],
        mask: Int[Tensor, "row pos"],
        limit: int,
        cache: Any = None,
    ) -> Int[Tensor, "row new"]:
        device = input_device(self.model)
        extra = {} if cache is None else {"past_key_values": cache}
        with self._plain_settings(limit):
            out = self._hf.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), **extra
            )
        new: Tensor = out[:, ids.shape[1] :].cpu()
        return new

    @contextmanager
    def _plain_settings(self, limit: int) -> Iterator[None]:
        """Greedy decoding and nothing else, whatever the model's generation file asks for."""
        from transformers import GenerationConfig

        own = self._hf.generation_config
        self._hf.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=limit,
            eos_token_id=list(self.end_ids) or None,
            pad_token_id=self.end_ids[0] if self.end_ids else 0,
            use_cache=True,
        )
        try:
            yield
        finally:
            self._hf.generation_config = own

    def _cut(self, new: list[int], limit: int) -> tuple[int, ...]:
        """Up to the first token that ends a completion, or the limit."""
        ends = [i + 1 for i, token in enumerate(new) if token in self.end_ids]
        return tuple(new[: min(ends[0] if ends else len(new), limit)])

    def text(self, ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        text: str = self.model.tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def pieces(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[str, ...]:
        """What each token of a completion contributes to the text."""
        return str_tokens(self.model, (*prompt_ids, *ids))[len(prompt_ids) :]


def _branchable(cache: Any, length: int) -> Any:
    """The cache, if it holds every position in its place and can be cut and repeated."""
    layers = getattr(cache, "layers", None)
    if not layers or not all(hasattr(cache, n) for n in ("crop", "batch_repeat_interleave")):
        return None
    plain = all(type(layer).__name__ == "DynamicLayer" for layer in layers)
    return cache if plain and all(layer.keys.shape[-2] == length for layer in layers) else None
