"""How faithful is each rule set on real weights? Measures, for docs/faithfulness.md.

    python tools/real_model.py --out FOLDER
    python benchmarks/real_failures.py --model FOLDER --data DATA --work WORK --out CASES.jsonl
    python benchmarks/real_faithfulness.py --model FOLDER --cases CASES.jsonl --out OUT --shard 1/2
    python benchmarks/real_faithfulness.py --model FOLDER --cases CASES.jsonl --out OUT --shard 2/2
    python benchmarks/real_faithfulness.py --out OUT --summary benchmarks/real_faithfulness.json

Groups of prompts: indirect objects, agreement and facts from the templates in ``_real_prompts.py``,
20 each; failures and long failures, of more than 200 tokens: cases of ``clrp.study``
(CASES.jsonl), --failures and --long of them drawn at random. What is measured is in
``_real_measures.py``:

- base: relevance of every rule set, the share of Δℓ at the tokens, effects of single tokens
  measured and predicted. Of failures 16 ordinary tokens are drawn at random (correlations are over
  these) and the 16 strongest of AttnLRP added; of templates all are replaced. A second random
  token takes the place of each sampled one, and a second window is predicted, on templates and
  every third failure; the window on all long ones.
- removal: the area between curves of removed tokens, and tokens to flip: all templates, and 24
  failures of at most 120 tokens.
- patching: 4 prompts of indirect objects and 4 of agreement.
- circuits: 5 of each, where the corrupted prompt takes half a logit or more from Δℓ.

A file is written for each prompt and part, whole or not at all; what is there is not measured
again, so a run can be stopped and continued. A process takes one thread. Failures come in random
order, those of more than 600 tokens last, so what a stopped run has is a random sample of each. The
files hold tokens' positions and numbers, no texts; --summary makes of them one file with a row a
prompt and rule set. Without --cases templates alone are measured, as of a second model, with
--parts base:

    python benchmarks/real_faithfulness.py --model SECOND --name NAME --out OUT --parts base \
        --templates 5 --summary benchmarks/real_second_model.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _real_measures as measures
import _real_verdicts as verdicts
import torch
from _faithfulness_runs import RULES
from _real_prompts import FAILURES, LONG, TEMPLATES, prompts
from torch import Tensor

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.files import atomic_path

NAMED = tuple(clrp.RULE_SETS)
GROUPS = (*TEMPLATES, FAILURES, LONG)
BOUND = 200  # tokens; longer failures are a group of their own
FAR = 600  # tokens; still longer ones are measured last
SUBSET, SHORT = 24, 120  # failures of at most so many tokens, for removal
PATCHED = (0, 1, 10, 11)  # numbers of the templates' prompts
RESTORED = tuple(range(0, 20, 4))  # the same, for circuits
DIGITS = 6


@dataclass(frozen=True)
class Asked:
    """One prompt with two tokens. number: in its group. rank: its place in the order of failures,
    which is random. target: the right token of a template, the written one of a failure."""

    group: str
    number: int
    rank: int
    ids: Tensor
    target: int
    contrast: int
    corrupted: Tensor | None = None
    removal: bool = True

    @property
    def second(self) -> bool:
        """Whether two random tokens are drawn for sampled ones."""
        return self.group in TEMPLATES or self.rank % 3 == 0

    @property
    def windows(self) -> tuple[int, ...]:
        """Of predicted effects; that of ``result.check`` is always there."""
        return measures.WINDOWS if self.second or self.group == LONG else measures.WINDOWS[-1:]

    @property
    def methods(self) -> tuple[str, ...]:
        return RULES if self.removal else NAMED

    def file(self, out: Path, part: str) -> Path:
        return out / f"{self.group.replace(' ', '_')}-{self.number:04d}.{part}.json"


# ---- which prompts


def one_token(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"{word!r} has {len(ids)} tokens under this tokenizer; templates need 1.")
    return int(ids[0])


def from_templates(tokenizer: Any, most: int | None) -> list[Asked]:
    """Prompts with BOS where the model's own tokenizer adds it."""
    found: list[Asked] = []
    for group in TEMPLATES:
        for number, prompt in enumerate([p for p in prompts() if p.group == group][:most]):
            clean, corrupted = (
                None if text is None else torch.tensor(tokenizer(text)["input_ids"])
                for text in (prompt.text, prompt.corrupted)
            )
            if corrupted is not None and len(corrupted) != len(clean):
                raise ValueError(f"{prompt.text!r} and its partner differ in length.")
            two = one_token(tokenizer, prompt.right), one_token(tokenizer, prompt.wrong)
            found.append(Asked(group, number, number, clean, *two, corrupted))
    return found


