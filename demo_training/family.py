"""Write the demo family: the large and the small model, and the small one's checkpoints.

    python -m demo_training.family --large RUN --small RUN --out demo_family

RUN is a folder that ``train.py`` wrote; the small one's was trained with ``--snapshots``. Weights
are rounded to float16. No tokenizer is written: all use the demo model's, in
``tl_contrastive_lrp/demo/data``. Accuracies are measured on the same held-out tasks for every
model, the demo model included, and written into the card with the sizes and training settings.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tl_contrastive_lrp.demo import demo_dir

from .evaluate import ask, held_out
from .tasks import KINDS
from .train import Config, build_model, load_tokenizer

LIMIT = 12_000_000
"""Bytes of the models, the demo model included, so that a checkout stays small."""
SEED = 3
"""Of the tasks on which the family is measured; export.py has others."""

_CARD = """# The demo family of tl_contrastive_lrp

Models of the Qwen3 architecture, trained from scratch on the demo benchmark by the scripts in
`demo_training/`. **They are demonstrations, not useful language models.** The demo model of the
package (`tl_contrastive_lrp/demo/data`, see its card) is the family's middle size. All have its
tokenizer. A checkout's `study` opens them as `demo/small`, `demo/large` and, at a step of its
training, `demo/small@1000`; they are not part of the installed package.

| model | parameters | layers | width | steps | {kinds} | all |
| --- | --- | --- | --- | --- | {lines} | --- |
{rows}

Accuracy: whole answers that are right, word for word, by greedy decoding on {judged} held-out
tasks of each kind at the highest difficulty, the same for all models. Weights are float16.

## How they were trained

One thread each, float32; flags that differ from the defaults of `demo_training/train.py`:

```sh
{commands}
python -m demo_training.family --large checkpoints/large --small checkpoints/small --out demo_family
```

Checkpoints of one run share its learning rate schedule: constant from step {warmup} until the
last {decay:.0%} of the steps, so all but the last ones are from the constant part.
"""


@dataclass(frozen=True)
class Member:
    """One model of the family, its weights rounded to float16 and held in float32."""

    name: str
    model: PreTrainedModel
    step: int | None

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half().float())
    return model.eval()


def load_state(run: Path, tokenizer: Any) -> tuple[PreTrainedModel, Config, int]:
    """The model of a run's state.pt, its settings and its step."""
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
    config = Config(**state["config"])
    model = build_model(config, len(tokenizer), tokenizer)
    model.load_state_dict(state["model"])
    return _rounded(model), config, int(state["step"])


def members(large: Path, small: Path, tokenizer: Any) -> tuple[list[Member], dict[str, Config]]:
    """Both models and the small one's snapshots, in order of training."""
    found, configs = [], {}
    for name, run in (("large", large), ("small", small)):
        model, config, step = load_state(run, tokenizer)
        if step != config.steps:
            print(f"{run}: training is at step {step} of {config.steps}")
        found.append(Member(name, model, step))
        configs[name] = config
    last = found[-1].step
    for folder in sorted(small.glob("step-*")):
        step = int(folder.name.removeprefix("step-"))
        if step != last:
            model = _rounded(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
            found.append(Member(f"small-{step:04d}", model, step))
    return found, configs


def accuracies(model: PreTrainedModel, tokenizer: Any, judged: int) -> dict[str, float]:
    """Share of held-out tasks whose whole answer is right, by kind."""
    found = {}
    for kind in KINDS:
        asked = list(ask(model, tokenizer, held_out(kind, SEED, judged, 600)))
        found[kind] = sum(a.departure is None for a in asked) / len(asked)
    return found


def write(member: Member, out: Path) -> int:
    """Write one model in Hugging Face's format, float16; returns its size in bytes."""
    folder = out / member.name
    if folder.exists():
        shutil.rmtree(folder)
    dtype = member.model.dtype
    member.model.half().save_pretrained(folder)
    member.model.to(dtype)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["trained_steps"] = member.step
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.iterdir())


def _command(name: str, config: Config, snapshots: list[int]) -> str:
    own, usual = asdict(config), asdict(Config())
    flags = [f"--{k.replace('_', '-')} {v}" for k, v in own.items() if v != usual[k]]
    if snapshots:
        flags.append("--snapshots " + " ".join(map(str, snapshots)))
    lines = ["python -m demo_training.train --tokenizer tl_contrastive_lrp/demo/data"]
    for part in (f"--out checkpoints/{name} --threads 1", *flags):
        if len(lines[-1]) + len(part) > 94:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += " " + part
    return "\n".join(lines)


def card(
    rows: list[tuple[Member, dict[str, float]]], configs: dict[str, Config], judged: int
) -> str:
    """The family's card, from measured figures."""
    lines = []
    for member, right in rows:
        shape = member.model.config
        mean = sum(right.values()) / len(right)
        lines.append(
            f"| `{member.name}` | {member.size:,} | {shape.num_hidden_layers} | "
            f"{shape.hidden_size} | {'see its card' if member.step is None else member.step} | "
            + " | ".join(f"{right[kind]:.0%}" for kind in KINDS)
            + f" | {mean:.0%} |"
        )
    steps = sorted(m.step for m, _ in rows if m.name.startswith("small") and m.step is not None)
    commands = [
        _command(name, config, steps if name == "small" else []) for name, config in configs.items()
    ]
    return _CARD.format(
        kinds=" | ".join(KINDS),
        lines=" | ".join("---" for _ in KINDS),
        rows="\n".join(lines),
        judged=judged,
        commands="\n".join(commands),
        warmup=configs["small"].warmup,
        decay=configs["small"].decay,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--large", type=Path, required=True, help="run of the large model")
    parser.add_argument("--small", type=Path, required=True, help="run of the small model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--judged", type=int, default=150, help="held-out tasks of each kind")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(demo_dir())
    family, configs = members(args.large, args.small, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    total = sum(f.stat().st_size for f in demo_dir().iterdir() if f.suffix != ".jsonl")
    total += sum(write(member, args.out) for member in family)
    middle = AutoModelForCausalLM.from_pretrained(demo_dir(), dtype=torch.float32).eval()
    checkpoints = sorted(family[2:], key=lambda m: m.step or 0)
    rows = []
    for member in (family[0], Member("demo", middle, None), family[1], *checkpoints):
        rows.append((member, accuracies(member.model, tokenizer, args.judged)))
        print(member.name, f"{member.size:,}", rows[-1][1], flush=True)
    (args.out / "README.md").write_text(card(rows, configs, args.judged), encoding="utf-8")
    print(f"{len(family)} models in {args.out}; {total:,} bytes of models, the demo model included")
    if total > LIMIT:
        raise SystemExit(f"That is more than {LIMIT:,} bytes; leave out a checkpoint.")


if __name__ == "__main__":
    main()
