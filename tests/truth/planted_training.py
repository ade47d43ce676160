"""Train the small induction model whose weights lie beside this file.

    python tests/truth/planted_training.py --out tests/truth/planted_induction.safetensors

Prompts are a BOS, distinct random letters, and the same letters again from a random one on (after
the last comes the first). From the second letter of the repetition on the next letter is
determined, by the one letter that stands after the earlier occurrence. Grouped-query attention, two
blocks, no help but the loss.
"""

from __future__ import annotations

import argparse
import time

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from truth.families import BOS, SPECIAL

FIRST, LETTERS, LENGTH = 5, 16, 9
CONFIG = dict(
    hidden_size=48, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=False,
    rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
    initializer_range=0.15, **SPECIAL,
)  # fmt: skip


def model() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(**CONFIG)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batch(size: int, generator: torch.Generator) -> Tensor:
    """[size, 2 · LENGTH + 1] token ids."""
    letters = torch.rand(size, LETTERS, generator=generator).argsort(1)[:, :LENGTH] + FIRST
    start = torch.randint(LENGTH, (size, 1), generator=generator)
    again = letters.gather(1, (start + torch.arange(LENGTH)) % LENGTH)
    return torch.cat([torch.full((size, 1), BOS), letters, again], 1)


def train(steps: int, size: int, rate: float, seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = model().train()
    optimiser = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.98))
    asked = torch.arange(LENGTH + 1, 2 * LENGTH)
    began = time.perf_counter()
    for step in range(steps):
        tokens = batch(size, generator)
        logits = trained(tokens[:, :-1]).logits[:, asked]
        wanted = tokens[:, asked + 1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, step / 50) * min(1.0, 3 * (1 - step / steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0 or step == steps - 1:
            right = float((logits.argmax(-1) == wanted).float().mean())
            print(f"{step:>5} loss {loss.item():.3f} right {right:.3f} "
                  f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return trained.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trained = train(options.steps, options.size, options.rate, options.seed)
    weights = {name: p.detach().half().contiguous() for name, p in trained.named_parameters()}
    save_file(weights, options.out)


if __name__ == "__main__":
    main()
