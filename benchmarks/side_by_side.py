"""Relevance beside Hugging Face's own forward and backward with fused attention (sdpa), in one run.

    python benchmarks/side_by_side.py FOLDER [--lengths 128,512,1508] [--repeats 3]

FOLDER is a causal language model saved for transformers. Prints, for each length, the processor
time of ``attribute`` under AttnLRP and GIM, with fused and with eager attention, as a ratio to that
of Hugging Face's forward and backward (the best of the repeats each). A model of 135M parameters
takes about five minutes with the defaults.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import tl_contrastive_lrp as clrp

RULES = ("attnlrp", "gim")
KINDS = ("fused", "eager")


def main() -> None:
    """Print a line for each length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--lengths", default="128,512,1508")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    model = TransformerBridge.boot_transformers(args.folder, device="cpu", dtype=torch.float32)
    own = AutoModelForCausalLM.from_pretrained(args.folder, attn_implementation="sdpa").eval()
    own.requires_grad_(False)
    objective = clrp.logit_diff(model, 5, 7)
    for length in map(int, args.lengths.split(",")):
        ids = torch.randint(0, int(model.cfg.d_vocab), (1, length))

        def hugging_face(ids: torch.Tensor = ids) -> None:
            embedded = own.get_input_embeddings()(ids).detach().requires_grad_(True)
            logits = own(inputs_embeds=embedded).logits[0, -1]
            torch.autograd.grad(logits[5] - logits[7], embedded)

        calls: dict[str, Callable[[], object]] = {"Hugging Face": hugging_face}
        for rules in RULES:
            for kind in KINDS:

                def relevance(ids=ids, rules=rules, kind=kind) -> None:
                    clrp.attribute(
                        model, ids, objective, rules=rules, memory="plain", attention=kind
                    )

                calls[f"{rules} {kind}"] = relevance
        best = dict.fromkeys(calls, float("inf"))
        for repeat in range(args.repeats + 1):  # the first warms up
            for name, call in calls.items():
                begin = time.process_time()
                call()
                if repeat:
                    best[name] = min(best[name], time.process_time() - begin)
        ratios = {name: f"{t / best['Hugging Face']:.2f}" for name, t in best.items()}
        print(f"{length:,} tokens: {ratios}", flush=True)


if __name__ == "__main__":
    main()
