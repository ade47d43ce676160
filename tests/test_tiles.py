"""In tiles, relevance is that of the plain way; what stops, or does not fit, breaks nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from families import FAMILIES, boot, make_config, make_tokenizer, random_tokens
from torch import Tensor

import tl_contrastive_lrp as clrp
from tl_contrastive_lrp import explain as explain_module
from tl_contrastive_lrp import memory, tiled_backward, tiles
from tl_contrastive_lrp.errors import FileFormatError, ModelStateError

TILED: dict[str, Any] = {"memory": "tiled", "tile": 7, "progress": False}
PLAIN: dict[str, Any] = {"memory": "plain"}
FIELDS = ("tokens", "resid", "heads", "neurons")
LIMIT = 1e-5


def both(
    model: Any, ids: Tensor, objective: Any, tile: int = 7, **more: Any
) -> tuple[clrp.Attribution, clrp.Attribution]:
    plain = clrp.attribute(model, ids, objective, **PLAIN, **more)
    return plain, clrp.attribute(model, ids, objective, **{**TILED, "tile": tile}, **more)


def assert_same(plain: clrp.Attribution, tiled: clrp.Attribution) -> None:
    largest = float(plain.resid.abs().max())
    assert largest > 0
    for name in FIELDS:
        wanted, got = getattr(plain, name), getattr(tiled, name)
        assert (wanted is None) == (got is None)
        if wanted is not None:
            assert got.shape == wanted.shape
            assert float((got - wanted).abs().max()) <= LIMIT * largest, name
    for one, other in zip(plain.ledger.rows, tiled.ledger.rows, strict=True):
        assert one.site == other.site
        for part in ("total", "biases", "positions", "other"):
            # totals are sums of as many terms as there are tokens
            assert abs(getattr(one, part) - getattr(other, part)) <= 10 * LIMIT * largest, part
    assert abs(plain.delta - tiled.delta) <= LIMIT * max(1.0, abs(plain.delta))
    same = ("pos", "target", "contrast", "objective", "target_is_top", "sites", "rules")
    assert all(getattr(plain, name) == getattr(tiled, name) for name in same)
    assert plain.token_ids.tolist() == tiled.token_ids.tolist()
    assert plain.coverage == tiled.coverage


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


def test_no_relevance_is_zero_everywhere() -> None:
    model, ids = boot("qwen3-bias", torch.float32), random_tokens(1, 20)

    def objective(logits: Tensor) -> Tensor:
        return 0.0 * logits[0, -1, 7]

    plain, tiled = (
        clrp.attribute(model, ids, objective, neurons=True, **way) for way in (PLAIN, TILED)
    )
    for name in FIELDS:
        wanted, got = getattr(plain, name), getattr(tiled, name)
        assert got.shape == wanted.shape
        assert not got.any()
        assert not wanted.any()


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


# ---------------------------------------------------------------- stopping and going on


class Stopped(Exception):
    pass


def state_of(model: Any) -> list[Any]:
    hooks = [(n, len(p.fwd_hooks), len(p.bwd_hooks)) for n, p in model.hook_dict.items()]
    modules = [
        (n, len(m._forward_hooks), len(m._forward_pre_hooks))
        for n, m in model.original_model.named_modules()
    ]
    return hooks + modules + [p.requires_grad for p in model.original_model.parameters()]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """stop_after(k, error): the run stops in the k-th block from the top, in its second tile."""

    def arrange(blocks: int, error: type[BaseException]) -> None:
        done = {"blocks": 0, "tiles": 0}
        layer, replayed = tiled_backward.Backward.layer, tiled_backward.Backward._replayed

        def counted_layer(self: Any, *args: Any) -> Any:
            done["blocks"], done["tiles"] = done["blocks"] + 1, 0
            return layer(self, *args)

        def counted_tile(self: Any, *args: Any) -> Any:
            done["tiles"] += 1
            if done["blocks"] > blocks and done["tiles"] == 2:
                raise error
            return replayed(self, *args)

        monkeypatch.setattr(tiled_backward.Backward, "layer", counted_layer)
        monkeypatch.setattr(tiled_backward.Backward, "_replayed", counted_tile)

    return arrange


def test_interrupting_leaves_the_model_as_it_was(stop_after: Any) -> None:
    model = boot("gemma3", torch.float32)
    objective, before = clrp.logit_diff(model, 7, 11), state_of(model)
    stop_after(1, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        clrp.attribute(model, random_tokens(1, 30), objective, **TILED)
    assert state_of(model) == before


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("kind", ["nodes", "edges"])
def test_a_stopped_run_goes_on_with_the_same_bits(
    kind: str, blocks: int, stop_after: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = boot("gemma3", torch.float32)
    ids, objective = random_tokens(1, 30), clrp.logit_diff(model, 7, 11)

    def run(**more: Any) -> dict[str, Tensor]:
        if kind == "nodes":
            found: Any = clrp.attribute(model, ids, objective, **TILED, **more)
            return {name: getattr(found, name) for name in FIELDS[:3]}
        found = clrp.attribution_graph(model, ids, objective, mass=0.9, **TILED, **more)
        names = ("relevance", "weight", "source_pos", "target_pos", "source_site")
        return {name: getattr(found, name) for name in names} | {
            "kept": torch.tensor([found.history[0].mass_kept, found.history[0].mass_before])
        }

    wanted = run()
    with monkeypatch.context():
        stop_after(blocks, Stopped)
        with pytest.raises(Stopped):
            run(checkpoint_dir=tmp_path / "run")
    monkeypatch.undo()
    files = sorted(path.name for path in (tmp_path / "run").glob("*.safetensors"))
    assert files == [f"block_{i}.safetensors" for i in range(3 - blocks, 3)]
    runs = []
    layer = tiled_backward.Backward.layer
    monkeypatch.setattr(
        tiled_backward.Backward, "layer", lambda *args: (runs.append(args[1]), layer(*args))[1]
    )
    found = run(checkpoint_dir=tmp_path / "run")
    assert runs == list(range(2 - blocks, -1, -1))  # finished blocks are not run again
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_folder_belongs_to_one_question(tmp_path: Path) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 12)
    clrp.attribute(model, ids, clrp.logit_diff(model, 7, 11), **TILED, checkpoint_dir=tmp_path)
    with pytest.raises(FileFormatError, match="another run"):
        clrp.attribute(model, ids, clrp.logit_diff(model, 7, 12), **TILED, checkpoint_dir=tmp_path)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FileFormatError, match=r"mine\.txt"):
        clrp.attribute(model, ids, clrp.logit_diff(model, 7, 11), **TILED, checkpoint_dir=tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"


# ---------------------------------------------------------------- memory


def test_out_of_memory_halves_the_tile_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 40)
    objective, layer = clrp.logit_diff(model, 7, 11), tiled_backward.Backward.layer

    def full(self: Any, at: int, g: Tensor) -> Tensor:
        if at == 0 and max(stop - start for start, stop in self.forward.bounds) > 18:
            raise torch.OutOfMemoryError("full")
        return layer(self, at, g)

    plain = clrp.attribute(model, ids, objective, **PLAIN)
    monkeypatch.setattr(tiled_backward.Backward, "layer", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tiled = clrp.attribute(model, ids, objective, **{**TILED, "tile": 64})
    assert [str(w.message)[:25] for w in said] == ["The GPU ran out of memory"]
    assert tiled.memory == "tiled (tile 16)"
    assert_same(plain, tiled)


def test_auto_takes_tiles_where_the_plain_way_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = boot("qwen3", torch.float32), random_tokens(1, 40)
    objective = clrp.logit_diff(model, 7, 11)
    assert clrp.attribute(model, ids, objective).memory == "plain"
    need = memory.plain_bytes(model, 40)
    monkeypatch.setattr(memory, "free_bytes", lambda device: need // 2)  # noqa: ARG005
    found = clrp.attribute(model, ids, objective, progress=False)
    assert found.memory == "tiled (tile 16)"
    assert_same(clrp.attribute(model, ids, objective, **PLAIN), found)


# Its own way to choose keys, from a state beside them; no cache; the first GPT's lists.
@pytest.mark.parametrize("name", ["glm_moe_dsa", "bert", "openai_gpt"])
def test_what_cannot_run_in_tiles_runs_the_plain_way_or_says_so(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = zoo.boot(name, torch.float32), random_tokens(1, 12)
    objective = clrp.logit_diff(model, 7, 11)
    with pytest.raises(ModelStateError, match="This model cannot run in tiles: "):
        clrp.attribute(model, ids, objective, **TILED)
    with pytest.raises(ModelStateError, match="This model cannot run in tiles: "):
        clrp.attribution_graph(model, ids, objective, **TILED)
    # Where tiles would be taken, and the plain way turns out to fit.
    monkeypatch.setattr(explain_module, "choose", lambda *_, **__: memory.Choice(7, 1, 1000))
    assert clrp.attribute(model, ids, objective, progress=False).memory == "plain"


def test_what_has_no_cache_is_refused_with_the_memory_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = zoo.boot("bert", torch.float32)
    ids, objective = random_tokens(1, 12), clrp.logit_diff(model, 7, 11)
    with pytest.raises(ModelStateError, match=r"cannot run in tiles: .* memory='plain', which"):
        clrp.attribute(model, ids, objective, **TILED)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1024)  # noqa: ARG005
    need = memory.gib(memory.plain_bytes(model, 12))
    with pytest.raises(ModelStateError, match=f"needs about {need} the plain way, and 0 MiB"):
        clrp.attribute(model, ids, objective)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"memory": "little"}, "'auto', 'plain' or 'tiled'"),
        ({"memory": "tiled", "tile": 0}, "1 or more"),
        ({"memory": "tiled", "tile": True}, "1 or more"),
        ({"memory": "plain", "tile": 4}, "leave it out"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    model = boot("qwen3", torch.float32)
    with pytest.raises(ValueError, match=words):
        clrp.attribute(model, random_tokens(), clrp.logit_diff(model, 7, 11), **settings)


def test_masks_take_a_bit_a_number() -> None:
    mask = torch.full((1, 1, 70, 101), torch.finfo(torch.float32).min).triu(7)
    packed = tiles.Packed.of(mask)
    assert packed.bits.numel() == -(-70 * 101 // 8)
    assert torch.equal(packed.unpacked(), mask)
    assert packed.unpacked().dtype == mask.dtype
    many = torch.randn(70, 101)
    assert tiles.Packed.of(many) is many
    hidden = mask == 0
    assert torch.equal(tiles.Packed.of(hidden).unpacked(), hidden)
