"""A run in tiles that is killed goes on with the same bits; Ctrl-C leaves no trace."""

from __future__ import annotations

import dataclasses
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.children import command, environment
from support.grids import grid
from support.killed_child import KINDS, boot, run
from support.model_state import snapshot_of
from truth import zoo
from truth.zoo.row import windows

from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.hooks.user_hooks import as_own

BLOCKS = 6


@pytest.fixture(scope="module")
def folder() -> str:
    """A model of six blocks on disk, with windows, soft-caps and biases."""
    row = zoo.ROWS["gemma2"]
    changes = {
        "num_hidden_layers": BLOCKS, "layer_types": windows(*"sf" * (BLOCKS // 2)),
        "sliding_window": 30, "max_position_embeddings": 256,
    }  # fmt: skip
    deep = dataclasses.replace(row, name="gemma2-deep", kwargs={**row.kwargs, **changes})
    with mock.patch.dict(zoo.ROWS, {deep.name: deep}):
        return str(zoo.saved(deep.name))


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return boot(folder)


@pytest.fixture(scope="module", autouse=True)
def untouched(model: Any) -> dict[str, Any]:
    """What the model is like before anything is explained."""
    model(torch.arange(4, 9)[None])  # transformers puts hooks of its own on at the first forward
    before = snapshot_of(model)
    for kind in ("nodes", "edges"):
        run(model, kind, 40)  # the first run also audits the model, and meets each point more often
    return before


def stopped_at(block: int, how: signal.Signals, arguments: list[str], after: float) -> int:
    """Runs the child until that block is on disk and a moment longer; its exit status."""
    checkpoint = Path(arguments[1])
    with subprocess.Popen(command("killed_child", *arguments), env=environment()) as child:
        try:
            for _ in range(120_000):
                if (checkpoint / f"block_{block}.safetensors").exists() or child.poll() is not None:
                    break
                time.sleep(0.001)
            time.sleep(after)
            child.send_signal(how)
            return child.wait(60)
        finally:
            child.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(len(KINDS) + 1))
def test_killed_and_resumed_has_the_same_bits(
    seed: int, folder: str, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = random.Random(seed)
    kind, how = KINDS[seed % len(KINDS)], signal.SIGKILL
    if seed == len(KINDS):
        how = signal.SIGINT
    block, after = drawn.randrange(1, BLOCKS), drawn.uniform(0.0, 0.2)
    wanted = run(model, kind)
    checkpoint = tmp_path / "run"
    status = stopped_at(block, how, [folder, str(checkpoint), kind], after)
    assert status == (3 if how is signal.SIGINT else -signal.SIGKILL)
    done = sorted(int(p.stem.removeprefix("block_")) for p in checkpoint.glob("*.safetensors"))
    assert done == list(range(done[0], BLOCKS))
    assert 0 < done[0] <= block

    blocks, layer = [], tiled_backward.Backward.layer

    def counted(self: Any, at: int, *args: Any) -> Any:
        blocks.append(at)
        return layer(self, at, *args)

    monkeypatch.setattr(tiled_backward.Backward, "layer", counted)
    found = run(model, kind, checkpoint_dir=checkpoint)
    assert blocks == list(reversed(range(done[0])))  # and none of those that were done
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


# ---------------------------------------------------------------- stopped from within


class Interrupt:
    """A hook that stands for Ctrl-C at its n-th call."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, tensor: Any, hook: Any) -> None:  # noqa: ARG002
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


# In the prefill and when blocks run again; on the way back in a block, and behind all of them.
POINTS = [
    ("blocks.0.hook_resid_pre", "fwd"), ("blocks.3.attn.hook_z", "fwd"),
    ("blocks.5.mlp.hook_out", "fwd"), ("unembed.hook_out", "fwd"),
    ("blocks.4.attn.hook_z", "bwd"), ("blocks.0.mlp.hook_post", "bwd"), ("ln_final.hook_in", "bwd"),
]  # fmt: skip


@pytest.mark.parametrize(("at", "kind"), grid(POINTS, ["nodes", "edges"]))
def test_stopped_anywhere_nothing_is_left_behind(
    at: tuple[str, Any], kind: str, model: Any, untouched: dict[str, Any], tmp_path: Path
) -> None:
    """Hooks, gradients, flags as they were; the next run gives the same numbers."""
    point, way = at
    calls = as_own(Interrupt(0))  # a user's hook would be kept out of the tiles
    with model.hooks(**{f"{way}_hooks": [(point, calls)]}):
        wanted = run(model, kind, 40)
    times = -calls.left
    assert times > 0, "the point is never met"
    assert snapshot_of(model) == untouched
    parameter = next(model.original_model.parameters())
    parameter.grad = torch.ones_like(parameter)  # the user's own
    before = snapshot_of(model)
    for after in random.Random(f"{kind} {point}").sample(range(times), min(2, times)):
        stop = {f"{way}_hooks": [(point, as_own(Interrupt(after + 1)))]}
        with pytest.raises(KeyboardInterrupt), model.hooks(**stop):
            run(model, kind, 40, checkpoint_dir=tmp_path / str(after))
        assert snapshot_of(model) == before
    parameter.grad = None
    found = run(model, kind, 40)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
