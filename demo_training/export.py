"""Round a trained model to float16, find what it gets wrong, and write the package's demo data.

    python -m demo_training.export --run RUN --out tl_contrastive_lrp/demo/data

Prints what it writes. Asking the model the held-out tasks dominates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from .card import write_card
from .evaluate import Asked, ask, held_out, write_greedily
from .marked import Task
from .tasks import KINDS
from .tokenizer import chat_prompt
from .train import Config, build_model, load_tokenizer

MIN_DELTA = 1.0
LONG = 900
_MOST = 10
"""Tasks drawn, as a multiple of those judged, where failures are rare."""


def load_run(run: Path) -> tuple[PreTrainedModel, Tokenizer, dict]:
    """The model of RUN/state.pt with its weights rounded to float16, held in float32."""
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    config = Config(**state["config"])
    tokenizer = load_tokenizer(run / "tokenizer")
    model = build_model(config, len(tokenizer), tokenizer)
    model.load_state_dict(state["model"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model.eval(), tokenizer, {**asdict(config), "trained_steps": state["step"]}


def _meaningful(tokenizer: Tokenizer, *ids: int) -> bool:
    """No blank and no special token."""
    return all(tokenizer.decode([i]).strip() and i not in tokenizer.all_special_ids for i in ids)


def _record(
    model: PreTrainedModel, tokenizer: Tokenizer, asked: Asked, index: int, name: str, failed: bool
) -> dict:
    """One line of cases.jsonl: the choice at token `index` of the right answer."""
    logits = asked.logits[index - asked.first]
    right = asked.ids[index]
    if failed:
        target, contrast = int(logits.argmax()), right
    else:
        others = logits.clone()
        others[right] = -torch.inf
        target, contrast = right, int(others.argmax())
    ids = asked.ids[:index]
    prompt = asked.text[: asked.offsets[index][0]]
    if tokenizer(prompt)["input_ids"] != ids:
        raise AssertionError(f"{name}: the prompt alone is tokenised otherwise than in its answer")
    user = asked.text[len("<|im_start|>user\n") :].split("<|im_end|>")[0]
    prefix = prompt[len(chat_prompt(user)) :]
    positions, _ = asked.decisive(index)
    return {
        "id": name,
        "kind": asked.task.kind,
        "family": asked.task.family,
        "failed": failed,
        "user": user,
        "answer_prefix": prefix,
        "prompt": prompt,
        "answer": asked.task.turns[0].answer_text,
        "model_answer": prefix + write_greedily(model, tokenizer, ids),
        "target": tokenizer.decode([target]),
        "target_id": target,
        "contrast": tokenizer.decode([contrast]),
        "contrast_id": contrast,
        "delta": round(float(logits[target] - logits[contrast]), 4),
        "n_tokens": len(ids),
        "decisive_positions": positions,
        "decisive_text": [tokenizer.decode([ids[p]]) for p in positions],
    }


def _choice(tokenizer: Tokenizer, asked: Asked, failed: bool) -> int | None:
    """Index of the answer token to explain, or None if this task offers no good one."""
    if failed:
        index = asked.departure
        if index is None:
            return None
        candidates = [index]
    else:
        if asked.departure is not None:
            return None
        candidates = [i for i in range(asked.first, len(asked.ids)) if asked.decisive(i)[1] > 1]
        # the piece with most options is the one a solver has to work for
        candidates.sort(key=lambda i: -asked.decisive(i)[1])
    for index in candidates:
        logits = asked.logits[index - asked.first]
        top = logits.topk(2).indices.tolist()
        pair = (top[0], asked.ids[index]) if failed else (top[0], top[1])
        delta = float(logits[pair[0]] - logits[pair[1]])
        if delta > MIN_DELTA and asked.decisive(index)[0] and _meaningful(tokenizer, *pair):
            return index
    return None


def _hardest(asked: Asked) -> tuple[bool, float]:
    """Is the piece that depends on most right (given the answer so far), and chance there."""
    decisive = [asked.decisive(i) for i in range(asked.first, len(asked.ids))]
    k = max(range(len(decisive)), key=lambda i: (decisive[i][1] > 1, len(decisive[i][0]), -i))
    return int(asked.logits[k].argmax()) == asked.ids[asked.first + k], 1 / decisive[k][1]


def with_failures(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    asked: Iterable[Asked],
    further: Iterable[Task],
    each: int,
) -> list[Asked]:
    """`asked`, and further tasks until `each` failed cases can be picked from them all."""
    asked = list(asked)
    found = {a.text for a in asked if _choice(tokenizer, a, True) is not None}
    if len(found) < each:
        for one in ask(model, tokenizer, further):
            asked.append(one)
            if _choice(tokenizer, one, True) is not None:
                found.add(one.text)
            if len(found) == each:
                break
    return asked


def pick(
    model: PreTrainedModel, tokenizer: Tokenizer, asked: Iterable[Asked], kind: str, each: int
) -> list[dict]:
    """`each` failed and `each` solved cases; a third of the tool cases are long where possible."""
    asked, lines = list({a.text: a for a in asked}.values()), []  # a short task may come twice
    for failed in (True, False):
        good = [(a, i) for a in asked if (i := _choice(tokenizer, a, failed)) is not None]
        random.Random(f"pick/{kind}/{failed}").shuffle(good)
        long = [g for g in good if g[1] >= LONG][: each // 3]
        rest = [g for g in good if g not in long]
        for n, (one, index) in enumerate((long + rest)[:each]):
            name = f"{kind}-{'failed' if failed else 'solved'}-{n:02d}"
            lines.append(_record(model, tokenizer, one, index, name, failed))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder written by train.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=600, help="held-out tasks per kind")
    parser.add_argument("--each", type=int, default=15, help="failed and solved cases per kind")
    parser.add_argument("--level", type=float, default=1.0, help="difficulty in [0, 1]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=None, help="training time, for the card")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer, trained = load_run(args.run)
    longest = round(model.config.max_position_embeddings * 0.9)
    lines: list[dict] = []
    figures: dict[str, dict] = {}
    for kind in KINDS:
        tasks = held_out(kind, args.seed, _MOST * args.held_out, longest, args.level)
        judged = list(itertools.islice(tasks, args.held_out))
        asked = list(ask(model, tokenizer, tqdm(judged, desc=kind)))
        right = [a.departure is None for a in asked]
        families: dict[str, list[bool]] = {}
        for a, ok in zip(asked, right, strict=True):
            families.setdefault(a.task.family, []).append(ok)
        figures[kind] = {
            "tasks": len(asked),
            "accuracy": sum(right) / len(asked),
            "chance": sum(a.task.chance for a in asked) / len(asked),
            "hardest": sum(_hardest(a)[0] for a in asked) / len(asked),
            "hardest_chance": sum(_hardest(a)[1] for a in asked) / len(asked),
            "families": {f: (len(v), sum(v) / len(v)) for f, v in sorted(families.items())},
        }
        if kind == "tool":
            for low, high in ((0, 200), (200, 500), (500, LONG), (LONG, 10**9)):
                some = [ok for a, ok in zip(asked, right, strict=True) if low <= a.first < high]
                if some:
                    span = (
                        f"{low} to {high - 1} tokens" if high < 10**9 else f"{low} tokens or more"
                    )
                    figures[kind]["families"][span] = (len(some), sum(some) / len(some))
        asked = with_failures(model, tokenizer, asked, tasks, args.each)
        lines += pick(model, tokenizer, asked, kind, args.each)
        print(kind, figures[kind])

    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    (args.out / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(args.out)
    with (args.out / "cases.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    count = sum(p.numel() for p in model.parameters())
    write_card(args.out, trained, figures, count, lines, args.minutes)
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{count} parameters, {size} bytes of weights, {len(lines)} cases in {args.out}")


if __name__ == "__main__":
    main()
