"""Where weights and tokens are changes no relevance; what is in no one place is refused.

A GPU is pretended (``pretend_device.py``): it shows every tensor that is made in the wrong place,
and that the backward may run in a thread of its own. It does not show a GPU's rounding or memory.
"""

from __future__ import annotations

import json
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.children import command, environment
from support.model_state import snapshot_of
from torch import Tensor
from truth.families import boot, random_tokens, saved
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError
from tl_contrastive_lrp.inputs.tokens import model_device

ALONE = ("gpt2", "gpt_oss", "llama4_text")  # biases; sinks, windows, experts; complex rotations
HALVES = ("gemma2",)
RUNS = {
    "plain nodes", "plain graphs", "tiled nodes", "tiled graphs", "kept", "resumed",
    "over several blocks",
}  # fmt: skip


@pytest.fixture(scope="module")
def pretended() -> list[dict[str, Any]]:
    arguments = command("device_child", ",".join(ALONE), ",".join(HALVES))
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=900, env=environment())
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


SPREAD = [(name, "alone") for name in ALONE] + [
    (name, f"{which} half") for name in HALVES for which in ("first", "second")
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), SPREAD)
def test_on_another_device_it_is_what_the_cpu_gives(
    name: str, how: str, pretended: list[dict[str, Any]]
) -> None:
    """Plain and tiled, heads and details, several objectives, gone on with; results on the CPU."""
    (found,) = [x for x in pretended if (x.get("name"), x.get("how")) == (name, how)]
    assert found["devices"] == (["other:0"] if how == "alone" else ["cpu", "other:0"])
    assert found["off"].keys() == RUNS
    assert max(found["off"].values()) <= PROMISED[torch.float32]  # weights lie elsewhere
    assert found["where"] == ["cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("prompt elsewhere", ("PromptError", "is on cpu, the model on other:0", "tokens.to(")),
        ("objective elsewhere", ("same device", "cpu and other:0")),
        ("result elsewhere", ("nothing",)),  # one number: autograd brings it together
        ("spread by hand", ("ModelStateError", "(cpu, other:0)", "device_map=")),
    ],
)
def test_mixed_devices_are_refused(
    what: str, words: tuple[str, ...], pretended: list[dict[str, Any]]
) -> None:
    found = [x for x in pretended if x.get("what") == what]
    assert [x["way"] for x in found] == ["plain", "tiled"]
    for one in found:
        assert all(word in one["said"] for word in words), one["said"]
        assert one["untouched"]


# ---------------------------------------------------------------- without a second device


def test_weights_without_numbers_are_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(saved("gpt2")), device="cpu").eval()
    model.original_model.to("meta")
    before = snapshot_of(model)
    for call in (clrp.attribute, clrp.attribution_graph):
        run: Any = call
        with pytest.raises(ModelStateError, match="meta device, which hold no numbers"):
            run(model, random_tokens(), target=7, contrast=11)
    assert snapshot_of(model) == before


def test_a_part_without_numbers_is_refused() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(saved("gpt2")), device="cpu").eval()
    model.blocks[1].original_component.to("meta")
    with pytest.raises(ModelStateError, match="meta device, which hold no numbers"):
        clrp.attribute(model, random_tokens(), target=7, contrast=11)


def offloaded(name: str, where: dict[str, str], folder: Path) -> Any:
    """With these parts ("embed", "0", "1", "rest") on disk or the CPU, as accelerate does it."""
    from transformer_lens.model_bridge import TransformerBridge

    inner, layers = ("transformer", "h") if name == "gpt2" else ("model", "layers")
    plain = boot(name, torch.float32)
    parts = [n for n, _ in getattr(plain.original_model, inner).named_children() if n != layers]
    device_map: dict[str, str | int] = {
        f"{inner}.{part}": where["embed" if part in ("wte", "embed_tokens") else "rest"]
        for part in parts
    }
    device_map |= {f"{inner}.{layers}.{i}": where[str(i)] for i in (0, 1)}
    device_map["lm_head"] = where["embed"]  # tied to it in some
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerBridge.boot_transformers(
            str(saved(name)), device_map=device_map, offload_folder=str(folder)
        ).eval()


def numbers(model: Any, ids: Tensor, **way: Any) -> list[Tensor]:
    objectives = [clrp.logit_diff(model, 7, 12), clrp.logit_diff(model, 9, 12, pos=11)]
    nodes = clrp.attribute(model, ids, objectives[0], **way)
    graphs = clrp.attribution_graphs(model, ids, objectives, heads=True, mass=0.9, **way)
    found = [nodes.tokens, nodes.resid, nodes.heads]
    for graph in graphs:
        found += [graph.weight, graph.source_pos, graph.target_pos, graph.relevance]
    return found


DISK = [
    {"embed": "cpu", "0": "cpu", "1": "disk", "rest": "cpu"},
    {"embed": "cpu", "0": "disk", "1": "cpu", "rest": "disk"},
    {"embed": "disk", "0": "cpu", "1": "disk", "rest": "cpu"},  # tokens go to weights on disk
    {"embed": "disk", "0": "disk", "1": "disk", "rest": "disk"},
]


@pytest.mark.parametrize("where", DISK, ids=lambda where: " ".join(where.values()))
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_weights_on_disk(name: str, where: dict[str, str], tmp_path: Path) -> None:
    """In tiles and plainly, with and without: one result."""
    plain, ids = boot(name, torch.float32), random_tokens(1, 20)
    model = offloaded(name, where, tmp_path)
    on_disk = [p.is_meta for p in model.original_model.parameters()]
    assert any(on_disk)
    assert model_device(model) == torch.device("cpu")
    for way in ({"memory": "plain"}, {"memory": "tiled", "tile": 6, "progress": False}):
        for found, wanted in zip(
            numbers(model, ids, **way), numbers(plain, ids, **way), strict=True
        ):
            assert torch.equal(found, wanted)
    assert [p.is_meta for p in model.original_model.parameters()] == on_disk
