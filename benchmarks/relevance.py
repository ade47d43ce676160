"""Cost of relevance over TransformerLens' own forward + backward through the same HookPoints.

Both sides run the same random model of Qwen3's architecture on the same tokens and objective:

- plain: ``run_with_cache``-style hooks that keep activation and gradient at the named HookPoints,
  then ``torch.autograd.grad`` of the logit difference at the embeddings;
- relevance: ``clrp.run_with_relevance`` at the same HookPoints, and ``clrp.attribute``.

The runs alternate and the medians' ratios are printed, since machines are noisy; a line for each
length, of which the longest dominates.

    python benchmarks/relevance.py --pos 512 --layers 4 --d-model 256 --repeats 9
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from _models import random_bridge

import tl_contrastive_lrp as clrp


def plain(model, tokens, objective, names: list[str]) -> None:
    """TransformerLens' forward and backward hooks at ``names``, no parameter gradients."""
    activations, gradients, leaf = {}, {}, {}

    def start(tensor, hook):
        leaf["x"] = tensor.detach().requires_grad_(True)
        return leaf["x"]

    def keep(tensor, hook):
        activations[hook.name] = tensor.detach()

    def keep_grad(grad, hook):
        gradients[hook.name] = grad.detach()

    forward = [("embed.hook_out", start), *((name, keep) for name in names)]
    with model.hooks(fwd_hooks=forward, bwd_hooks=[(name, keep_grad) for name in names]):
        torch.autograd.grad(objective(model(tokens)), leaf["x"])


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run, taken in turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pos", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rules", choices=clrp.RULE_SETS, default=clrp.DEFAULT_RULES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_bridge(options.layers, options.d_model, options.heads, max(options.pos))
    for parameter in model.original_model.parameters():
        parameter.requires_grad_(False)
    names = [f"blocks.{i}.{at}" for i in range(options.layers) for at in
             ("hook_resid_pre", "attn.hook_z", "mlp.hook_post", "hook_resid_post")]  # fmt: skip
    print(f"{options.layers} layers, d_model {options.d_model}, {options.threads} thread(s), "
          f"{options.rules}, median of {options.repeats}; seconds, and ratio to plain")  # fmt: skip
    print(f"{'pos':>6} {'plain':>8} {'relevance':>10} {'ratio':>6} {'attribute':>10} {'ratio':>6}")
    for pos in options.pos:
        tokens = torch.randint(4, model.cfg.d_vocab, (1, pos))
        objective = clrp.logit_diff(model, 7, 12)
        runs = {
            "plain": lambda: plain(model, tokens, objective, names),
            "relevance": lambda: clrp.run_with_relevance(
                model, tokens, objective, names, rules=options.rules
            ),
            "attribute": lambda: clrp.attribute(model, tokens, objective, rules=options.rules),
        }
        t = measure(runs, options.repeats)
        print(f"{pos:>6} {t['plain']:>8.3f} {t['relevance']:>10.3f} "
              f"{t['relevance'] / t['plain']:>6.2f} {t['attribute']:>10.3f} "
              f"{t['attribute'] / t['plain']:>6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
