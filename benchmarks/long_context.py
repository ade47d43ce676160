"""Time, peak memory and kept edges of long prompts, plain and in tiles, each in its own process.

    python benchmarks/long_context.py                 # 1k to 16k tokens; plain as far as it fits
    python benchmarks/long_context.py --lengths 1024 2048 --device cuda --shape qwen3-0.6b
    python benchmarks/long_context.py --lengths 4096 --against main     # before and after

Random weights; shapes are what costs. Peak memory is the process's (CPU) or torch's (CUDA), above
what it was with the model loaded. Prints a line for each run. The defaults take about four minutes
by the table of docs/long_prompts.md; the longest prompt is more than half of it.

``--against`` takes a commit of this repository, or a folder with a checkout: each run is made with
it and with the checkout that this script is in, in turns, ``--repeats`` times each, and a line says
what became of the best time and of the peak (``compare_commits.py`` does so for short prompts).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare_commits import ROOT, checkout_of, require_from

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64,
    },
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32, "vocab_size": 1024,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151936,
    },
}  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 12288, 16384)


def build(shape: str, device: str, dtype: str) -> Any:
    import torch
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SHAPES[shape], max_position_embeddings=65536)
    with tempfile.TemporaryDirectory() as folder:
        hf = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        for name, parameter in hf.named_parameters():  # sharper than at birth, as trained ones are
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.data.mul_(2.0)
        hf.save_pretrained(folder)
        return TransformerBridge.boot_transformers(
            folder, device=device, dtype=getattr(torch, dtype)
        )


def rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one(args: argparse.Namespace) -> None:
    import torch

    import tl_contrastive_lrp as clrp

    require_from(args.checkout)
    torch.set_num_threads(args.threads)
    model = build(args.shape, args.device, args.dtype)
    n = args.lengths[0]
    ids = torch.randint(0, SHAPES[args.shape]["vocab_size"], (1, n),
                        generator=torch.Generator().manual_seed(1)).to(args.device)  # fmt: skip
    objectives = [clrp.logit_diff(model, 7, 11 + i) for i in range(args.objectives)]
    clrp.attribute(model, ids[:, :16], objectives[0])  # what is done once: audit, imports
    clrp.attribution_graph(model, ids[:, :16], objectives[0])
    cuda = args.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.max_memory_allocated() / 2**20 if cuda else rss()
    start = time.perf_counter()
    more: dict[str, Any] = {"memory": args.memory, "tile": args.tile}
    if args.what == "nodes":
        results = clrp.attribute_each(model, ids, objectives, progress=False, **more)
        kept, used = 0, results[0].memory
    else:
        graphs = clrp.attribution_graphs(
            model, ids, objectives, mass=args.mass, progress=False, **more
        )
        kept, used = sum(len(graph.weight) for graph in graphs), graphs[0].memory
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else rss()
    print(json.dumps({"n": n, "what": args.what, "objectives": args.objectives, "memory": used,
                      "seconds": round(seconds, 2),
                      "peak_mib": round(peak - base), "total_mib": round(peak),
                      "kept_edges": kept}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--what", choices=("nodes", "graph"), default="graph")
    parser.add_argument("--memory", choices=("both", "plain", "tiled", "auto"), default="both")
    parser.add_argument("--plain-up-to", type=int, default=2048)
    parser.add_argument("--tile", type=int)
    parser.add_argument("--mass", type=float, default=0.85)
    parser.add_argument("--objectives", type=int, default=1, help="contrasts at once")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", help="a commit, or the folder of a checkout")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each kind")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkout", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    with contextlib.ExitStack() as stack:
        sides = {"": ROOT}
        if args.against:
            sides = {"before": stack.enter_context(checkout_of(args.against)), "after": ROOT}
        for n in args.lengths:
            for way in ["tiled", "plain"] if args.memory == "both" else [args.memory]:
                if way == "plain" and n > args.plain_up_to:
                    continue
                compare(args, sides, n, way)


def compare(args: argparse.Namespace, sides: dict[str, Path], n: int, way: str) -> None:
    """Print a line for each run, and with two sides one that compares them."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(args.repeats):
        for side in list(sides) if turn % 2 == 0 else reversed(list(sides)):
            done = run(args, sides[side], n, way)
            line = done.stdout.strip() or f"{n} {way}: {done.stderr.strip()[-300:]}"
            print(f"{side} {line}".strip(), flush=True)
            if done.returncode == 0:
                found[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
    if len(sides) == 2 and all(found.values()):
        old, new = ({key: min(run[key] for run in found[side]) for key in ("seconds", "peak_mib")}
                    for side in sides)  # fmt: skip
        ratios = ", ".join(f"{key} {new[key] / max(old[key], 0.01):.2f}" for key in old)
        print(f"{n} {way}, after / before: {ratios}", flush=True)


def run(
    args: argparse.Namespace, checkout: Path, n: int, way: str
) -> subprocess.CompletedProcess[str]:
    """One run in a process of its own, with the package of this checkout."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", "--lengths", str(n),
               "--memory", way, "--what", args.what, "--mass", str(args.mass),
               "--shape", args.shape, "--device", args.device, "--dtype", args.dtype,
               "--threads", str(args.threads), "--objectives", str(args.objectives),
               "--checkout", str(checkout)]  # fmt: skip
    command += ["--tile", str(args.tile)] if args.tile and way == "tiled" else []
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


if __name__ == "__main__":
    main()
