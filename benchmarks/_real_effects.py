"""Effects of replacing single tokens, measured on a plain Hugging Face model.

In a causal model, replacing token i changes nothing before i. The clean prompt is run once with a
key-value cache; each replacement then runs from its token on, over the cache cut there, in batches
of replacements that are close to each other. Only the two logits that are compared are computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

ROWS, NUMBERS = 8, 512  # at least so many rows a batch, or tokens in all
Replacement = tuple[int, int | None]  # position, and the token there instead; None: zero embedding


def _batches(which: Sequence[Replacement], length: int) -> Iterator[list[int]]:
    """Indices of replacements that run together, by position."""
    order = sorted(range(len(which)), key=lambda i: which[i][0])
    while order:
        rows = max(ROWS, NUMBERS // (length - which[order[0]][0]))
        yield order[:rows]
        order = order[rows:]


def _cut(cache: Any, start: int, rows: int) -> Any:
    """The keys and values before ``start``, for each row."""
    from transformers import DynamicCache

    part = DynamicCache()
    if start:
        for number, layer in enumerate(cache.layers):
            keys, values = (
                kept[:, :, :start].expand(rows, -1, -1, -1).contiguous()
                for kept in (layer.keys, layer.values)
            )
            part.update(keys, values, number)
    return part


@torch.no_grad()
def measured_effects(
    model: Any, ids: Tensor, target: int, contrast: int, which: Sequence[Replacement]
) -> Tensor:
    """Δℓ with each replacement alone, minus Δℓ, in logits: [replacement].

    model: a causal model of transformers, in evaluation mode. ids: [pos].
    """
    from transformers import DynamicCache

    weight = model.get_output_embeddings().weight
    embed, length = model.get_input_embeddings(), len(ids)

    def delta(hidden: Tensor) -> Tensor:
        both = torch.nn.functional.linear(hidden[:, -1], weight[[target, contrast]])
        return (both[:, 0] - both[:, 1]).double()

    clean = model.base_model(input_ids=ids[None], past_key_values=DynamicCache(), use_cache=True)
    base, embedded = float(delta(clean.last_hidden_state)), embed(ids)
    effects = torch.zeros(len(which), dtype=torch.float64)
    for batch in _batches(which, length):
        start = which[batch[0]][0]
        rows = embedded[start:].repeat(len(batch), 1, 1)
        for row, number in enumerate(batch):
            position, token = which[number]
            new = 0.0 if token is None else embed(torch.tensor(token))
            rows[row, position - start] = new
        past = _cut(clean.past_key_values, start, len(batch))
        run = model.base_model(inputs_embeds=rows, past_key_values=past, use_cache=True)
        effects[batch] = delta(run.last_hidden_state) - base
    return effects
