"""Train the demo model from scratch: seeded, and resumable to the bit on the same machine.

    python -m demo_training.train --tokenizer RUN/tokenizer --out RUN
    python -m demo_training.train --tokenizer RUN/tokenizer --out RUN --resume

The learning rate is constant after the warm-up until `--decay` of the steps are left, and the
curriculum depends on `--curriculum-steps` only; so a run may be resumed with another `--steps` as
long as its decay has not begun, and equals a run started with that number.

Shows a bar. The shipped model took 28 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from .data import Batch, Stream


@dataclass(frozen=True)
class Config:
    """Sizes and schedule; every field is a command-line flag."""

    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 320
    context: int = 1280
    rope_theta: float = 10000.0
    steps: int = 5000
    curriculum_steps: int = 1500
    twice_until: int = 200
    drills_until: int = 1500
    warmup: int = 100
    decay: float = 0.25
    tokens_per_batch: int = 3072
    lr: float = 0.003
    matrix_lr: float = 0.01
    weight_decay: float = 0.05
    seed: int = 0


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that tokenizer.py wrote to a folder."""
    if not (folder / "tokenizer.json").exists():
        raise FileNotFoundError(
            f"no tokenizer.json in {folder}; write one with "
            f"python -m demo_training.tokenizer --out {folder}"
        )
    return AutoTokenizer.from_pretrained(folder)


def build_model(config: Config, vocab_size: int, tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of the asked size (the seed fixes its weights)."""
    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=config.matrix_lr, weight_decay=config.weight_decay, momentum=0.95
        ),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, config: Config) -> float:
    """Factor on the learning rates: linear warm-up, constant, linear decay to 0."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    left = config.steps - step
    return min(1.0, left / max(1.0, config.decay * config.steps))


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Weighted mean cross-entropy at the batch's predicting places."""
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    logits = model.lm_head(hidden[batch.rows, batch.columns])
    losses = F.cross_entropy(
        logits.float(), batch.ids[batch.rows, batch.columns + 1], reduction="none"
    )
    return (losses * batch.weights).sum() / batch.weights.sum()


class Run:
    """One training run: model, optimisers, data and step, saved and restored together."""

    def __init__(self, config: Config, tokenizer_dir: Path, device: str = "cpu") -> None:
        self.config, self.device, self.step = config, device, 0
        self.tokenizer = load_tokenizer(tokenizer_dir)
        self.model = build_model(config, len(self.tokenizer), self.tokenizer).to(device).train()
        self.optimizers = make_optimizers(self.model, config)
        self.data = Stream(self.tokenizer, config.seed, config.tokens_per_batch, config.context)

    @property
    def _phase(self) -> str:
        """What the next pool of data holds, see `data.PHASES`."""
        if self.step < self.config.twice_until:
            return "twice"
        return "drills" if self.step < self.config.drills_until else "tasks"

    def advance(self) -> float:
        """Do one optimiser step and return its loss."""
        progress = min(1.0, self.step / max(1, self.config.curriculum_steps))
        batch = self.data.batch(progress, self._phase)
        if self.device != "cpu":
            batch = Batch(*(t.to(self.device) for t in vars(batch).values()))
        factor = rate(self.step, self.config)
        for optimizer, base in zip(
            self.optimizers, (self.config.matrix_lr, self.config.lr), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = base * factor
        loss = loss_of(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the whole state; the old file stays until the new one is complete."""
        state = {
            "config": asdict(self.config),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "data": self.data.state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Take up a saved run; sizes, seed and schedule (but `steps`) must be the same."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        for key, value in asdict(self.config).items():
            if key != "steps" and state["config"][key] != value:
                raise ValueError(
                    f"{path} was trained with {key}={state['config'][key]}, not {value}; "
                    f"resume with --{key.replace('_', '-')} {state['config'][key]}"
                )
        old, new = state["config"]["steps"], self.config.steps
        first_decay = min(old, new) * (1 - self.config.decay)
        if old != new and state["step"] > first_decay:
            raise ValueError(
                f"{path} is at step {state['step']} of {old}, past the start of a decay "
                f"({first_decay:.0f}); resume with --steps {old}"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.data.restore(state["data"])


def train(
    run: Run, out: Path, *, save_every_minutes: float = 3.0, snapshots: Iterable[int] = ()
) -> None:
    """Train to `run.config.steps`, saving `state.pt` now and then and the wanted snapshots."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "train_config.json").write_text(json.dumps(asdict(run.config), indent=2) + "\n")
    wanted = set(snapshots)
    saved, mean = time.monotonic(), None
    with tqdm(
        total=run.config.steps, initial=run.step, unit="step", mininterval=10, desc="training"
    ) as bar:
        while run.step < run.config.steps:
            loss = run.advance()
            mean = loss if mean is None else 0.98 * mean + 0.02 * loss
            bar.update()
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            if run.step in wanted:
                run.model.save_pretrained(out / f"step-{run.step:06d}")
            if time.monotonic() - saved > 60 * save_every_minutes:
                run.save(out / "state.pt")
                saved = time.monotonic()
    run.save(out / "state.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every-minutes", type=float, default=3.0)
    parser.add_argument("--snapshots", type=int, nargs="*", default=(), help="steps to keep")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = Config(**{name: getattr(args, name) for name in asdict(Config())})
    run = Run(config, args.tokenizer, args.device)
    state = args.out / "state.pt"
    if args.resume:
        run.load(state)
    elif state.exists():
        parser.error(f"{state} exists; add --resume to go on, or choose another --out")
    train(run, args.out, save_every_minutes=args.save_every_minutes, snapshots=args.snapshots)


if __name__ == "__main__":
    main()
