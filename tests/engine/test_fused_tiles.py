"""Fused attention in tiles, in forwards that are shared, and in every other call that takes it.

Eager attention without tiles, TransformerLens' own code, is the truth here; other tests hold it
against independent truth. The rule sets are compared in float64 throughout, so that nothing can
hide in rounding.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from support.grids import diagonal
from support.model_state import snapshot_of
from support.small_tiles import small_query_tiles
from support.tiling import FIELDS, PLAIN, TILED
from support.zoo_expected import COVERED
from torch import Tensor
from truth import zoo
from truth.families import boot, left_padded, random_tokens
from truth.float64 import true_float64
from truth.rounding import PROMISED

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp.attribution.attribute import relevance_readings
from tl_contrastive_lrp.attribution.candidates import logits_at
from tl_contrastive_lrp.engine import fused as fused_room
from tl_contrastive_lrp.engine import memory
from tl_contrastive_lrp.engine.plain import forward
from tl_contrastive_lrp.engine.prefilled import prefill_prompt
from tl_contrastive_lrp.engine.tiled import backward as tiled_backward
from tl_contrastive_lrp.engine.tiled import prefill as prefill_room
from tl_contrastive_lrp.engine.tiled.kept import KeptAttention
from tl_contrastive_lrp.errors import FileFormatError, ModelStateError, NotTileableError
from tl_contrastive_lrp.rules.query_tiles import Attention
from tl_contrastive_lrp.rules.visible import MaskMemory, VisibleKeys

RULES = ("attnlrp", "cplrp", "gim", "gradient")
EAGER: dict[str, Any] = {**PLAIN, "attention": "eager"}
FUSED: dict[str, Any] = {**TILED, "attention": "fused"}
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def assert_same(found: clrp.Attribution, wanted: clrp.Attribution, bound: float) -> None:
    largest = float(wanted.resid.abs().max())
    assert largest > 0
    for name in FIELDS:
        x, y = getattr(found, name), getattr(wanted, name)
        assert (x is None) == (y is None)
        if y is not None:
            assert float((x - y).abs().max()) <= bound * largest, name
    for one, other in zip(found.ledger.rows, wanted.ledger.rows, strict=True):
        for part in ("total", "biases", "positions", "other"):
            assert abs(getattr(one, part) - getattr(other, part)) <= 10 * bound * largest, part
    assert abs(found.delta - wanted.delta) <= bound * max(1.0, abs(wanted.delta))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts queries of fused attention, and tensors of [.., head, query, key] for so many keys.

    A backward by query tiles has such tensors for the few queries of ``small_query_tiles``.
    """

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.attended, self.by_head = keys, 0, list[tuple[str, tuple[int, ...]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.attended += args[0].shape[-2] if func is FLASH else 0
        by_head = isinstance(out, Tensor) and out.ndim == 4 and out.shape[1] > 1  # not so a mask
        # Keys are also transposed, [head, d_head, key], for the product that is deferred.
        if by_head and out.shape[-1] >= self.keys and out.shape[-2] > 5 and out.shape[-2] != 8:
            self.by_head.append((str(func), tuple(out.shape)))
        return out


# ---- the same relevance ------------------------------------------------------------------


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3", "mistral"])
def test_rule_sets(name: str, rules: str) -> None:
    """Windows of Gemma 3 and Mistral are shorter than the prompt, and end within a tile."""
    model, ids = boot(name), random_tokens(1, 40)
    objective = clrp.logit_diff(model, 7, 11, pos=33)
    with true_float64(model):
        wanted = clrp.attribute(model, ids, objective, rules=rules, **EAGER)
        found = clrp.attribute(model, ids, objective, rules=rules, **FUSED)
    assert (found.memory, found.attention) == ("tiled (tile 7)", "fused")
    assert_same(found, wanted, PROMISED[torch.float64])


@pytest.mark.parametrize(
    ("name", "rules"), diagonal(("llama", "qwen3", "gemma3", "phi", "olmo", "gpt_neox"), RULES)
)
@pytest.mark.parametrize("tile", [1, 5, 64])
def test_families(name: str, rules: str, tile: int) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens(23)
    objective = clrp.logit_diff(model, 7, 12)
    wanted = clrp.attribute(model, ids, objective, rules=rules, **EAGER)
    found = clrp.attribute(model, ids, objective, rules=rules, **{**FUSED, "tile": tile})
    assert found.attention == "fused"
    assert_same(found, wanted, PROMISED[torch.float32])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mpt"])
def test_soft_caps_sinks_and_position_biases(name: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens(23)
    objective = clrp.logit_diff(model, 7, 12)
    with small_query_tiles():
        wanted, found = (clrp.attribute(model, ids, objective, **how) for how in (EAGER, FUSED))
    assert found.attention == "fused"
    assert_same(found, wanted, PROMISED[torch.float32])


@pytest.mark.parametrize("rules", RULES)
def test_several_objectives_and_neurons(rules: str) -> None:
    """They share one replay of each block; one of them reads all positions."""
    model, ids = boot("qwen3"), random_tokens(1, 30)
    each = [
        clrp.logit_diff(model, 7, 11),
        clrp.target_logit(model, 5, pos=12),
        lambda logits: (logits[0, :, 7] - logits[0, :, 9]).mean(),
    ]
    more: dict[str, Any] = {"rules": rules, "neurons": True}
    with true_float64(model):
        wanted = clrp.attribute_each(model, ids, each, **more, **EAGER)
        found = clrp.attribute_each(model, ids, each, **more, **FUSED)
    for one, other in zip(found, wanted, strict=True):
        assert_same(one, other, PROMISED[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    """As close to float32 as eager attention is."""
    ids, truth = random_tokens(1, 30), boot("qwen3", torch.float32)
    objective = clrp.logit_diff(truth, 7, 11)
    exact = clrp.attribute(truth, ids, objective, **EAGER)
    model = boot("qwen3", dtype)
    eager = clrp.attribute(model, ids, objective, **{**TILED, "attention": "eager"})
    fused = clrp.attribute(model, ids, objective, **FUSED)
    scale = float(exact.resid.abs().max())
    off = [float((x.resid - exact.resid).abs().max()) / scale for x in (eager, fused)]
    assert fused.attention == "fused"
    assert off[1] <= 3 * off[0] + 1e-3


# ---- what is computed --------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_memory_is_linear_in_the_prompt(rules: str) -> None:
    """Nothing of [head, tile, key] is made, and attention is computed forward only once."""
    model, n = boot("qwen3", torch.float32), 61
    ids, objective = random_tokens(1, n), clrp.logit_diff(model, 7, 11)
    clrp.attribute(model, ids, objective, rules=rules, **FUSED)  # audits the model first
    for how in (FUSED, {**TILED, "attention": "eager"}):
        with small_query_tiles(), Calls(keys=40) as calls:
            clrp.attribute(model, ids, objective, rules=rules, **how)
        if how is not FUSED:
            assert calls.by_head
            continue
        assert calls.by_head == []
        assert calls.attended == int(model.cfg.n_layers) * n


def test_what_was_written_into_is_not_used_again() -> None:
    kept, attention = KeptAttention(), Attention(VisibleKeys(5, 5, MaskMemory()), 0.5)
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    z = kept.keeping("a")(q, k, v, attention)
    expected = z.clone()

    def again(path: str, scale: float = 0.5) -> tuple[Tensor, int]:
        """What is recalled, and how many queries were attended for it."""
        with Calls(keys=99) as calls:
            z = kept.using(path)(q, k, v, replace(attention, scale=scale))
        return z, calls.attended

    assert again("a")[1] == 0
    assert torch.equal(again("a")[0], expected)
    for path, scale in (("b", 0.5), ("a", 0.25)):
        assert again(path, scale)[1] == 5
    z[0, 0, 0] = 0.0
    assert again("a")[1] == 5
    assert torch.equal(again("a")[0], expected)


def test_a_replay_that_attends_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept hides no difference between the prefill and the second run of a block."""
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    call = prefill_room.Prefill.call

    def turned(self: Any, layer: int, *more: Any) -> Any:
        args, kwargs = call(self, layer, *more)
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (sin, cos)}

    monkeypatch.setattr(prefill_room.Prefill, "call", turned)
    with pytest.raises(ModelStateError, match="gives a different output when it is run again"):
        clrp.attribute(model, ids, clrp.logit_diff(model, 7, 11), **FUSED)


def test_auto_fuses_long_prompts_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = boot("qwen3", torch.float32)
    objective = clrp.logit_diff(model, 7, 11)
    monkeypatch.setattr(fused_room, "_WORTH_FROM", 30)
    kinds = [
        clrp.attribute(model, random_tokens(1, n), objective, **TILED).attention for n in (29, 30)
    ]
    assert kinds == ["eager", "fused"]


# ---- hooks -------------------------------------------------------------------------------


def test_hooks_that_look_see_the_whole_prompt_once() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 30)
    seen: dict[str, list[Tensor]] = {}
    names = ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_z", "blocks.1.hook_resid_post")

    def look(x: Tensor, hook: Any) -> None:
        seen.setdefault(hook.name, []).append(x.detach().clone())

    objective = clrp.logit_diff(model, 7, 11)
    with true_float64(model):
        _, cache = model.run_with_cache(ids)
        wanted = clrp.attribute(model, ids, objective, **EAGER)
        with model.hooks(fwd_hooks=[(name, look) for name in names]):
            found = clrp.attribute(model, ids, objective, **FUSED)
    assert found.attention == "fused"
    assert_same(found, wanted, PROMISED[torch.float64])
    assert len(seen) == len(names)
    for name, (x,) in seen.items():
        torch.testing.assert_close(x, cache[name].reshape(x.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("point", ["attn.hook_pattern", "attn.hook_z"])
def test_hooks_that_edit_are_honoured_without_tiles(
    point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    objective, hooks = clrp.logit_diff(model, 7, 11), [(f"blocks.0.{point}", lambda x, hook: x * 2)]  # noqa: ARG005
    with model.hooks(fwd_hooks=hooks):
        with pytest.raises(NotTileableError, match=point):
            clrp.attribute(model, ids, objective, **FUSED)
        wanted = clrp.attribute(model, ids, objective, **EAGER)
        room = import_module("tl_contrastive_lrp.engine.run")
        monkeypatch.setattr(room, "plan_memory", lambda *_, **__: memory.MemoryPlan(7, 1, 1000))
        found = clrp.attribute(model, ids, objective, attention="fused", progress=False)
    n = int(model.cfg.n_layers)
    expected = f"fused in {n - 1} of {n} blocks" if point.endswith("pattern") else "fused"
    assert (found.memory, found.attention) == ("plain", expected)
    assert_same(found, wanted, PROMISED[torch.float32])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_exception_leaves_nothing_behind(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    objective, before = clrp.logit_diff(model, 7, 11), snapshot_of(model)
    for name in ("keeping", "using"):  # in the prefill, and in a replay

        def fail(*_: Any) -> Any:
            def raising(*_: Any) -> Any:
                raise error

            return raising

        with monkeypatch.context() as patched:
            patched.setattr(KeptAttention, name, fail)
            with pytest.raises(error):
                clrp.attribute(model, ids, objective, **FUSED)
        assert torch._C._len_torch_function_stack() == 0
        assert snapshot_of(model) == before


# ---- checkpoints -------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_a_stopped_run_goes_on_with_the_same_bits(
    rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = boot("gemma3", torch.float32), random_tokens(1, 30)
    objective, layer = clrp.logit_diff(model, 7, 11), tiled_backward.Backward.layer
    how = {**FUSED, "rules": rules}
    wanted = clrp.attribute(model, ids, objective, **how)

    def stop(self: Any, at: int) -> None:
        if at == 1:
            raise Stopped
        layer(self, at)

    with monkeypatch.context() as patched:
        patched.setattr(tiled_backward.Backward, "layer", stop)
        with pytest.raises(Stopped):
            clrp.attribute(model, ids, objective, checkpoint_dir=tmp_path, **how)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["block_2.safetensors"]
    found = clrp.attribute(model, ids, objective, checkpoint_dir=tmp_path, **how)
    assert found.attention == wanted.attention == "fused"
    for name in ("tokens", "resid", "heads"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("kinds", [("eager", "fused"), ("fused", "eager")])
def test_a_folder_belongs_to_one_kind_of_attention(kinds: tuple[str, str], tmp_path: Path) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 12)
    how: dict[str, Any] = {**TILED, "checkpoint_dir": tmp_path}
    objective = clrp.logit_diff(model, 7, 11)
    clrp.attribute(model, ids, objective, attention=kinds[0], **how)  # type: ignore[arg-type]
    with pytest.raises(FileFormatError, match="attention"):
        clrp.attribute(model, ids, objective, attention=kinds[1], **how)  # type: ignore[arg-type]


# ---- forwards that are shared ------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, 7])
@pytest.mark.parametrize("kind", ["fused", "eager"])
def test_a_prefilled_forward_has_its_kind(kind: Any, tile: int | None) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 30)
    objective = clrp.logit_diff(model, 7, 11)
    how: dict[str, Any] = {"memory": "plain" if tile is None else "tiled", "tile": tile}
    wanted = clrp.attribute(model, ids, objective, attention=kind, progress=False, **how)
    plan = memory.plan_memory(model, 30, **how)
    readings = relevance_readings(model)
    shared = prefill_prompt(model, ids, clrp.DEFAULT_RULES, readings, plan, uses=3, attention=kind)
    other: Any = {"fused": "eager", "eager": "fused"}[kind]
    with pytest.raises(ValueError, match=f"with {kind} attention, and attention='{other}'"):
        clrp.attribute(model, ids, objective, prefilled=shared, attention=other)
    for asked in ("auto", kind, "auto"):
        found = clrp.attribute(
            model, ids, objective, prefilled=shared, attention=asked, progress=False
        )
        assert (found.attention, found.memory) == (kind, wanted.memory)
        assert torch.equal(found.resid, wanted.resid)


# ---- run_with_relevance, next_token_table ------------------------------------------------


def fused_squares(model: Any, ids: Tensor, **more: Any) -> tuple[Any, bool]:
    """The cache of fused attention, and whether some pattern was computed."""
    n = ids.shape[1]
    with small_query_tiles(), Calls(keys=n) as calls:
        _, cache = clrp.run_with_relevance(
            model, ids, clrp.logit_diff(model, 7, 11), attention="fused", **more
        )
    return cache, bool(calls.by_head)


def test_the_whole_cache_is_complete() -> None:
    model, ids = boot("qwen3"), random_tokens(1, 41)
    objective = clrp.logit_diff(model, 7, 11)
    with true_float64(model):
        logits, wanted = clrp.run_with_relevance(model, ids, objective, attention="eager")
        found, squares = fused_squares(model, ids)
        plain = clrp.run_with_relevance(model, ids, objective)[0]
    assert squares
    assert torch.equal(plain, logits)
    assert found.cache_dict.keys() == wanted.cache_dict.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (lambda name: name.endswith(("resid_post", "hook_z", "hook_q")), False),
        (["hook_embed", "blocks.1.attn.hook_v"], False),
        (lambda name: "pattern" in name, True),
        (["blocks.0.attn.hook_attn_scores"], True),
    ],
)
def test_a_cache_without_patterns_is_fused(names: Any, pattern: bool) -> None:
    model, ids = boot("qwen3"), random_tokens(2, 41)
    with true_float64(model):
        wanted = clrp.run_with_relevance(
            model, ids, clrp.logit_diff(model, 7, 11), names, attention="eager"
        )[1]
        found, squares = fused_squares(model, ids, names_filter=names)
    assert squares == pattern
    assert found.cache_dict.keys() == wanted.cache_dict.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=0, atol=1e-10 * float(value.abs().max())
        )


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("rules", ["attnlrp", "gim"])
def test_left_padding(name: str, rules: str) -> None:
    model, (ids, mask) = boot(name), left_padded((19, 6, 12))
    asked: dict[str, Any] = {
        "objective": clrp.logit_diff(model, 7, 11), "rules": rules, "attention_mask": mask,
        "names_filter": ["hook_embed", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"],
    }  # fmt: skip
    with true_float64(model):
        eager, fused = (
            clrp.run_with_relevance(model, ids, attention=kind, **asked)[1]
            for kind in ("eager", "fused")
        )
    for key, value in eager.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(fused[key], value, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("how", [PLAIN, TILED])
def test_next_tokens(how: dict[str, Any]) -> None:
    model, ids = boot("gemma3"), random_tokens(1, 41)
    with true_float64(model), torch.no_grad():
        wanted = model(ids)[0, 20]
        with Calls(keys=30) as calls:
            found = logits_at(model, ids, 20, **how, attention="fused")
    assert calls.attended
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    tables = [clrp.next_token_table(model, ids, attention=kind) for kind in ("eager", "fused")]
    assert tables[0]["id"].tolist() == tables[1]["id"].tolist()


@pytest.mark.parametrize("memory_kind", ["plain", "tiled"])
def test_unknown_kinds_are_refused_everywhere(memory_kind: Any) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 12)
    plan = memory.plan_memory(model, 12, memory_kind)
    wrong: Any = {"attention": "flash"}
    for call in (
        lambda: clrp.next_token_table(model, ids, memory=memory_kind, **wrong),
        lambda: clrp.run_with_relevance(model, ids, clrp.logit_diff(model, 7, 11), **wrong),
        lambda: prefill_prompt(model, ids, "gim", relevance_readings(model), plan, **wrong),
    ):
        with pytest.raises(ValueError, match="use 'auto', 'fused' or 'eager'"):
            call()


# ---- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COVERED)
def test_memory_is_planned_by_what_is_fused(name: str) -> None:
    model, ids = zoo.boot(name, torch.float32), zoo.random_tokens(11)
    found = clrp.attribute(model, ids, clrp.logit_diff(model, 7, 12), attention="fused", **PLAIN)
    planned, n = fused_room.fused_blocks(model, "fused", 11), int(model.cfg.n_layers)
    words = {0: "eager", n: "fused"}.get(planned, f"fused in {planned} of {n} blocks")
    assert found.attention == words


def test_a_model_without_rules_is_planned_as_eager() -> None:
    model = boot("qwen3", torch.float32)
    assert fused_room.fused_blocks(model, "fused", 5) == int(model.cfg.n_layers)
    assert fused_room.fused_blocks(model, "eager", 5000) == 0
    assert fused_room.fused_blocks(model, "auto", 5) == 0
    refused = zoo.boot("opt-post-norm", torch.float32)  # has no rules, but next tokens
    assert fused_room.fused_blocks(refused, "fused", 5) == 0
    assert len(clrp.next_token_table(refused, zoo.random_tokens(5), attention="fused")) == 10


def test_a_forward_keeps_less_than_is_estimated() -> None:
    """What autograd saves in a forward, counted, and as much again for what the backward adds."""
    model, n = boot("qwen3", torch.float32), 64
    sizes: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if not isinstance(x, torch.nn.Parameter):
            storage = x.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    blocks = int(model.cfg.n_layers)
    for kind, fused in (("eager", 0), ("fused", blocks)):
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            run = forward(model, random_tokens(1, n), "gim", [], attention=kind)  # type: ignore[arg-type]
        assert run.attention == kind
        need = memory.plain_bytes(model, n, fused=fused)
        assert sum(sizes.values()) <= need
    heads = int(model.cfg.n_heads)
    square = 4 * heads * n * n
    assert memory.plain_bytes(model, n) - need >= 4 * blocks * square


def test_auto_takes_tiles_later_where_attention_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 64)
    objective, blocks = clrp.logit_diff(model, 7, 11), int(model.cfg.n_layers)
    little = memory.plain_bytes(model, 64, fused=blocks)
    assert little < 0.6 * memory.plain_bytes(model, 64)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(little / 0.69))  # noqa: ARG005
    eager, fused = (
        clrp.attribute(model, ids, objective, attention=kind, progress=False)  # type: ignore[arg-type]
        for kind in ("eager", "fused")
    )
    assert eager.memory.startswith("tiled")
    assert fused.memory == "plain"
    assert memory.tile_for(model, 8000, 8 << 30, fused=blocks) == 2048
    assert memory.tile_for(model, 8000, 8 << 30) < 1024


def test_the_logits_of_a_span_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are kept beside a tile's activations, and in one pass only those that are read."""
    model, n = boot("qwen3", torch.float32), 4096
    blocks, vocab = int(model.cfg.n_layers), int(model.cfg.d_vocab)
    all_read, one = (memory.plain_bytes(model, n, fused=blocks, read=k) for k in (n, 1))
    assert all_read - one == 8 * (n - 1) * vocab
    assert all_read == memory.plain_bytes(model, n, fused=blocks)
    assert memory.plain_bytes(model, n, read=1) == memory.plain_bytes(model, n)
    free = 8 * n * vocab * 3
    tiles = [memory.tile_for(model, n, free, fused=blocks, read=k) for k in (1, n // 2, n)]
    assert tiles == sorted(tiles, reverse=True)
    assert tiles[0] > tiles[-1]
    plans: list[int] = []
    run = import_module("tl_contrastive_lrp.engine.run")
    real = run.plan_memory

    def watched(*given: Any, **more: Any) -> Any:
        plans.append(more["read"])
        return real(*given, **more)

    monkeypatch.setattr(run, "plan_memory", watched)
    ids = random_tokens(1, 20)
    for objective in (clrp.span_logit(model, ids, (5, 12)), clrp.target_logit(model, 3), _first):
        clrp.attribute(model, ids, objective)
    assert plans == [7, 1, 20]


def _first(logits: Tensor) -> Tensor:
    return logits[0, -1, 3]