def from_cases(path: Path, most: int, most_long: int, longest: int) -> list[Asked]:
    """Failures, in random order but for the longest, which come last; the first of them that are
    short enough are for removal too."""
    cases = list(enumerate(clrp.study.load_cases(path)))
    cases = [(number, case) for number, case in cases if len(case.ids) <= longest]
    draw = random.Random(0)
    draw.shuffle(cases)
    left, chosen = {FAILURES: most, LONG: most_long}, []
    for number, case in cases:
        group = LONG if len(case.ids) > BOUND else FAILURES
        if left[group]:
            left[group] -= 1
            chosen.append((group, number, case))
    draw.shuffle(chosen)  # of a stopped run, both groups have their part
    found, short = [], 0
    for rank, (group, number, case) in enumerate(chosen):
        removal = len(case.ids) <= SHORT and short < SUBSET
        short += removal
        ids = torch.tensor(case.ids)
        two = case.target_id, case.contrast_id
        found.append(Asked(group, number, rank, ids, *two, removal=removal))
    return sorted(found, key=lambda one: len(one.ids) > FAR)


# ---- what is measured of one


def base(model: Any, plain: Any, one: Asked, out: Path) -> dict[str, Any]:
    """Relevance, shares and effects."""
    clock, seconds = time.process_time(), {}

    def lap(name: str) -> None:
        nonlocal clock
        seconds[name], clock = round(time.process_time() - clock, 3), time.process_time()

    target, contrast, first = measures.preferred(model, one.ids, one.target, one.contrast)
    results = measures.relevance(model, one.ids, target, contrast, one.methods)
    scores = {name: result.tokens for name, result in results.items()}
    lap("relevance")
    free = measures.ordinary(model, one.ids)
    strength, seed = scores[measures.FIRST_SET], GROUPS.index(one.group) * 100_000 + one.number
    at = measures.positions(one.ids, free, strength, seed)
    found = measures.effects(model, plain, one.ids, target, contrast, at, seed, one.second)
    lap("measured effects")
    foreseen = measures.predicted(model, one.ids, target, contrast, one.windows)
    lap("predicted effects")
    return {
        "tokens": len(one.ids),
        "delta": results[measures.FIRST_SET].delta,
        "right": one.target == target,
        "first": first,
        "ordinary": free,
        "relevance": {name: score.tolist() for name, score in scores.items()},
        "shares": measures.shares(results),
        "predicted": foreseen,
        "measured": {"pos": list(at), "why": list(at.values()), **found},
        "seconds": seconds,
    }


def removal(model: Any, plain: Any, one: Asked, out: Path) -> dict[str, Any]:
    """Area and tokens to flip, of the relevance that ``base`` wrote."""
    known = json.loads(one.file(out, "base").read_text("utf-8"))
    scores = {name: torch.tensor(s).double() for name, s in known["relevance"].items()}
    target, contrast, first = measures.preferred(model, one.ids, one.target, one.contrast)
    clock = time.process_time()
    areas = measures.area(model, one.ids, target, contrast, scores)
    middle = time.process_time()
    counts = measures.flips(model, one.ids, target, scores) if first else {}
    seconds = {"area": middle - clock, "tokens to flip": time.process_time() - middle}
    return {"area": areas, "flips": counts, "seconds": seconds}


def patched(model: Any, plain: Any, one: Asked, out: Path) -> dict[str, Any]:
    clock = time.process_time()
    target, contrast, _ = measures.preferred(model, one.ids, one.target, one.contrast)
    assert one.corrupted is not None
    found = measures.patching(model, one.ids, one.corrupted, target, contrast, RULES)
    return {"patching": found, "seconds": {"patching": time.process_time() - clock}}


def restored(model: Any, plain: Any, one: Asked, out: Path) -> dict[str, Any]:
    clock = time.process_time()
    target, contrast, _ = measures.preferred(model, one.ids, one.target, one.contrast)
    assert one.corrupted is not None
    found = measures.circuits(
        model, one.ids, one.corrupted, target, contrast, RULES, seed=one.number
    )
    return {"circuits": found, "seconds": {"circuits": time.process_time() - clock}}


Part = Callable[[Any, Any, Asked, Path], dict[str, Any]]
PARTS: dict[str, Part] = {
    "base": base, "removal": removal, "patching": patched, "circuits": restored,
}  # fmt: skip


