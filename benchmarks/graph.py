"""Cost of the attribution graph, in one run: against a forward + backward, and against packing.

- graph / plain: ``clrp.attribution_graph`` (all edges, both granularities) over a plain forward and
  backward of the same model at the same tokens, without hooks but the one at the embeddings;
- packed / closed: the paper's batched backward signals for one transition over one transition's
  share of all that the graph costs beyond the plain forward and backward;
- peak memory of both, above what the process held before (Linux: the resident set's high-water
  mark, in fresh processes).

    python benchmarks/graph.py

Prints a line for each length, with ratios and MiB. The packed signals dominate: 22.5 s a transition
at 512 tokens (docs/accuracy_and_speed.md).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _models import random_bridge

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.graph.edges.batched import batched_edges
from tl_contrastive_lrp.rules.rule_sets import get_rule_set

LAYERS, WIDTH, HEADS = 4, 256, 8


def plain(model, tokens, objective) -> None:
    leaf = {}

    def start(tensor, hook):
        leaf["x"] = tensor.detach().requires_grad_(True)
        return leaf["x"]

    with model.hooks(fwd_hooks=[("embed.hook_out", start)]):
        torch.autograd.grad(objective(model(tokens)), leaf["x"])


def ready(pos: int):
    torch.set_num_threads(1)
    model = random_bridge(LAYERS, WIDTH, HEADS, pos)
    for parameter in model.original_model.parameters():
        parameter.requires_grad_(False)
    tokens = torch.arange(pos)[None] * 7919 % (model.cfg.d_vocab - 4) + 4
    return model, tokens, clrp.logit_diff(model, 7, 12)


def seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def _resident_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 2**10
    raise RuntimeError(f"/proc/self/status has no {key}")


def _peak(pos: int, what: str, queue) -> None:
    model, tokens, objective = ready(pos)
    plain(model, tokens[:, :8], objective)  # what is loaded once and for all
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident_mib("VmRSS")
    if what == "plain":
        plain(model, tokens, objective)
    elif what == "graph":
        clrp.attribution_graph(model, tokens, objective)
    else:
        pair = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")
        batched_edges(model, tokens, objective, get_rule_set("attnlrp"), [pair], progress=False)
    queue.put(_resident_mib("VmHWM") - before)


def peak_mib(pos: int, what: str) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(pos, what, queue))
    process.start()
    found = float(queue.get())
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pos", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packed-pos", type=int, default=512)
    options = parser.parse_args()
    print(f"{LAYERS} layers, d_model {WIDTH}, {HEADS} heads, 1 thread, median of {options.repeats}")
    print("seconds of plain; graph / plain; peak memory above the loaded model")
    print(f"{'pos':>6} {'plain':>8} {'block':>6} {'sublayer':>9} {'plain':>10} {'graph':>10}")
    for pos in options.pos:
        model, tokens, objective = ready(pos)
        t = seconds(
            {
                "plain": lambda: plain(model, tokens, objective),
                "block": lambda: clrp.attribution_graph(model, tokens, objective),
                "sublayer": lambda: clrp.attribution_graph(
                    model, tokens, objective, granularity="sublayer"
                ),
            },
            options.repeats,
        )
        print(f"{pos:>6} {t['plain']:>8.3f} {t['block'] / t['plain']:>6.2f} "
              f"{t['sublayer'] / t['plain']:>9.2f} {peak_mib(pos, 'plain'):>6.0f} MiB "
              f"{peak_mib(pos, 'graph'):>6.0f} MiB", flush=True)  # fmt: skip
        if pos == options.packed_pos:
            closed = (t["block"] - t["plain"]) / LAYERS
            pair = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre")
            start = time.perf_counter()
            rules = get_rule_set("attnlrp")
            batched_edges(model, tokens, objective, rules, [pair], progress=False)
            packed = time.perf_counter() - start
            print(f"  one transition at {pos}: packed {packed:.1f} s; closed form "
                  f"{closed:.4f} s a transition; ratio {packed / max(closed, 1e-4):,.0f}; "
                  f"packed peak {peak_mib(pos, 'packed'):.0f} MiB", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
