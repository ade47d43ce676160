"""A span of what was written, beside one token and beside its tokens one by one.

    python benchmarks/spans.py
    python benchmarks/spans.py --pos 2048 --spans 1 32 256 1024 --memory tiled --tile 256

A random model of Qwen3's architecture explains the last n tokens of one prompt with
``span_logit``. Each row is over the last token alone (``logit_diff`` at equal total length, the
same engine and attention), as a ratio of medians; runs alternate, since machines are noisy, and
the time is this process's processor time. "one by one" runs an ``attribute`` for each token of a
short span. What a long span pays for, and one token does not: the logits of all its positions, and
in tiles the last block's backward at all of them. Rows of ``answer_diff`` and ``trace_back`` are
printed where the package has them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _measure import Meter
from _models import random_bridge

import tl_contrastive_lrp as clrp


def runs_of(model: Any, tokens: torch.Tensor, options: Any) -> dict[str, Callable[[], Any]]:
    """What is measured, by name; "one token" is what all else is compared with."""
    length = tokens.shape[1]
    how = {"memory": options.memory, "attention": options.attention, "progress": False}
    if options.memory == "tiled":
        how["tile"] = options.tile

    def attribute(objective: Any) -> Any:
        return clrp.attribute(model, tokens, objective, **how)

    last, other = int(tokens[0, -1]), 4
    one = clrp.logit_diff(model, last, other, pos=length - 2)
    runs: dict[str, Callable[[], Any]] = {"one token": lambda: attribute(one)}
    for n in options.spans:
        for against in ("none", "top_k"):
            span = clrp.span_logit(model, tokens, (length - n, length), against)
            runs[f"span of {n}, {against}"] = lambda span=span: attribute(span)
    single = [
        clrp.target_logit(model, int(tokens[0, p]), pos=p - 1)
        for p in range(length - options.one_by_one, length)
    ]
    runs[f"{options.one_by_one} one by one"] = lambda: [attribute(each) for each in single]
    if hasattr(clrp, "answer_diff"):
        ids = tokens[0].tolist()
        diff = clrp.answer_diff(model, tokens[:, : length - 16], target=ids[-16:], contrast=[5] * 9)
        runs["answer_diff, 16 and 9"] = lambda: clrp.attribute(
            model, tokens[:, : length - 16], diff, **how
        )
    if hasattr(clrp, "trace_back"):
        span, through = (length - 16, length), (length // 2, length - 16)
        runs["trace_back, 2 hops"] = lambda: clrp.trace_back(
            model, tokens, span, through=through, hops=2
        )
    return runs


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Measure and print; returns the ratios by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pos", type=int, default=1280)
    parser.add_argument("--spans", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--one-by-one", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--memory", choices=("plain", "tiled"), default="plain")
    parser.add_argument("--tile", type=int, default=256)
    parser.add_argument("--attention", choices=("auto", "eager", "fused"), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model = random_bridge(
        options.layers, options.d_model, options.heads, options.pos, options.vocab
    )
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, options.vocab, (1, options.pos), generator=generator)
    runs = runs_of(model, tokens, options)
    meter, taken = Meter("cpu"), {name: list[float]() for name in runs}
    for turn in range(options.repeats + 1):
        for name, run in runs.items():
            seconds, _ = meter.seconds(run)
            if turn:
                taken[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in taken.items()}
    ratios = {name: value / medians["one token"] for name, value in medians.items()}
    print(f"{options.pos} tokens, {options.layers} layers, d_model {options.d_model}, vocabulary "
          f"{options.vocab}, {options.memory}, {options.attention} attention, median of "
          f"{options.repeats}; {meter.clock}, and ratio to one token")  # fmt: skip
    for name, value in medians.items():
        print(f"{name:<24} {value:>9.3f} s {ratios[name]:>8.2f}")
    return ratios


if __name__ == "__main__":
    main()