def jobs(asked: Iterable[Asked]) -> list[tuple[Asked, str]]:
    """What is measured, in order: what a stopped run should have first comes first."""
    asked = list(asked)
    templates = [one for one in asked if one.group in TEMPLATES]
    failures = [one for one in asked if one.group not in TEMPLATES]
    found = [(one, part) for one in templates for part in ("base", "removal")]
    for part, numbers in (("patching", PATCHED), ("circuits", RESTORED)):
        found += [
            (one, part) for one in templates
            if one.corrupted is not None and one.number in numbers
        ]  # fmt: skip
    for one in failures:
        found.append((one, "base"))
        if one.removal:
            found.append((one, "removal"))
    return found


def cost(one: Asked, part: str) -> float:
    """About how many seconds it takes."""
    n = len(one.ids)
    if part == "base":
        return 2.0 + n * 0.3
    return {"removal": 0.3 * n, "patching": n, "circuits": 60.0}[part]


def rounded(value: Any) -> Any:
    """Numbers with ``DIGITS`` digits, NaN as None."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list | tuple) else value


def spent(out: Path) -> dict[str, float]:
    """Processor seconds by part, over all files there."""
    total: dict[str, float] = {}
    for file in out.glob("*.*.json"):
        for name, seconds in json.loads(file.read_text("utf-8"))["seconds"].items():
            total[name] = total.get(name, 0.0) + seconds
    return total


def measure(
    model: Any, plain: Any, asked: list[Asked], out: Path, shard: tuple[int, int],
    parts: Sequence[str] = tuple(PARTS),
) -> None:  # fmt: skip
    """What is not there yet of this shard's part, with what remains."""
    which, of = shard
    mine = [one for number, one in enumerate(asked) if number % of == which - 1]
    todo = [(one, part) for one, part in jobs(mine) if part in parts]
    left = [(one, part) for one, part in todo if not one.file(out, part).exists()]
    total, done, start = sum(cost(*job) for job in left), 0.0, time.perf_counter()
    print(f"shard {which}/{of}: {len(left)} of {len(todo)} to do", flush=True)
    for number, (one, part) in enumerate(left, 1):
        found = rounded(
            {"group": one.group, "number": one.number} | PARTS[part](model, plain, one, out)
        )
        with atomic_path(one.file(out, part), example="out.json") as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
        done += cost(one, part)
        elapsed = time.perf_counter() - start
        remaining = elapsed / done * (total - done) / 60
        print(
            f"{number}/{len(left)} {one.group} {one.number} {part}, {len(one.ids)} tokens; "
            f"{elapsed / 60:.1f} min, about {remaining:.1f} remain",
            flush=True,
        )


# ---- the summary


def correlations(pair: tuple[list[float], list[float]], names: tuple[str, str]) -> dict[str, float]:
    return {
        name: measures.correlation(*pair, kind)
        for name, kind in zip(names, ("pearson", "spearman"), strict=True)
    }


