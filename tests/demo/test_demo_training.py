"""Training the demo model: resumed to the bit, on drills and tasks that can be answered."""

from __future__ import annotations

import dataclasses
import random
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # demo_training is not part of the wheel

from demo_training import drill, train  # noqa: E402
from demo_training.data import Stream  # noqa: E402
from tl_contrastive_lrp import demo  # noqa: E402

TINY = train.Config(
    d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp=16, context=128,
    steps=6, curriculum_steps=4, warmup=2, tokens_per_batch=600,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train.load_tokenizer(demo.demo_dir())


def _states_equal(a: train.Run, b: train.Run) -> bool:
    one, two = a.model.state_dict(), b.model.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = train.Run(TINY, demo.demo_dir())
    losses = [whole.advance() for _ in range(6)]
    first = train.Run(TINY, demo.demo_dir())
    early = [first.advance() for _ in range(3)]
    first.save(tmp_path / "state.pt")
    second = train.Run(TINY, demo.demo_dir())
    assert not _states_equal(first, second)
    second.load(tmp_path / "state.pt")
    late = [second.advance() for _ in range(3)]
    assert early + late == losses
    assert _states_equal(whole, second)


def test_resuming_with_another_size_or_after_the_decay_is_refused(tmp_path):
    run = train.Run(TINY, demo.demo_dir())
    run.step = 5
    run.save(tmp_path / "state.pt")
    other = train.Run(dataclasses.replace(TINY, seed=1), demo.demo_dir())
    with pytest.raises(ValueError, match=r"seed=0, not 1; resume with --seed 0"):
        other.load(tmp_path / "state.pt")
    longer = train.Run(dataclasses.replace(TINY, steps=60), demo.demo_dir())
    with pytest.raises(ValueError, match="resume with --steps 6"):
        longer.load(tmp_path / "state.pt")


def test_the_data_stream_can_be_taken_up_across_pools(tokenizer):
    def new() -> Stream:
        return Stream(tokenizer, 5, 40_000, 256)

    whole, batches, states = new(), [], []
    while len({s["pool"] for s in states}) < 2 or len(batches) < 4:
        states.append(whole.state())
        batches.append(whole.batch(len(batches) / 10))
    states.append(whole.state())
    for k in (1, len(batches) - 1):
        again = new()
        again.restore(states[k])
        for n in range(k, len(batches)):
            batch = again.batch(n / 10)
            assert torch.equal(batch.ids, batches[n].ids)
            assert torch.equal(batch.columns, batches[n].columns)


def test_snapshots_are_hugging_face_models(tmp_path):
    from transformers import AutoModelForCausalLM

    run = train.Run(dataclasses.replace(TINY, steps=2), demo.demo_dir())
    train.train(run, tmp_path, snapshots=[1])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "step-000001")
    assert loaded.config.num_hidden_layers == 1
    assert (tmp_path / "state.pt").is_file()
    assert not (tmp_path / "state.partial").exists()


def test_a_drill_can_be_answered_from_what_stands_further_up():
    """Every written value is the one stated for its key; the second half repeats the first."""
    rng = random.Random(4)
    for _ in range(50):
        (said, _), (again, written) = drill.twice(rng, 30)
        first, second = said.split("<|im_end|>\n<|im_start|>assistant")
        assert written
        assert first == "<|im_start|>user\n" + second + again
        shown, *rest = drill.facts(rng)
        keys, values = rest[::2], rest[1::2]
        assert len(keys) == len(values) >= 2
        for (key, asked), (value, written) in zip(keys, values, strict=True):
            assert written
            assert not asked
            stated = re.findall(rf"(?<!\w){re.escape(key.strip())}([ =]\d+)\n", shown[0] + "\n")
            stated += re.findall(rf"(?<!\w){re.escape(key.strip())}([ =]\d+)<", shown[0])
            assert stated == [value]


def test_the_phases_hold_what_they_say(tokenizer):
    """First repetitions alone, then every kind with drills, then every kind with few."""

    def share_of_drills(phase: str, batches: int) -> tuple[float, str]:
        stream, rows = Stream(tokenizer, 3, 60_000, 512), []
        for _ in range(batches):
            rows += [tokenizer.decode(row) for row in stream.batch(0.5, phase).ids]
        # a drill's answer begins on the line of the word "assistant", a task's below it
        drills = [row for row in rows if "<|im_start|>assistant " in row]
        return len(drills) / len(rows), "".join(rows)

    alone, said = share_of_drills("twice", 1)
    many, mixed = share_of_drills("drills", 3)
    few, tasks = share_of_drills("tasks", 3)
    signs = ("How many", "Log:", "print(", "words")
    assert alone == 1.0
    assert not any(sign in said for sign in signs)
    assert all(sign in mixed and sign in tasks for sign in signs)
    assert many > 2 * few > 0
