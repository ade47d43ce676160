"""Relevance in tiles beside Hugging Face's own forward and backward with fused attention (sdpa).

    python benchmarks/tiles_beside_sdpa.py [--blocks 8] [--tokens 8000] [--rules attnlrp] [--alone]

Random weights of SmolLM2-135M's shape; shapes are what costs. Prints the processor time of both in
one process, on one thread, their ratio, and the resident memory that each adds at its highest. The
backward is that of a difference of two logits, to the embeddings. With --alone only ``attribute``
is run: of all 30 blocks at 8,000 tokens Hugging Face's forward keeps several GiB. The defaults take
three minutes.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _models import bridge_of
from transformers import AutoModelForCausalLM, LlamaConfig

import tl_contrastive_lrp as clrp

_PAGE = 4096


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE >> 20


def measured(run: Callable[[], object]) -> tuple[float, int]:
    """Processor seconds, and how many MiB resident memory rose at its highest."""
    before, done = _resident(), threading.Event()
    highest = [before]

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], _resident())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    done.set()
    thread.join()
    return seconds, highest[0] - before


def main() -> None:
    """Print a line for each of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rules", default="attnlrp")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--tile", type=int)
    parser.add_argument("--alone", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=args.blocks,
        num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
        max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(4, 49152, (1, args.tokens), generator=torch.Generator().manual_seed(1))
    own_seconds = 0.0
    if not args.alone:
        own = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        own.requires_grad_(False)

        def forward_and_backward(n: int = args.tokens) -> object:
            start = own.get_input_embeddings()(ids[:, :n]).detach().requires_grad_(True)
            at = own(inputs_embeds=start, logits_to_keep=1).logits[0, -1]
            return torch.autograd.grad(at[7] - at[11], start)

        forward_and_backward(64)
        own_seconds, mib = measured(forward_and_backward)
        print(f"Hugging Face, sdpa: {own_seconds:.1f} s, {mib} MiB", flush=True)
        del own
    model = bridge_of(config)
    objective = clrp.logit_diff(model, 7, 11)
    clrp.attribute(model, ids[:, :16], objective, rules=args.rules)  # audits the model
    results: list[clrp.Attribution] = []
    seconds, mib = measured(
        lambda: results.append(
            clrp.attribute(
                model, ids, objective, rules=args.rules, attention=args.attention,
                memory="tiled", tile=args.tile, progress=False,
            )
        )
    )  # fmt: skip
    ratio = f", {seconds / own_seconds:.2f} times as long" if own_seconds else ""
    how = f"{results[0].memory}, {results[0].attention}"
    print(f"attribute, {args.rules}, {how}: {seconds:.1f} s{ratio}, {mib} MiB", flush=True)


if __name__ == "__main__":
    main()