def of_base(found: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The prompt's own numbers, and those of each rule set and of predicted effects."""
    measured = found["measured"]
    keep = [i for i, why in enumerate(measured["why"]) if why != "strongest"]
    at = [measured["pos"][i] for i in keep]
    truth = {kind: [measured[kind][i] for i in keep] for kind in ("zero", "random a", "random b")}
    prompt = {
        "group": found["group"], "prompt": found["number"], "tokens": found["tokens"],
        "delta": found["delta"], "right": found["right"], "first": found["first"],
        "sampled": len(keep), "ordinary": len(found["ordinary"]),
        "mean_effect": sum(map(abs, truth["zero"])) / max(1, len(keep)),
    }  # fmt: skip
    pairs = {"zero_random": ("zero", "random a"), "random_random": ("random a", "random b")}
    for name, (one, other) in pairs.items():
        if None not in truth[other]:
            names = f"pearson_{name}", f"spearman_{name}"
            prompt |= correlations((truth[one], truth[other]), names)
    prompt |= verdicts.checked(found)
    rows: dict[str, dict[str, float]] = {}
    guesses = {name: [-r[p] for p in at] for name, r in found["relevance"].items()}
    for window, one in found["predicted"].items():
        guesses[f"window {window}"] = [one["effect"][p] for p in at]
    for name, guess in guesses.items():
        row = rows[name] = {}
        if name.startswith("window"):
            row["forwards"] = found["predicted"][name.split()[1]]["forwards"]
        for kind, measure_of in (("zero", "zero"), ("random", "random a")):
            names = f"pearson_{kind}", f"spearman_{kind}"
            row |= correlations((guess, truth[measure_of]), names)
        if name in found["shares"]:
            share = found["shares"][name]["share"]
            row |= {
                "share": share, "sink_share": found["shares"][name]["sink_share"],
                "off_share": abs(1.0 - share), "wrong_sign": float(share < 0),
            }  # fmt: skip
    return prompt, rows


def summary(out: Path) -> dict[str, Any]:
    """Everything in the folder as columns and rows; no text of a prompt."""
    found: dict[tuple[str, int], tuple[dict[str, Any], dict[str, dict[str, float]]]] = {}
    for file in sorted(out.glob("*.base.json")):
        known = json.loads(file.read_text("utf-8"))
        found[known["group"], known["number"]] = of_base(known)
    for part in ("removal", "patching", "circuits"):
        for file in sorted(out.glob(f"*.{part}.json")):
            known = json.loads(file.read_text("utf-8"))
            rows = found[known["group"], known["number"]][1]
            for measure_of in ("area", "flips"):
                for name, value in known.get(measure_of, {}).items():
                    rows[name][measure_of] = value
            for name, values in known.get("patching", {}).items():
                rows[name] |= {f"patching {key}": value for key, value in values.items()}
            for name, values in known.get("circuits", {}).items():
                rows.setdefault(name, {}).update(values)
    order = sorted(found, key=lambda key: (GROUPS.index(key[0]), key[1]))
    per_prompt = [found[key][0] for key in order]
    per_method = [
        {"group": key[0], "prompt": key[1], "method": name} | row
        for key in order for name, row in found[key][1].items()
    ]  # fmt: skip
    about = json.loads((out / "about.json").read_text("utf-8"))
    minutes = {name: round(seconds / 60, 1) for name, seconds in sorted(spent(out).items())}
    return {
        "about": about | {"processor_minutes": minutes},
        "prompts": table(per_prompt),
        "methods": table(per_method),
    }


def table(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Columns by name, None where a row lacks one, numbers with four digits."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    short = [
        {k: float(f"{v:.4g}") if isinstance(v, float) and math.isfinite(v) else
            None if isinstance(v, float) else v for k, v in row.items()}
        for row in rows
    ]  # fmt: skip
    return {name: [row.get(name) for row in short] for name in names}


def about(folder: Path, name: str, cases: Path | None) -> dict[str, Any]:
    """What was measured with."""
    packages = ("torch", "transformers", "transformer_lens", "tl_contrastive_lrp")
    names = {"transformer_lens": "transformer-lens"}
    return {
        "model": name or folder.name,
        "cases": 0 if cases is None else len(clrp.study.load_cases(cases)),
        "python": platform.python_version(),
        **{name: version(names.get(name, name)) for name in packages},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder with real weights")
    parser.add_argument("--name", default="", help="what the page calls the model")
    parser.add_argument("--cases", type=Path, help="failures, as clrp.study saves them")
    parser.add_argument("--out", type=Path, required=True, help="folder of measurements")
    parser.add_argument("--shard", default="1/1", help="this process's part, as 1/2")
    parser.add_argument("--failures", type=int, default=140, help="the most short failures")
    parser.add_argument("--long", type=int, default=36, help="the most long failures")
    parser.add_argument("--longest", type=int, default=1000, help="tokens of a failure")
    parser.add_argument("--templates", type=int, help="the most prompts of each template group")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=tuple(PARTS), metavar="PART")
    parser.add_argument("--summary", type=Path, help="write this file from what is measured")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.model is not None:
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM, AutoTokenizer

        which, of = map(int, options.shard.split("/"))
        if not 1 <= which <= of:
            parser.error(f"--shard {options.shard}: give 1/{of} to {of}/{of}")
        torch.set_num_threads(1)
        model: Any = TransformerBridge.boot_transformers(str(options.model)).eval()
        plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        asked = from_templates(AutoTokenizer.from_pretrained(options.model), options.templates)
        if options.cases is not None:
            asked += from_cases(options.cases, options.failures, options.long, options.longest)
        with atomic_path(options.out / "about.json", example="about.json") as temporary:
            temporary.write_text(
                json.dumps(about(options.model, options.name, options.cases)), "utf-8"
            )
        measure(model, plain, asked, options.out, (which, of), options.parts)
        for name, seconds in sorted(spent(options.out).items()):
            print(f"{name}: {seconds / 60:.1f} processor minutes")
    if options.summary is not None:
        text = json.dumps(summary(options.out), ensure_ascii=False, separators=(",", ":"))
        with atomic_path(options.summary, example="real.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        print(f"{options.summary}: {len(text) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
