"""Many prompts with ``attribute_each``: in batches, beside one at a time.

    python benchmarks/batches.py
    python benchmarks/batches.py --prompts 32 --lengths 20 120 --sizes 4 16 --repeats 5

The demo model and a random Llama (8 blocks, d_model 256) explain the same prompts, drawn once, of
lengths drawn from a range. Ways alternate, and the medians' ratios to one at a time are printed,
since machines are noisy: "auto" chooses the batches itself, a number is ``batch_size``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from _models import random_bridge

import tl_contrastive_lrp as clrp


def seconds(
    model: Any, prompts: list[torch.Tensor], sizes: dict[str, int | None], repeats: int
) -> dict[str, float]:
    """Median seconds with each batch size, taken in turns after one warm-up each."""
    taken: dict[str, list[float]] = {name: [] for name in sizes}
    objectives = [clrp.logit_diff(model, 7, 11)] * len(prompts)
    for turn in range(repeats + 1):
        for name, size in sizes.items():
            start = time.perf_counter()
            clrp.attribute_each(model, prompts, objectives, memory="plain", batch_size=size)
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs=2, default=(20, 120))
    parser.add_argument("--sizes", type=int, nargs="*", default=())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {"one at a time": 1, "auto": None, **{str(size): size for size in args.sizes}}
    shortest, longest = args.lengths
    models = {
        "demo": clrp.load_demo_model(),
        "llama": random_bridge(8, 256, 8, longest, 4096, family="Llama"),
    }
    for name, model in models.items():
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(shortest, longest + 1, (args.prompts,), generator=generator)
        prompts = [
            torch.randint(4, model.cfg.d_vocab, (1, length), generator=generator)
            for length in lengths.tolist()
        ]
        taken = seconds(model, prompts, sizes, args.repeats)
        alone = taken.pop("one at a time")
        ratios = ", ".join(f"{way} {alone / other:.2f}x faster" for way, other in taken.items())
        print(f"{name}: {args.prompts} prompts one at a time {alone:.2f} s; {ratios}")


if __name__ == "__main__":
    main()
