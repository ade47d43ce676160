"""How often each locator finds the first wrong token, on the demo benchmark, where it is known.

    python benchmarks/locators.py [--model demo] [--limit 280] [--rollouts 48] [--json FILE]

A judge is a callable of the user's and is not measured; "given" is the truth itself. Counted are
the failures of one model; "distance" is found − true, in tokens. Besides: how often the contrast of
the model's own top 10 is the token that the planted answer has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from tl_contrastive_lrp.study.benchmarks import open_benchmark
from tl_contrastive_lrp.study.collect import CollectSettings, Failure, Greedy, complete
from tl_contrastive_lrp.study.collect.contrast import find_contrast
from tl_contrastive_lrp.study.collect.locate import LOCATORS
from tl_contrastive_lrp.study.models import ModelSpec, open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--limit", type=int, default=280)
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = open_model(ModelSpec("model", args.model), device="cpu")
    benchmark = open_benchmark("demo", limit=args.limit)
    settings = CollectSettings(max_new_tokens=64, batch_size=16, max_rollouts=args.rollouts)
    writer = Greedy(model, settings.batch_size)
    failures = []
    for done in complete(model, benchmark.items(), settings):
        if hasattr(done, "text") and not benchmark.check(done.item, done.text).passed:
            failures.append(
                Failure(done, benchmark, writer, settings.max_new_tokens, done.item.reference)
            )
    truth = [LOCATORS["given"](f, settings) for f in failures]
    clean, right = 0, 0
    for f, position in zip(failures, truth, strict=True):
        logits = f.reading.logits[position]
        own = find_contrast(f, position, logits, ("own",), settings.top_k, {})
        planted = find_contrast(f, position, logits, ("given",), settings.top_k, {})
        clean += own is not None
        right += own is not None and own[0] == planted[0]
    figures = {"model": args.model, "failures": len(failures), "rollouts": args.rollouts,
               "own contrast": clean, "of these the planted token": right}  # fmt: skip
    print(figures)
    figures["locators"] = {}
    for name in ("divergence", "constraint", "recovery"):
        began = time.monotonic()
        found = [LOCATORS[name](f, settings) for f in failures]
        gaps = [a - b for a, b in zip(found, truth, strict=True) if a is not None]
        figures["locators"][name] = {
            "answered": len(gaps),
            "right": sum(g == 0 for g in gaps),
            "early": sum(g < 0 for g in gaps),
            "late": sum(g > 0 for g in gaps),
            "median |distance| where wrong": statistics.median([abs(g) for g in gaps if g] or [0]),
            "seconds": round(time.monotonic() - began, 1),
        }
        print(name, figures["locators"][name], flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
