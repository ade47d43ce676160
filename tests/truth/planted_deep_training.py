"""Train the eight-block model whose weights lie beside this file.

    python tests/truth/planted_deep_training.py --out tests/truth/planted_deep.safetensors

A prompt is a BOS and pairs of letters in any order. The pairs are links of chains: with a → b and
b → c somewhere in the prompt, a letter a after them asks for the end of its chain, c: two lookups,
one after the other. All first letters of pairs are asked for, in any order, without the answers
being shown; half of them need one lookup only. To begin with, all chains have one link (a letter is
looked up, and that is all): without that the model first learns to guess one of the ends, which is
hard to leave again. A Qwen3 with grouped-query attention and gated MLPs, no help but the loss.
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from truth.families import BOS, SPECIAL

FIRST, LETTERS = 5, 20
CHAINS, LINKS = 3, 2
PAIRS = CHAINS * LINKS
BLOCKS = 8
CONFIG = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=BLOCKS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    initializer_range=0.1, **SPECIAL,
)  # fmt: skip


def model() -> transformers.Qwen3ForCausalLM:
    config = transformers.Qwen3Config(**CONFIG)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batch(size: int, links: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids [size, 1 + 3 · PAIRS], chains of ``links``; answers and lookups of the asked."""
    chains = PAIRS // links
    letters = torch.rand(size, LETTERS, generator=generator).argsort(1)[:, : chains * (links + 1)]
    letters = letters.view(size, chains, links + 1) + FIRST
    keys, values = (x.reshape(size, PAIRS) for x in (letters[..., :-1], letters[..., 1:]))
    ends = letters[..., -1:].expand(-1, -1, links).reshape(size, PAIRS)
    lookups = torch.arange(links, 0, -1).expand(size, chains, links).reshape(size, PAIRS)
    order, asked = (torch.rand(size, PAIRS, generator=generator).argsort(1) for _ in range(2))
    pairs = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    tokens = torch.cat([torch.full((size, 1), BOS), pairs, keys.gather(1, asked)], 1)
    return tokens, ends.gather(1, asked), lookups.gather(1, asked)


def train(
    steps: int, easy: int, mixed: int, size: int, rate: float, seed: int
) -> transformers.Qwen3ForCausalLM:
    """Steps below ``easy`` see chains of one link, those below ``mixed`` by turns, then of two."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = model().train()
    with torch.no_grad():  # what blocks add does not grow with their number
        for block in trained.model.layers:
            block.self_attn.o_proj.weight /= (2 * BLOCKS) ** 0.5
            block.mlp.down_proj.weight /= (2 * BLOCKS) ** 0.5
    optimiser = torch.optim.AdamW(
        trained.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    began = time.perf_counter()
    for step in range(steps):
        links = 1 if step < easy or (step < mixed and step % 2 == 0) else LINKS
        tokens, wanted, lookups = batch(size, links, generator)
        logits = trained(tokens).logits[:, -PAIRS:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / 200) * min(1.0, 3 * (1 - step / steps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimiser.step()
        if step % 200 == 199 or step == steps - 1:
            right = (logits.argmax(-1) == wanted).float()
            shares = [f"{n} lookups {right[lookups == n].mean():.3f}" for n in range(1, links + 1)]
            print(f"{step:>5} loss {loss.item():.3f} right: {', '.join(shares)} "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return trained.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--easy", type=int, default=600)
    parser.add_argument("--mixed", type=int, default=3000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(
        options.steps, options.easy, options.mixed, options.size, options.rate, options.seed
    )
    weights = {name: p.detach().half().contiguous() for name, p in trained.named_parameters()}
    save_file(weights, options.out)


if __name__ == "__main__":
    main()
