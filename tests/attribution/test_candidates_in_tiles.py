"""Candidates of long prompts: the logits of Hugging Face's own forward, without its memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from truth import zoo
from truth.families import FAMILIES, boot, hf_model, random_tokens

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution import candidates
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.tiled import prefill as tiles
from tl_contrastive_lrp.errors import ModelStateError, TokenError
from tl_contrastive_lrp.hooks.user_hooks import as_own

TILED: dict[str, Any] = {"memory": "tiled", "tile": 7, "progress": False}


def little(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: size)  # noqa: ARG005


def hooks_of(model: Any) -> list[Any]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.original_model.named_modules()
    ]


@pytest.mark.parametrize("pos", [-1, 20, 0])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_plain_forward(name: str, pos: int) -> None:
    """Windows of 4 positions are shorter than a tile; soft-caps bend attention and logits."""
    model, ids = boot(name, torch.float32), random_tokens(1, 40)
    with torch.no_grad():
        wanted = hf_model(name, torch.float32)(ids).logits[0, pos]
    table = clrp.next_token_table(model, ids, k=1000, pos=pos, **TILED).sort_values("id")
    assert table["id"].tolist() == list(range(len(wanted)))
    largest = float(wanted.abs().max())
    assert np.abs(table["logit"].to_numpy() - wanted.numpy()).max() <= 1e-5 * largest
    assert np.allclose(table["probability"], wanted.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt_bigcode", "mpt", "gpt_oss"])
def test_families_of_the_zoo(name: str) -> None:
    model, ids = zoo.boot(name, torch.float32), random_tokens(1, 23)
    with torch.no_grad():
        wanted = model(ids)[0, 11]
    got = candidates.logits_at(model, ids, 11, **TILED)
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


@pytest.mark.parametrize("tile", [1, 16, 64])
def test_the_tile_does_not_matter(tile: int) -> None:
    model, ids = boot("gemma3", torch.float32), random_tokens(1, 30)
    got = candidates.logits_at(model, ids, **{**TILED, "tile": tile})
    with torch.no_grad():
        assert torch.allclose(got, model(ids)[0, -1], atol=1e-5)


def test_no_attention_is_wider_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is not tried: of a prompt of 40, no pattern has 40 rows."""
    model, ids, seen = boot("qwen3", torch.float32), random_tokens(1, 40), []

    @as_own  # a user's hook would be shown the prompt whole, by a forward of its own
    def look(pattern: Any, **_: Any) -> None:
        seen.append(pattern.shape[-2])

    little(monkeypatch, memory.plain_bytes(model, 40) // 2)
    with model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", look)]):
        clrp.next_token_table(model, ids, tile=9, progress=False)
        assert max(seen) == 13  # the check of the first tokens, without tiles
        assert sum(seen) == 2 * 13 + 40
        clrp.next_token_table(model, ids, memory="plain")
    assert seen[-1] == 40


def test_later_tokens_are_not_computed() -> None:
    model, ids, seen = boot("qwen3", torch.float32), random_tokens(1, 40), []
    look = as_own(lambda x, **_: seen.append(x.shape[1]))
    with model.hooks(fwd_hooks=[("embed.hook_out", look)]):
        candidates.logits_at(model, ids, 10, **TILED)
    assert sum(seen) == 2 * 13 + 11


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("gemma2", torch.float32), random_tokens(1, 20)
    before = hooks_of(model)
    with torch.inference_mode():
        clrp.next_token_table(model, ids, **TILED)
    clrp.next_token_table(model, ids, **TILED)
    assert hooks_of(model) == before
    assert not any(p.grad is not None for p in model.original_model.parameters())
    assert torch.is_grad_enabled()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiles._Recorder, "after_last", stop)
    with pytest.raises(KeyboardInterrupt):
        clrp.next_token_table(model, ids, **TILED)
    assert hooks_of(model) == before


def test_a_full_gpu_halves_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, real, tried = boot("qwen3", torch.float32), random_tokens(1, 60), tiles.prefill, []

    def full(model: Any, tokens: Any, wanted: Any, bounds: Any, *more: Any) -> Any:
        tried.append(max(stop - start for start, stop in bounds))
        if tried[-1] > 20:
            raise torch.OutOfMemoryError("full")
        return real(model, tokens, wanted, bounds, *more)

    monkeypatch.setattr(candidates, "prefill", full)
    with pytest.warns(UserWarning, match="ran out of memory; going on with tiles of 24") as said:
        got = candidates.logits_at(model, ids, memory="tiled", tile=48, progress=False)
    assert len(said) == 1
    assert tried[-2:] == [24, 12]
    with torch.no_grad():
        assert torch.allclose(got, model(ids)[0, -1], atol=1e-5)
    tried.clear()
    monkeypatch.setattr(candidates, "check_tileable", lambda *_: None)
    monkeypatch.setattr(memory, "_TILES", (30, 1024))
    with pytest.warns(UserWarning, match="ran out"), pytest.raises(torch.OutOfMemoryError):
        candidates.logits_at(model, ids, memory="tiled", tile=48, progress=False)
    assert tried == [48, 24]


@pytest.mark.parametrize("name", ["bert", "openai_gpt"])
def test_without_a_cache_the_plain_way_or_a_refusal_with_figures(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.boot(name, torch.float32), random_tokens(1, 12)
    with pytest.raises(ModelStateError, match=r"cannot run in tiles: .* Use memory='plain'"):
        clrp.next_token_table(model, ids, **TILED)
    with torch.no_grad():
        wanted = model(ids)[0, -1]
    # The backward would not fit, the forward does.
    need, backward = candidates.forward_bytes(model, 12), memory.plain_bytes(model, 12)
    assert need < backward
    little(monkeypatch, backward)
    monkeypatch.setattr(memory, "_SAFE", 0.99)
    assert torch.equal(candidates.logits_at(model, ids, progress=False), wanted)
    little(monkeypatch, 1024)
    said = f"needs about {memory.gib(need)} without tiles, and 0 MiB are free"
    with pytest.raises(ModelStateError, match=said):
        clrp.next_token_table(model, ids)


def test_bad_settings_are_refused() -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 9)
    with pytest.raises(ValueError, match="'auto', 'plain' or 'tiled'"):
        clrp.next_token_table(model, ids, memory="little")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more"):
        clrp.next_token_table(model, ids, tile=0)
    with pytest.raises(TokenError, match="Position 9 does not exist in a prompt of 9"):
        clrp.next_token_table(model, ids, pos=9, **TILED)


def test_a_bar_only_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 20)
    clrp.next_token_table(model, ids, **TILED)
    clrp.next_token_table(model, ids)
    assert capsys.readouterr().err == ""
    clrp.next_token_table(model, ids, **{**TILED, "progress": True})
    assert "Prompt" in capsys.readouterr().err
