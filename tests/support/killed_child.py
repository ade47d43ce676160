"""A long run in tiles for a test to kill: ``python killed_child.py MODEL_FOLDER CHECKPOINT KIND``.

It exits with 0 when it comes to its end, and after Ctrl-C with 3 if the model is as it was before,
else with 4.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import tl_contrastive_lrp as clrp
from support.model_state import snapshot_of
from tl_contrastive_lrp.engine.tiled.checkpoint import Checkpoint

TILES: dict[str, Any] = {"memory": "tiled", "tile": 17, "progress": False}
KINDS = ("nodes", "edges", "heads of two")
_COLUMNS = ("relevance", "weight", "source_pos", "target_pos", "source_site", "target_site", "head")


def boot(folder: str) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)


def run(model: Any, kind: str, length: int = 72, **more: Any) -> dict[str, torch.Tensor]:
    """All numbers of a result, by name."""
    ids = torch.randint(4, 48, (1, length), generator=torch.Generator().manual_seed(3))
    asked = [clrp.logit_diff(model, 7, 11), clrp.logit_diff(model, 9, 12, pos=length - 20)]
    if kind == "nodes":
        nodes = clrp.attribute(model, ids, asked[0], **TILES, **more)
        return {name: getattr(nodes, name) for name in ("tokens", "resid", "heads")}
    if kind == "edges":
        graphs = [clrp.attribution_graph(model, ids, asked[0], mass=0.9, **TILES, **more)]
    else:
        graphs = clrp.attribution_graphs(model, ids, asked, heads=True, top_k=900, **TILES, **more)
    found: dict[str, torch.Tensor] = {}
    for i, graph in enumerate(graphs):
        found |= {f"{i} {c}": getattr(graph, c) for c in _COLUMNS if getattr(graph, c) is not None}
        kept = graph.history[0].transitions
        found[f"{i} kept"] = torch.tensor([[k.mass_before, k.mass_kept] for k in kept])
    return found


def main(folder: str, checkpoint: str, kind: str) -> int:
    write = Checkpoint.write

    def slowly(*args: Any) -> None:
        write(*args)
        # Whoever watches the folder is to be in time, on a busy machine too.
        is_last = (Path(checkpoint) / "block_0.safetensors").exists()
        time.sleep(30 if is_last else 0.15)

    mock.patch.object(Checkpoint, "write", slowly).start()
    model = boot(folder)
    model(torch.arange(4, 9)[None])  # transformers puts hooks of its own on at the first forward
    before = snapshot_of(model)
    try:
        run(model, kind, checkpoint_dir=checkpoint)
    except KeyboardInterrupt:
        return 3 if snapshot_of(model) == before else 4
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
