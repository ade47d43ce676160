"""In tiles, relevance is that of the plain way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stretched import stretched
from support.tiling import FIELDS, LIMIT, PLAIN, TILED, assert_same, both
from torch import Tensor
from truth import zoo
from truth.families import FAMILIES, boot, make_config, make_tokenizer, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.engine.tiled.tiles import BitMask
from tl_contrastive_lrp.errors import ModelStateError, NotTileableError


@pytest.mark.parametrize("pos", [-1, 20])
@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_that_of_the_plain_way(name: str, pos: int) -> None:
    model = boot(name, torch.float32)
    objective = clrp.logit_diff(model, 7, 11, pos=pos)
    plain, tiled = both(model, random_tokens(1, 40), objective, neurons=True)
    assert_same(plain, tiled)
    assert plain.memory == "plain"
    assert tiled.memory == "tiled (tile 7)"


@pytest.mark.parametrize("rules", [name for name in clrp.RULE_SETS if name != "attnlrp"])
@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_every_rule_set(name: str, rules: str) -> None:
    model = boot(name, torch.float32)
    assert_same(*both(model, random_tokens(1, 17), clrp.logit_diff(model, 7, 11), rules=rules))


# Attention by operation, fused and one key for all, ALiBi, latent, experts with windows and sinks.
@pytest.mark.parametrize("name", ["gpt_neo", "gpt_bigcode", "mpt", "youtu", "gpt_oss"])
def test_families_of_the_zoo(name: str) -> None:
    model = zoo.boot(name, torch.float32)
    ids = torch.randint(4, 48, (1, 23), generator=torch.Generator().manual_seed(1))
    assert_same(*both(model, ids, clrp.logit_diff(model, 7, 11)))


def test_any_objective_may_read_all_logits() -> None:
    model = boot("gpt2", torch.float32)

    def objective(logits: Tensor) -> Tensor:
        return logits[0, -1, 7] - 0.5 * logits[0, 5, 3] + logits[0, 20].square().mean()

    assert_same(*both(model, random_tokens(1, 33), objective))


@pytest.mark.parametrize("tile", [1, 5, 64])
def test_the_tile_does_not_matter(tile: int) -> None:
    model = boot("gemma3", torch.float32)
    objective = clrp.logit_diff(model, 7, 11)
    assert_same(*both(model, random_tokens(1, 12), objective, tile=tile))


class Nothing(clrp.Objective):
    """An objective that says its position and asks for nothing there."""

    def __call__(self, logits: Tensor) -> Tensor:
        return 0.0 * super().__call__(logits)


def test_no_relevance_is_zero_everywhere() -> None:
    model, ids = boot("qwen3-bias", torch.float32), random_tokens(1, 20)
    asked = clrp.logit_diff(model, 7, 11)
    objective = Nothing(**{f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)})
    plain, tiled = (
        clrp.attribute(model, ids, objective, neurons=True, **way) for way in (PLAIN, TILED)
    )
    for name in FIELDS:
        wanted, got = getattr(plain, name), getattr(tiled, name)
        assert got.shape == wanted.shape
        assert not got.any()
        assert not wanted.any()


def test_a_function_that_asks_for_nothing_is_refused() -> None:
    """Of a function the positions are those with a gradient, and there are none."""
    model, ids = boot("qwen3-bias", torch.float32), random_tokens(1, 20)
    for way in (PLAIN, TILED):
        with pytest.raises(ModelStateError, match="gradient is 0 at every logit"):
            clrp.attribute(model, ids, lambda logits: 0.0 * logits[0, -1, 7], **way)


def test_half_precision_keeps_its_float32_backward() -> None:
    model = boot("qwen2", torch.bfloat16)
    assert_same(*both(model, random_tokens(1, 24), clrp.logit_diff(model, 7, 11)))


def long_model(folder: Path) -> Any:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    config = make_config("gemma3")
    config.max_position_embeddings, config.sliding_window = 1024, 100
    torch.manual_seed(0)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.normal_(std=0.15)
    hf.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 1024
    tokenizer.save_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), device="cpu", dtype=torch.float32)


def test_seven_hundred_tokens_nodes_and_edges(tmp_path: Path) -> None:
    model = long_model(tmp_path)
    ids, objective = random_tokens(1, 700), clrp.logit_diff(model, 7, 11)
    assert_same(*both(model, ids, objective, tile=97))
    plain = clrp.attribution_graph(model, ids, objective, **PLAIN)
    tiled = clrp.attribution_graph(model, ids, objective, **{**TILED, "tile": 97})
    for source, target in plain.transitions:
        wanted, got = (g.matrix(g.sites[source], g.sites[target]) for g in (plain, tiled))
        assert float((wanted - got).abs().max()) <= LIMIT * float(wanted.abs().max())


def test_masks_take_a_bit_a_number() -> None:
    mask = torch.full((1, 1, 70, 101), torch.finfo(torch.float32).min).triu(7)
    packed = BitMask.of(mask)
    assert packed.bits.numel() == -(-70 * 101 // 8)
    assert torch.equal(packed.unpacked(), mask)
    assert packed.unpacked().dtype == mask.dtype
    many = torch.randn(70, 101)
    assert BitMask.of(many) is many
    hidden = mask == 0
    assert torch.equal(BitMask.of(hidden).unpacked(), hidden)


@pytest.mark.parametrize(("limit", "length"), [(20, 20), (20, 21), (10, 11)])
def test_positions_stretched_for_long_prompts_are_not_tiled(limit: int, length: int) -> None:
    """Beyond the limit all angles change, also the first tile's, which is run alone.

    The probe of 13 tokens finds this out where the limit lies below it, and no other.
    """
    model = stretched(limit)
    ids, objective = random_tokens(1, length), clrp.logit_diff(model, 7, 11)
    if length == limit:
        assert_same(*both(model, ids, objective))
        return
    with pytest.raises(NotTileableError, match=f"stretched for prompts as long as {length} tokens"):
        clrp.attribute(model, ids, objective, **TILED)
    with torch.no_grad():  # The keys of a tile alone would be others.
        whole, alone = model(ids)[:, :limit], model(ids[:, :limit])
    assert float((whole - alone).abs().max()) > 1e-3 * float(whole.abs().max())
