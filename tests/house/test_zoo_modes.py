"""How a model is run changes no relevance: padding, flags, weight processing, caching, offloading.

On families of the zoo, one or more for each way in which rules are attached. Where TransformerLens
itself computes other logits in a mode than in the plain run, relevance explains other numbers, and
there is nothing to compare: those are listed, so that the comparison cannot vanish unnoticed.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grids import diagonal
from torch import Tensor
from truth import zoo
from truth.families import boot as boot_family
from truth.families import random_tokens as family_tokens
from truth.families import saved

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.errors import ModelStateError

FAMILIES = (
    "gpt_neo", "gptj", "opt", "bloom", "falcon", "falcon-alibi", "mpt", "gpt_neox", "phi", "phi3",
    "stablelm-qk-norm", "cohere2", "nemotron", "olmo2", "smollm3", "nanochat", "mixtral",
    "qwen2_moe-mixed", "gpt_oss", "deepseek_v2", "deepseek_v3", "afmoe", "jetmoe", "llama4_text",
)  # fmt: skip


def relevance(model: Any, ids: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Logits, and relevance at the embeddings summed over their dimensions, [batch, pos]."""
    objective = clrp.logit_diff(model, 7, 12)
    logits, cache = clrp.run_with_relevance(model, ids, objective, "hook_embed", **how)
    return logits, cache["hook_embed"].sum(-1)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# families whose own logits move with padding: Llama 4 counts its attention chunks from there
MOVED_BY_PADDING = frozenset({"llama4_text"})


@pytest.mark.parametrize("name", FAMILIES)
def test_left_padding_changes_no_prompt(name: str) -> None:
    model, ids = zoo.boot(name), zoo.random_tokens()
    short = ids[:, :5]
    rows = torch.stack([ids[0], torch.cat([torch.zeros(3, dtype=ids.dtype), short[0]])])
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    logits, batch = relevance(model, rows, attention_mask=mask)
    whole, alone = relevance(model, ids), relevance(model, short)
    assert off(batch[0], whole[1][0]) < 1e-5
    moved = off(logits[1, -1], alone[0][0, -1]) > 1e-4
    assert moved == (name in MOVED_BY_PADDING)
    if not moved:
        assert off(batch[1, 3:], alone[1][0]) < 1e-5
        assert float(batch[1, :3].abs().max()) == 0.0


FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in")


@pytest.mark.parametrize(("name", "flag"), diagonal(FAMILIES, FLAGS))
def test_flags_change_no_relevance(name: str, flag: str) -> None:
    model, ids = zoo.boot(name), zoo.random_tokens()
    wanted = relevance(model, ids)
    switch = getattr(model, f"set_{flag}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            switch(True)
        except (NotImplementedError, ValueError, RuntimeError) as refused:
            pytest.skip(f"TransformerLens refuses {flag} here: {refused}")
    try:
        found = relevance(model, ids)
    finally:
        switch(False)
    assert off(found[0], wanted[0]) < 1e-5
    assert off(found[1], wanted[1]) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_one_result_with_and_without_a_cache(name: str) -> None:
    model, ids = zoo.boot(name), zoo.random_tokens()
    wanted = relevance(model, ids)
    assert torch.equal(relevance(model, ids, use_cache=False)[1], wanted[1])


def test_cached_tokens_are_refused() -> None:
    """Their relevance could not be told, and would be lost."""
    model, ids = boot_family("qwen3", torch.float32), family_tokens()
    with torch.no_grad():
        _, cache = model(ids[:, :4], return_type="logits_and_cache", use_past_kv_cache=True)
    with pytest.raises(ModelStateError, match="whole prompt"):
        relevance(model, ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("name", FAMILIES)
def test_compatibility_mode_without_processing(name: str) -> None:
    ids = zoo.random_tokens()
    logits, wanted = relevance(zoo.boot(name), ids)
    model = zoo.build.boot.__wrapped__(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    found = relevance(model.eval(), ids)
    assert off(found[0], logits) < 1e-5
    assert off(found[1], wanted) < 1e-5


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_weights_on_disk(name: str, tmp_path: Path) -> None:
    """accelerate keeps the second block on disk and brings it in for its own calls alone."""
    from transformer_lens.model_bridge import TransformerBridge

    plain, ids = boot_family(name, torch.float32), family_tokens()
    inner = "transformer" if name == "gpt2" else "model"
    layers = "h" if name == "gpt2" else "layers"
    parts = [n for n, _ in getattr(plain.original_model, inner).named_children() if n != layers]
    device_map: dict[str, str | int] = {
        f"{inner}.{part}": "cpu" for part in (*parts, f"{layers}.0")
    }
    device_map.update({"lm_head": "cpu", f"{inner}.{layers}.1": "disk"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = TransformerBridge.boot_transformers(
            str(saved(name)), device_map=device_map, offload_folder=str(tmp_path)
        ).eval()
    assert any(p.is_meta for p in model.original_model.parameters())
    objective = clrp.logit_diff(plain, 7, 12)
    wanted, found = (clrp.attribute(m, ids, objective) for m in (plain, model))
    assert torch.equal(found.resid, wanted.resid)
    assert found.ledger == wanted.ledger
    graphs = [clrp.attribution_graph(m, ids, objective) for m in (plain, model)]
    for pair in zip(graphs[0].sites, graphs[0].sites[1:], strict=False):
        assert torch.equal(graphs[0].matrix(*pair), graphs[1].matrix(*pair))
    assert any(p.is_meta for p in model.original_model.parameters())
