"""Runs of a pretend device, in a process of their own; prints what came of each as JSON lines."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from truth import zoo

import tl_contrastive_lrp as clrp
from support import long_zoo, pretend_device
from support.model_state import snapshot_of

OTHER = "other:0"
WINDOW = 30
# A tile so large that its mask is kept packed, and a smaller one.
TILES: dict[str, Any] = {"memory": "tiled", "tile": 70, "progress": False}
IDS = zoo.random_tokens(80)
COLUMNS = ("weight", "source_pos", "target_pos", "source_site", "target_site", "relevance")


def _graph(graph: Any) -> list[Tensor]:
    return [getattr(graph, name) for name in COLUMNS]


def runs(model: Any, ids: Tensor, folder: str) -> dict[str, list[Tensor]]:
    """All that tiles and the plain way give, by name."""
    one, two = clrp.logit_diff(model, 7, 12), clrp.logit_diff(model, 9, 12, pos=15)
    found: dict[str, list[Tensor]] = {}

    def custom(logits: Tensor) -> Tensor:
        return logits[0, -1, 7] - logits[0, 5, 3] + logits[0, 20].square().mean()

    for name, way in (("plain", {"memory": "plain"}), ("tiled", TILES)):
        nodes = clrp.attribute(model, ids, custom, **way)
        found[f"{name} nodes"] = [nodes.tokens, nodes.resid, nodes.heads]
        graphs = clrp.attribution_graphs(
            model, ids, [one, two], heads=True, details=True, mass=0.9, **way
        )
        found[f"{name} graphs"] = [x for graph in graphs for x in _graph(graph)]
    for name in ("kept", "resumed"):
        graph = clrp.attribution_graph(
            model, ids, one, top_k=90, checkpoint_dir=Path(folder) / "run", **TILES
        )
        found[name] = _graph(graph)
    graph = clrp.attribution_graph(model, ids, one, layers=[0], progress=False)
    found["over several blocks"] = _graph(graph)
    return found


def boot(name: str) -> Any:
    return long_zoo.boot(name, WINDOW)


def spread(name: str, first: str, second: str) -> Any:
    """Blocks after the first on another device, with accelerate's hooks, as a device_map has it."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForCausalLM

    path = str(long_zoo.saved(name, WINDOW))
    hf = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype=torch.float32
    )
    stack_name = "transformer" if hasattr(hf, "transformer") else "model"
    for part, module in getattr(hf, stack_name).named_children():
        blocks = part in ("h", "layers")
        for i, child in enumerate(module if blocks else [module]):
            late = (blocks and i > 0) or part in ("norm", "ln_f")
            device = torch.device(second if late else first)
            add_hook_to_module(child.to(device), AlignDevicesHook(device))
    tied = hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    device = torch.device(first if tied else second)
    add_hook_to_module(hf.lm_head.to(device), AlignDevicesHook(device))
    add_hook_to_module(hf, AlignDevicesHook(torch.device(first), io_same_device=True))
    return TransformerBridge.boot_transformers(path, hf_model=hf).eval()


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def _off(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    largest = wanted.double().abs().max().clamp_min(1e-30)
    return float((found.cpu().double() - wanted.double()).abs().max() / largest)


def compare(name: str, how: str, model: Any, ids: Tensor) -> None:
    """How far everything is from what the CPU gives, of the largest, and where it is."""
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        wanted, found = runs(boot(name), IDS, here), runs(model, ids, there)
    devices = sorted({str(p.device) for p in model.original_model.parameters()})
    off = {
        key: max(_off(a, b) for a, b in zip(found[key], wanted[key], strict=True)) for key in wanted
    }
    where = sorted({str(x.device) for values in found.values() for x in values})
    say(name=name, how=how, devices=devices, off=off, where=where)


def refusal(what: str, model: Any, ids: Tensor, objective: Any) -> None:
    """What is said, and whether the model is as before."""
    before = snapshot_of(model)
    for way in ("plain", "tiled"):
        try:
            clrp.attribute(model, ids, objective, memory=way, progress=False)
            said = "nothing"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        say(what=what, way=way, said=said, untouched=snapshot_of(model) == before)


def main(alone: list[str], halves: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pretend_device.set_up()
    for name in alone:
        compare(name, "alone", boot(name).to(OTHER), IDS.to(OTHER))
    for name in halves:
        compare(name, "first half", spread(name, OTHER, "cpu"), IDS.to(OTHER))
        compare(name, "second half", spread(name, "cpu", OTHER), IDS)

    model = boot("gpt2").to(OTHER)
    model(IDS.to(OTHER))
    diff = clrp.logit_diff(model, 7, 12)
    weights = torch.randn(zoo.VOCAB)
    refusal("prompt elsewhere", model, IDS, diff)
    refusal("objective elsewhere", model, IDS.to(OTHER), lambda x: (x[0, -1] * weights).sum())
    refusal("result elsewhere", model, IDS.to(OTHER), lambda x: diff(x).cpu())
    model.blocks[1].to("cpu")
    refusal("spread by hand", model, IDS.to(OTHER), diff)


if __name__ == "__main__":
    main(*(names.split(",") for names in sys.argv[1:]))
