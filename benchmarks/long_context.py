"""Time, peak memory and kept edges of long prompts, plain and in tiles, each in its own process.

    python benchmarks/long_context.py                 # 1k to 16k tokens; plain as far as it fits
    python benchmarks/long_context.py --lengths 1024 2048 --device cuda --shape qwen3-0.6b

Random weights; shapes are what costs. Peak memory is the process's (CPU) or torch's (CUDA), above
what it was with the model loaded. Prints a line for each run. The defaults take about four minutes
by the table of docs/long_prompts.md; the longest prompt is more than half of it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SHAPES: dict[str, dict[str, int]] = {
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
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    for n in args.lengths:
        ways = ["tiled", "plain"] if args.memory == "both" else [args.memory]
        for way in ways:
            if way == "plain" and n > args.plain_up_to:
                continue
            command = [sys.executable, str(Path(__file__).resolve()), "--one", "--lengths", str(n),
                       "--memory", way, "--what", args.what, "--mass", str(args.mass),
                       "--shape", args.shape, "--device", args.device, "--dtype", args.dtype,
                       "--threads", str(args.threads),
                       "--objectives", str(args.objectives)]  # fmt: skip
            command += ["--tile", str(args.tile)] if args.tile and way == "tiled" else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            print(done.stdout.strip() or f"{n} {way}: {done.stderr.strip()[-300:]}", flush=True)


if __name__ == "__main__":
    main()
