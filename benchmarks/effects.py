"""Predicted effects of replacing tokens beside measured ones: cost by window, and agreement.

    python benchmarks/effects.py
    python benchmarks/effects.py --lengths 128 512 1024 --windows 0 2 4
    python benchmarks/effects.py --model FOLDER --prompts FILE.jsonl --number 15

Cost: a random model of Llama's kind, one prompt of each length; forwards of the prompt and seconds
of ``token_effects`` for each window, and of measuring (``window=None``), which is left out above
``--measure-up-to`` tokens.

Agreement, with ``--model``, a folder with real weights: prompts are the "question" or "prompt" of
each line of a JSON Lines file (without one, word problems made here), in the model's chat template
where it has one, continued greedily by 5 to 40 tokens; the objective is the two tokens with the
highest logits there. Printed are means over prompts of Pearson's and Spearman's correlation with
measured effects, over all tokens but the first, and over those at least 17 before the end; with
them relevance with its sign turned (``attribute``), since an effect is what Δℓ gains.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _models import random_bridge
from transformer_lens.model_bridge import TransformerBridge

import tl_contrastive_lrp as clrp

QUIET: dict[str, Any] = {"progress": False}
FAR = 17  # tokens before the end from which on a token is far from it


def timed(*args: Any, **how: Any) -> tuple[clrp.TokenEffects, float]:
    start = time.perf_counter()
    effects = clrp.token_effects(*args, **QUIET, **how)
    return effects, time.perf_counter() - start


def cost(lengths: list[int], windows: list[int], measure_up_to: int) -> pd.DataFrame:
    """Forwards and seconds for each length and window."""
    model = random_bridge(8, 256, 8, max(lengths))
    rows = []
    for length in lengths:
        tokens = torch.randint(4, model.cfg.d_vocab, (1, length))
        objective = clrp.logit_diff(model, 7, 12)
        timed(model, tokens, objective, window=0)  # the first call tries the model
        for window in [*windows, None] if length <= measure_up_to else windows:
            effects, seconds = timed(model, tokens, objective, window=window)
            name = "measured" if window is None else window
            rows.append((length, name, round(effects.forwards, 1), round(seconds, 2)))
    return pd.DataFrame(rows, columns=["tokens", "window", "forwards", "seconds"])


def word_problems() -> Iterator[str]:
    """Made-up questions, without end."""
    draw = random.Random(0)
    names, things = ["Ada", "Bo", "Chi", "Dov", "Eve"], ["pears", "stamps", "tiles", "ropes"]
    while True:
        a, b = draw.sample(names, 2)
        thing, (m, n, k) = draw.choice(things), draw.sample(range(3, 40), 3)
        yield (
            f"{a} has {m} {thing} and buys {n} more at the market. {b} gives {a} another {k} "
            f"{thing}, but on the way home {a} loses {min(m, k)} of them. How many {thing} does "
            f"{a} have in the evening?"
        )


def prompts(model: Any, file: Path | None, longest: int) -> Iterator[torch.Tensor]:
    """Token ids [1, pos] of questions, each continued greedily by a few tokens."""
    draw = random.Random(0)
    texts: Iterator[str] = word_problems()
    if file is not None:
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        draw.shuffle(lines)
        texts = iter([str(line.get("question") or line["prompt"]) for line in lines])
    for text in texts:
        if getattr(model.tokenizer, "chat_template", None):
            text = str(clrp.chat(model, [{"role": "user", "content": text}]))
        tokens = model.to_tokens(text, prepend_bos=False)
        more = draw.randint(5, 40)
        if not 40 <= tokens.shape[1] <= longest - more:
            continue
        with torch.no_grad():
            for _ in range(more):
                written = model(tokens)[:, -1:].argmax(-1)
                if int(written) == model.tokenizer.eos_token_id:
                    break
                tokens = torch.cat([tokens, written], dim=1)
        yield tokens


def correlations(found: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """Pearson and Spearman over all tokens but the first, and over those far from the end."""
    frame = pd.DataFrame({"found": found.double().numpy(), "truth": truth.numpy()})[1:]
    return [
        float(part.corr(kind)["found"]["truth"])
        for part in (frame, frame[: -(FAR - 1)])
        for kind in ("pearson", "spearman")
    ]


def agreement(model: Any, file: Path | None, number: int, windows: list[int], longest: int) -> Any:
    """Mean correlations with measured effects by what is replaced and what predicts."""
    rows = []
    for which, tokens in zip(range(number), prompts(model, file, longest), strict=False):
        with torch.no_grad():
            top, second = model(tokens)[0, -1].topk(2).indices.tolist()
        objective = clrp.logit_diff(model, top, second)
        relevance = clrp.attribute(model, tokens, objective, rules="attnlrp", **QUIET).tokens
        for replace in ("zero", "random"):
            how = {"replace": replace, "seed": which}
            truth, seconds = timed(model, tokens, objective, window=None, **how)
            rows.append((replace, "measured", *[1.0] * 4, truth.forwards, seconds))
            for window in windows:
                found, seconds = timed(model, tokens, objective, window=window, **how)
                same = correlations(found.effect, truth.effect)
                rows.append((replace, f"window {window}", *same, found.forwards, seconds))
            rows.append((replace, "−attnlrp", *correlations(-relevance, truth.effect), 1.0, 0.0))
        print(f"{which + 1}: {tokens.shape[1]} tokens", flush=True)
    columns = ["Pearson", "Spearman", "Pearson, far", "Spearman, far", "forwards", "seconds"]
    frame = pd.DataFrame(rows, columns=["replace", "predicted by", *columns])
    return frame.groupby(["replace", "predicted by"])[columns].mean().round(2)


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    """Measure and print; returns the last table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--measure-up-to", type=int, default=512)
    parser.add_argument("--model", help="folder with real weights")
    parser.add_argument("--prompts", type=Path, help="JSON Lines with a question or prompt each")
    parser.add_argument("--number", type=int, default=15)
    parser.add_argument("--longest", type=int, default=150)
    options = parser.parse_args(arguments)
    if options.model is None:
        torch.manual_seed(0)
        table = cost(options.lengths, options.windows, options.measure_up_to)
        print(table.to_string(index=False))
        return table
    model = TransformerBridge.boot_transformers(options.model).eval()
    table = agreement(model, options.prompts, options.number, options.windows, options.longest)
    print(table.to_string())
    return table


if __name__ == "__main__":
    main()
